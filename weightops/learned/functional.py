"""Functionals: from what a learned optimizer sees of every weight to what it adds to the momentum."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from weightops import _check, _op
from weightops._checkpoints import CheckpointError, read_described, write_described
from weightops.learned._architecture import check_outline, outline
from weightops.learned._features import FEATURES, TIMES
from weightops.nn._arguments import is_spec, plan_of
from weightops.ops.equivariant import EquivariantPlan, equivariant_linear, equivariant_stack
from weightops.ops.equivariant.basis import Term
from weightops.spec import WeightSpec

#: kind -> how its equivariant layers take fixed axes; ``None``: it has none
KINDS = {"unf": "permute", "nfn": "index", "deep_sets": None}
_FORMAT, _VERSION = "weightops functional", 1


class Functional(nn.Module):
    """f of a learned optimizer: layers that see one weight each, then equivariant ones, relu between.

    With the standard options the paper's: 19 -> 32 -> 32 -> 32 for every weight alike, then 32 -> 1 by a layer that
    sees the whole network (Zhou, Finn and Harrison, arXiv 2402.05232, section 4.2, and the code of its experiments).

    Args:
        spec: the weight space of the networks to train.
        kind: the last layers: ``"unf"``, all equivariant maps; ``"nfn"``, those that do not permute axes without a
            label, whose positions have parameters of their own (NFN's hidden-only setting, arXiv 2302.14040);
            ``"deep_sets"``, maps of single weights there too.
        hidden: channels between layers.
        layers: number of all layers.
        equivariant: how many of them, the last ones, see the whole network.
        eps: added to the mean squares by which features are scaled.
        device, dtype: of the parameters.

    Attributes:
        weights, biases: of the layers, ``[T, C_in, C_out]`` and ``[num_biases, C_out]`` as of
            :class:`~weightops.nn.EquivariantLinear`, T = 1 where one weight is seen. No shape depends on the widths of
            the networks, save with ``"nfn"`` on the axes without a label.

    Raises:
        ValueError: an option is unknown or out of range, or the parameters are too large.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        spec: WeightSpec,
        kind: str = "unf",
        *,
        hidden: int = 32,
        layers: int = 4,
        equivariant: int = 1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "Functional"
        is_spec(where, "spec", spec)
        _check.choice(where, "kind", kind, tuple(KINDS))
        _check.count(where, "hidden", hidden)
        _check.count(where, "layers", layers)
        _check.count(where, "equivariant", equivariant)
        _check.number(where, "eps", eps, 0, 1)
        if equivariant > layers:
            raise ValueError(
                f"{where}: equivariant must be at most layers, {layers}, not {equivariant}"
            )
        self.spec, self.kind, self.eps = spec, kind, float(eps)
        self.hidden, self.equivariant = hidden, equivariant
        widths = [FEATURES + TIMES, *[hidden] * (layers - 1), 1]
        self._plans = self._make_plans(spec, layers)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for plan, into, out in zip(self._plans, widths[:-1], widths[1:], strict=True):
            plan.check_size(into, out, dtype or torch.get_default_dtype())
            options: dict[str, Any] = {"device": device, "dtype": dtype}
            self.weights.append(torch.empty(plan.num_terms, into, out, **options))
            self.biases.append(torch.empty(plan.num_biases, out, **options))
        self.reset_parameters()

    def _make_plans(self, spec: WeightSpec, layers: int) -> list[EquivariantPlan]:
        fixed, single = KINDS[self.kind], _pointwise_plan(spec)
        if fixed is None:
            return [single] * layers
        plan = plan_of(spec, None, fixed=fixed, terms="full", normalize="mean")
        return [single] * (layers - self.equivariant) + [plan] * self.equivariant

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights of variance 1 / fan-in, and set biases to zero."""
        for plan, weight, bias in zip(self._plans, self.weights, self.biases, strict=True):
            counts = torch.tensor(plan.terms_per_output, device=weight.device)
            fan_in = (counts * weight.shape[1]).repeat_interleave(counts)
            weight.normal_().mul_(fan_in.to(weight).rsqrt()[:, None, None])
            bias.zero_()

    @property
    def num_parameters(self) -> int:
        """D: numbers of all layers."""
        return sum(p.numel() for p in self.parameters())

    def flatten(self) -> Tensor:
        """The parameters as one vector ``[D]``, a copy."""
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    @torch.no_grad()
    def load_flat_(self, theta: Tensor) -> Functional:
        """Take the parameters from a vector ``[D]``, and return the functional.

        Raises:
            ValueError: ``theta`` is not D long.
            TypeError: ``theta`` is no floating point tensor.
        """
        where = "Functional.load_flat_"
        _check.tensor(where, "theta", theta, "[D]", 1)
        _check.floating(where, "theta", theta)
        _check.size(where, "theta", len(theta), self.num_parameters, "the functional")
        for parameter, values in zip(self.parameters(), self._views(theta), strict=True):
            parameter.copy_(values)
        return self

    def forward(self, x: Tensor, time: Tensor, theta: Tensor | None = None) -> Tensor:
        """f of every weight.

        Args:
            x: weight, gradient and six momenta, each over its root mean square, ``[N, P, 8]``.
            time: what all weights of a network share: ``[11]``, or ``[N, 11]``.
            theta: parameters ``[D]`` in the place of the functional's own, or each network's, ``[N, D]``.

        Returns:
            ``[N, P]``.

        Raises:
            ValueError: shapes do not fit.
            TypeError: an argument is no floating point tensor, or not of the parameters' dtype.
        """
        self._check("Functional.forward", x, time, theta)
        parameters: list[Tensor] = list(self.parameters()) if theta is None else self._views(theta)
        layers = len(self._plans)
        weights, biases = parameters[:layers], parameters[layers:]
        if KINDS[self.kind] is None or self.equivariant < layers:
            # What all weights share is summed once, with the bias.
            shared = (time[..., None, None, :] @ weights[0][..., FEATURES:, :])[..., 0, :]
            weights[0], biases[0] = weights[0][..., :FEATURES, :], biases[0] + shared
        else:
            times = time if time.dim() == 2 else time.expand(len(x), -1)
            x = torch.cat([x, times[:, None].expand(-1, x.shape[1], -1)], -1)
        plain = not (torch.is_grad_enabled() or _op._transforms_active())
        for first, end in self._runs():
            plan, activate = self._plans[first], end < layers
            if plain:
                some = weights[first:end], biases[first:end]
                x = equivariant_stack(x, *some, plan, activate_last=activate)
                continue
            for n in range(first, end):
                x = equivariant_linear(x, weights[n], biases[n], plan)
                x = x.relu() if n + 1 < layers else x
        return x[..., 0]

    def _runs(self) -> list[tuple[int, int]]:
        """First and end of layers of one plan."""
        layers = len(self._plans)
        middle = layers if KINDS[self.kind] is None else layers - self.equivariant
        return [(a, b) for a, b in ((0, middle), (middle, layers)) if a < b]

    def on(self, spec: WeightSpec) -> Functional:
        """The functional for networks of other widths: with the same parameters, not copies of them.

        Raises:
            ValueError: ``spec`` is of another architecture, and what differs.
            TypeError: ``spec`` is no WeightSpec.
        """
        return self._on("Functional.on", spec)

    def _on(self, where: str, spec: WeightSpec) -> Functional:
        is_spec(where, "spec", spec)
        if spec == self.spec:
            return self
        fixed = KINDS[self.kind]
        if fixed is not None:
            sizes = fixed != "permute"
            check_outline(where, spec, sizes, outline(self.spec, sizes), list(self.spec.shapes))
        other = copy.copy(self)
        other.spec, other._plans = spec, self._make_plans(spec, len(self._plans))
        return other

    def copy(self) -> Functional:
        """The same with parameters of its own."""
        other = copy.copy(self)
        own = [
            nn.ParameterList(p.detach().clone() for p in of) for of in (self.weights, self.biases)
        ]
        vars(other)["_modules"] = dict(zip(("weights", "biases"), own, strict=True))
        return other

    def flops(self) -> int:
        """Two a multiplication of channels, for one network."""
        return sum(
            2 * plan.products * weight.shape[1] * weight.shape[2]
            for plan, weight in zip(self._plans, self.weights, strict=True)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters, and what networks they are for but for their widths, as one safetensors file.

        Raises:
            ValueError: the file can't be written.
        """
        self._write("Functional.save", path, {})

    def _write(self, where: str, path: Any, more: dict[str, Any]) -> None:
        fixed = KINDS[self.kind]
        description = {
            **{"format": _FORMAT, "version": _VERSION, "options": self._options()},
            "outline": None if fixed is None else outline(self.spec, fixed != "permute"),
            "names": list(self.spec.shapes),
        }
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_described(where, _check.path(where, "path", path), state, description | more)

    @classmethod
    def load(cls, path: str | os.PathLike[str], spec: WeightSpec) -> Functional:
        """Read what :meth:`save` or :meth:`LearnedOptimizer.save` wrote, for networks of ``spec``, whatever their widths.

        Raises:
            ValueError: the file can't be read or holds no functional, or ``spec`` is of another architecture.
            TypeError: an argument has the wrong type.
        """
        return cls._read("Functional.load", path, spec)[0]

    @classmethod
    def _read(cls, where: str, path: Any, spec: Any) -> tuple[Functional, dict[str, Any]]:
        path = _check.path(where, "path", path)
        is_spec(where, "spec", spec)
        tensors, description = read_described(where, path)
        if description.get("format") != _FORMAT:
            raise CheckpointError(f"{where}: {path}: holds no functional")
        if description.get("version") != _VERSION:
            raise CheckpointError(
                f"{where}: {path}: has version {description.get('version')!r} of the format, "
                f"this library reads {_VERSION}"
            )
        try:
            options, wanted = description["options"], description["outline"]
            sizes, names = KINDS[options["kind"]] != "permute", description["names"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: {path}: holds no functional: {error!r}") from None
        if wanted is not None:
            check_outline(where, spec, sizes, wanted, names)
        try:
            made = cls(spec, **options, dtype=next(iter(tensors.values())).dtype)
        except TypeError as error:
            raise CheckpointError(f"{where}: {path}: holds no functional: {error}") from None
        try:
            made.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{where}: {path}: does not fit: {reason}") from None
        return made, description

    def _options(self) -> dict[str, Any]:
        return {
            **{"kind": self.kind, "hidden": self.hidden, "layers": len(self._plans)},
            **{"equivariant": self.equivariant, "eps": self.eps},
        }

    def _views(self, theta: Tensor) -> list[Tensor]:
        """``theta`` ``[..., D]`` as the parameters, which have its leading axes."""
        sizes = [p.numel() for p in self.parameters()]
        pieces = theta.split(sizes, -1)
        return [
            piece.unflatten(-1, p.shape) for piece, p in zip(pieces, self.parameters(), strict=True)
        ]

    def _check(self, where: str, x: Any, time: Any, theta: Any) -> None:
        _check.tensor(where, "x", x, "[N, P, 8]", 3)
        if list(x.shape[1:]) != [self.spec.numel, FEATURES]:
            raise ValueError(
                f"{where}: x must have shape [N, {self.spec.numel}, {FEATURES}], not {list(x.shape)}"
            )
        _check.tensor(where, "time", time, "[11] or [N, 11]")
        if list(time.shape) not in ([TIMES], [len(x), TIMES]):
            raise ValueError(
                f"{where}: time must have shape [{TIMES}] or [{len(x)}, {TIMES}], not {list(time.shape)}"
            )
        self._check_theta(where, theta, len(x))
        own = self.weights[0] if theta is None else theta
        for name, value in (("x", x), ("time", time)):
            _check.same_device(where, name, value, "theta", own)
            if value.dtype != own.dtype:
                raise TypeError(f"{where}: {name} is {value.dtype}, but theta is {own.dtype}")

    def _check_theta(self, where: str, theta: Any, networks: int) -> None:
        if theta is None:
            return
        count = self.num_parameters
        _check.tensor(where, "theta", theta, "[D] or [N, D]")
        _check.floating(where, "theta", theta)
        if list(theta.shape) not in ([count], [networks, count]):
            raise ValueError(
                f"{where}: theta must have shape [{count}] or [{networks}, {count}], not {list(theta.shape)}"
            )

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{len(self.spec.shapes)} tensors, {options}"


def _pointwise_plan(spec: WeightSpec) -> EquivariantPlan:
    """Of the maps that see one weight each, alike for all: of all weights as one vector, the identity."""
    cached = spec._cache.setdefault("pointwise", [])
    if not cached:
        vector = WeightSpec({"weights": ("weight",)}, {"weights": (spec.numel,)})
        cached.append(EquivariantPlan(vector, terms=_is_identity))
    return cached[0]


def _is_identity(term: Term) -> bool:
    return term.input_indices == term.output_indices
