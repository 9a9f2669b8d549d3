"""The raw ops of the manifold family: schemas, shapes, derivatives, batching.

A layer on a manifold is a trilinear form S(x, c, W) . grad in its input, coefficients, bases and cotangent.
``manifold_contract`` is its gradient by the last, ``manifold_contract_backward`` by the others, so all higher
derivatives are these two again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.ops.manifold import reference

Geometry = Sequence[int]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"manifold: {what}")


def _check_contract(
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Geometry,
    precision: str,
) -> None:
    dims = 4 if geometry else 3
    _require(x.dim() == dims, f"x must have {dims} axes, not shape {list(x.shape)}")
    _require(weight.dim() == dims + bool(geometry), f"weight has shape {list(weight.shape)}")
    _require(coeffs.dim() == 2, f"coeffs must be [G, K], not {list(coeffs.shape)}")
    _require(coeffs.shape[1] == weight.shape[0], "coeffs and weight differ in their bases")
    _require(len(geometry) in (0, 7), f"geometry must have 0 or 7 entries, not {list(geometry)}")
    inputs, groups = (x.shape[1], geometry[6]) if geometry else (x.shape[2], 1)
    _require(inputs == weight.shape[2] * groups, "x and weight differ in their inputs")
    _require(weight.shape[1] % groups == 0, f"{groups} groups for {weight.shape[1]} outputs")
    if index is None:
        _require(coeffs.shape[0] in (1, x.shape[0]), f"{coeffs.shape[0]} contexts for {x.shape[0]}")
    else:
        _require(index.shape == x.shape[:1], "index must have an entry for each item of x")
        fault = _check.index_fault(index, coeffs.shape[0])
        _require(fault is None, f"index{fault}")
    if shift is not None:
        expected = [coeffs.shape[0], weight.shape[1]]
        _require(list(shift.shape) == expected, f"shift must be {expected}")


def _check_backward(
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    *needs: Any,
) -> None:
    _check_contract(x, coeffs, index, weight, None, geometry, needs[-1])
    expected = _result_shape(x, weight, geometry)
    _require(list(grad.shape) == expected, f"grad must be {expected}, not {list(grad.shape)}")


def _result_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    if not geometry:
        return [x.shape[0], x.shape[1], weight.shape[1]]
    sizes = [
        (x.shape[2 + d] + 2 * geometry[2 + d] - geometry[4 + d] * (weight.shape[3 + d] - 1) - 1)
        // geometry[d]
        + 1
        for d in range(2)
    ]
    return [x.shape[0], weight.shape[1], *sizes]


def _contract_fake(
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Geometry,
    precision: str,
) -> Tensor:
    return x.new_empty(_result_shape(x, weight, geometry))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    need_x: bool,
    need_coeffs: bool,
    need_weight: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        coeffs.new_empty(coeffs.shape if need_coeffs else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _sum(*values: Tensor | None) -> Tensor | None:
    held = [value for value in values if value is not None]
    return sum(held[1:], held[0]) if held else None


def _contract_backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    x, coeffs, index, weight, shift, geometry, precision = args
    to_x = to_coeffs = to_weight = to_shift = None
    if needs[0] or needs[1] or needs[3]:
        wanted = (bool(needs[0]), bool(needs[1]), bool(needs[3]))
        to_x, to_coeffs, to_weight = _backward(
            grad, x, coeffs, index, weight, geometry, *wanted, precision
        )
    if shift is not None and needs[4]:
        of_items = grad.sum((2, 3) if geometry else 1, dtype=shift.dtype)
        to_shift = reference.to_contexts(of_items, index, shift.shape[0])
    return (
        to_x if needs[0] else None,
        to_coeffs if needs[1] else None,
        None,
        to_weight if needs[3] else None,
        to_shift,
        None,
        None,
    )


def _contract_jvp(
    args: Sequence,
    x: Tensor | None,
    coeffs: Tensor | None,
    _index: None,
    weight: Tensor | None,
    shift: Tensor | None,
    *_: Any,
) -> Tensor | None:
    at_x, at_coeffs, index, at_weight, _shift, geometry, precision = args
    pushed: list[Tensor | None] = []
    for tangents in ((x, None, None), (None, coeffs, None), (None, None, weight)):
        if any(each is not None for each in tangents):
            at = (at_x, at_coeffs, at_weight)
            u, c, w = (a if t is None else t for a, t in zip(at, tangents, strict=True))
            # The first of them takes the shift along.
            pushed.append(_contract(u, c, index, w, shift, geometry, precision))
            shift = None
    if shift is not None:
        added = reference.of_items(shift, index, at_x.shape[0]).to(at_x.dtype)
        shape = _result_shape(at_x, at_weight, geometry)
        pushed.append((added[:, :, None, None] if geometry else added[:, None]).expand(shape))
    return _sum(*pushed)


def _fold(
    size: int,
    dims: Sequence[int | None],
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Items [V, N, ...] as [V * N, ...] and their contexts; ``own`` gives each lane contexts of its own."""
    in_x, in_coeffs, in_index, in_shift = dims
    x, by_lane = _op.moved_front(x, in_x, size), _op.moved_front(coeffs, in_coeffs, size)
    items, contexts = x.shape[1], by_lane.shape[1]
    if index is not None:
        index = _op.moved_front(index, in_index, size)
    elif contexts != 1 and not own:
        index = torch.arange(items, device=x.device).expand(size, items)
    elif contexts == 1 and own and items != 1:
        index = torch.zeros(1, items, dtype=torch.int64, device=x.device).expand(size, items)
    if own:
        coeffs = by_lane.flatten(0, 1)
        if shift is not None:
            shift = _op.moved_front(shift, in_shift, size).flatten(0, 1)
        if index is not None:
            index = index + contexts * torch.arange(size, device=x.device)[:, None]
    return x.flatten(0, 1), coeffs, None if index is None else index.flatten(), shift


def _lane(value: Any, dim: int | None, lane: int) -> Any:
    return value if dim is None else value.select(dim, lane)


def _contract_vmap(
    size: int,
    dims: Sequence,
    x: Tensor,
    coeffs: Tensor,
    index: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Geometry,
    precision: str,
) -> tuple:
    tensors = (x, coeffs, index, weight, shift)
    if dims[3] is not None:
        lanes = [
            _contract(*(_lane(v, d, n) for v, d in zip(tensors, dims)), geometry, precision)
            for n in range(size)
        ]
        return torch.stack(lanes), 0
    own = dims[1] is not None or dims[4] is not None
    at = (dims[0], dims[1], dims[2], dims[4])
    x, coeffs, index, shift = _fold(size, at, x, coeffs, index, shift, own)
    y = _contract(x, coeffs, index, weight, shift, geometry, precision)
    return y.unflatten(0, (size, y.shape[0] // size)), 0


_contract: Callable = _op.define(
    "manifold_contract(Tensor x, Tensor coeffs, Tensor? index, Tensor weight, Tensor? shift,"
    " int[] geometry, str precision) -> Tensor",
    reference=reference.contract,
    fake=_contract_fake,
    check=_check_contract,
    vmap=_contract_vmap,
    backward=_contract_backward,
    jvp=_contract_jvp,
)


def _each_slot(args: Sequence, values: Sequence[Tensor | None], needs: Sequence[bool]) -> list:
    """Gradients by x, coeffs and weight (where ``needs`` says so) of the form with x, coeffs and weight
    in turn replaced by ``values``; what is replaced has no gradient."""
    grad, x, coeffs, index, weight, geometry, *_, precision = args
    found: list[list[Tensor]] = [[], [], []]
    for slot, value in enumerate(values):
        wanted = [bool(need) and other != slot for other, need in enumerate(needs)]
        if value is None or not any(wanted):
            continue
        at = [x, coeffs, weight]
        at[slot] = value
        given = _backward(grad, at[0], at[1], index, at[2], geometry, *wanted, precision)
        for each, need, gradient in zip(found, wanted, given, strict=True):
            if need:
                each.append(gradient)
    return [_sum(*each) for each in found]


def _backward_backward(args: Sequence, needs: Sequence[bool], *tangents: Tensor | None) -> tuple:
    _grad, x, coeffs, index, weight, geometry, *wanted, precision = args
    held = [t if want else None for t, want in zip(tangents, wanted, strict=True)]
    to_x, to_coeffs, to_weight = _each_slot(args, held, (needs[1], needs[2], needs[4]))
    to_grad = None
    if needs[0]:
        at_x, at_coeffs, at_weight = held
        at = (x, coeffs, index, weight, None, geometry, precision)
        to_grad = _contract_jvp(at, at_x, at_coeffs, None, at_weight, None)
    return to_grad, to_x, to_coeffs, None, to_weight, *[None] * 5


def _backward_jvp(
    args: Sequence,
    grad: Tensor | None,
    x: Tensor | None,
    coeffs: Tensor | None,
    _index: None,
    weight: Tensor | None,
    *_: Any,
) -> tuple:
    wanted = args[6:9]
    pushed = _each_slot(args, (x, coeffs, weight), wanted)
    if grad is not None:
        given = _backward(grad, *args[1:])
        pushed = [_sum(*each) for each in zip(pushed, given, strict=True)]
    # Of several outputs each must have a tangent, also the empty ones.
    slots = zip(pushed, wanted, (args[1], args[2], args[4]), strict=True)
    return tuple(
        at.new_zeros(at.shape if want else (0,)) if each is None else each
        for each, want, at in slots
    )


def _backward_vmap(size: int, dims: Sequence, *args: Any) -> tuple:
    grad, x, coeffs, index, weight, geometry, *wanted, precision = args
    if wanted[2] or dims[4] is not None:
        # Gradients by weight are summed over a call's items, so every lane is a call.
        lanes = [
            _backward(*(_lane(v, d, n) for v, d in zip(args[:5], dims)), *args[5:])
            for n in range(size)
        ]
        parts = zip(*lanes, strict=True)
        given = [torch.stack(p) if w else p[0] for p, w in zip(parts, wanted, strict=True)]
    else:
        own = wanted[1] or dims[2] is not None
        grad = _op.moved_front(grad, dims[0], size).flatten(0, 1)
        at = (dims[1], dims[2], dims[3], None)
        x, coeffs, index, _shift = _fold(size, at, x, coeffs, index, None, own)
        folded = _backward(grad, x, coeffs, index, weight, geometry, *wanted, precision)
        given = [
            g.unflatten(0, (size, g.shape[0] // size)) if w else g
            for g, w in zip(folded, wanted, strict=True)
        ]
    return tuple(given), tuple(0 if w else None for w in wanted)


_backward: Callable = _op.define(
    "manifold_contract_backward(Tensor grad, Tensor x, Tensor coeffs, Tensor? index, Tensor weight,"
    " int[] geometry, bool need_x, bool need_coeffs, bool need_weight, str precision)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.contract_backward,
    fake=_backward_fake,
    check=_check_backward,
    vmap=_backward_vmap,
    backward=_backward_backward,
    jvp=_backward_jvp,
)


def _check_synthesize(coeffs: Tensor, bases: Tensor) -> None:
    _require(coeffs.dim() == 2 and bases.dim() == 2, "coeffs and bases must have two axes")
    _require(coeffs.shape[1] == bases.shape[0], "coeffs and bases differ in their bases")


# A backward pass may run under autocast too.
_product = _op._exactly(torch.matmul)


def _synthesize_backward(args: Sequence, needs: Sequence[bool], grad: Tensor) -> tuple:
    coeffs, bases = args
    to_coeffs = to_bases = None
    if needs[0]:
        to_coeffs = _product(grad.to(coeffs.dtype), bases.to(coeffs.dtype).mT)
    if needs[1]:
        to_bases = _synthesize(coeffs.mT, grad)
    return to_coeffs, to_bases


def _synthesize_jvp(args: Sequence, coeffs: Tensor | None, bases: Tensor | None) -> Any:
    return _sum(
        None if coeffs is None else _synthesize(coeffs, args[1]),
        None if bases is None else _synthesize(args[0], bases),
    )


def _synthesize_vmap(size: int, dims: Sequence, coeffs: Tensor, bases: Tensor) -> tuple:
    if dims[1] is None:
        folded = _synthesize(_op.moved_front(coeffs, dims[0], size).flatten(0, 1), bases)
        return folded.unflatten(0, (size, folded.shape[0] // size)), 0
    lanes = [_synthesize(_lane(coeffs, dims[0], n), _lane(bases, dims[1], n)) for n in range(size)]
    return torch.stack(lanes), 0


_synthesize: Callable = _op.define(
    "synthesize(Tensor coeffs, Tensor bases) -> Tensor",
    reference=reference.synthesize,
    fake=lambda coeffs, bases: bases.new_empty(coeffs.shape[0], bases.shape[1]),
    check=_check_synthesize,
    vmap=_synthesize_vmap,
    backward=_synthesize_backward,
    jvp=_synthesize_jvp,
)
_synthesize_into = _op.define_into(
    "synthesize_into(Tensor coeffs, Tensor bases, Tensor(a!) out) -> ()", of=_synthesize
)


def _check_update(bases: Tensor, grad: Tensor, coeffs: Tensor, step: Tensor) -> None:
    _check_synthesize(coeffs, bases)
    _require(grad.shape == (coeffs.shape[0], bases.shape[1]), "grad does not fit coeffs and bases")
    _require(step.shape == coeffs.shape, "step must have the shape of coeffs")


def _update_vmap(*_: Any) -> tuple:
    raise RuntimeError("manifold: synthesize_update works in place and takes no batched tensors")


_update: Callable = _op.define(
    "synthesize_update(Tensor(a!) bases, Tensor grad, Tensor coeffs, Tensor step) -> Tensor",
    reference=reference.synthesize_update,
    fake=lambda bases, grad, coeffs, step: coeffs.new_empty(coeffs.shape),
    check=_check_update,
    vmap=_update_vmap,
)


def _check_into(coeffs: Tensor, bases: Tensor, out: Tensor) -> None:
    _check_synthesize(coeffs, bases)
    _require(out.shape == (coeffs.shape[0], bases.shape[1]), "out does not fit coeffs and bases")


def _serve_in_triton(op: str, check: Callable, module: str, launcher: str, by: str) -> None:
    """Serve CUDA by a launcher whose module is imported when it is first called: Triton takes a second."""

    def kernel(*args: Any) -> Any:
        check(*args)
        launchers = importlib.import_module(f"weightops.ops.manifold.{module}")
        return getattr(launchers, launcher)(*args)

    _op.serve(op, "cuda", kernel, by)


if torch.version.cuda and importlib.util.find_spec("triton"):
    _by = "Triton; torch, if one context is for all or channels are convolved one by one"
    _serve_in_triton("manifold_contract", _check_contract, "triton", "contract", _by)
    _serve_in_triton(
        "manifold_contract_backward", _check_backward, "triton", "contract_backward", _by
    )
    _by = "Triton; torch, if bases and contexts are many"
    for _name, _check_of in (
        ("synthesize", _check_synthesize),
        ("synthesize_into", _check_into),
        ("synthesize_update", _check_update),
    ):
        _serve_in_triton(_name, _check_of, "triton_synthesize", _name, _by)
