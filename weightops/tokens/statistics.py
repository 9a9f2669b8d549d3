"""Means and deviations of a zoo's weights, in one pass."""

from __future__ import annotations

import json
from math import prod

import torch
from torch import Tensor

from weightops import _check
from weightops.ops.tokens import token_moments
from weightops.spec import WeightSpec
from weightops.tokens._arguments import check_networks, read_json
from weightops.tokens.plan import TokenPlan

PER = ("layer", "all")
#: networks whose moments are held at once
_BATCH = 1024


class Statistics:
    """Mean and standard deviation of networks' weights, for each tensor or for all weights together.

    They are gathered in float64, in one pass over any number of batches (Chan, Golub and LeVeque
    1983)::

        found = Statistics(spec)
        for flat in batches:
            found.update(flat)

    Args:
        spec: axes and layout of the networks, or a :class:`TokenPlan` of them.
        per: ``"layer"``, a mean and a deviation for each tensor, or ``"all"``, one for all.

    Raises:
        ValueError: ``per`` is unknown.
        TypeError: an argument has the wrong type.
    """

    def __init__(self, spec: WeightSpec | TokenPlan, *, per: str = "layer") -> None:
        self._spec = _spec_of("Statistics", spec)
        _check.choice("Statistics", "per", per, PER)
        self._per = per
        self._count = 0
        self._sizes = [prod(shape) for shape in self._spec.shapes.values()]
        self._mean = torch.zeros(len(self._sizes), dtype=torch.float64)
        self._squares = torch.zeros_like(self._mean)

    @property
    def spec(self) -> WeightSpec:
        """Axes and layout of the networks."""
        return self._spec

    @property
    def per(self) -> str:
        """``"layer"`` or ``"all"``."""
        return self._per

    @property
    def count(self) -> int:
        """Number of networks seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """float64: ``[tensors]`` in the order of the spec, ``[]`` for ``"all"``; zero before any network."""
        return self._moments()[0]

    @property
    def std(self) -> Tensor:
        """As :attr:`mean`, the deviations: roots of the mean squares, not of the unbiased ones."""
        return self._moments()[1]

    @torch.no_grad()
    def update(self, flat: Tensor) -> Statistics:
        """Add networks ``[N, P]`` or one ``[P]``, and return ``self``.

        Raises:
            ValueError: the shape is another, or a weight is not finite; nothing is added.
            TypeError: ``flat`` is no tensor of float16, bfloat16, float32 or float64.
        """
        self._add("update", flat)
        return self

    def _add(self, where: str, flat: Tensor) -> None:
        check_networks(where, flat, self._spec)
        if flat.is_meta:
            raise ValueError(f"{where}: flat is on meta, where tensors hold no values")
        rows = flat.detach() if flat.dim() == 2 else flat.detach()[None]
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        count, mean, squares = self._count, self._mean, self._squares
        for batch in rows.split(_BATCH):
            found = token_moments(batch, self._sizes).cpu()
            if not torch.isfinite(found).all():
                _check.finite(where, "flat", flat)
                raise ValueError(f"{where}: flat has weights whose squares are no finite sum")
            if not len(found):
                continue
            means, total = found[..., 0], float(count + len(found))
            # From the first, so that constants stay exact.
            own = means[0] + (means - means[0]).mean(0)
            away = own - mean if count else torch.zeros_like(mean)
            squares = squares + found[..., 1].sum(0) + sizes * (means - own).square().sum(0)
            squares = squares + sizes * away.square() * (count * (len(found) / total))
            mean = mean + away * (len(found) / total) if count else own
            count += len(found)
        self._count, self._mean, self._squares = count, mean, squares

    def _moments(self) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        mean, squares = self._mean, self._squares
        if self._per == "all":
            share = sizes / max(1, self._spec.numel)
            filled = sizes > 0
            origin = mean[filled][:1].sum()
            total = origin + (share * (mean - origin)).sum()
            squares = (squares + self._count * sizes * (mean - total).square())[filled].sum()
            mean, sizes = total, sizes.sum()
        return mean.clone(), (squares / (sizes * self._count).clamp(min=1)).sqrt()

    def _factors(self, like: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Shift and scale ``[tensors]`` as the ops take them; ``inverse`` to divide by the deviation."""
        mean, std = (each.expand(len(self._sizes)) for each in self._moments())
        # Below float32's normal numbers a division would overflow.
        std = torch.where(std < torch.finfo(torch.float32).tiny, 1.0, std)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        scale = 1 / std if inverse else std
        return mean.to(like.device, dtype), scale.to(like.device, dtype)

    def to_json(self) -> str:
        """The statistics, with their spec, as JSON; :meth:`from_json` reads them back, to the bit."""
        return json.dumps(
            {
                "per": self._per,
                "count": self._count,
                "mean": self._mean.tolist(),
                "squares": self._squares.tolist(),
                "spec": json.loads(self._spec.to_json()),
            }
        )

    @classmethod
    def from_json(cls, text: str, *, spec: WeightSpec | None = None) -> Statistics:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            spec: the spec that the statistics are to fit, where that is to be checked.

        Raises:
            ValueError: ``text`` is something else, or the statistics are of another spec.
            TypeError: an argument has the wrong type.
        """
        where = "Statistics.from_json"
        data = read_json(where, "Statistics", text, spec)
        try:
            found = cls(data["spec"], per=data["per"])
            _check.count(where, "count", data["count"], 0)
            found._count = data["count"]
            for name in ("mean", "squares"):
                values = torch.tensor(data[name], dtype=torch.float64)
                if values.shape != found._mean.shape or not torch.isfinite(values).all():
                    raise ValueError(f"{name} must be {len(found._sizes)} finite numbers")
                setattr(found, f"_{name}", values)
            if (found._squares < 0).any():
                raise ValueError("squares must not be negative")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: text is not Statistics: {error!r}") from None
        return found

    def __repr__(self) -> str:
        return (
            f"Statistics(per={self._per!r}: {self._count:,} networks of {len(self._sizes)} tensors)"
        )

    def __reduce__(self) -> tuple:
        return Statistics.from_json, (self.to_json(),)


def statistics(flat: Tensor, spec: WeightSpec | TokenPlan, *, per: str = "layer") -> Statistics:
    """Mean and standard deviation of networks' weights, read once.

    Args:
        flat: networks ``[N, P]`` or one ``[P]``; float16, bfloat16, float32 or float64.
        spec: their spec, or a plan of them.
        per: ``"layer"``, a mean and a deviation for each tensor, or ``"all"``, one for all.

    Returns:
        :class:`Statistics`, to which more networks may be added.

    Raises:
        ValueError: the shape is another, ``per`` is unknown, or a weight is not finite.
        TypeError: an argument has the wrong type or dtype.
    """
    where = "statistics"
    spec = _spec_of(where, spec)
    _check.choice(where, "per", per, PER)
    found = Statistics(spec, per=per)
    found._add(where, flat)
    return found


def _spec_of(where: str, spec: WeightSpec | TokenPlan) -> WeightSpec:
    if isinstance(spec, TokenPlan):
        return spec.spec
    if not isinstance(spec, WeightSpec):
        raise TypeError(
            f"{where}: spec must be a WeightSpec or a TokenPlan, not {_check.describe(spec)}"
        )
    return spec
