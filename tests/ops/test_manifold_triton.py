"""Triton kernels of weight manifolds without a GPU: right in the interpreter, and within a GPU's means."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_checks import ARCHITECTURES, Launch, check_launch, interpret, run
from triton_checks import launches as launched

pytest.importorskip("triton")

PRODUCTS = {"contract_rows", "contract_groups", "outer"}
OPS = (
    "manifold_contract",
    "manifold_contract_backward",
    "synthesize",
    "synthesize_update",
)


def test_in_the_interpreter() -> None:
    interpret(Path(__file__).parent / "manifold_interpreted.py")


def test_the_kernels_serve_where_torch_has_cuda_and_are_imported_when_called() -> None:
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; import weightops; from weightops import _op, info; "
        "assert 'triton' not in sys.modules; ops = info.collect()['ops']; "
        f"assert all(ops[name]['cuda'].startswith('Triton; torch, if ') for name in {OPS}); "
        "assert ('synthesize_into', 'cuda') in _op.served"
    )
    run("-c", code, WEIGHTOPS_DISABLE_NATIVE="1")


class Case:
    """A layer whose launches are looked at; on meta tensors, since nobody launches them."""

    def __init__(
        self,
        x: Sequence[int],
        weight: Sequence[int],
        geometry: Sequence[int] = (),
        contexts: int = 8,
        grouped: bool = False,
    ) -> None:
        self.x, self.weight, self.geometry = x, weight, list(geometry)
        self.contexts, self.grouped = contexts, grouped

    def launches(self, dtype: torch.dtype, precision: str) -> list[Launch]:
        from weightops.ops.manifold import triton as kernels
        from weightops.ops.manifold import triton_synthesize as streams

        def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        wide = torch.promote_types(dtype, torch.float32)
        x, weight = made(*self.x), made(*self.weight)
        coeffs = made(self.contexts, len(weight), dtype=wide)
        shift = made(self.contexts, weight.shape[1], dtype=wide)
        index = made(len(x), dtype=torch.int64) if self.contexts != len(x) else None
        rest = (self.geometry, True, True, True, precision)

        def call() -> None:
            y = kernels.contract(x, coeffs, index, weight, shift, self.geometry, precision)
            kernels.contract_backward(y, x, coeffs, index, weight, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_pays", lambda *_: self.grouped)
            return launched(
                call,
                {
                    kernels: ("contract_rows", "contract_groups", "outer"),
                    streams: ("combine", "descend", "gather"),
                },
            )


def streamed(dtype: torch.dtype, bases: int, contexts: int, size: int) -> list[Launch]:
    from weightops.ops.manifold import triton_synthesize as streams

    wide = torch.promote_types(dtype, torch.float32)
    at = torch.empty(bases, size, dtype=dtype, device="meta")
    coeffs = torch.empty(contexts, bases, dtype=wide, device="meta")

    def call() -> None:
        y = streams.synthesize(coeffs, at)
        streams.synthesize_update(at, y, coeffs, coeffs)

    return launched(call, {streams: ("combine", "descend", "gather")})


def check(
    launches: Sequence[Launch],
    dtype: torch.dtype,
    precision: str,
    architectures: Sequence[int] = ARCHITECTURES,
) -> None:
    precise = dtype == torch.float64 or (dtype == torch.float32 and precision == "highest")
    for launch in launches:
        multiplies = launch.kernel.__name__ in PRODUCTS and not precise
        for architecture in architectures:
            # ptxas lays a few words aside so that one more block fits a multiprocessor.
            check_launch(launch, architecture, on_tensor_cores=multiplies, spilled=32)


def names(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in launches]


LINEAR = ((4096, 1, 1024), (3, 1024, 1024))
IMAGE = ((64, 64, 32, 32), (3, 64, 64, 3, 3), (1, 1, 1, 1, 1, 1, 1))


def test_what_a_layer_launches() -> None:
    by_rows = Case(*LINEAR).launches(torch.float32, "highest")
    assert names(by_rows) == ["contract_rows", "contract_rows", "gather", "outer"]
    by_groups = Case(*LINEAR, grouped=True).launches(torch.float32, "highest")
    # A gradient by eight contexts' weights is 32 MiB, and 64 are held at once.
    assert names(by_groups) == ["contract_groups", "contract_groups", "outer", "descend"]
    one = Case(*LINEAR, contexts=1).launches(torch.float32, "highest")
    assert names(one) == ["combine", "combine", "descend"]


@pytest.mark.parametrize(
    ("case", "dtype", "precision", "architectures"),
    [
        (Case(*LINEAR, grouped=True), torch.bfloat16, "highest", ARCHITECTURES),
        (Case(*IMAGE), torch.float32, "high", (80, 120)),
    ],
    ids=["groups", "rows of images"],
)
def test_kernels_fit_and_use_tensor_cores(
    case: Case, dtype: torch.dtype, precision: str, architectures: Sequence[int]
) -> None:
    check(case.launches(dtype, precision), dtype, precision, architectures)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_streams_fit(dtype: torch.dtype) -> None:
    check(streamed(dtype, 9, 4, 1 << 20), dtype, "highest", (90,))


def test_kernels_of_single_rows_bases_and_channels_compile() -> None:
    for case in (
        Case((1, 1, 1), (1, 1, 1), contexts=2, grouped=True),
        Case((2, 1, 1, 1), (1, 1, 1, 1, 1), (1,) * 7),
    ):
        check(case.launches(torch.float32, "highest"), torch.float32, "highest", (90,))


CASES = {
    "linear": LINEAR,
    "odd": ((4096, 1, 1023), (3, 1021, 1023)),
    "tokens": ((64, 77, 768), (3, 512, 768)),
    "few": ((8, 1, 1024), (3, 1000, 1024)),
    "nine": ((512, 1, 256), (9, 256, 256)),
    "many": ((4096, 1, 1024), (17, 1024, 1024)),
    "image": IMAGE,
    "nine of images": ((64, 64, 32, 32), (9, 64, 64, 3, 3), (1, 1, 1, 1, 1, 1, 1)),
    "many of images": ((64, 64, 32, 32), (17, 64, 64, 3, 3), (1, 1, 1, 1, 1, 1, 1)),
    "strided": ((64, 64, 32, 32), (3, 64, 32, 3, 3), (2, 2, 1, 1, 1, 1, 2)),
    "first": ((64, 3, 32, 32), (3, 64, 3, 7, 7), (2, 2, 3, 3, 1, 1, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "highest"),
        (torch.bfloat16, "highest"),
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.float32, "medium"),
        (torch.float64, "highest"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_kernels_fit_and_use_tensor_cores_everywhere(
    name: str, grouped: bool, dtype: torch.dtype, precision: str
) -> None:
    launches = Case(*CASES[name], grouped=grouped).launches(dtype, precision)
    check(launches, dtype, precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_streams_fit_everywhere(dtype: torch.dtype) -> None:
    for bases in (1, 8, 9, 31):
        for contexts in (1, 8):
            for size in (1 << 20, 1_000_003):
                check(streamed(dtype, bases, contexts, size), dtype, "highest")
