"""What users have today of what :mod:`bench_circles` measures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightops import fourier_transform
from weightops.circles import PairNetwork, Training, train
from weightops.testing import best_time

LR, DECAY = 0.01, 0.5
#: networks at once that the batched peer tries
SIZES = (1, 2, 4, 8, 16)


def _sizes(training: Training) -> tuple[int, int, int]:
    p, d = training.spec.shapes["embedding.weight"]
    return p, d, training.spec.shapes["first.weight"][0]


def loop(training: Training, steps: int) -> Callable[[], Tensor]:
    """Network after network, lean: nothing is evaluated, AdamW is fused."""
    networks = [PairNetwork(*_sizes(training)) for _ in training.flat]
    for network, row in zip(networks, training.flat, strict=True):
        training.spec.load_(network, row)
    optimizers = [
        torch.optim.AdamW(n.parameters(), lr=LR, weight_decay=DECAY, fused=True) for n in networks
    ]
    p = _sizes(training)[0]

    def run() -> Tensor:
        for network, optimizer, pairs in zip(networks, optimizers, training.pairs, strict=True):
            targets = pairs.sum(1) % p
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(network(pairs), targets).backward()
                optimizer.step()
        return torch.cat([training.spec.flatten(network) for network in networks])

    return run


def vmap(training: Training, steps: int) -> Callable[[], Tensor]:
    """All networks at once by ``torch.func``, one fused AdamW."""
    p = _sizes(training)[0]
    network = PairNetwork(*_sizes(training))
    parts = {
        name: nn.Parameter(part.clone())
        for name, part in training.spec.unflatten(training.flat).items()
    }
    optimizer = torch.optim.AdamW(parts.values(), lr=LR, weight_decay=DECAY, fused=True)
    targets = training.pairs.sum(2) % p

    def loss(parts: dict[str, Tensor], pairs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, parts, (pairs,)), targets)

    grads_of = torch.func.vmap(torch.func.grad(loss))

    def run() -> Tensor:
        for _ in range(steps):
            for name, grad in grads_of(parts, training.pairs, targets).items():
                parts[name].grad = grad
            optimizer.step()
        return torch.cat([part.detach().flatten(1) for part in parts.values()], 1)

    return run


class Factored:
    """Some networks at once, by hand: the first layer as ``A[a] + B[b]``, batched products, one fused AdamW."""

    def __init__(self, training: Training, at: slice) -> None:
        self.p, self.d, _ = _sizes(training)
        self.flat = training.flat[at].clone().requires_grad_()
        self.flat.grad = torch.empty_like(self.flat)
        self.weights = list(training.spec.unflatten(self.flat.detach()).values())
        self.grads = list(training.spec.unflatten(self.flat.grad).values())
        self.optimizer = torch.optim.AdamW([self.flat], lr=LR, weight_decay=DECAY, fused=True)
        pairs = training.pairs[at]
        begin = self.p * torch.arange(len(pairs))[:, None, None]
        self.first, self.second = (pairs + begin).reshape(-1, 2).T.contiguous()
        self.targets = (pairs.sum(2) % self.p)[..., None]
        self.minus = torch.tensor(-1.0).expand(self.targets.shape)

    def step(self) -> None:
        embedding, of_pair, *rest = self.weights
        of_a, of_b = of_pair.split(self.d, 2)
        bias, of_second, second_bias, of_third, third_bias = rest
        a = torch.bmm(embedding, of_a.mT)
        b = torch.baddbmm(bias[:, None], embedding, of_b.mT)
        y = a.flatten(0, 1).index_select(0, self.first)
        y = y.add_(b.flatten(0, 1).index_select(0, self.second)).unflatten(0, (len(embedding), -1))
        x = F.silu(y)
        z = torch.baddbmm(second_bias[:, None], x, of_second.mT)
        w = F.silu(z)
        grad = torch.baddbmm(third_bias[:, None], w, of_third.mT).softmax(2)
        grad.scatter_add_(2, self.targets, self.minus).div_(self.targets.shape[1])

        to_embedding, to_pair, *others = self.grads
        to_bias, to_second, to_second_bias, to_third, to_third_bias = others
        torch.bmm(grad.mT, w, out=to_third)
        torch.sum(grad, 1, out=to_third_bias)
        grad = torch.ops.aten.silu_backward(torch.bmm(grad, of_third), z)
        torch.bmm(grad.mT, x, out=to_second)
        torch.sum(grad, 1, out=to_second_bias)
        grad = torch.ops.aten.silu_backward(torch.bmm(grad, of_second), y).flatten(0, 1)
        by_a, by_b = (
            torch.zeros_like(table).flatten(0, 1).index_add_(0, rows, grad).view_as(table)
            for table, rows in ((a, self.first), (b, self.second))
        )
        torch.baddbmm(torch.bmm(by_a, of_a), by_b, of_b, out=to_embedding)
        for side, by in zip(to_pair.split(self.d, 2), (by_a, by_b), strict=True):
            side.copy_(torch.bmm(by.mT, embedding))
        torch.sum(by_b, 1, out=to_bias)
        self.optimizer.step()


def in_groups(training: Training, steps: int, size: int) -> Callable[[], Tensor]:
    starts = range(0, len(training.flat), size)
    groups = [Factored(training, slice(begin, begin + size)) for begin in starts]

    def run() -> Tensor:
        for group in groups:
            for _ in range(steps):
                group.step()
        return torch.cat([group.flat.detach() for group in groups])

    return run


@cache
def fastest_size(precision: str) -> int:
    """Of a group, in this run, which is set to ``precision``."""
    training = train(16, 59, 128, steps=0)
    return min(SIZES, key=lambda size: best_time(in_groups(training, 2, size), 0.0))


def factored(training: Training, steps: int) -> Callable[[], Tensor]:
    return in_groups(training, steps, fastest_size(torch.get_float32_matmul_precision()))


PEERS: dict[str, Callable[[Training, int], Callable[[], Tensor]]] = {
    "loop": loop,
    "vmap": vmap,
    "factored": factored,
}


def _concatenated(pairs: Tensor, embedding: Tensor) -> Tensor:
    return F.embedding(pairs, embedding).flatten(1)


def linear_loop(pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = zip(pairs, embedding, weight, bias, strict=True)
    return torch.stack([F.linear(_concatenated(of, e), w, c) for of, e, w, c in parts])


def linear_batched(pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    networks, tokens, _ = embedding.shape
    rows = pairs + tokens * torch.arange(networks)[:, None, None]
    x = F.embedding(rows, embedding.flatten(0, 1)).flatten(2)
    return torch.baddbmm(bias[:, None], x, weight.mT)


def linear_factored(pairs: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    networks, tokens, d = embedding.shape
    first, second = (pairs + tokens * torch.arange(networks)[:, None, None]).flatten(0, 1).T
    a = torch.bmm(embedding, weight[..., :d].mT).flatten(0, 1)
    b = torch.baddbmm(bias[:, None], embedding, weight[..., d:].mT).flatten(0, 1)
    made = a.index_select(0, first) + b.index_select(0, second)
    return made.view(networks, -1, weight.shape[1])


LAYERS = {
    "linear-loop": linear_loop,
    "linear-batched": linear_batched,
    "factored": linear_factored,
}


def _frequencies(rows: Tensor, p: int) -> Tensor:
    return torch.linalg.vector_norm(rows[:, 1 : (p + 1) // 2], dim=2)


@cache
def _transform(p: int) -> Tensor:
    return fourier_transform(p).float()


def product(embedding: Tensor) -> Tensor:
    rows = _transform(embedding.shape[1]) @ embedding[:, None]
    return torch.linalg.vector_norm(rows, dim=(1, 3))


SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {
    "fft": lambda x: _frequencies(torch.fft.fft(x, dim=1), x.shape[1]),
    "rfft": lambda x: _frequencies(torch.fft.rfft(x, dim=1), x.shape[1]),
    "product": product,
}
