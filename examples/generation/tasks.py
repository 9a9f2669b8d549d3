"""Tasks of digits, some to build a zoo from and some to generate networks for, and architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import cos, pi, sin

import torch
from reproduction import Digits
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

import weightops
from weightops import WeightSpec

TRAIN = 1300


@cache
def digits() -> Digits:
    """scikit-learn's 1,797 digits as ``[B, 1, 8, 8]``, always the same 1,300 of them to train on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().div(16)[order, None]
    return Digits.split(images, torch.from_numpy(data.target).long()[order], TRAIN)


@dataclass(frozen=True)
class Tasks:
    """Datasets with the same number of classes; seen ones first.

    Attributes:
        names: one for each dataset.
        data: the datasets.
        seen: how many a zoo is built from.
        classes: K.
        between: of unseen tasks the two seen ones that they lie between, where tasks have an order.
    """

    names: tuple[str, ...]
    data: tuple[Digits, ...]
    seen: int
    classes: int
    between: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def unseen(self) -> range:
        return range(self.seen, len(self.data))

    def train(self) -> tuple[Tensor, Tensor]:
        """Images ``[T, B, 1, 8, 8]`` and classes ``[T, B]``, of as many images as every task has."""
        size = min(len(each.train) for each in self.data)
        images = torch.stack([each.train[:size] for each in self.data])
        return images, torch.stack([each.train_classes[:size] for each in self.data])


def rotate(images: Tensor, degrees: float) -> Tensor:
    """``[B, C, H, W]`` about the centre, bilinear."""
    angle = degrees / 180 * pi
    matrix = torch.tensor([[cos(angle), -sin(angle), 0.0], [sin(angle), cos(angle), 0.0]])
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def rotations(seen: int, unseen: int) -> Tasks:
    """Angles evenly around the circle, of which those between seen ones are unseen."""
    step = 360 / (seen + unseen)
    angles = [step * n for n in range(seen + unseen)]
    held_out = [angles[round((n + 0.5) * len(angles) / unseen)] for n in range(unseen)]
    ordered = [angle for angle in angles if angle not in held_out] + held_out
    whole = digits()
    data = [
        Digits(
            rotate(whole.train, angle),
            whole.train_classes,
            rotate(whole.test, angle),
            whole.test_classes,
        )
        for angle in ordered
    ]
    between = {
        n: (ordered.index(angles[at - 1]), ordered.index(angles[(at + 1) % len(angles)]))
        for n, at in enumerate(map(angles.index, held_out), seen)
    }
    return Tasks(tuple(f"{angle:g}°" for angle in ordered), tuple(data), seen, 10, between)


def of_digits(chosen: Sequence[int]) -> Digits:
    """Images of the digits ``chosen``, whose classes are their places there."""
    whole = digits()
    place = torch.full((10,), -1)
    place[torch.tensor(chosen)] = torch.arange(len(chosen))
    train, test = place[whole.train_classes], place[whole.test_classes]
    return Digits(
        whole.train[train >= 0], train[train >= 0], whole.test[test >= 0], test[test >= 0]
    )


def chosen_digits(seen: int, unseen: int, draw: Callable[[torch.Generator], Tensor]) -> Tasks:
    """As many different tasks of :func:`of_digits` as asked for, in random order."""
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < seen + unseen:
        found[tuple(draw(generator).tolist())] = None
    names = tuple("".join(map(str, each)) for each in found)
    return Tasks(names, tuple(map(of_digits, found)), seen, len(names[0]))


def subsets(seen: int, unseen: int) -> Tasks:
    """Five of the ten digits, in ascending order."""
    return chosen_digits(
        seen, unseen, lambda generator: torch.randperm(10, generator=generator)[:5].sort()[0]
    )


def permuted(seen: int, unseen: int) -> Tasks:
    """The digits 0 to 4 under permuted labels."""
    return chosen_digits(seen, unseen, lambda generator: torch.randperm(5, generator=generator))


FAMILIES: dict[str, Callable[[int, int], Tasks]] = {
    "rotations": rotations,
    "subsets": subsets,
    "permuted labels": permuted,
}


def mlp(classes: int, width: int = 96) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


def cnn(classes: int, channels: tuple[int, int] = (16, 32)) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels[0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(*channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels[1], classes),
    )


MODELS: dict[str, Callable[[int], nn.Sequential]] = {
    "MLP": mlp,
    "CNN": cnn,
    "narrow MLP": partial(mlp, width=32),
    "narrow CNN": partial(cnn, channels=(8, 16)),
}


def traced(model: nn.Sequential) -> WeightSpec:
    """The model's layout and labels, verified."""
    images = digits().train[:4]
    spec = weightops.trace(model, images)
    weightops.verify(spec, model, images)
    return spec


def initial(model: nn.Sequential, spec: WeightSpec, count: int, seed: int) -> Tensor:
    """``[count, P]`` as PyTorch initialises the model, each another one."""
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        found.append(spec.flatten(model).detach())
    return torch.cat(found)
