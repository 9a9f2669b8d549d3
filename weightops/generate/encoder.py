"""Datasets as vectors: a Set Transformer over a few examples a class, aligned with networks' latents."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from weightops import _check

#: inputs ``[B, ...]`` and classes ``[B]``
Dataset: TypeAlias = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multihead attention block MAB(X, Y) (Set Transformer, equations 6 and 7), norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``[B, n, E]`` from ``x`` ``[B, n, E]``, which looks at ``y`` ``[B, m, E]``."""
        y = self.norm_y(y)
        h = x + self.attention(self.norm_x(x), y, y, need_weights=False)[0]
        return h + self.feed(h)


class InducedAttention(nn.Module):
    """ISAB (equations 9 and 10): a set looks at itself through learned points, at linear cost."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.points = nn.Parameter(0.5 * torch.randn(points, width))
        self.gather, self.spread = Attention(width, heads), Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(x, self.gather(self.points.expand(len(x), -1, -1), x))


class AttentionPool(nn.Module):
    """PMA (equation 11): ``[B, k, E]`` from sets ``[B, n, E]``, one vector for each learned seed."""

    def __init__(self, width: int, heads: int, seeds: int) -> None:
        super().__init__()
        self.seeds = nn.Parameter(0.5 * torch.randn(seeds, width))
        self.attention = Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.seeds.expand(len(x), -1, -1), x)


class DatasetEncoder(nn.Module):
    """A vector for a classification dataset, from a few examples of each class.

    A Set Transformer makes a vector of each class's examples, whose order has no influence; another
    one, which is told the classes apart by a learned embedding, makes one vector of them all.

    Source: Soro et al. 2024, arXiv 2402.18153, section 3.3; Lee et al. 2019, "Set Transformer",
    arXiv 1810.00825.

    Args:
        features: F, entries of an example as the extractor gives it.
        classes: K.
        width: E, entries of the dataset's vector.
        hidden: width of the Set Transformers, a multiple of ``heads``.
        heads: of attention.
        points: that a set looks at itself through (inducing points).
        extractor: module from examples ``[n, ...]`` to ``[n, F]``, of which a copy is kept; by default
            they are flattened. Its parameters are trained where they require gradients.

    Raises:
        ValueError: a size is not positive, or ``hidden`` is no multiple of ``heads``.
        TypeError: a size is no integer, ``extractor`` no module.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        width: int,
        *,
        hidden: int = 64,
        heads: int = 4,
        points: int = 16,
        extractor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sizes = {"features": features, "classes": classes, "width": width, "hidden": hidden}
        for name, size in (sizes | {"heads": heads, "points": points}).items():
            _check.count("DatasetEncoder", name, size)
        if hidden % heads:
            raise ValueError(f"DatasetEncoder: hidden {hidden} must be a multiple of heads {heads}")
        if not (extractor is None or isinstance(extractor, nn.Module)):
            raise TypeError(
                f"DatasetEncoder: extractor must be a module or None, not {_check.describe(extractor)}"
            )
        self.features, self.classes = features, classes
        self.extractor = nn.Flatten() if extractor is None else deepcopy(extractor)
        self.enter = nn.Linear(features, hidden)
        self.within = nn.Sequential(
            InducedAttention(hidden, heads, points), AttentionPool(hidden, heads, 1)
        )
        self.label = nn.Parameter(0.5 * torch.randn(classes, hidden))
        self.across = InducedAttention(hidden, heads, points)
        self.leave = nn.Sequential(
            nn.LayerNorm(hidden), nn.Flatten(), nn.Linear(classes * hidden, width)
        )

    def forward(self, examples: Tensor) -> Tensor:
        """``[B, E]`` from examples ``[B, K, S, ...]`` of K classes, S of each.

        Raises:
            ValueError: not K classes, no examples, or the extractor does not give ``[n, F]``.
            TypeError: ``examples`` is no tensor, or what is extracted has another dtype than the weights.
        """
        where = "DatasetEncoder.forward"
        _check.tensor(where, "examples", examples, "[B, K, S, ...]")
        _check.same_device(where, "examples", examples, "the model", self.label)
        if examples.dim() < 4 or examples.shape[1] != self.classes or not examples.shape[2]:
            raise ValueError(
                f"{where}: examples must have shape [B, {self.classes}, S, ...] with S > 0, "
                f"not {list(examples.shape)}"
            )
        sets = examples.shape[:3]
        features = self.extractor(examples.flatten(0, 2))
        if list(features.shape) != [sets.numel(), self.features]:
            raise ValueError(
                f"{where}: the extractor must give features {[sets.numel(), self.features]}, "
                f"not {list(features.shape)}"
            )
        if features.dtype != self.label.dtype:
            raise TypeError(
                f"{where}: the extractor must give {self.label.dtype} features, not {features.dtype}; "
                "by default they are the examples themselves"
            )
        pooled = self.within(self.enter(features).unflatten(0, (sets[0] * sets[1], sets[2])))
        return self.leave(self.across(pooled.flatten(0, 1).unflatten(0, sets[:2]) + self.label))


class ClassIndex:
    """Datasets by task and class, from which examples are drawn for many tasks at once.

    Args:
        where: the function that messages name.
        datasets: per task inputs ``[B, ...]`` and classes int64 or int32 ``[B]`` in ``0 .. K - 1``; all
            inputs of one shape.
        classes: K.

    Raises:
        ValueError: there is no dataset, one holds no example, or none of a class; shapes differ; a
            class is out of range; inputs are not finite.
        TypeError: a dataset is no pair of tensors, inputs are not floating, classes no integers.
    """

    def __init__(self, where: str, datasets: Sequence[Dataset], classes: int) -> None:
        if not isinstance(datasets, Sequence) or isinstance(datasets, str) or not datasets:
            raise TypeError(
                f"{where}: datasets must be a non-empty list of (inputs, labels), "
                f"not {_check.describe(datasets)}"
            )
        for n, dataset in enumerate(datasets):
            check_dataset(where, f"datasets[{n}]", dataset, classes)
            (inputs, _), (first, _) = dataset, datasets[0]
            _check.same_device(where, f"datasets[{n}]'s inputs", inputs, "datasets[0]'s", first)
            if inputs.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{where}: datasets[{n}] has inputs {list(inputs.shape[1:])}, "
                    f"datasets[0] has {list(first.shape[1:])}"
                )
        self.inputs = torch.cat([inputs for inputs, _ in datasets]).float()
        labels = torch.cat([labels.long() + n * classes for n, (_, labels) in enumerate(datasets)])
        #: examples, those of each task's first class first, and where each class's begin
        self.order = labels.argsort(stable=True)
        self.counts = labels.bincount(minlength=len(datasets) * classes).view(-1, classes)
        self.begins = (self.counts.view(-1).cumsum(0) - self.counts.view(-1)).view(-1, classes)

    def to(self, device: torch.device) -> ClassIndex:
        """Moved to a device, in place."""
        for name in ("inputs", "order", "counts", "begins"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, tasks: Tensor, examples: int, generator: torch.Generator) -> Tensor:
        """Examples ``[B, K, S, ...]`` of tasks ``[B]``, S independent draws (with replacement) a class."""
        counts = self.counts[tasks].unsqueeze(-1)
        # In float32 a product with a large count could round up to it.
        shape = (*counts.shape[:-1], examples)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=counts.device)
        at = self.begins[tasks].unsqueeze(-1) + (uniform * counts).long()
        return self.inputs[self.order[at]]


def check_dataset(where: str, name: str, dataset: Any, classes: int) -> None:
    """``dataset`` must be one that each of K classes can be drawn from."""
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        raise TypeError(
            f"{where}: {name} must be a pair (inputs, labels), not {_check.describe(dataset)}"
        )
    inputs, labels = dataset
    _check.tensor(where, f"{name}'s inputs", inputs, "[B, ...]")
    _check.tensor(where, f"{name}'s labels", labels, "[B]", 1)
    _check.floating(where, f"{name}'s inputs", inputs)
    _check.index_dtype(where, f"{name}'s labels", labels)
    _check.same_device(where, f"{name}'s labels", labels, "inputs", inputs)
    if inputs.is_meta:
        raise ValueError(f"{where}: {name} is on meta, where tensors hold no values")
    if inputs.dim() < 2:
        raise ValueError(
            f"{where}: {name}'s inputs must have shape [B, ...], not {list(inputs.shape)}"
        )
    _check.size(where, f"{name}'s labels", len(labels), len(inputs), "its inputs")
    if not len(inputs):
        raise ValueError(f"{where}: {name} holds no example")
    fault = _check.index_fault(labels, classes)
    if fault is not None:
        raise ValueError(f"{where}: {name}'s labels{fault}")
    _check.finite(where, f"{name}'s inputs", inputs)
    empty = (labels.long().bincount(minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{where}: {name} has no example of class {', '.join(map(str, empty))}")


def alignment_loss(
    datasets: Tensor, networks: Tensor, *, temperature: Tensor | float = 0.1
) -> Tensor:
    """Contrastive loss, a scalar, of datasets' vectors and those of networks that belong to them.

    As CLIP's, over the cosines of all pairs of a batch, but a pair's target is not 1 or 0: networks of
    one task belong to its dataset alike, so targets are the softmax of the mean of the cosines within
    datasets and within networks. They get no gradients.

    Args:
        datasets: ``[B, E]``.
        networks: ``[B, E]``; row n belongs to row n of ``datasets``.
        temperature: that cosines are divided by; a number, or a tensor of no axis where it is learned.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3; targets as in Soro et al. 2024,
    arXiv 2402.18153, section 3.3.

    Raises:
        ValueError: shapes are not ``[B, E]``, or differ.
        TypeError: an argument is no tensor, or dtypes are not floating or differ.
    """
    _check.tensor("alignment_loss", "datasets", datasets, "[B, E]", 2)
    _check.tensor("alignment_loss", "networks", networks, "[B, E]", 2)
    if datasets.shape != networks.shape:
        raise ValueError(
            f"alignment_loss: networks must have shape {list(datasets.shape)} as datasets, "
            f"not {list(networks.shape)}"
        )
    for name, value in (("datasets", datasets), ("networks", networks)):
        _check.floating("alignment_loss", name, value)
    _check.same_device("alignment_loss", "networks", networks, "datasets", datasets)
    if networks.dtype != datasets.dtype:
        raise TypeError(
            f"alignment_loss: networks is {networks.dtype}, but datasets is {datasets.dtype}"
        )
    if not isinstance(temperature, Tensor):
        _check.number("alignment_loss", "temperature", temperature, 1e-6, inf)
    elif temperature.dim() or temperature.is_sparse or not temperature.is_floating_point():
        raise TypeError(
            "alignment_loss: temperature must be a number or a floating tensor of no axis, "
            f"not {_check.describe(temperature)}"
        )
    else:
        _check.same_device("alignment_loss", "temperature", temperature, "datasets", datasets)
    a, b = normalize(datasets, dim=-1), normalize(networks, dim=-1)
    logits = a @ b.mT / temperature
    with torch.no_grad():
        targets = ((a @ a.mT + b @ b.mT) / (2 * temperature)).softmax(-1)
    rows = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    columns = -(targets.mT * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2
