"""What is trained: small networks on scikit-learn's digits, and on the characters of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import log

import torch
import torch.nn.functional as F
from prediction.zoo import CHARACTERS, text
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightops
from weightops import WeightSpec
from weightops.population import population_loss

KINDS = len(CHARACTERS)
#: characters that are read to tell the next one
LENGTH = 6


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` and classes."""
    images, classes = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return (images / 16).float().view(-1, 1, 8, 8), classes


@cache
def characters() -> tuple[Tensor, Tensor]:
    """Pieces of a text, one-hot ``[D, T K]``, and the character after each."""
    pieces = text()[0].unfold(0, LENGTH + 1, 1)
    return F.one_hot(pieces[:, :-1], KINDS).flatten(1).float(), pieces[:, -1].contiguous()


def mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def cnn() -> nn.Module:
    """Initialised for relus (He et al. 2015, arXiv 1502.01852): torch's own start is a long plateau."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )
    for layer in (model[0], model[2]):
        nn.init.kaiming_normal_(layer.weight)
    return model


class Elman(nn.Module):
    """``h <- tanh(W x + b + U h)`` over characters ``[B, T K]``; logits ``[B, K]`` of the next one."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.read = nn.Linear(KINDS, hidden)
        self.recur = nn.Linear(hidden, hidden, bias=False)
        self.write = nn.Linear(hidden, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.read(x.unflatten(1, (LENGTH, KINDS))).unbind(1)
        state = torch.tanh(first)
        for drive in others:
            state = torch.tanh(drive + self.recur(state))
        return self.write(state)


class Transformer(nn.Module):
    """One block, norms first, over characters ``[B, T K]``; logits ``[B, K]`` of the next one."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.read = nn.Linear(KINDS, width, bias=False)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("query", "key", "value", "out")}
        )
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.write = nn.Linear(width, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x.unflatten(1, (LENGTH, KINDS))) + self.place
        seen = self.norms[0](x)
        # Of the last character alone: no other's answer is needed.
        query = self.split(self.attend["query"](seen[:, -1:]))
        key, value = (self.split(self.attend[name](seen)) for name in ("key", "value"))
        shares = (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1)
        heads = (shares @ value).transpose(1, 2).flatten(2)[:, 0]
        last = x[:, -1] + self.attend["out"](heads)
        return self.write(last + self.feed(self.norms[1](last)))

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, heads, T, D / heads]``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Task:
    """What is trained, and on what."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    classes: int

    @property
    def worst(self) -> float:
        """A loss to cap others at: a bit above that of a network that says nothing."""
        return 1.1 * log(self.classes)

    def networks(self, count: int, seed: int) -> Tensor:
        """First weights ``[N, P]``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return traced(self)[1].flatten([self.make() for _ in range(count)])

    def losses(self, flat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``[N]`` of networks on rows ``[N, B]``, and their gradients ``[N, P]``."""
        x, targets = self.data()
        flat = flat.detach().requires_grad_()
        losses = population_loss(flat, traced(self)[0], x[rows], targets[rows])
        (grads,) = torch.autograd.grad(losses.sum(), flat)
        return losses.detach(), grads


@cache
def traced(task: Task) -> tuple[nn.Module, WeightSpec]:
    """The model, and its weight space, proven."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = task.make(), task.data()[0][:2]
        spec = weightops.trace(model, x)
        weightops.verify(spec, model, x)
    return model, spec


MLP = "MLP on digits"
TASKS = {
    MLP: Task(mlp, digits, 10),
    "CNN on digits": Task(cnn, digits, 10),
    "RNN on characters": Task(Elman, characters, KINDS),
    "transformer on characters": Task(Transformer, characters, KINDS),
}


@cache
def wider(width: int) -> Task:
    """The MLP with ``width`` hidden units."""
    return Task(partial(mlp, width), digits, 10)
