"""A functional learns something real about real networks within seconds."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from weightops import WeightSpec, permute, testing
from weightops.nn import UNF

SPEC: WeightSpec = testing.mlp_spec(16, 12, 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny ops: where cores are shared, two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    """Images averaged to 4 x 4, [1797, 16], and their digits."""
    images, target = load_digits(return_X_y=True)
    x = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), 2).flatten(1)
    return (x - x.mean()) / x.std(), torch.tensor(target)


def logits(flat: Tensor, x: Tensor) -> Tensor:
    """[N, P] networks on [B, 16] images: [N, B, 10]."""
    w = SPEC.unflatten(flat)
    h = torch.relu(x @ w["fc1.weight"].mT + w["fc1.bias"][:, None])
    return h @ w["fc2.weight"].mT + w["fc2.bias"][:, None]


def train_networks(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` networks trained at rates from useless to good, and their accuracy on images held out."""
    x, target = digits()
    flat = torch.randn(n, SPEC.numel, generator=generator) * 0.25
    rates = 10 ** (torch.rand(n, 1, generator=generator) * 2.5 - 2)
    for _ in range(40):
        batch = torch.randint(1000, (64,), generator=generator)
        weights = flat.requires_grad_()
        each = F.cross_entropy(
            logits(weights, x[batch]).movedim(2, 1), target[batch].expand(n, -1), reduction="none"
        )
        (grad,) = torch.autograd.grad(each.mean(1).sum(), weights)
        flat = (weights - rates * grad).detach()
    with torch.no_grad():
        right = logits(flat, x[1000:]).argmax(-1) == target[1000:]
    return flat, right.float().mean(1)


def test_accuracy_is_predicted_from_the_weights(generator: torch.Generator) -> None:
    flat, accuracy = train_networks(400, generator)
    assert accuracy.std() > 0.15  # there is something to predict
    torch.manual_seed(0)
    unf = UNF(SPEC, [1, 8, 8], "silu", out_features=1)
    optimizer = torch.optim.Adam(unf.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
    x, mean, std = 4 * SPEC.features(flat), accuracy[:300].mean(), accuracy[:300].std()
    for _ in range(200):
        chosen = torch.randint(300, (64,), generator=generator)
        predicted = unf(x[chosen])[:, 0]
        loss = F.mse_loss(predicted, (accuracy[chosen] - mean) / std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = unf(x[300:])[:, 0] * std + mean
        moved = permute(flat[300:], SPEC.random_permutations(100, generator), SPEC)
        again = unf(4 * SPEC.features(moved))[:, 0] * std + mean
    rest = accuracy[300:]
    explained = 1 - (predicted - rest).square().mean() / (rest - rest.mean()).square().mean()
    assert explained > 0.6, f"R^2 {explained:.3f}"
    torch.testing.assert_close(again, predicted, atol=1e-3, rtol=0)
