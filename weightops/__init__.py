"""weightops: kernels for programs whose data are neural networks' weights."""

from typing import TYPE_CHECKING, Any

from weightops import _load
from weightops._version import __version__
from weightops.ops.assign import assign
from weightops.ops.equivariant import EquivariantPlan, equivariant_linear
from weightops.ops.manifold import (
    manifold_conv1d,
    manifold_conv2d,
    manifold_linear,
    synthesize,
    synthesize_update_,
)
from weightops.ops.match import match_weights as _match_weights  # noqa: F401  (declares its op)
from weightops.ops.permute import merge, permute, permute_axes
from weightops.spec import WeightSpec

if TYPE_CHECKING:
    from weightops.tracing import explain, trace, verify

_load.load()
_TRACING = ("explain", "trace", "verify")


def __getattr__(name: str) -> Any:
    """Tracing imports torch.export, for a second, so that waits until it is asked for."""
    if name in _TRACING:
        from weightops import tracing

        return getattr(tracing, name)
    raise AttributeError(f"module 'weightops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_TRACING]


__all__ = [
    "EquivariantPlan",
    "WeightSpec",
    "__version__",
    "assign",
    "equivariant_linear",
    "explain",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_linear",
    "merge",
    "permute",
    "permute_axes",
    "synthesize",
    "synthesize_update_",
    "trace",
    "verify",
]
