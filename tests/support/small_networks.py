"""Networks that tests of barriers share."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import weightops


def spec_of(model: nn.Module) -> weightops.WeightSpec:
    """The flat layout of a model, without permutable axes."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.dim()}
    return weightops.WeightSpec(
        {name: (None,) * len(shape) for name, shape in shapes.items()}, shapes
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


NET_SPEC = weightops.WeightSpec(
    {
        "fc1.weight": ("h", None),
        "fc1.bias": ("h",),
        **{f"norm.{name}": ("h",) for name in ("weight", "bias", "running_mean", "running_var")},
        "fc2.weight": (None, "h"),
        "fc2.bias": (None,),
    },
    {name: tuple(t.shape) for name, t in Net().state_dict().items() if t.dim()},
)


def random_networks(
    build: Callable[[], nn.Module], count: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, weightops.WeightSpec, Tensor]:
    """A model, its spec and ``count`` networks of different seeds."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = build().to(dtype)
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_()
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
        models.append(model)
    spec = spec_of(models[0])
    return models[0], spec, spec.flatten(models).detach()


def networks() -> tuple[list[nn.Module], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(300, 6, generator=generator)
    targets = inputs[:, :4].argmax(1)
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models.append(model.eval())
    return models, inputs, targets


@torch.no_grad()
def evaluated(
    probe: nn.Module,
    spec: weightops.WeightSpec,
    rows: Iterable[Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses and errors of networks, each loaded and run on all inputs at once."""
    losses, errors = [], []
    for row in rows:
        spec.load_(probe.eval(), row)
        logits = probe(inputs)
        losses.append(nn.functional.cross_entropy(logits, targets).double())
        errors.append((logits.argmax(1) != targets).double().mean())
    return torch.stack(losses), torch.stack(errors)
