"""What users have today of what :mod:`bench_learned` measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops.learned import Functional
from weightops.learned._features import DECAYS, FEATURES, time_features

# The terms of an MLP of two layers by what they keep: hidden neurons, outputs, nothing.
BY_HIDDEN = [[1, 9, 16], [4, 11, 18], [6, 13, 22]]
BY_OUTPUT = [[21, 28], [24, 30]]
BY_NOTHING = [[3, 10, 17, 26], [5, 12, 19, 27], [7, 14, 23, 29], [8, 15, 25, 31]]


class Particle:
    """A particle of meta-training on an MLP of two layers: what a lean loop goes through.

    Written for its four tensors; matrices are laid out, and what the time adds to them is, once a step.
    """

    def __init__(
        self, functional: Functional, theta: Tensor, flat: Tensor, alpha: float, beta: float
    ) -> None:
        own = functional.copy().load_flat_(theta)
        self.params = [view.clone() for view in functional.spec.unflatten(flat).values()]
        self.momenta = [p.new_zeros(len(DECAYS), *p.shape) for p in self.params]
        self.weights = [1 - p.new_tensor(DECAYS).view(-1, *[1] * p.dim()) for p in self.params]
        self.alpha, self.beta, self.own = alpha, beta, DECAYS.index(0.9)
        self.sizes, self.eps, self.count = [p.numel() for p in self.params], functional.eps, 0
        weights, biases = (list(map(Tensor.detach, of)) for of in (own.weights, own.biases))
        self.first, self.times = weights[0][0, :FEATURES], weights[0][0, FEATURES:]
        self.first_bias = biases[0][0]
        self.hidden = [(w[0], b[0]) for w, b in zip(weights[1:-1], biases[1:-1], strict=True)]
        last = weights[-1][..., 0]
        self.input_hidden, self.input_column, self.hidden_output = last[0], last[2], last[20]
        self.by_hidden, self.by_output, self.by_nothing = (
            torch.cat([last[row].T for row in rows]) for rows in (BY_HIDDEN, BY_OUTPUT, BY_NOTHING)
        )
        self.bias = biases[-1][:, 0]

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        params = [p.requires_grad_() for p in self.params]
        w0, b0, w1, b1 = params
        loss = F.cross_entropy(F.linear(F.linear(x, w0, b0).relu(), w1, b1), targets)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            self.params = self.update([p.detach() for p in params], grads)
        self.count += 1
        return loss.detach()

    def update(self, params: list[Tensor], grads: tuple[Tensor, ...]) -> list[Tensor]:
        rows = []
        for p, g, m, weight in zip(params, grads, self.momenta, self.weights, strict=True):
            m.lerp_(g, weight)
            raw = torch.cat([p.view(1, -1), g.view(1, -1), m.view(len(DECAYS), -1)])
            rows.append(raw * (raw.square().mean(1, keepdim=True) + self.eps).rsqrt())
        time = time_features(self.count, params[0])
        h = torch.addmm(self.first_bias + time @ self.times, torch.cat(rows, 1).T, self.first)
        h = h.relu_()
        for weight, bias in self.hidden:
            h = torch.addmm(bias, h, weight).relu_()
        moves = self.last_layer(h, params)
        return [
            p - self.alpha * (m[self.own] + self.beta * f)
            for p, m, f in zip(params, self.momenta, moves, strict=True)
        ]

    def last_layer(self, h: Tensor, params: list[Tensor]) -> list[Tensor]:
        parts = [
            part.view(*p.shape, -1) for part, p in zip(h.split(self.sizes), params, strict=True)
        ]
        w0, b0, w1, b1 = parts
        over_inputs, over_outputs, by_outputs = w0.mean(1), w1.mean(0), w1.mean(1)
        means = torch.cat([over_inputs.mean(0), b0.mean(0), by_outputs.mean(0), b1.mean(0)])
        f0, f1, f2, f3 = (self.bias + means @ self.by_nothing).unbind()
        h0, h1, h2 = (torch.cat([over_inputs, b0, over_outputs], 1) @ self.by_hidden).unbind(1)
        o0, o1 = (torch.cat([by_outputs, b1], 1) @ self.by_output).unbind(1)
        return [
            w0 @ self.input_hidden + (w0.mean(0) @ self.input_column + f0) + h0[:, None],
            h1 + f1,
            w1 @ self.hidden_output + (h2 + f2) + o0[:, None],
            o1 + f3,
        ]


def loop(particles: list[Particle], x: Tensor, targets: Tensor, rows: Tensor) -> Callable[[], None]:
    """All steps of ``rows`` ``[steps, pairs, B]``, of which a pair's two particles see the same."""

    def run() -> None:
        for step in rows:
            for n, particle in enumerate(particles):
                particle.step(x[step[n // 2]], targets[step[n // 2]])

    return run
