"""What tells a network's accuracy from its weights, and how well it does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scipy.stats import kendalltau
from sklearn.ensemble import GradientBoostingRegressor
from torch import Tensor, nn

from prediction.zoo import traced
from weightops import WeightSpec
from weightops.nn import UNF, PositionalEncoding

WIDTH = 16
BATCH = 32
RATE = 3e-3
#: of the zoo, to train on and to choose the epoch by; the rest is to test on
TRAIN, VALIDATION = 0.65, 0.1

Results = dict[str, Any]


def statistics(flat: Tensor, spec: WeightSpec) -> Tensor:
    """StatNN's features (Unterthiner et al. 2020, arXiv 2002.11448) of networks ``[N, P]``.

    Mean, variance and the quantiles 0, 1/4, 1/2, 3/4 and 1 of every tensor: ``[N, 7 tensors]``.
    """
    found, quantiles = [], torch.linspace(0, 1, 5)
    for tensor in spec.unflatten(flat).values():
        values = tensor.flatten(1)
        found += [values.mean(1, keepdim=True), values.var(1, keepdim=True)]
        found.append(torch.quantile(values, quantiles, dim=1).T)
    return torch.cat(found, 1)


class Read(nn.Module):
    """Weights ``[N, P]`` to features ``[N, P, C]``: over the spread of their tensor, lifted, and placed."""

    scale: Tensor

    def __init__(self, flat: Tensor, spec: WeightSpec, places: bool) -> None:
        super().__init__()
        spread = [each.std().expand(each[0].numel()) for each in spec.unflatten(flat).values()]
        self.register_buffer("scale", torch.cat(spread))
        self.lift = nn.Linear(1, WIDTH)
        self.place = PositionalEncoding(spec, WIDTH) if places else nn.Identity()

    def forward(self, flat: Tensor) -> Tensor:
        return self.place(self.lift((flat / self.scale)[..., None]))


class Means(nn.Module):
    """Mean of every tensor: ``[N, P, C]`` to ``[N, tensors * C]``."""

    def __init__(self, spec: WeightSpec) -> None:
        super().__init__()
        self.sizes = [shape.numel() for shape in spec.shapes.values()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([each.mean(1) for each in x.split(self.sizes, 1)], 1)


def unf(flat: Tensor, spec: WeightSpec, places: bool = True) -> nn.Module:
    body = UNF(spec, [WIDTH] * 3, invariant=True)
    assert body.pool is not None
    return nn.Sequential(Read(flat, spec, places), body, *head(body.pool.out_features(WIDTH)))


def deep_sets(flat: Tensor, spec: WeightSpec, places: bool = False) -> nn.Module:
    """The same, but a weight's features depend on no other weight; every tensor has its own layers."""

    def pointwise(term: Any) -> bool:
        same = term.input == term.output and term.input_indices == term.output_indices
        return same and len(set(term.input_indices)) == len(term.input_indices)

    body = UNF(spec, [WIDTH] * 3, terms=pointwise)
    tensors = len(spec.shapes)
    last = (nn.ReLU(), Means(spec))
    return nn.Sequential(Read(flat, spec, places), body, *last, *head(tensors * WIDTH))


def head(features: int) -> tuple[nn.Module, ...]:
    first, last = nn.Linear(features, 64), nn.Linear(64, 1)
    return nn.Dropout(0.2), first, nn.ReLU(), last, nn.Flatten(0)


class Standardized(nn.Module):
    """Features less their mean over the training networks, over their deviation."""

    def __init__(self, flat: Tensor, spec: WeightSpec) -> None:
        super().__init__()
        self.spec, found = spec, statistics(flat, spec)
        self.mean, self.deviation = found.mean(0), found.std(0)

    def forward(self, flat: Tensor) -> Tensor:
        return (statistics(flat, self.spec) - self.mean) / self.deviation


def perceptron(flat: Tensor, spec: WeightSpec) -> nn.Module:
    features = Standardized(flat, spec)
    first = nn.Linear(len(features.mean), 64)
    return nn.Sequential(features, first, nn.ReLU(), *head(64))


NETWORKS: dict[str, Callable[[Tensor, WeightSpec], nn.Module]] = {
    "UNF": unf,
    "UNF, no positions": partial(unf, places=False),
    "Deep Sets": deep_sets,
    "Deep Sets, positions": partial(deep_sets, places=True),
    "StatNN, perceptron": perceptron,
}
TREES = "StatNN, boosted trees"
PREDICTORS = (
    "UNF",
    "Deep Sets",
    TREES,
    "UNF, no positions",
    "Deep Sets, positions",
    "StatNN, perceptron",
)


def compare(name: str, flat: Tensor, accuracy: Tensor, split: int, epochs: int) -> Results:
    """One predictor on one split: Kendall's tau on test networks, and what it says of each."""
    torch.set_num_threads(1)
    count, spec = len(flat), traced()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(split))
    ends = round(TRAIN * count), round((TRAIN + VALIDATION) * count)
    train, validation, test = order.tensor_split(ends)
    # As deviations, which all predictors learn alike.
    mean, deviation = accuracy[train].mean(), accuracy[train].std()
    wanted = (accuracy - mean) / deviation
    if name == TREES:
        said = trees(statistics(flat, spec), wanted, train, validation, split)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(split)
            network = NETWORKS[name](flat[train], spec)
            said = fit(network, flat, wanted, train, validation, epochs)
    return {
        "tau": round(float(kendalltau(said[test], accuracy[test])[0]), 4),
        "error": round(float((said - wanted)[test].square().mean().sqrt() * deviation), 5),
        "true": [round(each, 4) for each in accuracy[test].tolist()],
        "said": [round(each, 4) for each in (said[test] * deviation + mean).tolist()],
    }


def fit(
    network: nn.Module,
    flat: Tensor,
    wanted: Tensor,
    train: Tensor,
    validation: Tensor,
    epochs: int,
) -> Tensor:
    """What ``network`` says of ``flat`` after the epoch that was best on ``validation``."""
    batches = len(train) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=epochs * batches, pct_start=0.1
    )
    least, state = float("inf"), None
    for epoch in range(1, epochs + 1):
        network.train()
        for some in train[torch.randperm(len(train))].split(BATCH)[:batches]:
            loss = (network(flat[some]) - wanted[some]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 3 == 0 or epoch == epochs:
            network.eval()
            with torch.no_grad():
                error = (network(flat[validation]) - wanted[validation]).square().mean().item()
            if error < least:
                least = error
                state = {name: each.clone() for name, each in network.state_dict().items()}
    assert state is not None
    network.load_state_dict(state)
    with torch.no_grad():
        return network.eval()(flat)


def trees(x: Tensor, wanted: Tensor, train: Tensor, validation: Tensor, seed: int) -> Tensor:
    """Boosted trees, as many of 600 as are best on ``validation``."""
    model = GradientBoostingRegressor(
        n_estimators=600,
        learning_rate=0.05,
        subsample=0.7,
        max_depth=4,
        max_features=0.5,
        random_state=seed,
    ).fit(x[train].numpy(), wanted[train].numpy())
    stages = torch.stack([torch.from_numpy(each) for each in model.staged_predict(x.numpy())])
    errors = (stages - wanted)[:, validation].square().mean(1)
    return stages[errors.argmin()].float()
