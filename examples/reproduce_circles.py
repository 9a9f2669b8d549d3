"""Survival of the fittest representation: which circles of an embedding live through training.

Networks that add modulo p, many at once, with the signals of all frequencies at every step. Circles over
time and over the embedding's dimension; whether the start tells who survives, also among networks with one
initial embedding and in competitions of two frequencies; the signals as a linear system; what circles are
worth alone. Source: Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420. Ends with
tables and pictures, in the folder reproduced.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

import reproduction
import torch
from circles import report, studies
from circles.networks import Trainer
from rich.console import Console

from weightops.circles import construct, train


@dataclass(frozen=True)
class Plan:
    """Which networks are trained, and for how long.

    Attributes:
        steps: of all networks but those of ``longer``.
        networks: of dimension d.
        dimensions: others than d, with ``per_dimension`` networks each.
        longer: networks that are watched for so many steps.
        embeddings: that ``per_embedding`` networks each begin with.
        ratios: of the weaker to the stronger signal of two frequencies, with ``per_ratio`` networks each.
        strength: the stronger signal, the paper's.
        batch: networks that are trained at once.
    """

    p: int = 59
    d: int = 128
    steps: int = 1000
    networks: int = 24
    dimensions: tuple[int, ...] = (16, 32, 64)
    per_dimension: int = 16
    longer: tuple[int, int] = (8, 3001)
    embeddings: int = 3
    per_embedding: int = 16
    ratios: tuple[float, ...] = (0.1, 0.25, 0.35, 0.5, 0.7, 1.0)
    per_ratio: int = 8
    strength: float = 80.0
    batch: int = 8


FULL = Plan()
QUICK = Plan(
    **{"p": 31, "d": 64, "steps": 700, "networks": 8, "dimensions": (8,), "per_dimension": 4},
    **{"longer": (2, 1001), "embeddings": 2, "per_embedding": 3, "ratios": (0.25, 1.0)},
    **{"per_ratio": 2, "strength": 40.0},
)
PAPER = Plan(
    **{"steps": 30_001, "networks": 100, "per_dimension": 100, "longer": (8, 30_001)},
    **{"dimensions": (4, 8, 16, 24, 32, 48, 64, 80, 96), "embeddings": 10, "per_embedding": 50},
    **{"ratios": tuple(exp(-4 * n / 15) for n in range(15, -1, -1)), "per_ratio": 100},
    batch=16,
)
#: of how many steps the longer training is recorded
EVERY = 50


def compare(plan: Plan, console: Console, folder: Path) -> report.Results:
    """Train all networks, one study after the other, and ask them."""
    threads = f"{torch.get_num_threads()} threads"
    with reproduction.bars(console, threads) as (progress, facts):
        trained = Trainer(folder, progress, plan.batch)
        main = trained("circles", range(plan.networks), plan.p, plan.d, plan.steps)
        dimensions = {
            d: trained(
                f"dimension {d}", range(plan.per_dimension), plan.p, d, plan.steps, every=EVERY
            )
            for d in plan.dimensions
        }
        count, steps = plan.longer
        longer = trained("over time", range(count), plan.p, plan.d, steps, every=EVERY)
        results = {
            "plan": asdict(plan) | {"dimensions": sorted({*plan.dimensions, plan.d})},
            "dimensions": {
                str(d): studies.counts(networks)
                for d, networks in sorted((dimensions | {plan.d: main}).items())
            },
            "over time": studies.over_time(longer, EVERY),
            "survival": studies.survival(main),
            "one embedding": one_embedding(plan, trained),
            "competition": competition(plan, trained),
            "dynamics": studies.dynamics(main),
            "alone": studies.circles_alone(main),
            "planes": studies.planes(train(1, plan.p, plan.d, steps=0).embedding[0], main),
        }
    return {**facts, **results}


def one_embedding(plan: Plan, trained: Trainer) -> report.Results:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(plan.embeddings, plan.p, plan.d, generator=generator)
    networks = trained(
        "one embedding",
        *(range(plan.embeddings * plan.per_embedding), plan.p, plan.d, plan.steps),
        every=EVERY,
        embedding=start.repeat_interleave(plan.per_embedding, 0),
    )
    return studies.one_embedding(networks, plan.per_embedding)


def competition(plan: Plan, trained: Trainer) -> list[report.Results]:
    generator = torch.Generator().manual_seed(0)
    drawn: list[tuple[int, int]] = []
    while len(drawn) < plan.per_ratio:
        stronger, weaker = (torch.randperm((plan.p - 1) // 2, generator=generator)[:2] + 1).tolist()
        # Those appear where the stronger one is alone, too.
        if weaker not in studies.odd_multiples(stronger, plan.p):
            drawn.append((stronger, weaker))
    pairs = drawn * len(plan.ratios)
    signals = [
        (plan.strength, plan.strength * ratio)
        for ratio in plan.ratios
        for _ in range(plan.per_ratio)
    ]
    networks = trained(
        "two frequencies",
        *([*range(plan.per_ratio)] * len(plan.ratios), plan.p, plan.d, plan.steps),
        every=EVERY,
        embedding=construct(plan.p, plan.d, pairs, signals, dtype=torch.float32),
    )
    return studies.competition(networks, pairs, plan.per_ratio)


def short(quick: bool, console: Console) -> report.Results:
    with TemporaryDirectory() as folder:
        return compare(QUICK if quick else FULL, console, Path(folder))


if __name__ == "__main__":
    reproduction.run(
        "circles",
        __doc__.splitlines()[0],
        "few small networks, trained for a short time",
        short,
        report,
        width=150,
        papers=lambda folder, console: compare(PAPER, console, folder),
    )
