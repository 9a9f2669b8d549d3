"""Checks that any op can be put through: transforms, derivatives, compilation, equivariance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, func

from weightops.spec import WeightSpec

Function = Callable[[Tensor], Tensor]


def _total(f: Function, power: int) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).pow(power).sum()


#: name -> ``make(f)``: a function of x that uses ``f``, under transforms of torch.func
TRANSFORMS: dict[str, Callable[[Function], Callable[[Tensor], Any]]] = {
    "none": lambda f: lambda x: f(2 * x),
    "grad": lambda f: func.grad(_total(f, 2)),
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](f(x).detach())[0],
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (3 * x,))[1],
    "jacrev": lambda f: func.jacrev(lambda x: f(x).pow(3)),
    "jacfwd": lambda f: func.jacfwd(lambda x: f(x).pow(3)),
    "hessian": lambda f: func.hessian(_total(f, 3)),
    "jacrev(jacrev)": lambda f: func.jacrev(func.jacrev(_total(f, 3))),
    "vmap": lambda f: lambda x: func.vmap(f)(_stack(x)),
    "vmap(vmap)": lambda f: lambda x: func.vmap(func.vmap(f))(_stack(_stack(x))),
    "vmap(grad)": lambda f: lambda x: func.vmap(func.grad(_total(f, 2)))(_stack(x)),
    "vmap(jvp)": lambda f: lambda x: func.vmap(lambda y: func.jvp(f, (y,), (y * y,))[1])(_stack(x)),
    "grad(vmap)": lambda f: lambda x: func.grad(_total(func.vmap(f), 2))(_stack(x)),
    "jvp(grad)": lambda f: lambda x: func.jvp(func.grad(_total(f, 3)), (x,), (3 * x,))[1],
    "vmap(in_dims=-1)": lambda f: lambda x: func.vmap(f, in_dims=-1)(_stack(x).movedim(0, -1)),
}

#: how a transformed function is run
MODES = ("eager", "aot_eager", "inductor")


def _stack(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1])


@contextmanager
def _torch_warnings() -> Iterator[None]:
    """Torch's compiler warns about itself; an op under test is to raise or to be right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_transform(name: str, mode: str, op: Function, reference: Function, x: Tensor) -> None:
    """Assert that ``op`` and ``reference`` agree under one of :data:`TRANSFORMS`, run in one mode.

    Args:
        name: a key of :data:`TRANSFORMS`.
        mode: one of :data:`MODES`: eager, or ``torch.compile(fullgraph=True)`` with that backend.
        op: the op as a function of one tensor, differentiable in it.
        reference: the same in plain torch.
        x: float64 input.
    """
    make = TRANSFORMS[name]
    expected = make(reference)(x)
    f = make(op)
    with _torch_warnings():
        if mode != "eager":
            torch._dynamo.reset()
            f = torch.compile(f, backend=mode, fullgraph=True)
        given = f(x)
    torch.testing.assert_close(given, expected)


def check_gradients(op: Function, x: Tensor) -> None:
    """First and second derivatives against finite differences, forward mode and batched too."""
    x = x.detach().double().requires_grad_()
    with _torch_warnings():
        torch.autograd.gradcheck(
            op,
            (x,),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        torch.autograd.gradgradcheck(op, (x,))


def check_op(op: Callable, *args: Any) -> None:
    """``torch.library.opcheck`` of an op that ``_op.define`` returned, on one set of arguments."""
    with _torch_warnings():
        torch.library.opcheck(op.raw if hasattr(op, "raw") else op, args)  # type: ignore[arg-type]


def check_compiled_training(op: Function, reference: Function, inputs: Sequence[Tensor]) -> None:
    """``torch.compile`` with dynamic shapes: values and gradients right, one compilation for all."""
    torch._dynamo.reset()
    compilations = 0

    def counting_backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(
        lambda x: op(2 * x).sin(), backend=counting_backend, fullgraph=True, dynamic=True
    )
    with _torch_warnings():
        for x in inputs:
            ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
            out, expected = compiled(ours), reference(2 * theirs).sin()
            torch.testing.assert_close(out, expected)
            out.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert compilations == 1, f"compiled {compilations} times for {len(inputs)} sizes"


def check_export(op: Function, x: Tensor, name: str) -> None:
    """``torch.export`` keeps ``weightops::name`` as one node, and the program gives the same."""

    class Exported(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    with _torch_warnings():
        program = torch.export.export(Exported(), (x,))
        assert f"weightops.{name}" in str(program.graph), program.graph
        torch.testing.assert_close(program.module()(x), op(x))


def check_autocast(op: Function, x: Tensor) -> None:
    """Autocast neither changes the dtype nor the values of an op on weights."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        given = op(x)
    torch.testing.assert_close(given, op(x), rtol=0, atol=0)


def assert_equivariant(
    f: Callable[[Tensor], Tensor], flat: Tensor, spec: WeightSpec, *, trials: int = 3, seed: int = 0
) -> None:
    """Assert ``f(P w) = P f(w)`` for random permutations P of the spec's labels.

    Args:
        f: maps networks ``[N, P]`` to networks ``[N, P]``.
        flat: networks ``[N, P]``, floating point.

    Raises:
        AssertionError: naming the first tensor that differs.
        ValueError: the spec has no label longer than one, so there is nothing to prove.
    """
    from weightops.ops.permute import permute

    if not any(size > 1 for size in spec.labels.values()):
        raise ValueError(
            "assert_equivariant: the spec has no permutable axis, so this proves nothing"
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        perms = spec.random_permutations(flat.shape[0], generator)
        perms = {label: index.to(flat.device) for label, index in perms.items()}
        given = spec.unflatten(f(permute(flat, perms, spec)))
        expected = spec.unflatten(permute(f(flat), perms, spec))
        for name in spec.shapes:
            try:
                torch.testing.assert_close(given[name], expected[name])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
