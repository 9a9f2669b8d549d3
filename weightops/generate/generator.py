"""Weights for a dataset: autoencoder, dataset encoder and latent diffusion as one model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check
from weightops._checkpoints import CheckpointError, read_described, write_described
from weightops.generate._training import Training
from weightops.generate.encoder import (
    ClassIndex,
    Dataset,
    DatasetEncoder,
    alignment_loss,
    check_dataset,
)
from weightops.generate.latent import LatentDiffusion
from weightops.generate.vae import WeightVAE
from weightops.spec import WeightSpec
from weightops.tokens import Statistics, TokenPlan, pack, statistics, unpack

#: part -> what can be given to it
OPTIONS = {
    "autoencoder": ("hidden", "side", "channels"),
    "encoder": ("hidden", "heads", "points"),
    "diffusion": ("width", "blocks", "times"),
}
STAGES = ("autoencoder", "alignment", "diffusion")


class WeightGenerator(nn.Module):
    """Networks for a classification task, drawn given a few examples of it (D2NWG).

    A zoo of trained networks is encoded to latents by a :class:`WeightVAE`; a :class:`DatasetEncoder`
    is aligned with them; a :class:`LatentDiffusion` learns the latents given the dataset's vector.

    Source: Soro et al. 2024, "Diffusion-based Neural Network Weights Generation", arXiv 2402.18153.

    Args:
        spec: layout of one network; standardisation is per tensor.
        features: entries of an example, flattened or as ``extractor`` gives it.
        classes: K of every task.
        latent: L, entries of a latent; of every chunk's with ``chunk``.
        form: of the autoencoder, ``"mlp"`` or ``"convolution"``.
        chunk: entries of the chunks that a larger network is cut into; ``None`` for whole networks.
        condition: entries of a dataset's vector.
        examples: S of each class that a dataset's vector is made from.
        drop: probability that training drops the condition, for guidance.
        extractor: module that turns examples ``[n, ...]`` into ``[n, features]``; it is used in
            evaluation mode, and trained where its parameters require gradients.
        options: per part further arguments of it, under ``"autoencoder"``, ``"encoder"`` and
            ``"diffusion"``.

    Raises:
        ValueError: a size is not positive or does not fit another.
        TypeError: an argument has the wrong type.
    """

    floor: Tensor
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        features: int,
        classes: int,
        *,
        latent: int = 48,
        form: str = "mlp",
        chunk: int | None = None,
        condition: int = 128,
        examples: int = 5,
        drop: float = 0.0,
        extractor: nn.Module | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        where = "WeightGenerator"
        if not isinstance(spec, WeightSpec):
            raise TypeError(f"{where}: spec must be a WeightSpec, not {type(spec).__name__}")
        if not spec.numel:
            raise ValueError(f"{where}: spec has no weights")
        for name, size in (
            *(("features", features), ("classes", classes), ("latent", latent)),
            *(("condition", condition), ("examples", examples)),
        ):
            _check.count(where, name, size)
        if chunk is not None:
            _check.count(where, "chunk", chunk)
        given = _check_options(where, {} if options is None else options)
        self.spec, self.chunk, self.examples = spec, chunk, examples
        self.plan = TokenPlan(spec, "network" if chunk is None else "chunk", size=chunk)
        #: of the zoo's tensors, by which weights are standardised; ``None`` before :meth:`fit`
        self.statistics: Statistics | None = None
        self.classes = classes
        # In a list, so that it is no module of this one: the encoder has a copy of it.
        self._extractor = [extractor]
        self.config: dict[str, Any] = {
            **{"features": features, "classes": classes, "latent": latent, "form": form},
            **{"chunk": chunk, "condition": condition, "examples": examples, "drop": drop},
            "options": given,
        }
        self.register_buffer("floor", torch.full((spec.numel,), -torch.inf))
        try:
            self._build(0)
        except (TypeError, ValueError) as error:
            for part in (WeightVAE, DatasetEncoder, LatentDiffusion):
                message = str(error).removeprefix(f"{part.__name__}: ")
                if message != str(error):
                    raise type(error)(f"{where}: {message}") from None
            raise

    def _build(self, seed: int) -> None:
        """Make all parts anew, on the device of the buffers; the global generator is left as it was."""
        given, device = self.config, self.floor.device
        options = given["options"]
        chunks = None if self.chunk is None else self.plan.num_tokens
        total = given["latent"] * (chunks or 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder = WeightVAE(
                self.plan.size,
                given["latent"],
                form=given["form"],
                chunks=chunks,
                **options["autoencoder"],
            )
            self.encoder = DatasetEncoder(
                given["features"],
                given["classes"],
                given["condition"],
                extractor=self._extractor[0],
                **options["encoder"],
            )
            #: from latents to where they are compared with datasets
            self.projection = nn.Linear(total, given["condition"])
            self.log_temperature = nn.Parameter(torch.tensor(0.1).log())
            self.diffusion = LatentDiffusion(
                total, given["condition"], drop=given["drop"], **options["diffusion"]
            )
        self.register_buffer("latent_mean", torch.zeros(total))
        self.register_buffer("latent_scale", torch.ones(()))
        self.to(device).eval()

    def fit(
        self,
        flat: Tensor,
        tasks: Tensor,
        datasets: Sequence[Dataset],
        *,
        steps: tuple[int, int, int] = (1500, 500, 4000),
        batch: int = 128,
        rate: float = 1e-3,
        kl: float = 1e-4,
        noise: float = 0.02,
        decay: float = 0.995,
        redraws: int = 64,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: int = 500,
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Train all parts from the start, or go on from a checkpoint.

        A run that was stopped and goes on ends with the weights, bit for bit, of one that was not (same
        machine and number of threads). So does every run with the same seed.

        Args:
            flat: the zoo ``[N, P]``.
            tasks: of each network, int64 or int32 ``[N]``: which of ``datasets`` it was trained on.
            datasets: per task inputs ``[B, ...]``, floating, and classes ``[B]`` in ``0 .. K - 1``.
            steps: of the autoencoder, the alignment and the diffusion.
            batch: networks (chunks, for the autoencoder with ``chunk``) a step.
            rate: the learning rate at first; it falls to 0 along a cosine in each of the three.
            kl: weight of the divergence of latents from a normal distribution.
            noise: on the autoencoder's input, in standard deviations of weights.
            decay: of the moving average of the diffusion's parameters, which are the ones kept.
            redraws: of each dataset's examples that the diffusion sees.
            seed: of initial parameters and all random numbers.
            checkpoint: safetensors file to write to, whole or not at all, every so often, and to go
                on from where it exists.
            every: steps between checkpoints.
            progress: show bars on a terminal.

        Returns:
            Per stage the losses of all steps.

        Raises:
            ValueError: the zoo is no ``[N, P]``, holds no network or one that is not finite; a task is
                out of range; a dataset is empty, lacks a class or has one out of range; a number is out
                of range; the checkpoint can't be used, or is of another run.
            TypeError: an argument has the wrong type or dtype.
        """
        self._check_zoo(flat, tasks)
        index = ClassIndex("fit", datasets, self.classes)
        fault = _check.index_fault(tasks, len(datasets))
        if fault is not None:
            raise ValueError(f"fit: tasks{fault}, as there are {len(datasets)} datasets")
        if not isinstance(steps, (tuple, list)) or len(steps) != len(STAGES):
            raise TypeError(
                f"fit: steps must be three integers, of {', '.join(STAGES)}, not {_check.describe(steps)}"
            )
        for stage, count in zip(STAGES, steps, strict=True):
            _check.count("fit", f"steps of the {stage}", count, 0)
        _check.count("fit", "batch", batch)
        _check.count("fit", "redraws", redraws)
        _check.count("fit", "every", every)
        for name, value, high in (("rate", rate, 1.0), ("kl", kl, 1e9), ("noise", noise, 1e9)):
            _check.number("fit", name, value, 0, high)
        _check.number("fit", "decay", decay, 0, 1)
        _check.seed("fit", seed)
        _check.flag("fit", "progress", progress)
        path = None if checkpoint is None else _check.path("fit", "checkpoint", checkpoint)
        run = {
            **{"config": self.config, "spec": self.spec.digest, "steps": list(steps)},
            **{"batch": batch, "rate": rate, "kl": kl, "noise": noise, "decay": decay},
            **{"redraws": redraws, "seed": seed},
            **{"data": _digest(flat, tasks, *(t for pair in datasets for t in pair))},
        }
        self._build(seed)
        device = self.floor.device
        flat, tasks = flat.detach().to(device, torch.float32), tasks.to(device).long()
        index = index.to(device)
        self._standardise(flat)
        generator = torch.Generator(device).manual_seed(seed)
        training = Training(
            "fit",
            self,
            run,
            generator,
            path=path,
            every=every,
            progress=progress,
        )
        tokens = self._tokens(flat)

        def draw() -> Tensor:
            return torch.randint(len(flat), (batch,), generator=generator, device=device)

        def reconstruction() -> Tensor:
            rows, chunk = draw(), None
            if self.chunk is not None:
                size = (batch,)
                chunk = torch.randint(tokens.shape[1], size, generator=generator, device=device)
            x = tokens[rows] if chunk is None else tokens[rows, chunk]
            return self.autoencoder.loss(x, chunk, kl=kl, noise=noise, generator=generator)

        training.stage(
            STAGES[0], reconstruction, self.autoencoder.parameters(), steps=steps[0], rate=rate
        )
        latents = self._fit_latents(tokens)

        def alignment() -> Tensor:
            rows = draw()
            examples = index.draw(tasks[rows], self.examples, generator)
            vectors, networks = self.encoder(examples), self.projection(latents[rows])
            return alignment_loss(
                vectors, networks, temperature=self.log_temperature.exp().clamp(min=0.01)
            )

        aligned = [*self.encoder.parameters(), *self.projection.parameters(), self.log_temperature]
        training.stage(STAGES[1], alignment, aligned, steps=steps[1], rate=rate)

        vectors_of = self._conditions(index, len(datasets), redraws, seed)

        def denoising() -> Tensor:
            rows = draw()
            which = torch.randint(redraws, (batch,), generator=generator, device=device)
            return self.diffusion.loss(latents[rows], vectors_of[tasks[rows], which], generator)

        training.stage(
            STAGES[2],
            denoising,
            self.diffusion.parameters(),
            steps=steps[2],
            rate=rate,
            averaged=self.diffusion,
            decay=decay,
        )
        return training.losses

    @torch.no_grad()
    def generate(
        self,
        dataset: Dataset,
        num_networks: int,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> Tensor:
        """Networks ``[N, P]``, float32, for a dataset; each from other examples and other noise.

        Running variances, where the spec has any, are kept at least at the least of the zoo's.

        Args:
            dataset: inputs ``[B, ...]`` and classes ``[B]``, with an example of each class at least.
            num_networks: N.
            steps: evaluations of the denoiser.
            guidance: as :meth:`LatentDiffusion.sample` takes it.
            seed: of examples and noise.

        Raises:
            ValueError: the dataset is empty, lacks a class or has one out of range; a number is out of
                range.
            TypeError: an argument has the wrong type.
        """
        _check.count("generate", "num_networks", num_networks, 0)
        _check.seed("generate", seed)
        self.diffusion.check("generate", steps, guidance)
        device = self.floor.device
        check_dataset("generate", "dataset", dataset, self.classes)
        index = ClassIndex("generate", [dataset], self.classes).to(device)
        generator = torch.Generator(device).manual_seed(seed)
        tasks = torch.zeros(num_networks, dtype=torch.int64, device=device)
        condition = self.encoder(index.draw(tasks, self.examples, generator))
        z = self.diffusion.sample(condition, generator, steps=steps, guidance=guidance)
        return self._decode(z * self.latent_scale + self.latent_mean)

    @torch.no_grad()
    def reconstruct(self, flat: Tensor) -> Tensor:
        """Networks ``[N, P]`` as the autoencoder gives them back, float32.

        Raises:
            ValueError: ``flat`` is no ``[N, P]``.
            TypeError: ``flat`` is no tensor.
        """
        _check.tensor("reconstruct", "flat", flat, "[N, P]", 2)
        self.spec.check_flat("reconstruct", flat)
        _check.floating("reconstruct", "flat", flat)
        if flat.is_meta:
            raise ValueError("reconstruct: flat is on meta, where tensors hold no values")
        flat = flat.to(self.floor.device, torch.float32)
        return self._decode(self.autoencoder.encode(self._tokens(flat))[0].flatten(1))

    def save(self, path: str | Path) -> None:
        """Write the model as one safetensors file, whole or not at all.

        Raises:
            ValueError: the file can't be written.
        """
        found = self.statistics and self.statistics.to_json()
        description = {"config": self.config, "spec": self.spec.to_json(), "statistics": found}
        write_described("save", _check.path("save", "path", path), self.state_dict(), description)

    @classmethod
    def load(cls, path: str | Path, *, extractor: nn.Module | None = None) -> WeightGenerator:
        """Read a model that :meth:`save` wrote; ``extractor`` as it was made with, in any state.

        Raises:
            ValueError: the file can't be read, or holds no such model.
        """
        path = _check.path("load", "path", path)
        tensors, description = read_described("load", path)
        if "config" not in description:
            raise CheckpointError(
                f"load: {path}: is a checkpoint of a training, but no trained model"
            )
        spec = WeightSpec.from_json(description["spec"])
        config = dict(description["config"])
        sizes = config.pop("features"), config.pop("classes")
        if not (extractor is None or isinstance(extractor, nn.Module)):
            raise TypeError(
                f"load: extractor must be a module or None, not {_check.describe(extractor)}"
            )
        model = cls(spec, *sizes, extractor=extractor, **config)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"load: {path}: does not fit the model: {reason}") from None
        if description["statistics"] is not None:
            model.statistics = Statistics.from_json(description["statistics"], spec=spec)
        return model

    def _check_zoo(self, flat: Tensor, tasks: Tensor) -> None:
        _check.tensor("fit", "flat", flat, "[N, P]", 2)
        self.spec.check_flat("fit", flat)
        _check.floating("fit", "flat", flat)
        if flat.is_meta:
            raise ValueError("fit: flat is on meta, where tensors hold no values")
        if not len(flat):
            raise ValueError("fit: flat holds no network")
        _check.finite("fit", "flat", flat.float())
        _check.tensor("fit", "tasks", tasks, "[N]", 1)
        _check.index_dtype("fit", "tasks", tasks)
        _check.same_device("fit", "tasks", tasks, "flat", flat)
        _check.size("fit", "tasks", len(tasks), len(flat), "flat's axis 0")

    def _standardise(self, flat: Tensor) -> None:
        """Mean and deviation of each tensor over the zoo, and the least of its running variances."""
        self.statistics = statistics(flat, self.spec)
        for name, weights in self.spec.unflatten(flat).items():
            if name.endswith("running_var"):
                self.spec.unflatten(self.floor)[name].fill_(weights.min())

    def _tokens(self, flat: Tensor) -> Tensor:
        """Standardised, ``[N, T, D]``; whole networks are one token."""
        return pack(flat, self.plan, statistics=self.statistics)

    def _decode(self, z: Tensor) -> Tensor:
        x = self.autoencoder.decode(z.unflatten(1, (-1, self.autoencoder.latent)))
        return torch.maximum(unpack(x, self.plan, statistics=self.statistics), self.floor)

    @torch.no_grad()
    def _conditions(self, index: ClassIndex, tasks: int, redraws: int, seed: int) -> Tensor:
        """Vectors ``[T, R, E]`` of all datasets, each from other examples."""
        device = self.floor.device
        # Random numbers of their own, so that a stage that goes on sees the same.
        generator = torch.Generator(device).manual_seed((seed + 1) % 2**64)
        all_tasks = torch.arange(tasks, device=device).repeat_interleave(redraws)
        vectors = [
            self.encoder(index.draw(some, self.examples, generator))
            for some in all_tasks.split(128)
        ]
        return torch.cat(vectors).unflatten(0, (tasks, redraws))

    @torch.no_grad()
    def _fit_latents(self, tokens: Tensor) -> Tensor:
        """The zoo's latents ``[N, T L]``, centred and of unit variance over all."""
        latents = self.autoencoder.encode(tokens)[0].flatten(1)
        self.latent_mean.copy_(latents.mean(0))
        self.latent_scale.copy_((latents - self.latent_mean).square().mean().sqrt())
        return (latents - self.latent_mean) / self.latent_scale


def _check_options(where: str, options: Any) -> dict[str, dict[str, Any]]:
    """Options by part; parts that are not named have none."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{where}: options must map parts to options, not {_check.describe(options)}"
        )
    for part, named in options.items():
        _check.choice(where, "options", part, tuple(OPTIONS))
        if not isinstance(named, Mapping):
            raise TypeError(
                f"{where}: options[{part!r}] must map names to values, not {_check.describe(named)}"
            )
        for name in named:
            _check.choice(where, f"options[{part!r}]", name, OPTIONS[part])
    return {part: dict(options.get(part, {})) for part in OPTIONS}


def _digest(*tensors: Tensor) -> str:
    """A fingerprint of data, so that no training goes on with others."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(data.numpy().tobytes())
    return found.hexdigest()
