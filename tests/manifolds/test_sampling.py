"""Contexts are drawn evenly, stratified where asked, and few at a time for the grouped ops."""

import pytest
import torch
from scipy.stats import beta, kstest
from torch import Tensor

from weightops.manifolds import BSpline, Ellipse, Line, Manifold, Product, Simplex, Torus

MANIFOLDS = [Line(), Ellipse(), BSpline(6), Torus(), Simplex(4), Product(Line(), Simplex(3))]
UNIFORM = [Line(), Ellipse(), Torus(3), Product(Line(), Torus())]


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_shape_dtype_and_domain(
    manifold: Manifold, stratified: bool, n: int, generator: torch.Generator
) -> None:
    for dtype in (None, torch.float64, torch.bfloat16):
        drawn = manifold.sample(n, stratified=stratified, generator=generator, dtype=dtype)
        d = manifold.context_dims
        assert drawn.shape == ((n,) if d == 1 else (n, d))
        assert drawn.dtype == (dtype or torch.float32)
        assert manifold.coeffs(drawn).shape == (n, manifold.num_coeffs)  # within the domain


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
@pytest.mark.parametrize("stratified", [False, True])
def test_a_generator_decides(manifold: Manifold, stratified: bool) -> None:
    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        few = manifold.sample_few(9, 4, stratified=stratified, generator=generator)
        return manifold.sample(5, stratified=stratified, generator=generator), *few

    assert all(map(torch.equal, draw(0), draw(0)))
    assert not any(map(torch.equal, draw(0), draw(1)))


@pytest.mark.parametrize("manifold", UNIFORM, ids=repr)
@pytest.mark.parametrize("stratified", [False, True])
def test_numbers_are_uniform(
    manifold: Manifold, stratified: bool, generator: torch.Generator
) -> None:
    drawn = manifold.sample(2000, stratified=stratified, generator=generator).reshape(2000, -1)
    for column in drawn.T.numpy():
        assert kstest(column, "uniform").pvalue > 0.01


@pytest.mark.parametrize("stratified", [False, True])
def test_a_simplex_is_filled_evenly(stratified: bool, generator: torch.Generator) -> None:
    drawn = Simplex(4).sample(2000, stratified=stratified, generator=generator, dtype=torch.float64)
    for column in drawn.T.numpy():
        assert kstest(column, beta(1, 3).cdf).pvalue > 0.01
    # Marginals do not tell how corners go together; second moments do.
    gram = drawn.mT @ drawn / len(drawn)
    torch.testing.assert_close(gram, Simplex(4).gram, rtol=0, atol=0.005)


@pytest.mark.parametrize("manifold", UNIFORM, ids=repr)
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_a_context_from_each_part(manifold: Manifold, n: int, generator: torch.Generator) -> None:
    drawn = manifold.sample(n, stratified=True, generator=generator, dtype=torch.float64)
    drawn = drawn.reshape(n, -1)
    for column in drawn.T:
        assert torch.equal((column * n).floor().long().sort().values, torch.arange(n))
    if n == 1000:  # parts in random order, and independently so
        rho = torch.corrcoef(torch.cat([drawn.T, torch.arange(n, dtype=torch.float64)[None]]))
        assert rho.fill_diagonal_(0).abs().max() < 0.12


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
def test_strata_steady_the_mean(manifold: Manifold, generator: torch.Generator) -> None:
    def spread(stratified: bool) -> Tensor:
        means = [
            manifold.coeffs(manifold.sample(16, stratified=stratified, generator=generator)).mean(0)
            for _ in range(100)
        ]
        return torch.stack(means).var(0).sum()

    assert spread(True) < 0.7 * spread(False)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("manifold", [Ellipse(), Torus()], ids=repr)
def test_few_contexts_serve_a_batch(
    manifold: Manifold, stratified: bool, generator: torch.Generator
) -> None:
    contexts, index = manifold.sample_few(22, 5, stratified=stratified, generator=generator)
    assert contexts.shape == ((5,) if manifold.context_dims == 1 else (5, 2))
    assert index.dtype == torch.int64
    assert index.bincount(minlength=5).tolist() == [5, 5, 4, 4, 4]
    assert not torch.equal(index, index.sort().values)
    if stratified:
        parts = (contexts.reshape(5, -1) * 5).floor().sort(0).values
        assert torch.equal(parts, torch.arange(5.0)[:, None].expand_as(parts))


def test_few_contexts_for_less_rows_or_none() -> None:
    contexts, index = Line().sample_few(2, 5)
    assert contexts.shape == (5,)
    assert sorted(index.tolist()) == [0, 1]
    contexts, index = Line().sample_few(0, 3)
    assert contexts.shape == (3,)
    assert index.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
def test_on_a_gpu(manifold: Manifold) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    contexts, index = manifold.sample_few(9, 4, stratified=True, generator=generator)
    assert contexts.is_cuda
    assert index.is_cuda
    expected = manifold.coeffs(contexts.cpu())
    torch.testing.assert_close(manifold.coeffs(contexts).cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = manifold.coeffs(contexts)
    graph.replay()
    torch.testing.assert_close(captured.cpu(), expected)
