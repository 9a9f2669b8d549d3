"""An optimizer of torch whose update is learned."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weightops import _check
from weightops._checkpoints import CheckpointError
from weightops.learned._cost import StepCost, measure
from weightops.learned._rule import all_finite, check_number, decays_of, propose
from weightops.learned.functional import Functional
from weightops.nn._arguments import is_spec
from weightops.spec import WeightSpec

WHERE = "LearnedOptimizer"
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
_FIELDS = ("spec", "functional", "momentum", "nonfinite", "skipped", "_model", "_params", "_names")


class LearnedOptimizer(Optimizer):
    """Trains a model by ``W <- W - alpha (m + beta f)``, f a functional of all its weights (arXiv 2402.05232).

    ``m <- momentum m + (1 - momentum) gradient``, so without f this is SGD with momentum and the learning rate
    ``alpha (1 - momentum)``. f sees every weight, gradient and six momenta, each over its root mean square in the
    tensor, and the time.

    It takes the model, not its parameters: f is of the whole network, of buffers and of parameters that are not
    trained too, and knows tensors by the names that the spec has of the model. What is to be trained can be narrowed
    with ``params``, in any form that optimizers of torch take. Parameters without a gradient stay as they are.

    Args:
        spec: the model's, as :func:`weightops.trace` derives it.
        functional: f, for networks of the same architecture; widths may differ.
        alpha: step size, the groups' ``"lr"``, so that schedulers find it.
        beta: weight of f, the groups' ``"beta"``.
        model: whose parameters are trained: dense, float32 or float64.
        params: those to train, by default all.
        momentum: decay of m.
        nonfinite: what to do where a gradient is not finite: ``"raise"`` an error, which names it, or ``"skip"`` the step
            and count it. Neither weights nor state change.

    Attributes:
        skipped: steps that were skipped.

    Raises:
        ValueError: the model or the functional does not fit the spec; a parameter is not the model's; a number is out
            of range.
        TypeError: an argument has the wrong type or dtype.
    """

    _momenta: Tensor | None
    _count: Tensor
    _shares: Tensor  # what the gradient is given in each of the momenta, [R, 1]
    _own: int  # which of them is m
    _mask: tuple[frozenset[str], Tensor] | None

    def __init__(
        self,
        spec: WeightSpec,
        functional: Functional,
        alpha: float,
        beta: float,
        model: nn.Module,
        params: Params | None = None,
        *,
        momentum: float = 0.9,
        nonfinite: str = "raise",
    ) -> None:
        is_spec(WHERE, "spec", spec)
        if not isinstance(functional, Functional):
            raise TypeError(
                f"{WHERE}: functional must be a Functional, not {_check.describe(functional)}"
            )
        for name, value in (("alpha", alpha), ("beta", beta), ("momentum", momentum)):
            check_number(WHERE, name, value)
        _check.choice(WHERE, "nonfinite", nonfinite, ("raise", "skip"))
        if not isinstance(model, nn.Module):
            raise TypeError(f"{WHERE}: model must be a module, not {_check.describe(model)}")
        self.spec, self.functional = spec, functional._on(WHERE, spec)
        self.momentum, self.nonfinite, self.skipped = float(momentum), nonfinite, 0
        self._model, self._params = model, _read(spec, model, self.functional)
        self._names = _names(spec)
        self._begin()
        chosen = _listed(model.named_parameters() if params is None else params)
        if not chosen:
            raise ValueError(f"{WHERE}: params must hold a parameter, but is empty")
        super().__init__(chosen, {"lr": float(alpha), "beta": float(beta)})

    def _begin(self) -> None:
        """Momenta and count are to be made of ``state``."""
        self._momenta, self._count, self._mask = None, torch.tensor(0.0, device="cpu"), None

    def __getstate__(self) -> dict[str, Any]:
        self._publish()
        return super().__getstate__() | {name: vars(self)[name] for name in _FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model, with ``"lr"`` (alpha) and ``"beta"`` of their own.

        Raises:
            ValueError: a parameter is not the model's, or another group's.
            TypeError: there is something else than parameters.
        """
        where = f"{WHERE}.add_param_group" if self.param_groups else WHERE
        if not (isinstance(param_group, dict) and isinstance(param_group.get("params"), Iterable)):
            raise TypeError(
                f"{where}: param_group must be a dict with params, not {_check.describe(param_group)}"
            )
        params = param_group["params"]
        listed = [params] if isinstance(params, Tensor) else list(params)
        known = {id(param) for param in self._params.values()}
        held = {id(param) for group in self.param_groups for param in group["params"]}
        for n, each in enumerate(listed):
            pair = isinstance(each, tuple) and len(each) == 2
            name, param = each if pair else (f"params[{n}]", each)
            _check.tensor(where, name, param, "of the model")
            if id(param) not in known:
                raise ValueError(f"{where}: {name} is none of the model's parameters")
            if id(param) in held:
                raise ValueError(f"{where}: {name} is in a group already")
            held.add(id(param))
        for key, name in (("lr", "alpha"), ("beta", "beta")):
            check_number(where, name, param_group.get(key, self.defaults[key]))
        super().add_param_group(param_group | {"params": listed})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with ``closure``, its loss.

        Raises:
            ValueError: a gradient is not finite, unless ``nonfinite="skip"``.
            TypeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(lambda: None)
        return loss

    @torch.no_grad()
    def _step(self, mark: Callable[[], None]) -> None:
        """One step; ``mark`` is called before and after the functional."""
        names = {id(param): name for name, param in self._params.items()}
        moving = [
            [names[id(param)] for param in group["params"] if param.grad is not None]
            for group in self.param_groups
        ]
        given: dict[str, Any] = {name: self._params[name].grad for some in moving for name in some}
        for name, grad in given.items():
            _check.dense(WHERE, f"the gradient of {name}", grad)
        grads = self._flatten(given)
        if not bool(all_finite(grads)):
            if self.nonfinite == "raise":
                raise ValueError(f"{WHERE}: {self._fault(grads[0])}, and the step was not made")
            self.skipped += 1
            return
        momenta = self._ready()
        shares: Tensor | None = self._shares
        if len(given) < len(self._names):
            # What has no gradient keeps its momenta.
            momenta.lerp_(grads, self._shares[..., None] * self._masked(frozenset(given)))
            shares = None
        flat = self._flatten({name: self._tensor(name) for name in self._names})
        count, functional = int(self._count), self.functional
        f = propose(flat, grads, momenta, count, functional, shares=shares, mark=mark)
        for group, some in zip(self.param_groups, moving, strict=True):
            if some:
                move = torch.add(momenta[self._own, 0], f[0], alpha=float(group["beta"]))
                moves = self._views(move)
                listed = [[tensors[name] for name in some] for tensors in (self._params, moves)]
                torch._foreach_add_(*listed, alpha=-float(group["lr"]))
        self._count += 1

    def _flatten(self, given: Mapping[str, Tensor]) -> Tensor:
        """``[1, P]`` of the model's tensors by name; zero are those that are not given."""
        found = {
            name: given[name] if name in given else torch.zeros_like(self._tensor(name))
            for name in self._names
        }
        if not self._is_whole():
            return self.spec.flatten(found)
        # Fewer checks than the spec's, which have been made.
        return torch.cat([each.reshape(-1) for each in found.values()])[None]

    def _views(self, row: Tensor) -> dict[str, Tensor]:
        """A row ``[P]`` as the model's tensors."""
        if not self._is_whole():
            return self.spec.state_dict(row)
        shapes = self.spec.shapes
        pieces = row.split([prod(shape) for shape in shapes.values()])
        return {name: each.view(shapes[name]) for name, each in zip(shapes, pieces, strict=True)}

    def _is_whole(self) -> bool:
        """Whether the spec has no tensor by parts."""
        return self._names == list(self.spec.shapes)

    def _tensor(self, name: str) -> Tensor:
        return self._params[name] if name in self._params else self._model.get_buffer(name)

    def _masked(self, moving: frozenset[str]) -> Tensor:
        """One where there is a gradient, else zero, ``[1, P]``."""
        if self._mask is None or self._mask[0] != moving:
            ones = {name: torch.ones_like(self._params[name]) for name in moving}
            self._mask = moving, self._flatten(ones)
        return self._mask[1]

    def _fault(self, grads: Tensor) -> str:
        for name, grad in self.spec.unflatten(grads).items():
            bad = (~grad.isfinite()).nonzero()
            if len(bad):
                at = bad[0].tolist()
                return f"the gradient of {name}{at or ''} is {grad[tuple(at)].item()}"
        raise AssertionError

    @torch.no_grad()
    def _ready(self) -> Tensor:
        """The momenta ``[R, 1, P]``: those of ``state``, and zero where it has none."""
        if self._momenta is None:
            decays, self._own = decays_of(self.momentum, self.spec.flatten(self._model))
            rows, self._shares = len(decays), 1 - decays[..., 0]
            held = {
                name: self.state[param]["momenta"]
                for name, param in self._params.items()
                if "momenta" in self.state.get(param, {})
            }
            for name, momenta in held.items():
                wanted = [rows, *self._params[name].shape]
                if list(momenta.shape) != wanted:
                    raise ValueError(
                        f"{WHERE}: state has momenta of shape {list(momenta.shape)} for {name}, not {wanted}"
                    )
            steps = [float(self.state[self._params[name]]["step"]) for name in held]
            self._count = torch.tensor(max(steps, default=0.0))
            self._momenta = torch.stack(
                [
                    self._flatten({name: each[row] for name, each in held.items()})
                    for row in range(rows)
                ]
            )
            self._publish()
        return self._momenta

    def _publish(self) -> None:
        """Let ``state`` have the momenta: views, save of tensors that the spec has by parts."""
        if self._momenta is None:
            return
        momenta = self.spec.state_dict(self._momenta[:, 0])
        names = {id(param): name for name, param in self._params.items()}
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"step": self._count, "momenta": momenta[names[id(param)]]}

    def state_dict(self) -> dict[str, Any]:
        """As of optimizers of torch: per parameter ``"step"`` and ``"momenta"``; without the functional."""
        self._publish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; steps are then as if there had been no break.

        Raises:
            ValueError: the momenta are of other tensors, or another ``momentum`` wants more or fewer of them.
        """
        super().load_state_dict(state_dict)
        self._begin()
        self._ready()

    def measure(self, repeats: int = 10) -> StepCost:
        """How long a step takes with the present gradients, and the functional in it; nothing is changed.

        Raises:
            ValueError: ``repeats`` is below 1; a gradient is not finite.
            TypeError: ``repeats`` is no integer.
        """
        _check.count(f"{WHERE}.measure", "repeats", repeats)
        device = self.functional.weights[0].device
        changed = [*self._params.values(), self._ready(), self._count]
        skipped = self.skipped
        try:
            return measure(self._step, changed, device, repeats, self.functional.flops())
        finally:
            self.skipped = skipped

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the functional, alpha, beta and momentum as one safetensors file: what was learned, not the state.

        Raises:
            ValueError: the file can't be written.
        """
        settings = {"alpha": self.defaults["lr"], "beta": self.defaults["beta"]}
        more = {"settings": settings | {"momentum": self.momentum}}
        self.functional._write(f"{WHERE}.save", path, more)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        spec: WeightSpec,
        model: nn.Module,
        params: Params | None = None,
        *,
        nonfinite: str = "raise",
    ) -> LearnedOptimizer:
        """An optimizer for ``model`` of what :meth:`save` wrote, whatever the widths it was learned on.

        Raises:
            ValueError: the file can't be read or holds no optimizer, or ``spec`` is of another architecture.
            TypeError: an argument has the wrong type.
        """
        where = f"{WHERE}.load"
        functional, description = Functional._read(where, path, spec)
        if "settings" not in description:
            raise CheckpointError(f"{where}: {path}: holds a functional, but no alpha and beta")
        settings = description["settings"]
        if isinstance(model, nn.Module):
            functional.to(next((each.device for each in model.parameters()), "cpu"))
        alpha, beta, momentum = (settings[name] for name in ("alpha", "beta", "momentum"))
        return cls(
            *(spec, functional, alpha, beta, model, params),
            **{"momentum": momentum, "nonfinite": nonfinite},
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}functional: {self.functional!r}\n)"


def _read(spec: WeightSpec, model: nn.Module, functional: Functional) -> dict[str, Tensor]:
    """The model's parameters by the names that the spec has; checks the model."""
    like = functional.weights[0]
    for name, tensor in spec._state(WHERE, "model", model).items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{WHERE}: {name} must be float32 or float64, not {tensor.dtype}")
        _check.same_device(WHERE, name, tensor, "functional", like)
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: named[name] for name in _names(spec) if name in named}


def _listed(params: Any) -> list[Any]:
    try:
        if not isinstance(params, Tensor):
            return list(params)
    except TypeError:
        pass
    raise TypeError(
        f"{WHERE}: params must be parameters of the model, or None, not {_check.describe(params)}"
    )


def _names(spec: WeightSpec) -> list[str]:
    """Of the model's tensors, which the spec may have by parts."""
    return list(spec.state_dict(torch.empty(spec.numel, device="meta")))
