"""Bad input is refused with its own numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from weightops import WeightSpec, testing
from weightops.nn import (
    UNF,
    EquivariantDropout,
    EquivariantLinear,
    EquivariantNorm,
    Featurize,
    InvariantPool,
    PositionalEncoding,
)

MLP = testing.mlp_spec(6, 5, 4, 3)
CNN = WeightSpec({"conv1.weight": ("c1", None, None, None)}, {"conv1.weight": (5, 3, 3, 3)})
FLAT = torch.zeros(2, MLP.numel)
X = torch.zeros(2, MLP.numel, 2)
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
    (lambda: MLP.features(FLAT, None, FLAT.double()), TypeError, r"extra\[0\] is torch.float64"),
    (lambda: MLP.features(FLAT, 3), TypeError, r"grads must be a tensor \[N, P\], not int 3"),
    (lambda: MLP.features(FLAT, FLAT.to("meta")), ValueError, "grads is on meta, but flat is on"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
