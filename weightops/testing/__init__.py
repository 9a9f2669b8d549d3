"""Problems shared by tests and benchmarks, and checks that any op can be put through.

Everything here is public: who writes an op on weight space can test it with
:func:`check_transform`, :func:`check_gradients`, :func:`check_op` and :func:`assert_equivariant`.
"""

from weightops.testing.checks import (
    MODES,
    TRANSFORMS,
    Function,
    assert_equivariant,
    check_autocast,
    check_compiled_training,
    check_export,
    check_gradients,
    check_op,
    check_transform,
)
from weightops.testing.circles import FourierSignal, TokenPairs
from weightops.testing.functional import LearnedFunctional
from weightops.testing.manifold import REGIMES, ManifoldConv, ManifoldLinear, Synthesize
from weightops.testing.problems import (
    PLAN_OPTIONS,
    Assign,
    Equivariant,
    Networks,
    PermuteAxes,
    best_time,
    pack,
    random_rows,
)
from weightops.testing.specs import (
    WEIGHT_SPACES,
    cnn_spec,
    gru_seq2seq_spec,
    labelled_mlp_spec,
    matrices_spec,
    mlp_spec,
    random_spec,
    resnet20_spec,
    rnn_spec,
    tiny_spec,
    transformer_spec,
    vgg16_spec,
)

__all__ = [
    "MODES",
    "PLAN_OPTIONS",
    "REGIMES",
    "TRANSFORMS",
    "WEIGHT_SPACES",
    "Assign",
    "Equivariant",
    "FourierSignal",
    "Function",
    "LearnedFunctional",
    "ManifoldConv",
    "ManifoldLinear",
    "Networks",
    "PermuteAxes",
    "Synthesize",
    "TokenPairs",
    "assert_equivariant",
    "best_time",
    "check_autocast",
    "check_compiled_training",
    "check_export",
    "check_gradients",
    "check_op",
    "check_transform",
    "cnn_spec",
    "gru_seq2seq_spec",
    "labelled_mlp_spec",
    "matrices_spec",
    "mlp_spec",
    "pack",
    "random_rows",
    "random_spec",
    "resnet20_spec",
    "rnn_spec",
    "tiny_spec",
    "transformer_spec",
    "vgg16_spec",
]
