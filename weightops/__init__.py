"""weightops: kernels for programs whose data are neural networks' weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightops import _load
from weightops._version import __version__
from weightops.ops.assign import assign
from weightops.ops.equivariant import EquivariantPlan, equivariant_linear
from weightops.ops.fourier import fourier_signal, fourier_transform
from weightops.ops.functional import functional as _functional  # noqa: F401  (likewise)
from weightops.ops.manifold import (
    manifold_conv1d,
    manifold_conv2d,
    manifold_linear,
    synthesize,
    synthesize_update_,
)
from weightops.ops.match import match_weights as _match_weights  # noqa: F401  (declares its op)
from weightops.ops.permute import merge, permute, permute_axes
from weightops.ops.population import training as _training  # noqa: F401  (likewise)
from weightops.ops.token_pair import token_pair_linear
from weightops.ops.tokens import token_pack as _token_pack  # noqa: F401  (likewise)
from weightops.spec import WeightSpec

if TYPE_CHECKING:
    from weightops.population import population_forward, population_loss
    from weightops.tracing import explain, trace, verify

_load.load()
#: what imports torch.export, for a second, waits until it is asked for
_LATER = {
    **dict.fromkeys(("explain", "trace", "verify"), "weightops.tracing"),
    **dict.fromkeys(("population_forward", "population_loss"), "weightops.population"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'weightops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LATER]


__all__ = [
    "EquivariantPlan",
    "WeightSpec",
    "__version__",
    "assign",
    "equivariant_linear",
    "explain",
    "fourier_signal",
    "fourier_transform",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_linear",
    "merge",
    "permute",
    "permute_axes",
    "population_forward",
    "population_loss",
    "synthesize",
    "synthesize_update_",
    "token_pair_linear",
    "trace",
    "verify",
]
