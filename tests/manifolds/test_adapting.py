"""A lifted network adapts to what its context says: digits at any angle."""

from collections.abc import Iterator
from math import pi

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from weightops.manifolds import Ellipse, at, lift
from weightops.optim import ManifoldDescent

CIRCLE = Ellipse()
STEPS, BATCH = 250, 128


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny ops: where cores are shared, two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] between 0 and 1, in random order, and their digits."""
    images, target = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return x[order], torch.tensor(target)[order]


def turned(x: Tensor, context: Tensor) -> Tensor:
    """Images turned by ``2 pi context``."""
    c, s = (2 * pi * context).cos(), (2 * pi * context).sin()
    turn = torch.stack([c, -s, 0 * c, s, c, 0 * c], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, x.shape, align_corners=False), align_corners=False)


def accuracy(lifted: bool) -> float:
    """On 500 images held out, each at four angles, after training on the others at random angles."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x, target = digits()
    net: nn.Module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    if lifted:
        net = lift(net, CIRCLE)
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, 0.05, total_steps=STEPS, cycle_momentum=False
    )
    optimizer = ManifoldDescent(sgd, CIRCLE, net.bases()) if lifted else sgd  # type: ignore[operator]
    for _ in range(STEPS):
        chosen = torch.randint(1297, (BATCH,), generator=generator)
        context = CIRCLE.sample(BATCH, generator=generator)
        with at(context):
            logits = net(turned(2 * x[chosen] - 1, context))
        optimizer.zero_grad()
        F.cross_entropy(logits, target[chosen]).backward()
        optimizer.step()
        schedule.step()
    context = CIRCLE.sample(2000, generator=generator)
    with torch.no_grad(), at(context):
        found = net(turned(2 * x[1297:].repeat(4, 1, 1, 1) - 1, context)).argmax(1)
    return (found == target[1297:].repeat(4)).double().mean().item()


def test_a_lifted_cnn_reads_digits_at_any_angle() -> None:
    plain, adapted = accuracy(False), accuracy(True)
    assert adapted > 0.9, adapted
    assert adapted > plain + 0.07, (adapted, plain)
