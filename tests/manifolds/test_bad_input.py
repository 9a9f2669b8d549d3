"""Bad input is refused with its own numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from weightops.manifolds import (
    Bezier,
    BSpline,
    Ellipse,
    Fourier,
    Line,
    Manifold,
    Product,
    Simplex,
    Torus,
)

MIXED = Product(Line(), Simplex(3), Ellipse())
T = torch.tensor
nan, inf = float("nan"), float("inf")
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Fourier(0), ValueError, "^Fourier: harmonics must be at least 1, not 0"),
    (lambda: Fourier(1.0), TypeError, "^Fourier: harmonics must be an integer, not float 1.0"),
    (lambda: Torus(0), ValueError, "^Torus: circles must be at least 1, not 0"),
    (lambda: Torus(True), TypeError, "^Torus: circles must be an integer, not bool True"),
    (lambda: Torus(2, additive=1), TypeError, "^Torus: additive must be True or False, not int 1"),
    (lambda: Bezier(0), ValueError, "^Bezier: degree must be at least 1, not 0"),
    (lambda: Bezier("2"), TypeError, "^Bezier: degree must be an integer, not str '2'"),
    (lambda: BSpline(4, 0), ValueError, "^BSpline: degree must be at least 1, not 0"),
    (lambda: BSpline(3), ValueError, "^BSpline: control_points must be at least 4, not 3"),
    (
        lambda: BSpline(2, 2, ring=True),
        ValueError,
        "^BSpline: control_points must be at least 3, not 2",
    ),
    (lambda: BSpline(4, ring="yes"), TypeError, "^BSpline: ring must be True or False"),
    (lambda: Simplex(1), ValueError, "^Simplex: vertices must be at least 2, not 1"),
    (lambda: Simplex(None), TypeError, "^Simplex: vertices must be an integer, not NoneType"),
    (lambda: Product(), ValueError, "^Product: factors must be at least one manifold, not none"),
    (
        lambda: Product(Line(), 3),
        TypeError,
        r"^Product: factors\[1\] must be a Manifold, not int 3",
    ),
    (lambda: Line().coeffs(0.5), TypeError, r"^Line: context must be a tensor \[...\], not float"),
    (
        lambda: Torus().coeffs([0.5, 0.5]),
        TypeError,
        r"^Torus: context must be a tensor \[..., 2\], not list",
    ),
    (
        lambda: Line().coeffs(T([0, 1])),
        TypeError,
        "^Line: context must be floating point, not torch.int64",
    ),
    (lambda: Ellipse().coeffs(T(1j)), TypeError, "^Ellipse: context must be floating point"),
    (
        lambda: Line().coeffs(torch.ones(2).to_sparse()),
        TypeError,
        "^Line: context must be a dense tensor",
    ),
    (
        lambda: Torus().coeffs(torch.ones(4, 3)),
        ValueError,
        r"^Torus: context must have shape \[..., 2\], not \[4, 3\]",
    ),
    (
        lambda: Simplex(3).coeffs(T(1.0)),
        ValueError,
        r"^Simplex: context must have shape \[..., 3\], not \[\]",
    ),
    (
        lambda: Line().coeffs(T([0.5, 1.5])),
        ValueError,
        r"^Line: context must lie in \[0, 1\], but context\[1\] is 1.5",
    ),
    (
        lambda: Line().coeffs(T([[0.5, 0.5], [-0.25, 0.5]])),
        ValueError,
        r"^Line: context must lie in \[0, 1\], but context\[1, 0\] is -0.25",
    ),
    (
        lambda: Line().coeffs(T(nan)),
        ValueError,
        r"^Line: context must lie in \[0, 1\], but context is nan",
    ),
    (
        lambda: Bezier(2).derivative(T(1.25)),
        ValueError,
        r"^Bezier: context must lie in \[0, 1\], but context is 1.25",
    ),
    (
        lambda: BSpline(5).coeffs(T([2.0]).half()),
        ValueError,
        r"^BSpline: context must lie in \[0, 1\], but context\[0\] is 2.0",
    ),
    (
        lambda: BSpline(5, ring=True).coeffs(T([0.5, inf])),
        ValueError,
        r"^BSpline: context must be finite, but context\[1\] is inf",
    ),
    (
        lambda: Ellipse().coeffs(T([nan])),
        ValueError,
        r"^Ellipse: context must be finite, but context\[0\] is nan",
    ),
    (
        lambda: Torus().coeffs(T([[0, 0], [0.5, -inf]])),
        ValueError,
        r"^Torus: context must be finite, but context\[1\] is \[0.5, -inf\]",
    ),
    (
        lambda: Simplex(3).coeffs(T([[0.5, 0.5, 0], [0.5, 0.25, 0.5]])),
        ValueError,
        r"^Simplex: context must be at least 0 and sum to 1, but context\[1\] is \[0.5, 0.25, 0.5\]",
    ),
    (
        lambda: Simplex(3).coeffs(T([1.5, -0.5, 0])),
        ValueError,
        r"^Simplex: context must be at least 0 and sum to 1, but context is \[1.5, -0.5, 0.0\]",
    ),
    (
        lambda: MIXED.coeffs(T([[0.5, 1, 0, 0, 9], [2, 1, 0, 0, 9]])),
        ValueError,
        r"^Product: context must lie in \[0, 1\], but context\[1, 0\] is 2.0",
    ),
    (
        lambda: MIXED.coeffs(T([0.5, 1, 1, 0, 9])),
        ValueError,
        r"^Product: context must be at least 0 and sum to 1, but context\[1:4\] is \[1.0, 1.0, 0.0\]",
    ),
    (
        lambda: MIXED.coeffs(T([0.5, 1, 0, 0, nan])),
        ValueError,
        r"^Product: context must be finite, but context\[4\] is nan",
    ),
    (
        lambda: torch.func.grad(lambda s: Line().coeffs(s).sum())(T(1.5)),
        ValueError,
        "but context is 1.5",
    ),
    (lambda: Line().sample(-1), ValueError, "^Line.sample: n must be at least 0, not -1"),
    (lambda: Line().sample(2.0), TypeError, "^Line.sample: n must be an integer, not float 2.0"),
    (lambda: Line().sample(2, stratified=1), TypeError, "^Line.sample: stratified must be True or"),
    (
        lambda: Line().sample(2, generator=0),
        TypeError,
        "^Line.sample: generator must be a torch.Generator, not int 0",
    ),
    (
        lambda: Line().sample(2, dtype=torch.int64),
        TypeError,
        "^Line.sample: dtype must be a floating point dtype, not dtype torch.int64",
    ),
    (lambda: Line().sample_few(-1, 2), ValueError, "^Line.sample_few: n must be at least 0"),
    (
        lambda: Line().sample_few(4, 0),
        ValueError,
        "^Line.sample_few: contexts must be at least 1, not 0",
    ),
    (lambda: Manifold(), TypeError, "abstract"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_both_ends_of_a_line_are_its_own() -> None:
    ends = T([0.0, 1.0])
    assert torch.equal(Line().coeffs(ends), torch.eye(2))
    for outside in (torch.nextafter(ends[1], T(2.0)), torch.nextafter(ends[0], T(-1.0))):
        with pytest.raises(ValueError, match="must lie in"):
            Line().coeffs(outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_softmax_is_on_the_simplex(dtype: torch.dtype) -> None:
    for vertices in (2, 7, 300):
        logits = torch.randn(100, vertices, generator=torch.Generator().manual_seed(0))
        Simplex(vertices).coeffs((3 * logits).to(dtype).softmax(-1))
