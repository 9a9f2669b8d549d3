"""The methods compared, how each is trained, and its scores in every context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from manifold.models import Alone, Concatenated, FiLM, on_manifold, parameters, widest
from manifold.tasks import Denoising, Noise, Rotation, RotationAndHue, Task, digits
from weightops.manifolds import Ellipse, Lifted, Line, Manifold, Product, Torus
from weightops.optim import ManifoldDescent

BATCH = 256
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "AdamW": partial(torch.optim.AdamW, fused=True),
}


@dataclass(frozen=True)
class Method:
    """How a network learns of its context, and how it is trained.

    Attributes:
        build: a network for a task and a width.
        optimizer: one of ``OPTIMIZERS``.
        rate: the learning rate at first, chosen for accuracy in distribution.
        descent: the weights' manifold, where ``ManifoldDescent`` is around the optimizer.
        like: a method with as many parameters, for a network that is wider than the task's.
    """

    name: str
    build: Callable[[Task, int], nn.Module]
    optimizer: str = "SGD"
    rate: float = 0.1
    descent: Manifold | None = None
    like: Method | None = None

    def width(self, task: Task) -> int:
        if self.like is None:
            return task.width
        return widest(partial(self.build, task), self.like.parameters(task))

    def parameters(self, task: Task) -> int:
        return parameters(self.build(task, self.width(task)))


def on(
    name: str,
    manifold: Manifold,
    optimizer: str = "SGD",
    rate: float = 0.1,
    *,
    descent: bool = True,
) -> Method:
    trained = f"ManifoldDescent({optimizer})" if descent else optimizer
    build = partial(on_manifold, manifold=manifold)
    return Method(f"{name}, {trained}", build, optimizer, rate, manifold if descent else None)


def classifiers(first: Method, *others: Method, rate: float = 0.1) -> list[Method]:
    """Methods on manifolds and, at ``rate``, those they are compared to, some with as many parameters."""
    return [
        first,
        *others,
        Method("concatenation", Concatenated, rate=rate),
        Method("concatenation, equal parameters", Concatenated, rate=rate, like=first),
        Method("FiLM", FiLM, rate=rate),
        Method("FiLM, equal parameters", FiLM, rate=rate, like=first),
        Method("no context", Alone, rate=rate),
    ]


ON_CIRCLE = classifiers(
    on("ellipse", Ellipse()),
    on("ellipse", Ellipse(), descent=False),
    on("line (wrong topology)", Line()),
)
ON_LINE = classifiers(
    on("line", Line()),
    on("line", Line(), descent=False),
    on("ellipse (wrong topology)", Ellipse()),
)
ON_TORUS = classifiers(
    on("torus", Torus()),
    on("torus", Torus(), descent=False),
    on("additive torus", Torus(additive=True)),
    on("square (wrong topology)", Product(Line(), Line())),
    rate=0.3,
)
SPLINE = on("B-spline", Denoising.manifold, "AdamW", 0.01, descent=False)
TIME = partial(FiLM, scales=False)
DENOISERS = [
    SPLINE,
    on("B-spline", Denoising.manifold, "AdamW", 0.03),
    on("line", Line(), "AdamW", 0.01, descent=False),
    on("ellipse (wrong topology)", Ellipse(), "AdamW", 0.01, descent=False),
    Method("time embedding", TIME, "AdamW", 0.01),
    Method("time embedding, equal parameters", TIME, "AdamW", 0.01, like=SPLINE),
    Method("time embedding with scales, equal parameters", FiLM, "AdamW", 0.01, like=SPLINE),
    Method("no noise level", Alone, "AdamW", 0.01),
]
COMPARISONS: list[tuple[Task, list[Method]]] = [
    (Rotation(), ON_CIRCLE),
    (Rotation(arc=(0.25, 0.4)), ON_CIRCLE),
    (Noise(), ON_LINE),
    (RotationAndHue(), ON_TORUS),
    (Denoising(), DENOISERS),
]


def train(task: Task, methods: list[Method], seed: int, steps: int) -> list[nn.Module]:
    """A network of each method, side by side on the same images in the same contexts."""
    networks = []
    for method in methods:
        torch.manual_seed(seed)
        model = method.build(task, method.width(task))
        optimizer = OPTIMIZERS[method.optimizer](model.parameters(), lr=method.rate)
        if method.descent is not None:
            optimizer = ManifoldDescent(optimizer, method.descent, model.bases())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        networks.append((model, optimizer, schedule))
    data, generator = digits(task.size), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(data.train), (BATCH,), generator=generator)
        context = task.sample(BATCH, generator)
        x, target = task.examples(data.train[batch], data.train_classes[batch], context, generator)
        for model, optimizer, schedule in networks:
            loss = task.loss(model(x, context=context), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [model for model, *_ in networks]


@torch.no_grad()
def scores(task: Task, models: list[nn.Module]) -> list[list[float]]:
    """Of each on the same test images in every context of the task's grid."""
    data, generator = digits(task.size), torch.Generator().manual_seed(0)
    images, classes = data.test.repeat(task.draws, 1, 1, 1), data.test_classes.repeat(task.draws)
    found: list[list[float]] = [[] for _ in models]
    for context in task.grid():
        everywhere = context.expand(len(images), *context.shape)
        x, target = task.examples(images, classes, everywhere, generator)
        for model, own in zip(models, found, strict=True):
            # What follows the context is at one of them an ordinary network.
            if isinstance(model, Lifted):
                output = model.slice_at(context)(x)
            else:
                output = model(x, context=context)
            own.append(round(task.score(output, target).item(), 4))
    return found


def run(task: Task, methods: list[Method], seed: int, steps: int) -> list[list[float]]:
    """Scores ``[methods, contexts]``."""
    torch.set_num_threads(1)
    return scores(task, train(task, methods, seed, steps))
