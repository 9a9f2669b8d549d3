"""Many networks of one architecture at once: wrong predictions, and training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from weightops.population import population_forward, population_train


def errors(flat: Tensor, model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``[N, B]``."""
    return population_forward(flat, model, images, reduce="errors", targets=classes)


def accuracy(flat: Tensor, model: nn.Sequential, images: Tensor, classes: Tensor) -> Tensor:
    """``[N]``."""
    return population_forward(flat, model, images, reduce="accuracy", targets=classes)


def train(
    flat: Tensor,
    model: nn.Sequential,
    images: Tensor,
    classes: Tensor,
    tasks: Tensor,
    *,
    steps: Sequence[int],
    seed: int,
    batch: int = 64,
    rate: float = 3e-3,
) -> list[Tensor]:
    """Networks ``[N, P]`` after each of ``steps`` of Adam from ``flat``; 0 is the start.

    Network n learns ``images[tasks[n]]`` ``[B, C, H, W]`` of ``classes[tasks[n]]`` ``[B]``.
    """
    found = [flat.clone() for _ in steps]
    for task in tasks.unique().tolist():
        members = (tasks == task).nonzero()[:, 0]
        weights, state, done = flat[members], None, 0
        for after, step in zip(found, steps, strict=True):
            trained = population_train(
                *(weights, model, (images[task], classes[task])),
                steps=step - done,
                lr=rate,
                weight_decay=0.0,
                batch_size=batch,
                seed=[seed * len(flat) + n for n in members.tolist()],
                state=state,
                progress=False,
            )
            weights, state, done = trained.flat, trained.state, step
            after[members] = weights
    return found
