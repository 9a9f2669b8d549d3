"""The Gram of contexts that are drawn from an unknown measure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightops import _check


class GramEstimate:
    """A running mean of ``phi phi^T`` over observed coefficients, ``[K, K]`` in float64.

    Each batch's mean enters with weight ``1 - decay``, those before it fade by ``decay``, and the sum is
    divided by all weights given so far, so that the first batches count in full.
    """

    def __init__(self, num_coeffs: int, decay: float, damping: float) -> None:
        self.num_coeffs, self.decay, self.damping = num_coeffs, decay, damping
        self.moment = torch.zeros(num_coeffs, num_coeffs, dtype=torch.float64)
        self.weight = 0.0
        self.observed = 0

    def observe(self, where: str, coeffs: Tensor) -> None:
        k = self.num_coeffs
        _check.tensor(where, "coeffs", coeffs, f"[..., {k}]")
        _check.floating(where, "coeffs", coeffs)
        if coeffs.dim() == 0 or coeffs.shape[-1] != k:
            raise ValueError(
                f"{where}: coeffs must have shape [..., {k}], not {list(coeffs.shape)}"
            )
        rows = coeffs.detach().reshape(-1, k).double()
        if len(rows) == 0:
            return
        fresh = (1 - self.decay) * (rows.mT @ rows) / len(rows)
        self.moment = self.decay * self.moment.to(rows.device) + fresh
        self.weight = self.decay * self.weight + (1 - self.decay)
        self.observed += len(rows)

    def inverse(self, where: str) -> Tensor:
        """``[K, K]`` on the CPU, of the mean plus ``damping`` times its mean diagonal entry.

        Raises:
            ValueError: that is singular, or nothing was observed.
        """
        if self.observed == 0:
            raise ValueError(
                f"{where}: no contexts were observed, so there is no Gram to invert; call "
                "observe(coeffs) with the contexts drawn before step()"
            )
        gram = (self.moment / self.weight).cpu()
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        if not gram.isfinite().all():
            raise ValueError(f"{where}: coefficients were observed that are not finite")
        values, vectors = torch.linalg.eigh(gram)
        if values[0] <= values[-1] * self.num_coeffs * torch.finfo(gram.dtype).eps:
            raise ValueError(
                f"{where}: the Gram estimated from {self.observed} contexts is singular, its "
                f"eigenvalues are {values[0]:.1e} to {values[-1]:.1e}; observe more different contexts "
                f"than K = {self.num_coeffs}, or set damping"
            )
        return (vectors / values) @ vectors.mT

    def state_dict(self) -> dict[str, Any]:
        return {"moment": self.moment.clone(), "weight": self.weight, "observed": self.observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moment = state["moment"].clone()
        self.weight, self.observed = state["weight"], state["observed"]
