"""Coefficients, derivatives and Grams of every topology, against formulas, scipy and integration."""

import pickle
import subprocess
import sys
from math import comb, pi

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.interpolate import BSpline as ScipyBSpline
from torch import Tensor

from weightops import testing
from weightops.manifolds import (
    Bezier,
    BSpline,
    Ellipse,
    Fourier,
    Line,
    Manifold,
    Product,
    Simplex,
    Torus,
)

SPLINES = [
    Line(),
    Bezier(2),
    Bezier(7),
    BSpline(4),
    BSpline(9),
    BSpline(3, 1),
    BSpline(7, 2),
    BSpline(5, 1, ring=True),
    BSpline(6, 2, ring=True),
    BSpline(4, 3, ring=True),
    BSpline(9, 4, ring=True),
]
CIRCLES = [Ellipse(), Fourier(4), Torus(1), Torus(1, additive=True)]
MANY = [
    Torus(),
    Torus(additive=True),
    Torus(3),
    Torus(3, additive=True),
    Simplex(2),
    Simplex(4),
    Product(Line(), Ellipse()),
    Product(Simplex(3), BSpline(4, 2, ring=True), Bezier(2)),
]
ALL = [*SPLINES, *CIRCLES, *MANY]


def contexts(manifold: Manifold, n: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return manifold.sample(n, generator=generator, dtype=torch.float64)


def midpoints(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def close(given: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(given, expected, **tolerance)


def of(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_values_by_hand() -> None:
    half = 0.5**0.5
    close(Line().coeffs(of(0, 0.25, 1)), torch.stack([of(1, 0.75, 0), of(0, 0.25, 1)], 1))
    close(Ellipse().coeffs(of(0.125)), of(1, half, half)[None])
    close(Fourier(2).coeffs(of(0.25)), of(1, 0, 1, -1, 0)[None])
    close(Bezier(2).coeffs(of(0.25)), of(9 / 16, 6 / 16, 1 / 16)[None])
    close(Simplex(3).coeffs(of(0.2, 0.3, 0.5)), of(0.2, 0.3, 0.5))
    # Constant, cos, sin of the first angle (45 degrees), times those of the second (90 degrees).
    torus = of(1, 0, 1, half, 0, half, half, 0, half)
    close(Torus().coeffs(of(0.125, 0.25)), torus)
    close(Torus(additive=True).coeffs(of(0.125, 0.25)), of(1, half, half, 0, 1))
    # Quadratic, knots 0 0 0 1/2 1 1 1: the two middle functions are half their peak here.
    close(BSpline(4, 2).coeffs(of(0.5)), of(0, 0.5, 0.5, 0)[None])
    close(BSpline(4, 1, ring=True).coeffs(of(-0.0625)), of(0.75, 0, 0, 0.25)[None])


def test_grams_by_hand() -> None:
    line = torch.tensor([[1 / 3, 1 / 6], [1 / 6, 1 / 3]], dtype=torch.float64)
    ellipse = of(1, 0.5, 0.5).diag()
    close(Line().gram, line)
    close(Line().inverse_gram, torch.tensor([[4.0, -2], [-2, 4]], dtype=torch.float64))
    close(Ellipse().gram, ellipse)
    close(Torus().gram, torch.kron(ellipse, ellipse))
    close(Torus(additive=True).gram, of(1, 0.5, 0.5, 0.5, 0.5).diag())
    close(Product(Line(), Ellipse()).gram, torch.kron(line, ellipse))
    quadratic = torch.tensor([[9.0, -9, 3], [-9, 21, -9], [3, -9, 9]], dtype=torch.float64)
    close(Bezier(2).inverse_gram, quadratic)
    # A cardinal cubic's products with its neighbours (de Boor), over 5,040 spans of 1/8.
    ring = BSpline(8, 3, ring=True).gram[0] * 8 * 5040
    close(ring, of(2416, 1191, 120, 1, 0, 1, 120, 1191))


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_gram_has_its_inverse_in_float64(manifold: Manifold) -> None:
    k = manifold.num_coeffs
    for matrix in (manifold.gram, manifold.inverse_gram):
        assert matrix.dtype == torch.float64
        assert matrix.shape == (k, k)
        close(matrix, matrix.mT)
    eye = torch.eye(k, dtype=torch.float64)
    close(manifold.gram @ manifold.inverse_gram, eye, rtol=0, atol=1e-11)


@pytest.mark.parametrize("manifold", [*SPLINES, *CIRCLES], ids=repr)
def test_gram_is_the_integral_over_a_curve(manifold: Manifold) -> None:
    phi = manifold.coeffs(midpoints(20_000))
    close(phi.mT @ phi / len(phi), manifold.gram, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "manifold",
    [Torus(), Torus(additive=True), Product(Ellipse(), Bezier(2)), Product(Line(), BSpline(5))],
    ids=repr,
)
def test_gram_is_the_integral_over_a_surface(manifold: Manifold) -> None:
    grid = torch.cartesian_prod(midpoints(300), midpoints(300))
    phi = manifold.coeffs(grid)
    close(phi.mT @ phi / len(phi), manifold.gram, rtol=0, atol=1e-5)


def test_gram_is_the_integral_over_a_triangle() -> None:
    def product(i: int, j: int) -> float:
        def at(y: float, x: float) -> float:
            phi = Simplex(3).coeffs(of(x, y, 1 - x - y))
            return (phi[i] * phi[j]).item()

        return 2 * dblquad(at, 0, 1, 0, lambda x: 1 - x, epsabs=1e-9)[0]

    found = torch.tensor([[product(0, 0), product(0, 1)], [product(1, 2), product(2, 2)]])
    close(found.double(), Simplex(3).gram[:2, :2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("degree", [1, 2, 3, 6, 20])
def test_bezier_is_bernsteins(degree: int) -> None:
    s = midpoints(9)[:, None]
    k = torch.arange(degree + 1)
    binomials = of(*(comb(degree, i) for i in range(degree + 1)))
    close(Bezier(degree).coeffs(s[:, 0]), binomials * s**k * (1 - s) ** (degree - k))
    gram = [
        [comb(degree, i) * comb(degree, j) / comb(2 * degree, i + j) for j in range(degree + 1)]
        for i in range(degree + 1)
    ]
    close(Bezier(degree).gram, torch.tensor(gram, dtype=torch.float64) / (2 * degree + 1))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("spans", [1, 2, 5])
def test_open_spline_is_scipys(degree: int, spans: int) -> None:
    k = spans + degree
    knots = np.concatenate([np.zeros(degree), np.linspace(0, 1, spans + 1), np.ones(degree)])
    s = np.linspace(0, 1, 41)
    manifold = BSpline(k, degree)
    expected = ScipyBSpline.design_matrix(s, knots, degree).toarray()
    close(manifold.coeffs(torch.from_numpy(s)), torch.from_numpy(expected))
    slopes = ScipyBSpline(knots, np.eye(k), degree).derivative()(s[1:-1])
    inside = torch.from_numpy(s[1:-1])
    close(manifold.derivative(inside), torch.from_numpy(slopes), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [5, 8])
def test_ring_is_a_spline_of_scipys_about_each_control_point(degree: int, k: int) -> None:
    s = np.linspace(0, 1, 37)
    bump = ScipyBSpline.basis_element(np.arange(degree + 2) - (degree + 1) / 2, extrapolate=False)
    turns = np.arange(-2, 3)[:, None, None] * k
    expected = np.nan_to_num(bump(s[:, None] * k - np.arange(k) + turns)).sum(0)
    close(BSpline(k, degree, ring=True).coeffs(torch.from_numpy(s)), torch.from_numpy(expected))


@pytest.mark.parametrize("manifold", [*SPLINES, Simplex(3)], ids=repr)
def test_coefficients_are_a_partition_of_unity(manifold: Manifold) -> None:
    phi = manifold.coeffs(contexts(manifold, 100))
    assert (phi >= 0).all()
    close(phi.sum(-1), torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("manifold", [m for m in SPLINES if not m.ring], ids=repr)
def test_open_curves_start_and_end_at_their_first_and_last_point(manifold: Manifold) -> None:
    eye = torch.eye(manifold.num_coeffs, dtype=torch.float64)
    assert torch.equal(manifold.coeffs(of(0, 1)), eye[[0, -1]])


@pytest.mark.parametrize(
    "manifold",
    [*CIRCLES, Torus(), Torus(3, additive=True), *(m for m in SPLINES if m.ring)],
    ids=repr,
)
def test_circles_have_period_one(manifold: Manifold) -> None:
    s = contexts(manifold)
    turns = torch.randint(-9, 9, s.shape, generator=torch.Generator().manual_seed(0))
    close(manifold.coeffs(s + turns), manifold.coeffs(s))
    close(manifold.derivative(s + turns), manifold.derivative(s), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("manifold", [Fourier(5), BSpline(6, ring=True)], ids=repr)
def test_a_far_context_loses_no_digits(manifold: Manifold) -> None:
    # Both are exact in float32, so that what differs is the computation.
    near, far = torch.tensor([0.15625]), torch.tensor([-40_960 + 0.15625])
    assert torch.equal(manifold.coeffs(far), manifold.coeffs(near))


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_derivative_is_the_limit_of_differences(manifold: Manifold) -> None:
    s, h = contexts(manifold), 1e-6
    expected = []
    for column in range(manifold.context_dims):
        step = torch.zeros(manifold.context_dims, dtype=torch.float64)
        step[column] = h
        # A simplex is left by a change of one weight, so it is the plain function that is looked at.
        rows = s[:, None] if manifold.context_dims == 1 else s
        difference = manifold._coeffs(rows + step) - manifold._coeffs(rows - step)
        expected.append(difference / (2 * h))
    given = manifold.derivative(s)
    given = given[..., None] if manifold.context_dims == 1 else given
    close(given, torch.stack(expected, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_derivative_is_autograds(manifold: Manifold) -> None:
    s = contexts(manifold)
    expected = torch.func.vmap(torch.func.jacrev(manifold.coeffs))(s)
    close(manifold.derivative(s), expected)


@pytest.mark.parametrize("manifold", [*SPLINES[:4], *SPLINES[7:9], *CIRCLES[:2], *MANY], ids=repr)
def test_gradients_of_any_order(manifold: Manifold) -> None:
    s = contexts(manifold, 2)
    testing.check_gradients(manifold._coeffs, s if manifold.context_dims > 1 else s[:, None])
    if manifold.context_dims == 1:
        testing.check_gradients(manifold.coeffs, s)
        if manifold.derivative(s.requires_grad_()).requires_grad:  # not that of straight pieces
            testing.check_gradients(manifold.derivative, s)


def by_hand(s: Tensor) -> Tensor:
    """A quadratic Bezier curve times an ellipse times the first context's line, contexts [..., 3]."""
    a, b, c = s.unbind(-1)
    bezier = torch.stack([(1 - a) ** 2, 2 * a * (1 - a), a**2], -1)
    ellipse = torch.stack([torch.ones_like(b), (2 * pi * b).cos(), (2 * pi * b).sin()], -1)
    line = torch.stack([1 - c, c], -1)
    return torch.einsum("...i,...j,...k->...ijk", bezier, ellipse, line).flatten(-3)


def ring_by_hand(s: Tensor) -> Tensor:
    """Linear splines about 0, 1/3 and 2/3."""
    k = torch.arange(3, dtype=s.dtype)
    distance = 3 * s[..., None] - k
    distance = distance - 3 * (distance / 3).round()
    return (1 - distance.abs()).relu()


CASES = {
    "product": (Product(Bezier(2), Ellipse(), Line()).coeffs, by_hand, (2, 3)),
    "ring": (BSpline(3, 1, ring=True).coeffs, ring_by_hand, (3,)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", testing.TRANSFORMS)
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_transforms(name: str, mode: str, case: str) -> None:
    op, reference, shape = CASES[case]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    testing.check_transform(name, mode, op, reference, x)


@pytest.mark.parametrize("case", CASES)
def test_inductor_and_autocast_change_nothing(case: str) -> None:
    op, reference, shape = CASES[case]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 2
    testing.check_transform("vjp", "inductor", op, reference, x)
    testing.check_autocast(op, x.float())


@pytest.mark.parametrize("case", CASES)
def test_one_compilation_for_all_sizes(case: str) -> None:
    op, reference, shape = CASES[case]
    inputs = [torch.rand(n, *shape[1:], dtype=torch.float64) / 2 for n in (4, 5, 8)]
    testing.check_compiled_training(op, reference, inputs)


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_shapes_follow_the_contexts(manifold: Manifold) -> None:
    k, d = manifold.num_coeffs, manifold.context_dims
    s = contexts(manifold, 6)
    row = s.shape[1:]
    for lead in ((6,), (2, 3), (1, 6, 1)):
        phi = manifold.coeffs(s.reshape(*lead, *row))
        assert phi.shape == (*lead, k)
        close(phi.reshape(6, k), manifold.coeffs(s))
    assert manifold.coeffs(s[0]).shape == (k,)
    assert manifold.coeffs(s[:0]).shape == (0, k)
    assert manifold.derivative(s).shape == ((6, k) if d == 1 else (6, k, d))


@pytest.mark.parametrize("manifold", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(manifold: Manifold, dtype: torch.dtype) -> None:
    s = contexts(manifold).to(dtype)
    wide = s.double() if manifold.context_dims > 1 else s.double()[:, None]
    for given, expected in (
        (manifold.coeffs(s), manifold._coeffs(wide)),
        (manifold.derivative(s), manifold._derivative(wide)),
    ):
        assert given.dtype == dtype
        expected = expected.reshape(given.shape)
        # Halves are rounded once, at the end.
        scale = expected.abs().max().item()
        limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (given.double() - expected).abs().max() <= limit * scale


def test_coefficients_are_not_the_callers_tensor() -> None:
    s = of(0.5, 0.5)
    Simplex(2).coeffs(s).zero_()
    assert torch.equal(s, of(0.5, 0.5))
    Simplex(2).derivative(s).zero_()
    Line().gram.zero_()
    close(Line().gram.diagonal(), of(1 / 3, 1 / 3))


def test_a_product_of_products_is_one_product() -> None:
    line, ellipse, bezier = Line(), Ellipse(), Bezier(2)
    nested = Product(Product(line, ellipse), bezier)
    assert nested == Product(line, Product(ellipse, bezier)) == Product(line, ellipse, bezier)
    assert Product(ellipse, ellipse) != Torus()
    s = contexts(Torus())
    close(Product(ellipse, ellipse).coeffs(s), Torus().coeffs(s))


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_manifolds_are_values(manifold: Manifold) -> None:
    again = pickle.loads(pickle.dumps(manifold))
    assert again == manifold == eval(repr(manifold))
    assert hash(again) == hash(manifold)
    assert sum(manifold == other for other in ALL) == 1
    s = contexts(manifold)
    close(again.coeffs(s), manifold.coeffs(s))


def test_values_that_cannot_be_looked_at_are_not() -> None:
    outside = torch.tensor([0.5, 1.5])
    assert torch.func.vmap(Line().coeffs)(outside).shape == (2, 2)
    assert Line().coeffs(outside.to("meta")).shape == (2, 2)
    compiled = torch.compile(Line().coeffs, backend="eager", fullgraph=True)
    close(compiled(outside), torch.tensor([[0.5, 0.5], [-0.5, 1.5]]))


def test_nothing_is_imported_that_takes_time() -> None:
    code = (
        "import sys, weightops\n"
        "assert 'weightops.manifolds' not in sys.modules and 'weightops.optim' not in sys.modules\n"
        "import weightops.optim, weightops.manifolds\n"
        "assert not any(name.startswith('scipy') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
