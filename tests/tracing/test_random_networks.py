"""Networks of random ops on ``[B, T, D]``: whatever they do to their axes, the traced spec is proven."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightops.tracing import trace, verify


class RandomNetwork(nn.Module):
    """Between 3 and 9 ops drawn by a seed; parameters are made in the first run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.made = seed, 0
        self.weights = nn.ParameterList()
        self(torch.randn(2, 5, 6))

    def weight(self, *shape: int) -> Tensor:
        if self.made == len(self.weights):
            self.weights.append(nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5))
        self.made += 1
        return self.weights[self.made - 1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def fused(self, x: Tensor, draw: random.Random) -> Tensor:
        qkv = F.linear(x, self.weight(18, x.shape[-1])).unflatten(-1, (3, 2, 3))
        qkv = qkv.permute(2, 0, 3, 1, 4)
        ways: list[Callable[[], tuple[Tensor, ...]]] = [
            lambda: qkv.unbind(0),
            lambda: (qkv[0], qkv[1], qkv[2]),
            lambda: (qkv[:1][0], *qkv[1:]),
            lambda: ((qkv * 2)[0], qkv.chunk(3)[1][0], qkv[2]),
        ]
        return self.attend(*draw.choice(ways)())

    def written(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 1:3] = 2 * x[..., 1:3] + 1
        return x

    def forward(self, x: Tensor) -> Tensor:
        draw, self.made = random.Random(self.seed), 0
        known = [F.linear(x, self.weight(12, 6))]
        for _ in range(draw.randint(3, 9)):
            y = draw.choice(known[-3:])
            d = y.shape[-1]
            alike = [each for each in known if each.shape == y.shape]
            ops: list[Callable[[], Tensor]] = [
                *[lambda y=y, d=d: F.linear(y, self.weight(draw.choice([4, 6, 8, 12, d]), d))] * 3,
                lambda y=y, alike=alike: y + draw.choice(alike),
                lambda y=y, alike=alike: y * draw.choice(alike).sigmoid(),
                lambda y=y: torch.cat([y, draw.choice(known)], -1),
                lambda y=y: y.softmax(-1),
                lambda y=y: y - y.mean(-1, keepdim=True),
                lambda y=y, d=d: F.layer_norm(y, (d,), self.weight(d), self.weight(d)),
                lambda y=y: torch.stack([y, 2 * y.tanh()], draw.choice([2, 3])).flatten(2),
                lambda y=y, d=d: y[..., draw.randint(0, d - 1) :],
                lambda y=y: F.pad(y, (draw.randint(0, 2), draw.randint(0, 2))),
                lambda y=y: y.repeat_interleave(2, -1),
                lambda y=y, d=d: y * torch.arange(d).to(y),
                lambda y=y: torch.einsum("btd,ts->bsd", y, self.weight(y.shape[1], 5)),
                lambda y=y: self.fused(y, draw),
                lambda y=y: draw.choice([y.cumsum(-1), y.flip(-1), y.roll(1, -1), y.sort(-1)[0]]),
            ]
            if d % 2 == 0:
                halves, pairs = y.chunk(2, -1), y.unflatten(-1, (2, d // 2))
                ops += [
                    lambda a=halves: a[0] * a[1],
                    lambda a=halves: torch.cat([a[1], a[0]], -1),
                    lambda a=pairs: a.transpose(2, 3).flatten(2),
                    lambda a=pairs, d=d: (a * self.weight(d // 2)).flatten(2),
                    lambda a=pairs: (a * self.weight(2, 1)).flatten(2),
                    lambda a=pairs: self.attend(*[a.transpose(1, 2)] * 3),
                    lambda y=y, d=d: F.group_norm(y.mT, 2, self.weight(d), self.weight(d)).mT,
                ]
            if d % 3 == 0:
                thirds = y.unflatten(-1, (3, d // 3)).unbind(2)
                ops += [
                    lambda a=thirds: a[0] * a[1] + a[2],
                    lambda a=thirds: torch.stack(a[::-1], 2).flatten(2),
                ]
            if d >= 4:
                ops.append(lambda y=y: self.written(y))
            made = draw.choice(ops)()
            if made.shape[-1] <= 48:
                known.append(made)
        last = known[-1]
        return F.linear(last, self.weight(3, last.shape[-1])).mean(1)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_network_is_traced_and_proven(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = RandomNetwork(seed), torch.randn(2, 5, 6)
    spec = trace(model, x)
    if spec.labels:
        verify(spec, model, x, trials=1, rtol=1e-7)
