"""What a learned optimizer sees of every weight, beside what it sees of the time."""

from __future__ import annotations

import torch
from torch import Tensor

#: of the momenta, and time scales in steps (as in the paper's code, which has them of ``learned_optimization``)
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
#: weight, gradient and momenta of one weight; and what all weights share
FEATURES, TIMES = 2 + len(DECAYS), len(TIMESCALES)


def time_features(step: int | Tensor, like: Tensor) -> Tensor:
    """``tanh(step / scale - 1)`` for all time scales: ``[11]``, or ``[N, 11]`` of steps ``[N]``."""
    scales = torch.tensor(TIMESCALES, dtype=like.dtype, device=like.device)
    at = torch.as_tensor(step, dtype=like.dtype, device=like.device)
    return (at[..., None] / scales - 1).tanh()
