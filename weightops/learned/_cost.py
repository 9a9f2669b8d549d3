"""What a step of a learned optimizer takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepCost:
    """What a step of an optimizer takes.

    Attributes:
        seconds: of the whole step, the median of several.
        functional_seconds: of the functional in it, with its features.
        flops: of the functional.
    """

    seconds: float
    functional_seconds: float
    flops: int

    @property
    def share(self) -> float:
        """Of the functional in the step."""
        return self.functional_seconds / self.seconds


@torch.no_grad()
def measure(
    step: Callable[[Callable[[], None]], None],
    changed: list[Tensor],
    device: torch.device,
    repeats: int,
    flops: int,
) -> StepCost:
    """Make steps, and undo what they have ``changed``.

    ``step`` calls what it is given before and after the functional, unless it makes no step.
    """
    marks: list[float] = []

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(perf_counter())

    kept = [tensor.clone() for tensor in changed]
    times = []
    try:
        for _ in range(repeats):
            marks.clear()
            mark()
            step(mark)
            mark()
            if len(marks) != 4:
                raise ValueError("LearnedOptimizer.measure: a gradient is not finite")
            times.append((marks[3] - marks[0], marks[2] - marks[1]))
    finally:
        torch._foreach_copy_(changed, kept)
    whole, part = (median(each) for each in zip(*times, strict=True))
    return StepCost(whole, part, flops)
