"""Which point of a manifold layers are at, where their caller does not say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from weightops import _check, _op
from weightops.manifolds.manifold import Manifold


class Place:
    """Contexts, or coefficients in their stead, and which of them the entries of a batch have."""

    def __init__(
        self, where: str, context: Tensor | None, coeffs: Tensor | None, index: Tensor | None
    ) -> None:
        if (context is None) == (coeffs is None):
            given = "neither is" if context is None else "both are"
            raise ValueError(f"{where}: takes a context or coeffs, but {given} given")
        name, value = ("context", context) if coeffs is None else ("coeffs", coeffs)
        _check.tensor(where, name, value, "[...]")
        self.context, self.coeffs, self.index = context, coeffs, index
        self._found: dict[tuple, Tensor] = {}

    def coeffs_on(self, manifold: Manifold | None) -> Tensor:
        """The coefficients; where there is no manifold, the context itself."""
        if self.coeffs is not None:
            return self.coeffs
        context = self.context
        assert context is not None
        if manifold is None:
            return context
        if (
            torch.compiler.is_compiling()  # which merges what is computed twice
            or _op._transforms_active()
            or context.requires_grad  # a graph can be walked once, and belongs to its grad mode
            or context.is_inference()  # has no version
        ):
            return manifold.coeffs(context)
        key = (manifold, context._version, torch.is_inference_mode_enabled())
        if key not in self._found:
            self._found[key] = manifold.coeffs(context)
        return self._found[key]


_current: ContextVar[Place | None] = ContextVar("weightops.manifolds.at", default=None)


class _Thread(threading.local):
    current: Place | None = None


# Dynamo traces this, and no ContextVar; asyncio's tasks are told apart by the ContextVar only.
_thread = _Thread()


@contextmanager
def at(
    context: Tensor | None = None, *, coeffs: Tensor | None = None, index: Tensor | None = None
) -> Iterator[None]:
    """Within it, layers on a manifold that are given no context have this one.

    Coefficients are computed once, not once a layer, unless ``context`` requires a gradient: then give its
    ``coeffs`` where they are to be shared. An inner ``at`` replaces an outer one; threads, and in eager mode
    asyncio's tasks, have their own. Where a forward pass runs again in the backward pass, as with
    activation checkpointing, the backward pass must run within it too.

    Args:
        context: for each entry of the batch ``[B]``; with ``index`` ``[G]``; or one for all, ``[]``. Where a
            manifold's contexts have several numbers these are the last axis. Layers with a number of bases
            instead of a manifold take it as their coefficients.
        coeffs: coefficients ``[B, K]``, ``[G, K]`` with ``index`` or ``[K]``, instead of a context.
        index: ``[B]``, int64 or int32: entry b of a batch has context ``index[b]``.

    Raises:
        ValueError: neither or both of ``context`` and ``coeffs`` are given. Layers check the rest.
        TypeError: one is no tensor.
    """
    place = Place("at", context, coeffs, index)
    if torch.compiler.is_compiling():
        before = _thread.current
        _thread.current = place
        try:
            yield
        finally:
            _thread.current = before
        return
    token = _current.set(place)
    _thread.current = place
    try:
        yield
    finally:
        _current.reset(token)
        _thread.current = _current.get()


def current(where: str) -> Place:
    """The innermost ``at`` around."""
    place = _thread.current if torch.compiler.is_compiling() else _current.get()
    if place is None:
        raise ValueError(
            f"{where}: needs a context; give context= or coeffs=, or call it within "
            "weightops.manifolds.at(context)"
        )
    return place
