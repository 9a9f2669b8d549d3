"""Matching by learning: permutations that lower the loss on the way to the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf, log
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from weightops import _check
from weightops._progress import track
from weightops.align.activation import check_inputs
from weightops.align.weights import match_by_weights
from weightops.ops.assign import assign
from weightops.ops.permute import permute
from weightops.spec import WeightSpec

Perms: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
#: as the authors of Sinkhorn Re-Basin have it
NORMALISATIONS = 20


def match_straight_through(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 0.003,
    batch_size: int = 1000,
    seed: int = 0,
    loss: Loss = cross_entropy,
    progress: bool = True,
) -> tuple[Perms, Tensor]:
    """Permute networks so that their midpoints with the reference have a low loss.

    Weights ``[N, P]`` that start as the reference are trained: at every step each network is matched
    to its own by weights, from the step before on, the loss is taken half way from the reference to
    the matched network, and its gradient by that network goes straight through to the trained ones.

    Networks are evaluated in eval mode, save that batch norm takes its statistics from the batch.
    Of all permutations on the way, weight matching's included, those are kept whose midpoints have
    the lowest loss on the inputs.

    Args:
        spec: axes and layout of one network.
        reference: the network ``[P]`` to align to.
        flat: networks ``[N, P]`` to align.
        model: the architecture; it is copied and does not change.
        inputs: ``[B, ...]``, or a tuple of such tensors, the arguments of ``model``.
        targets: ``[B, ...]``, the second argument of ``loss``.
        steps: of training.
        learning_rate: of training by Adam (in place of the authors' momentum, whose rate depends on
            the network's scale).
        batch_size: inputs of one step, and evaluated at once.
        seed: of the batches and of weight matching.
        loss: of outputs and targets; a mean over the batch.
        progress: show a progress bar on a terminal.

    Returns:
        Label -> int64 ``[N, size]``, and the history: float64 ``[steps + 1, N]``, losses over all
        inputs at the midpoint with the permutation of each step; the first is weight matching's.

    Source: Ainsworth et al. 2022 (arXiv 2209.04836), section 3.3, algorithm 2.

    Raises:
        ValueError: inputs and targets do not fit, or a loss is not finite.
        TypeError: an argument has the wrong type.
    """
    problem = _Problem(spec, reference, flat, model, inputs, targets, loss, batch_size, seed)
    trained = problem.reference.expand_as(flat).clone().requires_grad_()
    perms = problem.identity()

    def propose() -> tuple[Tensor, Perms]:
        nonlocal perms
        current = permute(problem.start, perms, spec)
        near = [problem.match(row, own) for row, own in zip(trained.detach(), current.split(1))]
        moves = {label: torch.cat([each[label] for each in near]) for label in perms}
        perms = spec.compose(perms, moves)
        projected = permute(problem.start, perms, spec)
        return projected + (trained - trained.detach()), perms

    return problem.descend(propose, [trained], steps, learning_rate, progress)


def match_sinkhorn(
    spec: WeightSpec,
    reference: Tensor,
    flat: Tensor,
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 0.3,
    batch_size: int = 1000,
    seed: int = 0,
    loss: Loss = cross_entropy,
    progress: bool = True,
) -> tuple[Perms, Tensor]:
    """Permute networks so that their midpoints with the reference have a low loss.

    For every label a doubly stochastic matrix, 20 Sinkhorn normalisations of the exponential of a
    trained matrix, takes the place of a permutation; the permutation closest to it is its assignment.
    It starts with two thirds of its mass on the weight matching.

    Arguments, evaluation, what is kept, returned and raised are as for :func:`match_straight_through`.

    Source: Pena et al. 2023 (arXiv 2212.12042), section 3 (loss C_Mid); the normalisations are
    differentiated one by one, not implicitly.
    """
    problem = _Problem(spec, reference, flat, model, inputs, targets, loss, batch_size, seed)
    logits = {
        label: (log(2 * max(size - 1, 1)) * torch.eye(size, dtype=flat.dtype, device=flat.device))
        .repeat(len(flat), 1, 1)
        .requires_grad_()
        for label, size in spec.labels.items()
    }

    def propose() -> tuple[Tensor, Perms]:
        soft = {label: sinkhorn(each) for label, each in logits.items()}
        return mix(problem.start, soft, spec), {label: assign(each) for label, each in soft.items()}

    return problem.descend(propose, list(logits.values()), steps, learning_rate, progress)


def sinkhorn(logits: Tensor) -> Tensor:
    """Nearly doubly stochastic matrices ``[N, n, n]``: rows and columns normalised by turns."""
    for _ in range(NORMALISATIONS):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


def mix(flat: Tensor, soft: dict[str, Tensor], spec: WeightSpec) -> Tensor:
    """:func:`weightops.permute` of ``flat`` ``[N, P]`` by matrices ``[N, n, n]``: ``out[i] = soft[i, j] w[j]``."""
    mixed = []
    for name, weight in spec.unflatten(flat).items():
        axes = range(len(spec.shapes[name]))
        factors = [factor for axis in axes for factor in spec.factors(name, axis)]
        x = weight.reshape(len(flat), *(size for _, size in factors))
        for i, (label, _) in enumerate(factors, 1):
            if label is not None:
                front = x.movedim(i, 1)
                columns = front.reshape(*front.shape[:2], -1)
                x = (soft[label] @ columns).view(front.shape).movedim(1, i)
        mixed.append(x.reshape(len(flat), -1))
    return torch.cat(mixed, 1)


class _Problem:
    """Networks that weight matching has brought to the reference, and losses between them and it."""

    def __init__(
        self,
        spec: WeightSpec,
        reference: Tensor,
        flat: Tensor,
        model: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Tensor,
        loss: Loss,
        batch_size: int,
        seed: int,
    ) -> None:
        self.inputs = check_inputs(model, inputs)
        _check.tensor("match", "targets", targets, "[B, ...]")
        size, given = len(self.inputs[0]), len(targets) if targets.dim() else 0
        _check.size("match", "targets", given, size, "the batch of inputs")
        if not callable(loss):
            raise TypeError(f"match: loss must be a function, not {_check.describe(loss)}")
        _check.count("match", "batch_size", batch_size)
        self.targets, self.loss, self.batch_size = targets, loss, min(batch_size, size)
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        # A warning of an unverified spec is for the caller to give, once.
        self.spec = WeightSpec(spec.axes, spec.shapes, sizes=spec.labels)
        self.reference = reference.detach()
        self.found = self.match(self.reference, flat.detach())
        self.start = permute(flat.detach(), self.found, spec)
        self.network = _deterministic(model)
        if self.batch_size < 2 and any(isinstance(m, _BatchNorm) for m in self.network.modules()):
            raise ValueError(
                "match: batch norm needs batches of at least 2 inputs, "
                f"but batch_size is {batch_size} and inputs holds {size}"
            )
        self.buffers = {name for name, _ in self.network.named_buffers(remove_duplicate=False)}

    def identity(self) -> Perms:
        return {k: p.to(self.start.device) for k, p in self.spec.identity(len(self.start)).items()}

    def match(self, reference: Tensor, flat: Tensor) -> Perms:
        return match_by_weights(self.spec, reference, flat, seed=self.seed).perms

    def losses(self, rows: Tensor, index: Tensor) -> Tensor:
        """``[N]``: the loss half way from the reference to each network, on some inputs."""
        batch, targets = tuple(each[index] for each in self.inputs), self.targets[index]
        losses = []
        for row in (self.reference + rows) / 2:
            state = {
                name: tensor.detach().clone() if name in self.buffers else tensor
                for name, tensor in self.spec.state_dict(row).items()
            }
            losses.append(self.loss(functional_call(self.network, state, batch), targets))
        return torch.stack(losses)

    @torch.no_grad()
    def midpoints(self, perms: Perms) -> Tensor:
        """``[N]`` float64: losses over all inputs half way to the permuted networks."""
        rows = permute(self.start, perms, self.spec)
        size = len(self.targets)
        # No remainder: batch norm has no statistics of a single input.
        parts = torch.arange(size, device=rows.device).tensor_split(size // self.batch_size)
        sums = [self.losses(rows, part).double() * len(part) for part in parts]
        return torch.stack(sums).sum(0) / size

    @torch.enable_grad()
    def descend(
        self,
        propose: Callable[[], tuple[Tensor, Perms]],
        trained: list[Tensor],
        steps: int,
        learning_rate: float,
        progress: bool,
    ) -> tuple[Perms, Tensor]:
        """Train what the networks that ``propose`` gives, with their permutations, depend on."""
        _check.count("match", "steps", steps)
        _check.number("match", "learning_rate", learning_rate, 0, inf)
        _check.flag("match", "progress", progress)
        if not len(self.start):
            return self.found, torch.zeros(steps + 1, 0, dtype=torch.float64)
        optimizer = torch.optim.Adam(trained, learning_rate)
        best = previous = self.identity()
        lowest = losses = self.midpoints(best)
        history = []
        for step in track(range(steps + 1), "learned matching", enabled=progress):
            rows, perms = propose()
            if any(not torch.equal(p, previous[label]) for label, p in perms.items()):
                losses = self.midpoints(perms)
            previous = perms
            history.append(losses)
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            best = {k: torch.where(better[:, None], p, best[k]) for k, p in perms.items()}
            if step == steps:
                break
            order = torch.randperm(len(self.targets), generator=self.generator)
            total = self.losses(rows, order[: self.batch_size].to(rows.device)).sum()
            if not total.isfinite():
                raise ValueError(
                    f"match: the loss is {total.item()} at step {step}; a lower learning_rate may help"
                )
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return self.spec.compose(self.found, best), torch.stack(history)


def _deterministic(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with batch norm that normalises by the batch."""
    network = copy.deepcopy(model).eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train()
        elif isinstance(module, nn.RNNBase):
            # cuDNN has gradients of recurrent layers in training mode only.
            module.train()
            module.dropout = 0.0
    return network
