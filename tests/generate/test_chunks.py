"""A zoo of residual networks, generated chunk by chunk: from training to networks that work."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import BasicBlock
from torch import Tensor, nn

import weightops
from weightops.generate import WeightGenerator, evaluate
from weightops.population import population_batchnorm, population_train

CLASSES, TASKS, EACH = 3, 2, 4
FORMS: dict[str, dict[str, Any]] = {
    "mlp": {"autoencoder": {"hidden": (64, 32)}},
    "convolution": {"autoencoder": {"side": 8, "channels": (8, 8)}},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny steps: on a busy machine two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ResNet20(nn.Module):
    """Twenty layers as in He et al. 2016, of few channels."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        self.blocks = nn.Sequential(
            *(
                BasicBlock(before, after, 1 + (before != after))
                for before, after in zip([width, *widths], widths, strict=False)
            )
        )
        self.out = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


def without_norms(model: nn.Module) -> nn.Module:
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, nn.Identity())
        without_norms(module)
    return model


def datasets(rows: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Images whose classes the second task names otherwise."""
    centres = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    x = centres[labels] + 0.3 * torch.randn(rows, 3, 8, 8, generator=generator)
    return [(x, (labels + task) % CLASSES) for task in range(TASKS)]


@pytest.mark.parametrize(
    ("form", "norms"), [("mlp", False), ("convolution", False), ("convolution", True)]
)
def test_generated_resnets_solve_the_task_of_their_dataset(form: str, norms: bool) -> None:
    torch.manual_seed(0)
    model = ResNet20() if norms else without_norms(ResNet20())
    data, tasks = datasets(96, seed=1), torch.arange(TASKS).repeat_interleave(EACH)
    spec = weightops.trace(model, data[0][0][:2])
    x, targets = (torch.stack([data[task][of] for task in tasks]) for of in (0, 1))
    start = spec.flatten([model]).detach().expand(len(tasks), -1)
    zoo = population_train(
        start, model, (x, targets), steps=40, lr=1e-2, batch_size=32, progress=False
    ).flat
    if norms:
        zoo = population_batchnorm(zoo, model, x)

    generator = WeightGenerator(
        spec,
        x[0, 0].numel(),
        CLASSES,
        latent=4,
        form=form,
        chunk=1024,
        condition=16,
        options={
            **FORMS[form],
            "encoder": {"hidden": 16, "heads": 2, "points": 4},
            "diffusion": {"width": 128, "blocks": 2},
        },
    )
    assert generator.plan.num_tokens == 5
    generator.fit(
        zoo,
        tasks,
        data,
        steps=(300, 40, 400),
        batch=32,
        rate=5e-3,
        decay=0.98,
        progress=False,
    )
    unseen = datasets(90, seed=2)
    reconstructed = generator.reconstruct(zoo)
    for task in range(TASKS):
        alike = reconstructed[tasks == task]
        assert evaluate(alike, model, *unseen[task]).accuracy.min() > 0.9
        made = generator.generate(unseen[task], 6, steps=20)
        # Running statistics are generated with the weights.
        assert evaluate(made, model, *unseen[task]).accuracy.min() > 0.9
        assert evaluate(made, model, *unseen[1 - task]).accuracy.max() < 0.5
        assert len(made.unique(dim=0)) == len(made)
