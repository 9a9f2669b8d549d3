"""Bad input is refused with its own numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weightops import WeightSpec, testing
from weightops.manifolds import Ellipse, Line, Torus
from weightops.nn import (
    UNF,
    EquivariantDropout,
    EquivariantLinear,
    EquivariantNorm,
    Featurize,
    InvariantPool,
    ManifoldConv1d,
    ManifoldConv2d,
    ManifoldEmbedding,
    ManifoldLinear,
    ManifoldNorm,
    PositionalEncoding,
)

MLP = testing.mlp_spec(6, 5, 4, 3)
CNN = WeightSpec({"conv1.weight": ("c1", None, None, None)}, {"conv1.weight": (5, 3, 3, 3)})
FLAT = torch.zeros(2, MLP.numel)
X = torch.zeros(2, MLP.numel, 2)
CIRCLE = Ellipse()
LINEAR, EXPERTS = ManifoldLinear(4, 3, CIRCLE), ManifoldLinear(4, 3, 5)
EMBEDDING = ManifoldEmbedding(7, 3, CIRCLE)
LAYER_NORM = ManifoldNorm(nn.LayerNorm(4), CIRCLE)
BATCH_NORM = ManifoldNorm(nn.BatchNorm2d(4), CIRCLE, batch_norm="regions")
ROWS, IDS, S = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: EquivariantLinear(MLP, 0, 2), ValueError, "in_channels must be at least 1, not 0"),
    (lambda: EquivariantLinear(MLP, 1, 2.5), TypeError, "out_channels must be an integer"),
    (lambda: EquivariantLinear("x", 1, 1), TypeError, "spec must be a WeightSpec, not str 'x'"),
    (lambda: EquivariantLinear(MLP, 1, 1, spec_out=3), TypeError, "spec_out must be a WeightSpec"),
    (lambda: EquivariantLinear(MLP, 1, 1, fixed="no"), ValueError, "fixed must be one of"),
    (lambda: EquivariantLinear(MLP, 1, 1, terms=[]), TypeError, "terms must be a string or"),
    (lambda: EquivariantLinear(MLP, 1, 1, rank=0), ValueError, "rank must be at least 1, not 0"),
    (lambda: EquivariantLinear(MLP, 1, 1, bias=None), TypeError, "bias must be True or False"),
    (
        lambda: EquivariantLinear(MLP, 10**6, 10**6),
        ValueError,
        r"theta of [\d,]+ terms, 1000000 to 1000000 channels, .* takes .*GiB.*rank= shrink it",
    ),
    (
        lambda: EquivariantLinear(MLP, 3, 1)(X),
        ValueError,
        "theta has 3 input channels, but x has 2",
    ),
    (lambda: EquivariantLinear(MLP, 2, 1)(X[:, :5]), ValueError, r"x has shape \[2, 5, 2\]"),
    (lambda: EquivariantLinear(MLP, 2, 1)(X.double()), TypeError, "theta is torch.float32"),
    (lambda: EquivariantLinear(MLP, 2, 1).from_per_term_([]), TypeError, "must map output tensors"),
    (lambda: EquivariantLinear(MLP, 2, 1).from_per_term_({}), ValueError, "has no output tensor"),
    (
        lambda: EquivariantLinear(MLP, 2, 1).from_per_term_(
            EquivariantLinear(MLP, 2, 2).to_per_term()
        ),
        ValueError,
        r"tensors\['fc1.weight'\] must have shape \[\d+, 2, 1\], not \[\d+, 2, 2\]",
    ),
    (lambda: EquivariantNorm(MLP, 3)(X), ValueError, r"x must have shape \[B, 74, 3\]"),
    (lambda: EquivariantNorm(MLP, 3, eps=-1), ValueError, r"eps must be in \[0, 1\), not -1"),
    (lambda: EquivariantDropout(1.0), ValueError, r"p must be in \[0, 1\), not 1.0"),
    (lambda: InvariantPool(MLP)(X[0]), ValueError, r"x must have shape \[B, P, C\], not \[74, 2\]"),
    (lambda: InvariantPool(MLP)(X.long()), TypeError, "x must be floating point"),
    (lambda: InvariantPool(None), TypeError, "spec must be a WeightSpec"),
    (lambda: PositionalEncoding(MLP, 2, "no"), ValueError, "kind must be one of 'learned'"),
    (
        lambda: PositionalEncoding(CNN, 2, "sinusoidal"),
        ValueError,
        "channels must be at least 3, as conv1.weight has 3 fixed axes, not 2",
    ),
    (lambda: Featurize(MLP, embedding="no"), ValueError, "embedding must be one of 'gaussian'"),
    (lambda: Featurize(MLP, 1)(X), ValueError, r"x must have shape \[B, 74, 1\]"),
    (lambda: UNF(MLP, [2]), ValueError, "channels must have at least 2 entries"),
    (lambda: UNF(MLP, 2), TypeError, "channels must list integers, not int 2"),
    (lambda: UNF(MLP, [2, 0]), ValueError, r"channels\[1\] must be at least 1, not 0"),
    (lambda: UNF(MLP, [2, 2], "no"), ValueError, "activation must be one of 'relu'"),
    (lambda: UNF(MLP, [2, 2], 3), TypeError, "activation must be a string or a module, not int 3"),
    (lambda: UNF(MLP, [2, 2], dropout=2), ValueError, r"dropout must be in \[0, 1\), not 2"),
    (lambda: UNF(MLP, [3, 2])(X), ValueError, r"UNF: x must have shape \[B, 74, 3\]"),
    (lambda: MLP.features(FLAT[0]), ValueError, r"flat must have shape \[N, P\], not \[74\]"),
    (lambda: MLP.features(FLAT, FLAT[:, :3]), ValueError, "grads has shape"),
    (lambda: MLP.features(FLAT, FLAT[:1]), ValueError, "grads has length 1, but flat has size 2"),
    (lambda: MLP.features(FLAT.long()), TypeError, "flat must be floating point"),
    (lambda: ManifoldLinear(0, 2, CIRCLE), ValueError, "in_features must be at least 1, not 0"),
    (lambda: ManifoldLinear(2, "3", CIRCLE), TypeError, "out_features must be an integer"),
    (lambda: ManifoldLinear(2, 3, None), TypeError, "manifold must be a Manifold or a number of"),
    (lambda: ManifoldLinear(2, 3, True), TypeError, "number of bases, not bool True"),
    (lambda: ManifoldLinear(2, 3, 0), ValueError, "ManifoldLinear: manifold must be at least 1"),
    (lambda: ManifoldLinear(2, 3, 4, bias=1), TypeError, "bias must be True or False, not int 1"),
    (lambda: ManifoldLinear(2, 3, 4, spread=1), ValueError, r"spread must be in \[0, 1\), not 1"),
    (
        lambda: ManifoldConv1d(2, 3, 0, 4),
        ValueError,
        "^ManifoldConv1d: kernel_size must be at least",
    ),
    (lambda: ManifoldConv2d(2, 3, (3, 0), 4), ValueError, "kernel_size must be at least 1, not 0"),
    (lambda: ManifoldConv2d(2, 3, 3, 4, stride=0), ValueError, "stride must be at least 1, not 0"),
    (lambda: ManifoldConv2d(2, 3, 3, 4, padding=-1), ValueError, "padding must be at least 0"),
    (lambda: ManifoldConv2d(2, 3, 3, 4, dilation=1.5), TypeError, "dilation must be an integer"),
    (lambda: ManifoldConv2d(3, 4, 3, 4, groups=2), ValueError, "divisible by groups"),
    (lambda: ManifoldConv2d(2, 3, 3, 4, padding="x"), ValueError, "padding string 'x'"),
    (lambda: ManifoldConv2d(2, 3, 3, 4, padding_mode="x"), ValueError, "padding_mode must be one"),
    (
        lambda: ManifoldConv2d.from_condconv(nn.Conv2d(1, 1, 1)),
        TypeError,
        "^from_condconv: module must be timm's CondConv2d, not Conv2d",
    ),
    (lambda: ManifoldEmbedding(7, 0, 4), ValueError, "embedding_dim must be at least 1, not 0"),
    (lambda: ManifoldEmbedding(7, 3, 4, padding_idx=7), ValueError, "must be less than 7, not 7"),
    (lambda: ManifoldEmbedding(7, 3, 4, padding_idx=-8), ValueError, "must be at least -7, not -8"),
    (lambda: ManifoldNorm(nn.Linear(2, 2), 4), TypeError, "norm must be a LayerNorm.*not Linear"),
    (
        lambda: ManifoldNorm(nn.BatchNorm1d(2), CIRCLE),
        ValueError,
        "^ManifoldNorm: BatchNorm1d keeps a running mean and variance.*batch_norm='regions'",
    ),
    (
        lambda: ManifoldNorm(nn.BatchNorm1d(2), 4, batch_norm="regions"),
        ValueError,
        "batch_norm='regions' needs a manifold",
    ),
    (
        lambda: ManifoldNorm(nn.BatchNorm1d(2), CIRCLE, batch_norm="none"),
        ValueError,
        "batch_norm must be one of 'batch', 'regions', not 'none'",
    ),
    (
        lambda: ManifoldNorm(nn.BatchNorm1d(2), CIRCLE, batch_norm="regions", regions=0),
        ValueError,
        "regions must be at least 1, not 0",
    ),
    (
        lambda: LINEAR(ROWS),
        ValueError,
        "^ManifoldLinear: needs a context; give context= or coeffs=",
    ),
    (
        lambda: LINEAR(ROWS, index=IDS),
        ValueError,
        "takes a context or coeffs, but neither is given",
    ),
    (
        lambda: LINEAR(ROWS, S, coeffs=S),
        ValueError,
        "takes a context or coeffs, but both are given",
    ),
    (
        lambda: LINEAR(ROWS, 0.5),
        TypeError,
        r"^ManifoldLinear: context must be a tensor \[...\], not",
    ),
    (lambda: LINEAR(ROWS, S.long()), TypeError, "^Ellipse: context must be floating point"),
    (lambda: LINEAR(ROWS, S / 0), ValueError, "^Ellipse: context must be finite"),
    (lambda: ManifoldLinear(4, 3, Line())(ROWS, S - 1), ValueError, r"^Line: .* lie in \[0, 1\]"),
    (
        lambda: ManifoldLinear(4, 3, Torus())(ROWS, S[:1]),
        ValueError,
        r"shape \[..., 2\], not \[1\]",
    ),
    (
        lambda: LINEAR(ROWS, S[:1]),
        ValueError,
        r"coeffs \[1, 3\] must have a context for each entry",
    ),
    (lambda: LINEAR(ROWS, coeffs=S), ValueError, "coeffs has 2 coefficients .* weight has 3 bases"),
    (lambda: EXPERTS(ROWS, S), ValueError, "coeffs has 2 coefficients .* weight has 5 bases"),
    (lambda: LINEAR(ROWS, S.double()), TypeError, "coeffs must be torch.float32 as x"),
    (lambda: LINEAR(ROWS[:, :3], S), ValueError, "x has 3 inputs"),
    (
        lambda: LINEAR("x", S),
        TypeError,
        r"^manifold_linear: x must be a tensor \[..., in\], not str",
    ),
    (lambda: LINEAR(ROWS, S, index=IDS + 2), ValueError, r"index\[0\] is 2, outside 0..1"),
    (lambda: EMBEDDING(ROWS, S), TypeError, "^ManifoldEmbedding: ids must be int64 or int32"),
    (lambda: EMBEDDING([1], S), TypeError, r"ids must be a tensor \[B, ...\], not list"),
    (
        lambda: EMBEDDING(IDS, S[:1]),
        ValueError,
        r"there are 1 contexts for the first axis of x \[2\]",
    ),
    (
        lambda: EMBEDDING(IDS[0], S),
        ValueError,
        r"there are 2 contexts for the first axis of x \[\]",
    ),
    (
        lambda: EMBEDDING(IDS, coeffs=S),
        ValueError,
        r"must have shape \[contexts, 3\] or \[3\], not",
    ),
    (
        lambda: EMBEDDING(IDS, S.double()),
        TypeError,
        "coeffs must be torch.float32 as what they mix",
    ),
    (lambda: EMBEDDING(IDS, S, index=IDS - 1), ValueError, r"index\[0\] is -1, outside 0..1"),
    (lambda: EMBEDDING(IDS, S, index=S), TypeError, "index must be int64 or int32"),
    (
        lambda: EMBEDDING(IDS, S, index=IDS[:1]),
        ValueError,
        "there are 1 contexts for the first axis",
    ),
    (
        lambda: EMBEDDING(IDS, S[0], index=IDS),
        ValueError,
        r"index needs coeffs \[G, 3\], not \[3\]",
    ),
    (lambda: LAYER_NORM(IDS, S), TypeError, "^ManifoldNorm: x must be floating point"),
    (lambda: LAYER_NORM(ROWS[0], S), ValueError, "there are 2 contexts for the first axis"),
    (
        lambda: LAYER_NORM(torch.zeros(4), torch.zeros(4)),
        ValueError,
        r"x \[4\] has no axis left for contexts before those of the norm, \[4\]",
    ),
    (lambda: BATCH_NORM(ROWS, S), ValueError, r"BatchNorm2d takes no x of shape \[2, 4\]"),
    (lambda: BATCH_NORM(X[..., None], S), ValueError, "x must have 4 channels, not 74"),
    (lambda: MLP.features(FLAT, None, FLAT.double()), TypeError, r"extra\[0\] is torch.float64"),
    (lambda: MLP.features(FLAT, 3), TypeError, r"grads must be a tensor \[N, P\], not int 3"),
    (lambda: MLP.features(FLAT, FLAT.to("meta")), ValueError, "grads is on meta, but flat is on"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
