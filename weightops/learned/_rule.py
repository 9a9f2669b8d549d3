"""The update of a learned optimizer, for populations; what carries over from step to step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.learned._features import DECAYS, FEATURES, TIMES, time_features
from weightops.learned.functional import Functional
from weightops.ops.equivariant.plan import code_of
from weightops.ops.functional import features, functional_update
from weightops.ops.functional import functional as in_one_call

Number = float | Tensor
_MOST = sys.float_info.max


@dataclass(frozen=True)
class State:
    """What a learned optimizer keeps of N networks.

    Attributes:
        momenta: ``[R, N, P]``: the six that the functional sees, then m where its decay is none of theirs.
        step: steps made, one number or a tensor ``[N]``.
    """

    momenta: Tensor
    step: int | Tensor


def decays_of(momentum: Number, like: Tensor) -> tuple[Tensor, int]:
    """Decays of all momenta, ``[R, 1, 1]`` or ``[R, N, 1]``, and which of them is m's."""
    if not isinstance(momentum, Tensor):
        own = () if momentum in DECAYS else (momentum,)
        decays = like.new_tensor([*DECAYS, *own])[:, None, None]
        return decays, [*DECAYS, *own].index(momentum)
    seen = like.new_tensor(DECAYS)[:, None, None].expand(-1, len(momentum), 1)
    return torch.cat([seen, momentum[None, :, None]]), len(DECAYS)


def start(flat: Tensor, momentum: Number = 0.9) -> State:
    """The state before the first step of networks ``[N, P]``: momenta of zero.

    Raises:
        ValueError: a shape does not fit, or ``momentum``, a number or ``[N]``, is out of range.
        TypeError: an argument has the wrong type or dtype.
    """
    _check_networks("start", "flat", flat)
    check_number("start", "momentum", momentum, flat)
    return State(flat.new_zeros(len(decays_of(momentum, flat)[0]), *flat.shape), 0)


def propose(
    flat: Tensor, grads: Tensor, momenta: Tensor, step: int | Tensor, functional: Functional,
    theta: Tensor | None = None, *, shares: Tensor | None = None,
    mark: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """f ``[N, P]`` in ``flat``'s dtype, of momenta that have the gradient in them already.

    If they have not, ``shares`` ``[R, 1 or N]`` are what it is given in each of them, in place. ``mark`` is called before
    and after f, features with it.
    """
    own = functional.flatten() if theta is None else theta
    time = time_features(step, own)
    sizes = [prod(shape) for shape in functional.spec.shapes.values()]
    tensors = flat, grads, momenta[: len(DECAYS)]
    mark()
    if _is_one_call(functional, theta, *tensors, own):
        rows = [each if each.dim() > 1 else each[None] for each in (time, own)]
        widths = [FEATURES + TIMES, *[functional.hidden] * (len(functional._plans) - 1), 1]
        rest = *rows, sizes, widths, code_of(functional._plans[-1]), functional.eps
        if shares is None:
            f = in_one_call(*tensors, *rest)
        else:
            f = functional_update(momenta, flat, grads, shares, *rest)
    else:
        if shares is not None:
            momenta.lerp_(grads, shares[..., None])
        x = features(*tensors, sizes, functional.eps).to(own.dtype)
        f = functional(x, time, theta).to(flat.dtype)
    mark()
    return f


def _is_one_call(functional: Functional, theta: Tensor | None, *tensors: Tensor) -> bool:
    """Whether features and layers are one operation: not for gradients, for which features are kept.

    On GPUs the layers have kernels of their own.
    """
    flat, own = tensors[0], tensors[-1]
    layers = len(functional._plans)
    fits = layers > 1 and (
        functional.kind == "deep_sets" or (functional.kind == "unf" and functional.equivariant == 1)
    )
    leaves = (*tensors, *(functional.parameters() if theta is None else ()))
    plain = not (torch.is_grad_enabled() and any(each.requires_grad for each in leaves))
    here = flat.device.type == "cpu" and own.dtype == flat.dtype
    return fits and plain and here and not _op._transforms_active()


def step(
    flat: Tensor,
    grads: Tensor,
    state: State,
    functional: Functional,
    *,
    alpha: Number,
    beta: Number,
    momentum: Number = 0.9,
    theta: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One step of N networks at once: ``W <- W - alpha (m + beta f)`` (arXiv 2402.05232).

    ``m <- momentum m + (1 - momentum) gradient``; f is the functional's answer to weights, gradients, momenta and time.
    Nothing is changed in place, and gradients flow to everything given. A network whose gradient is not finite
    stays as it is, with its momenta; its step is counted.

    Args:
        flat: networks ``[N, P]``, laid out by the functional's spec.
        grads: their losses' gradients ``[N, P]``.
        state: from :func:`start` or from the step before, with the same kind of ``momentum``.
        functional: f.
        alpha, beta, momentum: numbers, or one per network, ``[N]``.
        theta: parameters of f in the place of its own: ``[D]``, or each network's, ``[N, D]``.

    Returns:
        The networks, and the state to go on from.

    Raises:
        ValueError: shapes or devices do not fit, or a number is out of range.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "step"
    if not isinstance(functional, Functional):
        raise TypeError(
            f"{where}: functional must be a Functional, not {_check.describe(functional)}"
        )
    for name, value in (("flat", flat), ("grads", grads)):
        _check_networks(where, name, value)
        functional.spec.check_flat(where, value, name)
    _check_like(where, "grads", grads, flat)
    for name, number in (("alpha", alpha), ("beta", beta), ("momentum", momentum)):
        check_number(where, name, number, flat)
    decays, own = decays_of(momentum, flat)
    _check_state(where, state, [len(decays), *flat.shape])
    functional._check_theta(where, theta, len(flat))
    finite = all_finite(grads.detach())
    sane = bool(finite.all())
    used = grads if sane else grads.where(finite, grads.new_zeros(()))
    momenta = used.lerp(state.momenta, decays)
    f = propose(flat, used, momenta, state.step, functional, theta)
    moved = flat - _column(alpha) * (momenta[own] + _column(beta) * f)
    if not sane:
        moved = moved.where(finite, flat)
        momenta = momenta.where(finite, state.momenta)
    return moved, State(momenta, state.step + 1)


def all_finite(rows: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, ``[N, 1]``."""
    # A sum is not finite where a number is not: one fast pass, and a slow one where sums overflow.
    finite = rows.sum(1, keepdim=True).isfinite()
    return finite if bool(finite.all()) else rows.isfinite().all(1, keepdim=True)


def check_number(where: str, name: str, value: Any, flat: Tensor | None = None) -> None:
    """``alpha``, ``beta`` or ``momentum``: a number, or one for each network of ``flat``."""
    if flat is not None and isinstance(value, Tensor):
        _check.tensor(where, name, value, "[N]", 1)
        _check_like(where, name, value, flat)
        return
    low = {"beta": -_MOST}.get(name, 0.0)
    _check.number(where, name, value, low, 1.0 if name == "momentum" else _MOST)


def _check_state(where: str, state: Any, momenta: list[int]) -> None:
    if not isinstance(state, State):
        raise TypeError(f"{where}: state must be a State, not {_check.describe(state)}")
    _check.tensor(where, "state.momenta", state.momenta, "[R, N, P]")
    if list(state.momenta.shape) != momenta:
        raise ValueError(
            f"{where}: state must have momenta {momenta}, not {list(state.momenta.shape)}"
        )
    if isinstance(state.step, Tensor):
        _check.tensor(where, "state.step", state.step, "[N]", 1)
        _check.size(where, "state.step", len(state.step), momenta[1], "flat's axis 0")
    else:
        _check.count(where, "state.step", state.step, 0)


def _check_networks(where: str, name: str, value: Any) -> None:
    _check.tensor(where, name, value, "[N, P]", 2)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: {name} must be float32 or float64, not {value.dtype}")


def _check_like(where: str, name: str, value: Tensor, flat: Tensor) -> None:
    _check.size(where, name, len(value), len(flat), "flat's axis 0")
    if value.dtype != flat.dtype:
        raise TypeError(f"{where}: {name} is {value.dtype}, but flat is {flat.dtype}")
    _check.same_device(where, name, value, "flat", flat)


def _column(value: Number) -> Number:
    return value[:, None] if isinstance(value, Tensor) else value
