"""The one way to declare an op: schema, reference, fake, derivatives and batching, once, in Python.

Compiled kernels only register faster implementations under their dispatch key, so an op exists, is
right and is differentiable with no compiled library at all.

Two holes in torch (2.10 to 2.14) shape the front door that :func:`define` returns:
an op with ``register_autograd`` raises under ``torch.func.grad`` and gives zero tangents under
``jvp`` (pytorch #168393, #170834, #179652), and ``torch.compile(torch.func.grad(f))`` gives zero
gradients for an ``autograd.Function`` over an opaque op. Hence: compiling inside a transform takes
the reference, eager inside a transform takes an ``autograd.Function``, and all else the raw op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "weightops"
_library = torch.library.Library(NAMESPACE, "DEF")
_transforms_active = torch._C._are_functorch_transforms_active

#: names of all ops declared, in order; ``python -m weightops.info`` lists their kernels
names: list[str] = []
#: (op, device type) -> what serves it, where that is written in Python
served: dict[tuple[str, str], str] = {}


def _declare(schema: str, kernel: Callable, fake: Callable) -> tuple[str, Callable]:
    name = schema.split("(", 1)[0]
    names.append(name)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return name, getattr(getattr(torch.ops, NAMESPACE), name).default


def _exactly(f: Callable) -> Callable:
    """``f`` in its arguments' own dtype: within an op autocast would reach the matrix products."""

    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return f(*args)
        with torch.autocast(device, enabled=False):
            return f(*args)

    return run


def _lengths(args: Sequence) -> tuple[int | None, ...]:
    """Per argument how many tensors it lists, ``None`` where it is no list of tensors."""
    return tuple(
        len(arg)
        if isinstance(arg, (list, tuple)) and all(isinstance(v, Tensor) for v in arg)
        else None
        for arg in args
    )


def _flat(values: Sequence, lengths: Sequence[int | None]) -> list:
    """Lists opened: a Function of autograd looks for tensors among its arguments only."""
    found: list = []
    for value, length in zip(values, lengths, strict=True):
        found.extend([value] if length is None else value or [None] * length)
    return found


def _nested(flat: Iterable, lengths: Sequence[int | None]) -> list:
    rest = iter(flat)
    return [next(rest) if n is None else list(islice(rest, n)) for n in lengths]


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    vmap: Callable,
    check: Callable | None = None,
    backward: Callable | None = None,
    jvp: Callable | None = None,
) -> Callable:
    """Declare ``weightops::name`` and return its front door, called with the schema's arguments.

    Args:
        schema: the op's schema, without namespace.
        reference: the definition in plain torch; differentiable and traceable.
        fake: the same on shapes alone.
        vmap: ``vmap(batch_size, in_dims, *args) -> (output, out_dims)``.
        check: ``check(*args)`` raises on values the reference would take silently; it stands in for
            the checks that a compiled kernel makes itself.
        backward: ``backward(args, needs, *grads) -> input gradients``; ``needs`` says per argument
            whether its gradient is wanted, and of several outputs' ``grads`` some may be ``None``.
            ``None``, with ``jvp``, where nothing is differentiable.
        jvp: ``jvp(args, *tangents) -> output tangent``; a tangent may be ``None``.

    Write ``backward`` and ``jvp`` with front doors, and higher derivatives need nothing more. What
    belongs to an argument that lists tensors (gradients, ``needs``, tangents, ``in_dims``) is a list too.
    """

    exactly = _exactly(reference)

    def kernel(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return exactly(*args)

    name, raw = _declare(schema, kernel, fake)

    if backward is None or jvp is None:
        # Nothing to differentiate, so functorch needs to know no more than how to batch.
        torch.library.register_vmap(
            f"{NAMESPACE}::{name}", lambda info, dims, *args: vmap(info.batch_size, dims, *args)
        )
        return raw

    def setup_context(ctx: Any, inputs: Sequence, output: Any) -> None:
        # Of several outputs some may not be used: None instead of zeros saves their share of the work.
        ctx.set_materialize_grads(not isinstance(output, tuple))
        ctx.lengths = _lengths(inputs)
        flat = _flat(inputs, ctx.lengths)
        ctx.tensors = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in flat]
        tensors = [flat[i] for i in ctx.tensors]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def saved_inputs(ctx: Any) -> list:
        flat = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            flat[i] = tensor
        return _nested(flat, ctx.lengths)

    differentiate, push = backward, jvp

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return differentiate(saved_inputs(ctx), ctx.needs_input_grad, *grads)

    def run_flat_backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = _nested(ctx.needs_input_grad[1:], ctx.lengths)
        return None, *_flat(differentiate(saved_inputs(ctx), needs, *grads), ctx.lengths)

    def run_jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return push(saved_inputs(ctx), *_nested(tangents[1:], ctx.lengths))

    def run_vmap(info: Any, dims: Sequence, lengths: Sequence, *flat: Any) -> Any:
        return vmap(info.batch_size, _nested(dims[1:], lengths), *_nested(flat, lengths))

    # Where somebody goes round the front door this is a tripwire: an error instead of a zero.
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", run_backward, setup_context=setup_context
    )

    transformed: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda lengths, *flat: raw(*_nested(flat, lengths))),
            "setup_context": staticmethod(
                lambda ctx, inputs, output: setup_context(
                    ctx, _nested(inputs[1:], inputs[0]), output
                )
            ),
            "backward": staticmethod(run_flat_backward),
            "jvp": staticmethod(run_jvp),
            "vmap": staticmethod(run_vmap),
        },
    )

    def front_door(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return exactly(*args) if _transforms_active() else raw(*args)
        if _transforms_active() or forward_ad._current_level >= 0:
            lengths = _lengths(args)
            return transformed.apply(lengths, *_flat(args, lengths))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return raw(*args)
        # The autograd key of a Python-declared op is a Python function that would cost 7 us.
        with torch._C._AutoDispatchBelowAutograd():
            return raw(*args)

    front_door.__name__ = name
    front_door.raw = raw  # type: ignore[attr-defined]
    front_door.reference = reference  # type: ignore[attr-defined]
    return front_door


def define_into(schema: str, *, of: Callable) -> Callable:
    """Declare the variant of an op that writes into its last argument, ``Tensor(a!) out``."""

    def kernel(*args: Any) -> None:
        *inputs, out = args
        out.copy_(of.raw(*inputs))  # type: ignore[attr-defined]

    return _declare(schema, kernel, lambda *args: None)[1]


def serve(name: str, device_type: str, kernel: Callable, by: str) -> None:
    """Let ``kernel`` serve an op on a device; as a compiled kernel, it makes the checks itself."""
    _library.impl(name, _exactly(kernel), device_type.upper())
    served[name, device_type] = by


def moved_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``tensor`` with its vmapped axis first; an unbatched one is repeated as a view."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def lane_by_lane(op: Callable[[], Callable]) -> Callable:
    """A ``vmap`` for :func:`define` that calls the op, which ``op`` returns, once for each lane."""

    def run(size: int, dims: Sequence, *args: Any) -> tuple[Any, Any]:
        lanes = [
            op()(
                *(
                    arg.select(dim, lane) if isinstance(arg, Tensor) and dim is not None else arg
                    for arg, dim in zip(args, dims, strict=True)
                )
            )
            for lane in range(size)
        ]
        if isinstance(lanes[0], Tensor):
            return torch.stack(lanes), 0
        outputs = tuple(torch.stack(each) for each in zip(*lanes, strict=True))
        return outputs, (0,) * len(outputs)

    return run


def push(f: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """``f``'s tangent by reverse mode twice: forward mode can't be nested in an op's ``jvp``."""
    made, pull = torch.func.vjp(f, *primals)[:2]

    def along(cotangent: Tensor) -> Tensor:
        pairs = zip(pull(cotangent), tangents, strict=False)
        return sum((grad * tangent).sum() for grad, tangent in pairs if tangent is not None)

    return torch.func.grad(along)(torch.zeros_like(made))


def _float32_precision() -> str:
    return torch.get_float32_matmul_precision()


# Dynamo does not trace torch's function, and the decorator that says this imports Dynamo, for a second. Dynamo
# guards on "highest" against the rest; between "high" and "medium" what was compiled stays as it was.
_float32_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def matmul_precision(dtype: torch.dtype) -> str:
    """What torch is set to for products of float32, and ``"highest"`` for those of other dtypes."""
    return _float32_precision() if dtype == torch.float32 else "highest"
