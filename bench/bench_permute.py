"""permute_axes, permute and merge against what users have today."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import weightops
from weightops import testing
from weightops.testing import (
    Networks,
    PermuteAxes,
    matrices_spec,
    mlp_spec,
    resnet20_spec,
    vgg16_spec,
)

AXES = [
    PermuteAxes((64, 128, 128)),
    PermuteAxes((8, 512, 512)),
    PermuteAxes((8, 2048, 2048)),
    PermuteAxes((64, 512, 512)),
    PermuteAxes((8, 512, 512, 3, 3)),
]
WHOLE = [
    Networks("vgg16", vgg16_spec()),
    Networks("vgg16", vgg16_spec(), 8),
    Networks("resnet20", resnet20_spec()),
    Networks("resnet20", resnet20_spec(), 64),
    Networks("mlp-10-tensors", mlp_spec(32, 64, 48, 32, 32, 10)),
]
MERGED = [Networks("8x2048x2048", matrices_spec(8, 2048), 8), Networks("vgg16", vgg16_spec(), 8)]

Arguments = tuple[Tensor, list, Tensor]


def _column_index(q: Tensor, x: Tensor) -> Tensor:
    return q.view(q.shape[0], 1, q.shape[1], *[1] * (x.dim() - 3))


def _row_index(p: Tensor, x: Tensor) -> Tensor:
    return p.view(*p.shape, *[1] * (x.dim() - 2))


def advanced_indexing(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None, None], p[:, :, None], q[:, None, :]]


def index_select_twice(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return torch.stack(
        [each.index_select(0, i).index_select(1, j) for each, i, j in zip(x, p, q, strict=True)]
    )


def take_along_dim(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return x.take_along_dim(_row_index(p, x), 1).take_along_dim(_column_index(q, x), 2)


def numpy_take(x: Tensor, p: Tensor, q: Tensor) -> np.ndarray:
    a, i, j = x.numpy(), p.numpy(), q.numpy()
    return np.stack([each.take(r, 0).take(c, 1) for each, r, c in zip(a, i, j, strict=True)])


def compiled_indexing() -> Callable:
    torch._dynamo.reset()
    return torch.compile(advanced_indexing)


def weightops_out(x: Tensor, perms: list, out: Tensor) -> Tensor:
    return weightops.permute_axes(x, perms, out=out)


PEERS = {
    "index_select-twice": lambda: index_select_twice,
    "advanced-indexing": lambda: advanced_indexing,
    "take_along_dim": lambda: take_along_dim,
    "numpy-take": lambda: numpy_take,
    "torch.compile": compiled_indexing,
}


OURS = ("weightops", "weightops-new-output", "weightops-streamed-copy")


@pytest.mark.parametrize("implementation", [*OURS, "copy_", *PEERS])
@pytest.mark.parametrize("problem", AXES, ids=str)
def test_permute_axes(
    problem: PermuteAxes, implementation: str, measure, benchmark, device
) -> None:
    benchmark.group = f"permute_axes {problem}"
    x, perms = problem.make(device)
    p, q = perms[:2]
    out = torch.empty_like(x)
    if implementation == "weightops":
        measure(lambda: weightops.permute_axes(x, perms, out=out), problem.bytes)
    elif implementation == "weightops-new-output":
        measure(lambda: weightops.permute_axes(x, perms), problem.bytes)
    elif implementation == "weightops-streamed-copy":
        # Nothing permuted: the same bytes past the cache, which no permutation can beat.
        nothing = [None] * (x.dim() - 1)
        measure(lambda: weightops.permute_axes(x, nothing, out=out), problem.bytes)
    elif implementation == "copy_":
        measure(lambda: out.copy_(x), problem.bytes)
    else:
        if implementation == "numpy-take" and device != "cpu":
            pytest.skip("numpy has no GPU")
        f = PEERS[implementation]()
        given = torch.as_tensor(f(x, p, q))
        torch.testing.assert_close(given, weightops.permute_axes(x, perms), rtol=0, atol=0)
        measure(lambda: f(x, p, q), problem.bytes)


def select_tensor_by_tensor(flat: Tensor, perms: dict[str, Tensor], spec) -> Tensor:
    rows = []
    for n, row in enumerate(flat):
        pieces = []
        for name, weight in spec.unflatten(row).items():
            for axis, label in enumerate(spec.axes[name]):
                if label is not None:
                    weight = weight.index_select(axis, perms[label][n])
            pieces.append(weight.flatten())
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["weightops", "clone", "index_select"])
@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_permute(problem: Networks, implementation: str, measure, benchmark, device) -> None:
    benchmark.group = f"permute {problem}"
    flat, perms = problem.make(device)
    spec = problem.spec
    expected = select_tensor_by_tensor(flat, perms, spec)
    torch.testing.assert_close(weightops.permute(flat, perms, spec), expected, rtol=0, atol=0)
    del expected
    f = {
        "weightops": lambda: weightops.permute(flat, perms, spec),
        "clone": flat.clone,
        "index_select": lambda: select_tensor_by_tensor(flat, perms, spec),
    }[implementation]
    measure(f, problem.bytes)


@pytest.mark.parametrize("implementation", ["weightops", "permute-then-matmul", "index_select"])
@pytest.mark.parametrize("problem", MERGED, ids=str)
def test_merge(problem: Networks, implementation: str, measure, benchmark, device) -> None:
    benchmark.group = f"merge {problem}"
    flat, perms = problem.make(device)
    spec = problem.spec
    weights = torch.full((problem.count,), 1 / problem.count, device=device)
    out = torch.empty(spec.numel, device=device)

    def selected() -> Tensor:
        total = torch.zeros(spec.numel, device=device)
        for n in range(problem.count):
            one = {label: index[n : n + 1] for label, index in perms.items()}
            total += weights[n] * select_tensor_by_tensor(flat[n : n + 1], one, spec)[0]
        return total

    f = {
        "weightops": lambda: weightops.merge(flat, weights, spec, perms=perms, out=out),
        "permute-then-matmul": lambda: weights @ weightops.permute(flat, perms, spec),
        "index_select": selected,
    }[implementation]
    torch.testing.assert_close(f(), selected())
    measure(f, problem.merge_bytes)


@pytest.mark.parametrize("implementation", ["read", "write"])
@pytest.mark.parametrize("problem", MERGED, ids=str)
def test_merge_floor(problem: Networks, implementation: str, measure, benchmark, device) -> None:
    """Reading every network and writing one, each as fast as torch can: the floor of a merge."""
    benchmark.group = f"merge {problem}"
    flat, _ = problem.make(device)
    out = torch.empty(problem.spec.numel, device=device)
    f = {"read": lambda: torch.amax(flat), "write": lambda: out.fill_(1.0)}[implementation]
    measure(f)


def test_call_overhead(measure, benchmark, device) -> None:
    """permute of a network of 10 tensors and 10,000 weights, beside copying it."""
    benchmark.group = "permute call"
    problem = WHOLE[-1]
    flat, perms = problem.make(device)
    out = torch.empty_like(flat)
    benchmark.extra_info["copy_us"] = 1e6 * testing.best_time(lambda: out.copy_(flat), 0.2)
    measure(lambda: weightops.permute(flat, perms, problem.spec))
