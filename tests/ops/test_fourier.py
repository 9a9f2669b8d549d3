"""fourier_signal against torch's transform."""

import pytest
import torch
from torch import Tensor

import weightops
from weightops import _load, testing
from weightops.ops import fourier
from weightops.ops.fourier import reference

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = [3, 4, 7, 11, 12, 59]


def by_fft(embedding: Tensor) -> Tensor:
    rows = torch.fft.fft(embedding.double(), dim=-2)
    return torch.linalg.vector_norm(rows, dim=-1)[..., 1 : (embedding.shape[-2] + 1) // 2]


@pytest.mark.parametrize("p", LENGTHS)
def test_signals_and_gradients_are_those_of_the_transform(p: int) -> None:
    x = torch.randn(3, p, 5, generator=GENERATOR, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    made, expected = weightops.fourier_signal(ours), by_fft(theirs)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    made.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weightops.fourier_signal(x[0]), made[0].detach())
    single = weightops.fourier_signal(x.float())
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [0, 1, 7, 16, 33, 128])
@pytest.mark.parametrize("p", [3, 13, 59, 300])
def test_the_kernel_is_the_definition(p: int, d: int, dtype: torch.dtype) -> None:
    x = testing.FourierSignal(3, p, d, dtype).make().mT.contiguous().mT
    matrix = reference.transform(p, dtype, x.device)
    torch.testing.assert_close(fourier._signal(x, matrix), reference.signal(x, matrix))


@pytest.mark.skipif(not _load.has_kernel("fourier_signal", "cpu"), reason="torch's products differ")
@pytest.mark.parametrize("networks", [1, 3])
def test_signals_are_the_same_to_the_bit_with_any_number_of_threads(networks: int) -> None:
    x = testing.FourierSignal(networks, 300, 33).make()
    matrix = reference.transform(300, x.dtype, x.device)
    signals, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            signals.append(fourier._signal(x, matrix))
    finally:
        torch.set_num_threads(threads)
    assert signals[0].equal(signals[1])
    assert signals[0].equal(signals[2])
    assert fourier._signal(x[:1], matrix).equal(signals[0][:1])


@pytest.mark.parametrize(("p", "d"), [(59, 1), (12, 1), (521, 3)])
def test_where_torchs_transform_is_faster_signals_are_the_same(p: int, d: int) -> None:
    x = testing.FourierSignal(2, p, d, torch.float64).make().requires_grad_()
    assert fourier._by_fft(x)
    made = weightops.fourier_signal(x)
    expected = reference.signal(x, weightops.fourier_transform(p))
    torch.testing.assert_close(made, expected, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad(each.sin().sum(), x)[0] for each in (made, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    zero = torch.zeros(p, d, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(weightops.fourier_signal(zero).sum(), zero)[0].any()


def test_the_transform_that_is_kept_serves_whatever_comes_after_it() -> None:
    x = torch.randn(2, 23, 3, generator=GENERATOR, dtype=torch.float64)
    with torch.inference_mode():
        weightops.fourier_signal(x)
    torch.func.grad(lambda x: weightops.fourier_signal(x).sum())(x)
    x.requires_grad_()
    weightops.fourier_signal(x).sum().backward()
    torch.testing.assert_close(weightops.fourier_signal(x), by_fft(x))


@pytest.mark.parametrize("p", LENGTHS)
def test_the_matrix_is_the_transform_of_the_identity(p: int) -> None:
    rows = torch.fft.fft(torch.eye(p, dtype=torch.float64), dim=0)[1 : (p + 1) // 2]
    torch.testing.assert_close(
        weightops.fourier_transform(p), torch.stack([rows.real, rows.imag]), rtol=0, atol=1e-13
    )


def test_a_pure_circle_has_one_signal_and_zero_gradients_elsewhere() -> None:
    cos, sin = weightops.fourier_transform(11)[:, 2]
    x = torch.stack([3 * cos, 3 * sin], 1).requires_grad_()
    made = weightops.fourier_signal(x)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[2] = 3 * 11 / 2**0.5
    torch.testing.assert_close(made.detach(), expected, rtol=1e-12, atol=1e-12)
    zero = torch.zeros(11, 2, dtype=torch.float64, requires_grad=True)
    weightops.fourier_signal(zero).sum().backward()
    assert zero.grad is not None
    assert not zero.grad.any()


def test_autocast_keeps_float32() -> None:
    x = torch.randn(2, 7, 3, generator=GENERATOR)
    testing.check_autocast(weightops.fourier_signal, x)
    grads = []
    for enabled in (False, True):
        at = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            weightops.fourier_signal(at).sum().backward()
        grads.append(at.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_dynamic_batch_compiles_once() -> None:
    testing.check_compiled_training(
        weightops.fourier_signal,
        by_fft,
        [torch.randn(n, 7, 3, generator=GENERATOR, dtype=torch.float64) for n in (2, 3, 5)],
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("networks", [0, 1, 3])
def test_opcheck(networks: int, requires_grad: bool) -> None:
    x = torch.randn(networks, 7, 3).requires_grad_(requires_grad)
    testing.check_op(fourier._signal, x, weightops.fourier_transform(7).float())


def test_meta_tensors_pass() -> None:
    assert weightops.fourier_signal(torch.empty(4, 12, 3, device="meta")).shape == (4, 5)
