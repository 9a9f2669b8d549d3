"""Any module with its weights on a manifold, and ordinary modules cut out of it again."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import weightops.nn as ours  # in full only once both packages are imported
from weightops import _check
from weightops.manifolds.context import Place, at, current
from weightops.manifolds.manifold import Manifold
from weightops.ops.manifold import synthesize
from weightops.ops.manifold.arguments import ACCUMULATE

#: names of modules or parameters, and types of modules
Which = Collection[Any]

_ONE_FOR_ALL = "runs in a kernel that takes one set of weights for the whole batch"
_WHY_NOT: dict[type, str] = {
    nn.MultiheadAttention: "reads the weights of its projections itself, once for the whole batch",
    nn.RNNBase: _ONE_FOR_ALL,
    nn.RNNCellBase: _ONE_FOR_ALL,
}


class Lifted(nn.Module):
    """A module whose weights follow a context; made by :func:`lift`.

    ``lifted(x, context=s)`` calls the model at contexts ``s``, as ``with at(s): lifted(x)`` does. Layers and
    contexts meet by the first axis of a layer's input, unless there is one context for all. A model that has
    arguments of these names itself is called as ``lifted.model`` within ``at``.

    Attributes:
        model: the module, with manifold layers in place of ordinary ones.
        manifold: topology of its weights.
        ordinary: name of a module, or of a parameter, that could not be lifted -> why.
    """

    def __init__(self, model: nn.Module, manifold: Manifold, ordinary: dict[str, str]) -> None:
        super().__init__()
        self.model, self.manifold, self.ordinary = model, manifold, ordinary

    def forward(
        self,
        *args: Any,
        context: Tensor | None = None,
        coeffs: Tensor | None = None,
        index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output, for its own arguments and a context, or the one of the ``at`` around.

        Args:
            context: for each entry of the batch ``[B]``; with ``index`` ``[G]``; or one for all, ``[]``; where
                the manifold's contexts have several numbers these are the last axis.
            coeffs: coefficients ``[B, K]``, ``[G, K]`` with ``index`` or ``[K]``, instead of a context.
            index: ``[B]``, int64 or int32: entry b of the batch has context ``index[b]``.

        Raises:
            ValueError: there is no context, or one is outside the manifold's domain; shapes do not fit.
            TypeError: an argument has the wrong type or dtype.
        """
        if context is None and coeffs is None and index is None:
            place = current("Lifted")
        else:
            place = Place("Lifted", context, coeffs, index)
        with at(coeffs=place.coeffs_on(self.manifold), index=place.index):
            return self.model(*args, **kwargs)

    def bases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters ``[K, ...]`` of what is on the manifold, as ``ManifoldDescent`` takes them."""
        held = {id(p) for layer in _layers(self) for p in layer.parameters(recurse=False)}
        return ((name, p) for name, p in self.named_parameters() if id(p) in held)

    def slice_at(self, context: Tensor | None = None, *, coeffs: Tensor | None = None) -> nn.Module:
        """The ordinary module at one context; see :func:`slice_at`."""
        place = Place("slice_at", context, coeffs, None)
        return slice_at(self.model, coeffs=place.coeffs_on(self.manifold))


def lift(
    model: nn.Module,
    manifold: Manifold,
    *,
    spread: float = 0.0,
    only: Which | None = None,
    skip: Which = (),
    batch_norm: str | None = None,
    regions: int = 8,
) -> Lifted:
    """A copy of ``model`` whose weights lie on ``manifold``: ``W(s) = sum_k phi_k(s) W_k``.

    Linear, Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm layers are
    replaced by their manifold versions, whose weights average over contexts to those of ``model``. Modules and
    parameters that are shared stay so.

    All else stays as it is, one for all contexts: MultiheadAttention and RNNs, which use their weights in one
    call for the whole batch; other layers; subclasses of layers, which may compute something else; layers with
    hooks or parametrizations; and parameters that belong to no layer. A warning names these, unless ``only`` or
    ``skip`` say that they are meant to stay. Code that reads a lifted layer's ``weight`` finds the bases.

    Args:
        model: any module.
        manifold: topology of the weights.
        spread: how far weights differ between contexts at first: root mean square of the differences from
            ``model``'s, relative to that of each tensor. 0: every W(s) is ``model``'s own.
        only: what to lift: names of modules, with all that is in them, and types.
        skip: what not to lift, in the same way; also names of parameters.
        batch_norm: for norms with a running mean and variance, which would be those of all contexts together:
            ``"regions"`` keeps them for each of several regions of contexts, ``"batch"`` keeps none and always
            takes the batch's own, as for :class:`weightops.nn.ManifoldNorm`.
        regions: number of regions along each dimension of the contexts' domain.

    Raises:
        ValueError: there is nothing to lift; a norm has running statistics and ``batch_norm`` does not say what
            to do; a name is not the model's; part of it is on a manifold already or not initialised; a
            parameter is shared by what is lifted and what is not.
        TypeError: an argument has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lift: model must be a module, not {_check.describe(model)}")
    if not isinstance(manifold, Manifold):
        raise TypeError(f"lift: manifold must be a Manifold, not {_check.describe(manifold)}")
    _check.number("lift", "spread", spread, 0, float("inf"))
    if batch_norm is not None:
        _check.choice("lift", "batch_norm", batch_norm, ("batch", "regions"))
    _check.count("lift", "regions", regions)
    table = _table()
    chosen, ordinary = _choose(model, manifold, table, only, skip)
    tracked = [n for n, m in chosen.items() if getattr(m, "track_running_stats", False)]
    if tracked and batch_norm is None:
        raise ValueError(
            f"lift: {', '.join(map(_named, tracked[:3]))}{', ...' * (len(tracked) > 3)} keeps a "
            "running mean and variance, which would be those of all contexts together; "
            "batch_norm='regions' keeps them for regions of contexts, batch_norm='batch' keeps none"
        )
    _check_ties(model, chosen)

    bases: dict[int, nn.Parameter] = {}

    def convert(param: nn.Parameter) -> nn.Parameter:
        if id(param) not in bases:
            value, noise = param.detach(), None
            if spread:
                size = spread * value.square().mean().sqrt()
                noise = size * torch.randn_like(value.expand(manifold.num_coeffs, *value.shape))
            on = manifold.around(value, noise)
            bases[id(param)] = nn.Parameter(on, param.requires_grad)
        return bases[id(param)]

    replaced: dict[int, Any] = {}
    for module in chosen.values():
        kind: Any = table[type(module)]
        options = (batch_norm, regions) if kind is ours.ManifoldNorm else ()
        replaced[id(module)] = kind.lifted(module, manifold, convert, *options)
    if ordinary:
        warnings.warn(
            "lift: these stay as they are, the same in every context: "
            + "; ".join(f"{name}: {why}" for name, why in ordinary.items())
            + ". Name them in skip= if that is meant.",
            stacklevel=2,
        )
    # A copy that finds its layers copied already.
    lifted = deepcopy(model, replaced)
    for module in lifted.modules():
        # In eval their fast paths hand the weights of the layers within to a kernel.
        if isinstance(module, nn.TransformerEncoderLayer) and _layers(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return Lifted(lifted, manifold, ordinary)


def _table() -> dict[type, type]:
    """Layer -> its manifold version."""
    norms = dict.fromkeys(
        (*ours.manifold_norm.CHANNELS, *ours.manifold_norm.TRAILING), ours.ManifoldNorm
    )
    return {
        nn.Linear: ours.ManifoldLinear,
        nn.Conv1d: ours.ManifoldConv1d,
        nn.Conv2d: ours.ManifoldConv2d,
        nn.Embedding: ours.ManifoldEmbedding,
        **norms,
    }


def _choose(
    model: nn.Module,
    manifold: Manifold,
    table: dict[type, type],
    only: Which | None,
    skip: Which,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What to lift, and what that was asked for can't be and why."""
    skipped = _matched("skip", model, skip)
    wanted = None if only is None else _matched("only", model, only)
    whole: tuple[Any, ...] = (*table, *_WHY_NOT)
    chosen: dict[str, nn.Module] = {}
    ordinary: dict[str, str] = {}
    for name, module in _outermost(model, whole):
        if isinstance(module, ours.manifold.ManifoldLayer):
            if module.manifold not in (None, manifold):
                raise ValueError(
                    f"lift: {_named(name)} is on a manifold already, {module.manifold}"
                )
            continue
        if id(module) in skipped or not (wanted is None or id(module) in wanted):
            continue
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"lift: {_named(name)} has no shape yet; run the model once before")
        own = [key for key, p in module._parameters.items() if p is not None]
        if not own and not getattr(module, "track_running_stats", False):
            continue
        why = _why_not(module, table)
        if why is None:
            chosen[name] = module
        elif isinstance(module, whole) or next(module.children(), None) is None:
            ordinary[_named(name)] = f"{type(module).__name__} {why}"
        else:
            paths = [f"{name}.{key}".lstrip(".") for key in own]
            ordinary |= {p: "belongs to no layer" for p in paths if p not in skip}
    if not chosen:
        raise ValueError(f"lift: found nothing to lift in {type(model).__name__}")
    return chosen, ordinary


def _named(name: str) -> str:
    return name or "the model itself"


def _outermost(model: nn.Module, whole: tuple[Any, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, but not what those of types ``whole`` are made of, as attention is of layers."""
    inner: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inner:
            yield name, module
        if isinstance(module, whole):
            inner |= {id(part) for part in module.modules()}


def _why_not(module: Any, table: dict[type, type]) -> str | None:
    for kind, why in _WHY_NOT.items():
        if isinstance(module, kind):
            return why
    if type(module) not in table:
        return "has no manifold version"
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks:
        return "has hooks, which would be lost"
    if not set(module._parameters) <= {"weight", "bias"}:
        return "computes its weight from other parameters"
    if any(p.dtype not in ACCUMULATE for p in module.parameters()):
        return "has parameters that are not floating point of 16 to 64 bits"
    if isinstance(module, nn.Embedding):
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"has {option}"
    return None


def _matched(argument: str, model: nn.Module, which: Any) -> set[int]:
    """Ids of the modules that ``which`` names or whose type it lists, and of all within them."""
    if isinstance(which, str) or not isinstance(which, Collection):
        raise TypeError(
            f"lift: {argument} must list names and types of modules, not {_check.describe(which)}"
        )
    names = dict(model.named_modules(remove_duplicate=False))
    params = dict(model.named_parameters(remove_duplicate=False))
    found: list[nn.Module] = []
    for each in which:
        if isinstance(each, type) and issubclass(each, nn.Module):
            found += [module for module in names.values() if isinstance(module, each)]
        elif not isinstance(each, str):
            raise TypeError(
                f"lift: {argument} must list names and types of modules, not {_check.describe(each)}"
            )
        elif each in names:
            found.append(names[each])
        elif each not in params or argument == "only":
            raise ValueError(f"lift: {argument} names {each!r}, which the model has not")
    return {id(part) for module in found for part in module.modules()}


def _check_ties(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    lifted = {id(p): name for name, module in chosen.items() for p in module.parameters()}
    inside = {id(module) for module in chosen.values()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            for key, param in module.named_parameters(recurse=False):
                if id(param) in lifted:
                    raise ValueError(
                        f"lift: {name}.{key} is a parameter of {lifted[id(param)]} too, which is "
                        f"lifted while {_named(name)} is not; lift both or neither"
                    )


def _layers(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, ours.manifold.ManifoldLayer)]


@torch.no_grad()
def slice_at(
    module: nn.Module, context: Tensor | None = None, *, coeffs: Tensor | None = None
) -> nn.Module:
    """An ordinary copy of ``module`` at one context, with torch's layers in place of those on a manifold.

    Its weights are synthesised in one call, from a copy of all bases side by side.

    Args:
        module: has layers on a manifold; a :class:`Lifted` gives the model in it.
        context: ``[]``, or ``[context_dims]`` where the manifold's contexts have several numbers.
        coeffs: coefficients ``[K]`` instead of it.

    Raises:
        ValueError: there is no such layer, or not one context.
        TypeError: an argument has the wrong type.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"slice_at: module must be a module, not {_check.describe(module)}")
    if isinstance(module, Lifted):
        return module.slice_at(context, coeffs=coeffs)
    place, layers = Place("slice_at", context, coeffs, None), _layers(module)
    if not layers:
        raise ValueError(f"slice_at: {type(module).__name__} has no layer on a manifold")
    groups: dict[tuple, dict[int, nn.Parameter]] = {}
    for layer in layers:
        for p in layer.parameters(recurse=False):
            groups.setdefault((layer.manifold, p.dtype, p.device), {})[id(p)] = p
    sliced: dict[int, nn.Parameter] = {}
    for (manifold, *_), params in groups.items():
        joined = torch.cat([p.flatten(1) for p in params.values()], 1)
        values = synthesize(_one(place.coeffs_on(manifold)), joined)
        pieces = values.split([p[0].numel() for p in params.values()])
        for (key, p), piece in zip(params.items(), pieces, strict=True):
            sliced[key] = nn.Parameter(piece.view(p.shape[1:]).clone(), p.requires_grad)

    def convert(param: nn.Parameter) -> nn.Parameter:
        return sliced[id(param)]

    at_one = {
        id(layer): layer.ordinary(convert, _one(place.coeffs_on(layer.manifold)))
        for layer in layers
    }
    return deepcopy(module, at_one)


def _one(coeffs: Tensor) -> Tensor:
    if coeffs.dim() != 1:
        raise ValueError(
            f"slice_at: takes one context, with coefficients [K], not {list(coeffs.shape)}"
        )
    return coeffs
