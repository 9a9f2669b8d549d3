"""Meta-training: parameters of a learned optimizer from the losses of networks that it trains."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightops import _check
from weightops._checkpoints import CheckpointError, read_described, write_described
from weightops._progress import track
from weightops.learned._inner import Inner
from weightops.learned._particles import STRETCH, Particles, unpack
from weightops.learned._rule import check_number
from weightops.learned.functional import Functional
from weightops.spec import WeightSpec

_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class MetaTraining:
    """What :func:`meta_train` gives.

    Attributes:
        functional: the one given, with parameters that were learned.
        alpha, beta, momentum: learned with them.
        losses: ``[iterations]``, of the inner networks, the mean over particles and steps.
        clipped: ``[iterations]``, how many inner losses were above ``most`` or not finite.
    """

    functional: Functional
    alpha: float
    beta: float
    momentum: float
    losses: Tensor
    clipped: Tensor


def meta_train(
    functional: Functional,
    flat: Tensor,
    spec_or_model: WeightSpec | nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    iterations: int,
    particles: int = 16,
    truncation: int = 50,
    horizon: int = 1000,
    batch_size: int | None = None,
    alpha: float = 0.1,
    beta: float = 0.03,
    momentum: float = 0.9,
    estimator: Literal["pes", "backprop"] = "pes",
    sigma: float = 0.01,
    lr: float = 1e-3,
    clip: float = 1.0,
    most: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: bool = True,
) -> MetaTraining:
    """Learn a functional, with alpha, beta and momentum, so that networks that it trains have low losses on the way.

    All particles are one population. With ``"pes"`` (persistent evolution strategies, Vicol, Metz and Sohl-Dickstein
    2021, arXiv 2112.13835) the two networks of a pair start alike and see the same rows, their parameters shifted
    by ``eps`` and ``-eps``; the gradient is that of the mean loss over ``truncation`` steps, smoothed by ``sigma`` and, as
    shifts are summed until a pair begins anew, unbiased by the truncation. With ``"backprop"`` it is that of truncated
    unrolled steps, of 2 ``particles`` networks. Adam takes it, clipped. Where ``torch.distributed`` is initialised,
    processes share the particles, and all give the same result.

    Args:
        functional: where to start; not changed.
        flat: networks ``[M, P]`` to draw first weights from, laid out by the functional's spec.
        spec_or_model: their architecture, as of :func:`~weightops.population.population_train`.
        data: samples ``[D, ...]`` and targets ``[D]`` or ``[D, K]``, likewise.
        iterations: of the outer optimizer.
        particles: pairs of networks.
        truncation: inner steps of an iteration.
        horizon: inner steps after which a pair begins anew, rounded up to whole truncations.
        batch_size: rows of an inner mini-batch, drawn with replacement; ``None``: all.
        alpha, beta, momentum: where to start; above 0, and momentum below 1.
        estimator: of the gradient.
        sigma: of the shifts, for ``"pes"``; ten times that for the logarithms of the three numbers.
        lr: of Adam.
        clip: the gradient's largest norm.
        most: at which an inner loss is capped; by default five times the mean of the first networks' ones.
        seed: of everything drawn.
        checkpoint: a safetensors file, written at every ``every``-th iteration; where it exists, work goes on
            from it as if it had not stopped.
        every: see ``checkpoint``.
        progress: show a progress bar.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or the checkpoint is of another run.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "meta_train"
    if not isinstance(functional, Functional):
        raise TypeError(
            f"{where}: functional must be a Functional, not {_check.describe(functional)}"
        )
    _check.tensor(where, "flat", flat, "[M, P]", 2)
    functional.spec.check_flat(where, flat)
    if not len(flat):
        raise ValueError(f"{where}: flat holds no network")
    inner = Inner(where, flat[:1].detach(), spec_or_model, data)
    _check.finite(where, "flat", flat)
    counts = {"particles": particles, "truncation": truncation, "horizon": horizon, "every": every}
    for name, count in counts.items():
        _check.count(where, name, count)
    _check.count(where, "iterations", iterations, 0)
    if batch_size is not None:
        _check.count(where, "batch_size", batch_size)
    for name, number in (("alpha", alpha), ("beta", beta), ("momentum", momentum)):
        check_number(where, name, number)
        if number <= 0:
            raise ValueError(f"{where}: {name} must be above 0, not {number}")
    _check.choice(where, "estimator", estimator, ("pes", "backprop"))
    positive = {"sigma": sigma, "lr": lr, "clip": clip} | ({} if most is None else {"most": most})
    for name, number in positive.items():
        _check.number(where, name, number, 0, float("inf"))
        if number == 0:
            raise ValueError(f"{where}: {name} must be above 0, not {number}")
    _check.seed(where, seed)
    _check.flag(where, "progress", progress)
    path = None if checkpoint is None else _check.path(where, "checkpoint", checkpoint)
    if particles % _world():
        raise ValueError(
            f"{where}: particles must be a multiple of the {_world()} processes, not {particles}"
        )
    numbers = torch.tensor([alpha, beta, 1 - momentum], dtype=torch.float64).log() / STRETCH
    theta = functional.flatten()
    psi = torch.cat([theta, numbers.to(theta)])
    flat = flat.detach()
    options = {
        **{"particles": particles, "truncation": truncation, "horizon": horizon},
        **{"batch_size": batch_size, "estimator": estimator, "sigma": sigma, "lr": lr},
        **{"clip": clip, "most": most, "seed": seed, "functional": functional._options()},
        "inputs": _digest(psi, flat, inner.x, inner.targets),
    }
    run = _Run(functional, flat, inner, psi, options, path)
    for _ in track(range(run.done, iterations), "meta-training", enabled=progress and not _rank()):
        run.iterate()
        if path is not None and (run.done % every == 0 or run.done == iterations):
            run.save()
    return run.result()


class _Run:
    """The state of a meta-training, and its iteration."""

    def __init__(
        self,
        functional: Functional,
        flat: Tensor,
        inner: Inner,
        psi: Tensor,
        options: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.functional, self.flat, self.inner = functional, flat, inner
        self.psi, self.options, self.path = psi, options, path
        self.moments = psi.new_zeros(2, len(psi))
        self.losses: list[float] = []
        self.clipped: list[int] = []
        generator = torch.Generator().manual_seed(options["seed"])
        pairs = options["particles"]
        first = flat[torch.randint(len(flat), (pairs,), generator=generator).to(flat.device)]
        spans = -(-options["horizon"] // options["truncation"])
        self.horizon = spans * options["truncation"]
        everything = Particles.fresh(first, len(psi), options["truncation"], self.horizon)
        if options["most"] is None:
            rows = torch.arange(len(inner.x), device=flat.device)[None].expand(len(first), -1)
            self.most = 5 * float(inner.loss_grad(first, rows)[0].nan_to_num(0, 0, 0).mean())
        else:
            self.most = float(options["most"])
        if path is not None and path.exists():
            everything = self._read(path)
        self.particles = everything.shard(_rank(), _world())

    @property
    def done(self) -> int:
        return len(self.losses)

    def iterate(self) -> None:
        options, particles = self.options, self.particles
        pairs, size = options["particles"], len(self.psi)
        # A generator of the iteration's own, so that nothing of it is to be kept, and processes draw alike.
        generator = torch.Generator().manual_seed(_mix(options["seed"], self.done))
        eps = torch.randn(pairs, size, generator=generator, dtype=torch.float64) * options["sigma"]
        rows = self._rows(generator, pairs)
        again = torch.randint(len(self.flat), (pairs,), generator=generator)
        mine = slice(_rank() * pairs // _world(), (_rank() + 1) * pairs // _world())
        eps, rows = eps[mine].to(self.psi), rows[:, mine].to(self.flat.device)
        if options["estimator"] == "pes":
            shifted = torch.stack([self.psi + eps, self.psi - eps], 1).flatten(0, 1)
            with torch.no_grad():
                losses, clipped = particles.unroll(
                    self.functional, self.inner, shifted, rows, self.most
                )
            particles.drift = particles.drift + eps.to(particles.drift)
            slope = (losses[::2] - losses[1::2]) / (2 * options["sigma"] ** 2)
            gradient = (slope[:, None] * particles.drift).sum(0) / pairs
        else:
            psi = self.psi.clone().requires_grad_()
            shared = psi.expand(2 * len(eps), -1)
            losses, clipped = particles.unroll(
                self.functional, self.inner, shared, rows, self.most, build=True
            )
            (gradient,) = torch.autograd.grad(losses.sum() / (2 * pairs), psi)
        stats = torch.stack([losses.detach().sum(), clipped.to(losses.dtype)])
        gradient, stats = _total(gradient.to(self.psi)), _total(stats)
        self._descend(gradient.nan_to_num(0, 0, 0))
        self.losses.append(float(stats[0]) / (2 * pairs))
        self.clipped.append(int(stats[1]))
        particles.begin_anew(self.flat[again[mine].to(self.flat.device)], self.horizon)

    def _rows(self, generator: torch.Generator, pairs: int) -> Tensor:
        """Of every step and pair, int64 ``[steps, n, B]``."""
        count, size = len(self.inner.x), self.options["batch_size"]
        steps = self.options["truncation"]
        if size is None:
            return torch.arange(count).expand(steps, pairs, -1)
        return torch.randint(count, (steps, pairs, size), generator=generator)

    def _descend(self, gradient: Tensor) -> None:
        """A step of Adam (arXiv 1412.6980) along the clipped gradient."""
        norm = gradient.norm()
        gradient = gradient * (self.options["clip"] / norm).clamp(max=1)
        powers = torch.stack([gradient, gradient.square()])
        betas = powers.new_tensor(_BETAS)[:, None]
        self.moments = powers.lerp(self.moments, betas)
        mean, square = self.moments / (1 - betas ** (self.done + 1))
        self.psi = self.psi - self.options["lr"] * mean / (square.sqrt() + _EPS)

    def result(self) -> MetaTraining:
        theta, alpha, beta, momentum = unpack(self.psi, torch.float64)
        return MetaTraining(
            functional=self.functional.copy().load_flat_(theta),
            **{"alpha": float(alpha), "beta": float(beta), "momentum": float(momentum)},
            losses=torch.tensor(self.losses, dtype=torch.float64),
            clipped=torch.tensor(self.clipped, dtype=torch.int64),
        )

    def save(self) -> None:
        """Write everything to go on from; with several processes the first one does."""
        gathered = {name: _gather(each) for name, each in self.particles.tensors().items()}
        if _rank() == 0:
            assert self.path is not None
            tensors = {
                **gathered,
                **{"psi": self.psi, "moments": self.moments},
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "clipped": torch.tensor(self.clipped, dtype=torch.int64),
            }
            write_described("meta_train", self.path, tensors, {"meta_train": self.options})
        if _world() > 1:
            dist.barrier()

    def _read(self, path: Path) -> Particles:
        where = "meta_train"
        tensors, description = read_described(where, path)
        found = description.get("meta_train")
        if not isinstance(found, dict):
            raise CheckpointError(f"{where}: {path}: is no checkpoint of a meta-training")
        for name, value in self.options.items():
            if found.get(name) != value:
                raise CheckpointError(
                    f"{where}: {path}: is of another run: {name} is {found.get(name)!r} there, "
                    f"not {value!r}"
                )
        self.psi, self.moments = (tensors.pop(n).to(self.psi) for n in ("psi", "moments"))
        self.losses, self.clipped = (tensors.pop(n).tolist() for n in ("losses", "clipped"))
        return Particles(**{name: each.to(self.flat.device) for name, each in tensors.items()})


def _mix(seed: int, stream: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:8], "little")


def _digest(*tensors: Tensor) -> str:
    """A fingerprint of what a run is given, so that no run goes on with something else."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _total(value: Tensor) -> Tensor:
    if _world() > 1:
        dist.all_reduce(value)
    return value


def _gather(value: Tensor) -> Tensor:
    if _world() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(_world())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
