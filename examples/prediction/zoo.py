"""A zoo of Elman networks that predict the next character of a text, all of a part trained at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

import weightops
from weightops import WeightSpec

CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,-"
DESCRIBED = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
HIDDEN = 24
LENGTH = 16
#: characters of a piece whose predictions are not counted, as too little has been read
FIRST = 4
RATES, STEPS, BATCHES = (1e-3, 1e-1), (30, 600), (4, 12, 36)


@cache
def text() -> tuple[Tensor, Tensor]:
    """What scikit-learn tells of its datasets, as places in ``CHARACTERS``: to train on, and to test on."""
    told = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in DESCRIBED)
    kept = re.sub(f"[^{CHARACTERS}]", " ", told.lower())
    kept = re.sub(r"([ .,-])\1+", r"\1", kept)
    # Every fourth part to test on, so that both have all subjects.
    parts = torch.tensor([CHARACTERS.index(each) for each in kept]).chunk(40)
    return torch.cat([part for n, part in enumerate(parts) if n % 4]), torch.cat(parts[::4])


class Elman(nn.Module):
    """``h <- tanh(W x + b + U h)`` over characters ``[B, T, K]``, one-hot; logits ``[B, T, K]``."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(len(CHARACTERS), HIDDEN)
        self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.write = nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        state, states = None, []
        for drive in self.read(x).unbind(1):
            state = torch.tanh(drive if state is None else drive + self.recur(state))
            states.append(state)
        return self.write(torch.stack(states, 1))


@cache
def traced() -> WeightSpec:
    """The weight space, proven: hidden units permute."""
    model, x = Elman(), torch.zeros(2, LENGTH, len(CHARACTERS))
    spec = weightops.trace(model, x)
    weightops.verify(spec, model, x.normal_(generator=torch.Generator().manual_seed(0)))
    return spec


def logits(flat: Tensor, characters: Tensor) -> Tensor:
    """``[N, B, T, K]`` of networks ``[N, P]``, each on its own ``characters`` ``[N, B, T]``."""
    part = traced().unflatten(flat)
    rows = part["read.weight"].mT + part["read.bias"][:, None]
    place = characters + len(CHARACTERS) * torch.arange(len(flat))[:, None, None]
    state, states = None, []
    for drive in F.embedding(place, rows.flatten(0, 1)).unbind(2):
        whole = drive if state is None else torch.baddbmm(drive, state, part["recur.weight"].mT)
        state = torch.tanh(whole)
        states.append(state)
    read = torch.stack(states, 2).flatten(1, 2)
    found = torch.baddbmm(part["write.bias"][:, None], read, part["write.weight"].mT)
    return found.unflatten(1, characters.shape[1:])


@torch.no_grad()
def accuracy(flat: Tensor) -> Tensor:
    """Share of the test text's characters that each network ``[N, P]`` predicts, ``[N]``."""
    pieces = text()[1].unfold(0, LENGTH + 1, LENGTH + 1)
    found = []
    for some in flat.split(16):
        guessed = logits(some, pieces[:, :-1].expand(len(some), -1, -1)).argmax(-1)
        found.append((guessed == pieces[:, 1:])[..., FIRST:].float().mean((1, 2)))
    return torch.cat(found)


@dataclass(frozen=True)
class Part:
    """Networks of a zoo and how each was trained: ``flat`` ``[N, P]``, all else ``[N]``."""

    flat: Tensor
    accuracy: Tensor
    rate: Tensor
    steps: Tensor
    batch: Tensor


def part(count: int, number: int, seed: int) -> Part:
    """``count`` networks of one batch size; rates and steps are drawn, evenly in their logarithms."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + number)
        flat = traced().flatten([Elman() for _ in range(count)])
        low, high = torch.tensor([RATES, STEPS]).log().T
        rate, steps = (low + (high - low) * torch.rand(count, 2)).exp().T
        steps = steps.long().sort(descending=True).values
        batch = BATCHES[number % len(BATCHES)]
        train(flat, rate, steps, batch)
    return Part(flat, accuracy(flat), rate, steps, torch.full((count,), batch))


def train(flat: Tensor, rate: Tensor, steps: Tensor, batch: int) -> None:
    """Adam on ``flat`` ``[N, P]`` in place, for descending numbers of ``steps`` ``[N]``."""
    characters = text()[0]
    mean, square = torch.zeros_like(flat), torch.zeros_like(flat)
    for step in range(1, int(steps[0]) + 1):
        active = int((steps >= step).sum())
        begin = torch.randint(len(characters) - LENGTH, (active, batch, 1))
        pieces = characters[begin + torch.arange(LENGTH + 1)]
        weights = flat[:active].clone().requires_grad_()
        guessed = logits(weights, pieces[..., :-1]).flatten(0, 2)
        loss = F.cross_entropy(guessed, pieces[..., 1:].flatten(), reduction="sum")
        (grad,) = torch.autograd.grad(loss / (batch * LENGTH), weights)
        mean[:active].lerp_(grad, 0.1)
        square[:active].lerp_(grad.square(), 0.01)
        size = rate[:active, None] * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        flat[:active] -= size * mean[:active] / (square[:active].sqrt() + 1e-8)
