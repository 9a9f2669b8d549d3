"""The particles of a meta-training: inner networks, their optimizers' states, and the gradient that they give."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from weightops.learned._inner import Inner
from weightops.learned._rule import State, decays_of, step
from weightops.learned.functional import Functional

#: of the logarithms of alpha, beta and 1 - momentum, so that a deviation sigma is one of 10 sigma there
STRETCH = 10.0
_SLOWEST = 0.9999


@dataclass
class Particles:
    """n pairs; pair i is rows 2 i and 2 i + 1 of networks.

    Attributes:
        flat: ``[2n, P]``.
        momenta: ``[2n, R, P]``.
        step: steps made ``[n]``, int64.
        limit: steps after which a pair begins anew ``[n]``.
        drift: what a pair's parameters were shifted by since then, summed ``[n, E]``.
    """

    flat: Tensor
    momenta: Tensor
    step: Tensor
    limit: Tensor
    drift: Tensor

    @classmethod
    def fresh(cls, networks: Tensor, size: int, truncation: int, horizon: int) -> Particles:
        """Pairs of ``networks`` ``[n, P]``. First ends are spread over the horizon, so all times are seen at once."""
        pairs = len(networks)
        spans = -(-horizon // truncation)
        limit = ((torch.arange(pairs) + 1) * spans // pairs).clamp(min=1) * truncation
        flat = networks.repeat_interleave(2, 0)
        rows = len(decays_of(flat.new_zeros(1), flat)[0])
        return cls(
            flat,
            flat.new_zeros(2 * pairs, rows, flat.shape[1]),
            *(torch.zeros_like(limit).to(flat.device), limit.to(flat.device)),
            networks.new_zeros(pairs, size),
        )

    def shard(self, rank: int, world: int) -> Particles:
        """The pairs of one process of several."""
        pick = slice(rank * len(self.step) // world, (rank + 1) * len(self.step) // world)
        rows = slice(2 * pick.start, 2 * pick.stop)
        return Particles(
            *(self.flat[rows].clone(), self.momenta[rows].clone()),
            *(self.step[pick].clone(), self.limit[pick].clone(), self.drift[pick].clone()),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def begin_anew(self, networks: Tensor, horizon: int) -> None:
        """Put ``networks`` ``[n, P]`` in the place of pairs that are at their end."""
        over = self.step >= self.limit
        rows = over.repeat_interleave(2)
        self.flat = torch.where(rows[:, None], networks.repeat_interleave(2, 0), self.flat)
        self.momenta = self.momenta.masked_fill(rows[:, None, None], 0)
        self.drift = self.drift.masked_fill(over[:, None], 0)
        self.step = self.step.masked_fill(over, 0)
        self.limit = self.limit.masked_fill(over, horizon)

    def unroll(
        self,
        functional: Functional,
        inner: Inner,
        psi: Tensor,
        rows: Tensor,
        most: float,
        build: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Train by ``psi`` ``[2n, E]`` on ``rows`` ``[steps, n, B]``.

        Returns:
            The networks' mean losses ``[2n]``, each step's at most ``most``, differentiable by ``psi`` if ``build``; and how
            many were above that or not finite.
        """
        theta, alpha, beta, momentum = unpack(psi, self.flat.dtype)
        state = State(self.momenta.transpose(0, 1), self.step.repeat_interleave(2))
        flat = self.flat
        total = flat.new_zeros(len(flat))
        clipped = torch.zeros((), dtype=torch.int64, device=flat.device)
        for each in rows:
            taken = each.repeat_interleave(2, 0)
            if build:
                flat = flat if flat.requires_grad else flat.detach().requires_grad_()
                losses = inner.losses(flat, taken)
                (grads,) = torch.autograd.grad(losses.sum(), flat, create_graph=True)
            else:
                losses, grads = inner.loss_grad(flat, taken)
            bounded = losses.nan_to_num(most, most, most).clamp(max=most)
            clipped += (losses.detach() != bounded.detach()).sum()
            total = total + bounded
            numbers = {"alpha": alpha, "beta": beta, "momentum": momentum}
            flat, state = step(flat, grads, state, functional, theta=theta, **numbers)
        self.flat, self.momenta = flat.detach(), state.momenta.detach().transpose(0, 1).contiguous()
        self.step = self.step + len(rows)
        return total / len(rows), clipped


def unpack(psi: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """theta ``[..., D]``, alpha, beta and momentum ``[...]`` of ``psi`` ``[..., D + 3]``."""
    alpha, beta, rest = (psi[..., -3:] * STRETCH).exp().to(dtype).unbind(-1)
    return psi[..., :-3], alpha, beta, (1 - rest).clamp(0, _SLOWEST)
