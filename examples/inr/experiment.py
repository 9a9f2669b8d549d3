"""One reader, trained on the SIRENs of the training images and tested on those of the test images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightops
from inr import sirens
from inr.readers import READERS, pixels
from inr.sirens import Sirens

PIXELS = "pixels"
#: validations, the best of which is tested
CHECKS = 10

Results = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A reader and what it is trained on.

    Attributes:
        reader: one of ``READERS``, or ``PIXELS``: an MLP on the images, for comparison.
        start: ``"own"``, an initialisation for every SIREN, or ``"shared"``, one for all.
        permuted: whether hidden units of the SIRENs are permuted at random in every batch.
        seed: of the reader, its batches and their permutations.
        networks: SIRENs of every image with own initialisations; a shared one gives one each.
        images: how many digits.
        fitted: steps of the SIRENs' training.
        steps: of the reader's.
        width: channels of the equivariant layers.
    """

    reader: str
    start: str
    permuted: bool
    seed: int
    networks: int = 16
    images: int = 1797
    fitted: int = 600
    steps: int = 1800
    width: int = 16

    @property
    def name(self) -> str:
        return f"{self.reader}, permuted" if self.permuted else self.reader


def compare(recipe: Recipe) -> Results:
    """Accuracies on test images of one reader, and what it read."""
    torch.set_num_threads(1)
    networks = recipe.networks if recipe.start == "own" else 1
    data = sirens.fitted(recipe.start, networks, recipe.images, recipe.fitted)
    began = time.process_time()
    single, together = trained(recipe, data)
    return {
        "accuracy": round(single, 4),
        "together": round(together, 4),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def fit(recipe: Recipe) -> Results:
    """How well the SIRENs draw their images."""
    torch.set_num_threads(1)
    networks = recipe.networks if recipe.start == "own" else 1
    data = sirens.fitted(recipe.start, networks, recipe.images, recipe.fitted)
    parts = (data.train, data.validation, data.test)
    return {
        "networks": data.psnr.numel(),
        "of an image": networks,
        "weights": data.spec.numel,
        "images": dict(zip(("train", "validation", "test"), map(len, parts), strict=True)),
        "psnr": [round(each, 2) for each in (data.psnr.mean().item(), data.psnr.min().item())],
        "kernel": data.kernel,
    }


def trained(recipe: Recipe, data: Sirens) -> tuple[float, float]:
    """Train a reader: accuracies on the test images, of single networks and of an image's together."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.reader == PIXELS:
        rows, model, rate = data.images[:, None], pixels(), 1e-3
    else:
        make, rate = READERS[recipe.reader]
        rows = data.flat
        model = make(data.spec, rows[data.train].flatten(0, 1), recipe.width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, recipe.steps, pct_start=0.1)
    best = (-1.0, 0.0, 0.0)
    for step in range(recipe.steps):
        picked = data.train[torch.randint(len(data.train), (64,), generator=generator)]
        which = torch.randint(rows.shape[1], (64,), generator=generator)
        x = rows[picked, which]
        if recipe.permuted:
            x = weightops.permute(x, data.spec.random_permutations(64, generator), data.spec)
        loss = F.cross_entropy(model(x), data.classes[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (recipe.steps // CHECKS) == 0:
            found, _ = accuracy(model, rows[data.validation], data.classes[data.validation])
            if found > best[0]:
                best = (found, *accuracy(model, rows[data.test], data.classes[data.test]))
    return best[1:]


@torch.no_grad()
def accuracy(model: nn.Module, rows: Tensor, classes: Tensor) -> tuple[float, float]:
    """Of networks ``[D, V, P]`` one by one, and by the mean of what an image's V networks say."""
    model.eval()
    each = model(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    model.train()
    single = (each.argmax(-1) == classes[:, None]).float().mean()
    together = (each.log_softmax(-1).mean(1).argmax(-1) == classes).float().mean()
    return single.item(), together.item()
