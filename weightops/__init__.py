"""weightops: kernels for programs whose data are neural networks' weights."""

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
from weightops.ops.permute import merge, permute, permute_axes
from weightops.spec import WeightSpec

_load.load()

__all__ = [
    "EquivariantPlan",
    "WeightSpec",
    "__version__",
    "assign",
    "equivariant_linear",
    "manifold_conv1d",
    "manifold_conv2d",
    "manifold_linear",
    "merge",
    "permute",
    "permute_axes",
    "synthesize",
    "synthesize_update_",
]
