"""token_pair_linear against a linear layer of concatenated embeddings."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import weightops
from weightops import testing
from weightops.ops import token_pair
from weightops.ops.token_pair import reference

GENERATOR = torch.Generator().manual_seed(0)


def problem(m: int, p: int, d: int, h: int, b: int, dtype: torch.dtype = torch.float64) -> list:
    return list(testing.TokenPairs(m, p, d, h, b, dtype).make())


def loop(pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack(
        [
            F.linear(e[p].flatten(1), w, c)
            for p, e, w, c in zip(pairs, embedding, weight, bias, strict=True)
        ]
    )


@pytest.mark.parametrize("b", [0, 1, 50])
@pytest.mark.parametrize("p", [1, 3, 12])
def test_values_and_gradients_are_those_of_concatenated_embeddings(p: int, b: int) -> None:
    pairs, *parts = problem(3, p, 4, 5, b)
    ours, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    made, expected = weightops.token_pair_linear(pairs, *ours), loop(pairs, *theirs)
    torch.testing.assert_close(made, expected, rtol=1e-13, atol=1e-13)
    made.sin().sum().backward()
    expected.sin().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_one_network_and_shared_pairs_are_those_of_many() -> None:
    pairs, *parts = problem(3, 7, 4, 5, 20)
    shared = weightops.token_pair_linear(pairs[0].int(), *parts)
    torch.testing.assert_close(
        shared, weightops.token_pair_linear(pairs[:1].expand(3, -1, -1), *parts)
    )
    for m in range(3):
        alone = weightops.token_pair_linear(pairs[0], *(part[m] for part in parts))
        torch.testing.assert_close(alone, shared[m])
    no_bias = weightops.token_pair_linear(pairs, *parts[:2])
    torch.testing.assert_close(no_bias, loop(pairs, *parts[:2], torch.zeros_like(parts[2])))


@pytest.mark.parametrize("networks", [1, 3, 4])
def test_sums_are_the_same_to_the_bit_with_any_number_of_threads(networks: int) -> None:
    pairs = problem(networks, 59, 16, 24, 3000)[0]
    values = torch.randn(networks, 3000, 100, generator=GENERATOR)
    sums, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            sums.append(token_pair.token_pair_sum(values, pairs, 59))
    finally:
        torch.set_num_threads(threads)
    assert sums[0].equal(sums[1])
    assert sums[0].equal(sums[2])
    for n in range(networks):
        alone = token_pair.token_pair_sum(values[n : n + 1], pairs[n : n + 1], 59)
        assert alone.equal(sums[0][n : n + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 300])
@pytest.mark.parametrize(("networks", "count"), [(3, 17), (5, 2784)])
def test_kernels_are_the_definition(
    networks: int, count: int, width: int, dtype: torch.dtype
) -> None:
    pairs = problem(networks, 59, 1, 1, count)[0]
    tables = torch.randn(networks, 2, 59, width, generator=GENERATOR, dtype=dtype)
    values = torch.randn(networks, width, count, generator=GENERATOR, dtype=dtype).mT
    for of in (pairs, pairs[:1], pairs[:1].expand(networks, -1, -1)):
        assert token_pair.token_pair_add(tables, of).equal(reference.add(tables, of))
        expected = reference.sum(values, of, 59)
        torch.testing.assert_close(token_pair.token_pair_sum(values, of, 59), expected)


@pytest.mark.parametrize("networks", [1, 3])
def test_sums_for_gpus_are_those_of_the_definition(networks: int) -> None:
    pairs = problem(networks, 7, 1, 1, 40)[0]
    values = torch.randn(3, 40, 5, generator=GENERATOR, dtype=torch.float64)
    expected = reference.sum(values, pairs, 9)
    torch.testing.assert_close(reference.sorted_sum(values, pairs, 9), expected)


def test_a_network_that_is_not_finite_leaves_the_others_alone() -> None:
    pairs, *parts = problem(2, 5, 3, 4, 10)
    expected = weightops.token_pair_linear(pairs, *parts)[1]
    parts[0][0] = torch.inf
    torch.testing.assert_close(weightops.token_pair_linear(pairs, *parts)[1], expected)


def test_autocast_keeps_float32() -> None:
    pairs, *parts = problem(2, 5, 3, 4, 10, torch.float32)
    testing.check_autocast(lambda e: weightops.token_pair_linear(pairs, e, *parts[1:]), parts[0])


def test_dynamic_batch_compiles_once() -> None:
    embedding = problem(2, 5, 4, 3, 1)[1]
    pairs = torch.tensor([[0, 1], [2, 4]])
    testing.check_compiled_training(
        lambda w: weightops.token_pair_linear(pairs, embedding, w, w[..., 0]),
        lambda w: loop(pairs.expand(2, -1, -1), embedding, w, w[..., 0]),
        [torch.randn(2, h, 8, generator=GENERATOR, dtype=torch.float64) for h in (3, 5, 6)],
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("pairs", [0, 1, 4])
def test_opcheck(pairs: int, requires_grad: bool) -> None:
    of = torch.randint(5, (1, pairs, 2), generator=GENERATOR)
    for each in (of, of.expand(2, -1, -1)):
        tables, values = torch.randn(2, 2, 5, 3), torch.randn(2, pairs, 3)
        testing.check_op(token_pair.token_pair_add, tables.requires_grad_(requires_grad), each)
        testing.check_op(token_pair.token_pair_sum, values.requires_grad_(requires_grad), each, 5)


def test_the_ops_themselves_refuse_tokens_out_of_range() -> None:
    for token in (-1, 5):
        pairs = torch.tensor([[[0, token]]])
        with pytest.raises(RuntimeError, match=rf"pairs\[0, 0, 1\] is {token}, outside 0..4"):
            token_pair.token_pair_add(torch.zeros(2, 2, 5, 3), pairs)
        with pytest.raises(RuntimeError, match=r"outside 0..4"):
            token_pair.token_pair_sum(torch.zeros(2, 1, 3), pairs, 5)


def test_meta_tensors_pass() -> None:
    pairs, *parts = (each.to("meta") for each in problem(2, 5, 3, 4, 10))
    assert weightops.token_pair_linear(pairs, *parts).shape == (2, 10, 4)
