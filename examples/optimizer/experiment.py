"""How well networks are trained: by SGD with momentum and Adam, tuned, and by learned optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from optimizer.tasks import MLP, TASKS, Task, traced, wider
from weightops import EquivariantPlan
from weightops.learned import Functional, MetaTraining, meta_train, start, step

#: seeds of what is drawn to tune and choose by, and to report
CHOICE, REPORT = 1, 2
#: Adam's learning rate and the shifts' deviation, smaller where f sums up more
STRIDES = {"deep_sets": (3e-3, 3e-3), "unf": (3e-4, 1e-3)}
MLP_STRIDES = STRIDES | {"unf": (8e-4, 1e-3)}
#: hidden units of MLPs that are trained by what was learned on another one
WIDTHS = (64, 128)
KINDS = ("Deep Sets", "UNF")
#: seeds of the further meta-training are so far from the first one's
SECOND = 500

#: ``(networks [N, P], gradients [N, P]) -> networks``, once a step
Update = Callable[[Tensor, Tensor], Tensor]
Results = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Steps and batches of all trainings, networks that a mean loss is of, and how functionals are learned."""

    horizon: int = 100
    batch: int = 32
    chosen_by: int = 16
    networks: int = 32
    #: first as Deep Sets, then as either
    iterations: int = 60
    further: int = 60
    #: the MLP's, which is quick: until Deep Sets gains no more
    mlp_further: int = 300
    #: after so many a functional is tried on networks, and the best one is kept
    every: int = 20
    particles: int = 16
    truncation: int = 20


def train(task: Task, flat: Tensor, update: Update, recipe: Recipe, seed: int, n: int) -> Tensor:
    """Train networks ``[G * n, P]``: the losses of their mini-batches, ``[steps, G, n]``.

    Those at equal places among n see the same rows, drawn as meta-training draws them. A loss is at most
    the task's worst, so that one network that diverges is not all of a mean.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(task.data()[1])
    recorded = []
    for _ in range(recipe.horizon):
        rows = torch.randint(samples, (n, recipe.batch), generator=generator)
        losses, grads = task.losses(flat, rows.repeat(len(flat) // n, 1))
        recorded.append(losses.nan_to_num(task.worst, task.worst).clamp(max=task.worst))
        flat = update(flat, grads)
    return torch.stack(recorded).unflatten(1, (-1, n))


def sgd(rate: Tensor, momentum: Tensor) -> Update:
    """``alpha (1 - momentum)`` is the learning rate; both per network ``[N, 1]``."""
    moment: Tensor | float = 0.0

    def update(flat: Tensor, grads: Tensor) -> Tensor:
        nonlocal moment
        moment = momentum * moment + (1 - momentum) * grads
        return flat - rate * moment

    return update


def adam(rate: Tensor, beta1: Tensor, beta2: Tensor) -> Update:
    """Adam (arXiv 1412.6980); all per network ``[N, 1]``."""
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0
    count = 0

    def update(flat: Tensor, grads: Tensor) -> Tensor:
        nonlocal mean, square, count
        count += 1
        mean = beta1 * mean + (1 - beta1) * grads
        square = beta2 * square + (1 - beta2) * grads.square()
        scale = (square / (1 - beta2**count)).sqrt() + 1e-8
        return flat - rate * (mean / (1 - beta1**count)) / scale

    return update


#: name -> rule, and the settings among which it is tuned
RULES: dict[str, tuple[Callable[..., Update], list[tuple[float, ...]]]] = {
    "SGD": (sgd, [*product([2 ** (n / 2 - 2) for n in range(8)], (0.0, 0.5, 0.8, 0.9))]),
    "Adam": (
        adam,
        [*product([10 ** (n / 4 - 2.5) for n in range(8)], (0.8, 0.9), (0.99, 0.999))],
    ),
}


def tuned(name: str, rule: str, recipe: Recipe, width: int | None = None) -> Results:
    """A rule with the settings that have the lowest mean loss over the horizon, and how it does then."""
    torch.set_num_threads(1)
    task = wider(width) if width else TASKS[name]
    make, grid = RULES[rule]

    def run(settings: list[tuple[float, ...]], seed: int, n: int) -> Tensor:
        columns = torch.tensor(settings).repeat_interleave(n, 0).T[..., None]
        first = task.networks(n, seed).repeat(len(settings), 1)
        return train(task, first, make(*columns), recipe, seed, n)

    losses = run(grid, CHOICE, recipe.chosen_by).mean((0, 2))
    best = grid[int(losses.argmin())]
    return {
        "settings": [float(f"{each:.4g}") for each in best],
        "tried": [float(f"{each:.4g}") for each in losses.tolist()],
        **curves(run([best], REPORT, recipe.networks)),
    }


def learn(name: str, seed: int, first: list[float], recipe: Recipe) -> Results:
    """Meta-train Deep Sets from tuned SGD, ``first``, and go on from there as Deep Sets and as UNF, equally long.

    So what differs are maps from one weight to another. Both train networks that they have not seen.
    """
    torch.set_num_threads(1)
    task = TASKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        functional = Functional(traced(task)[1], "deep_sets")
    with torch.no_grad():
        # Small beside the momentum.
        functional.weights[-1].mul_(0.01)
    # Near the largest rates that networks bear, losses tell little of small shifts.
    numbers = {"alpha": first[0] / 2, "momentum": max(first[1], 0.1), "beta": 0.3}
    common = meta_trained(name, functional, numbers, recipe.iterations, recipe, seed)
    further = recipe.mlp_further if name == MLP else recipe.further
    found = {}
    for kind in KINDS:
        begun = (
            common.best.functional
            if kind == "Deep Sets"
            else with_all_terms(common.best.functional)
        )
        numbers = {each: getattr(common.best, each) for each in numbers}
        again = meta_trained(name, begun, numbers, further, recipe, seed + SECOND)
        best = again.best
        found[kind] = {
            "parameters": begun.num_parameters,
            "tried": [float(f"{each:.4g}") for each in common.tried + again.tried[1:]],
            "settings": [float(f"{each:.4g}") for each in (best.alpha, best.momentum, best.beta)],
            "clipped": common.clipped + again.clipped,
            **curves(trained(task, best, recipe, REPORT, recipe.networks)),
        }
        if name == MLP:
            found[kind]["wider"] = {
                str(width): curves(trained(wider(width), best, recipe, REPORT, recipe.networks))
                for width in WIDTHS
            }
    return found


def with_all_terms(functional: Functional) -> Functional:
    """A universal neural functional that is ``functional``, of Deep Sets: its further terms are zero."""
    spec = functional.spec
    found = Functional(spec, "unf")
    same = torch.tensor([is_same(term) for term in EquivariantPlan(spec, fixed="permute").terms])
    with torch.no_grad():
        for to, of in zip(found.parameters(), functional.parameters(), strict=True):
            to.copy_(of)
        found.weights[-1][~same] = 0
    return found


def is_same(term: Any) -> bool:
    """Whether every weight stays where it is."""
    same = term.input == term.output and term.input_indices == term.output_indices
    return same and len(set(term.input_indices)) == len(term.input_indices)


@dataclass
class Learned:
    """The best of a meta-training, and the mean losses by which it was chosen."""

    best: MetaTraining
    tried: list[float]
    clipped: int


def meta_trained(
    name: str,
    functional: Functional,
    numbers: dict[str, float],
    iterations: int,
    recipe: Recipe,
    seed: int,
) -> Learned:
    task = TASKS[name]
    model, _ = traced(task)
    strides = (MLP_STRIDES if name == MLP else STRIDES)[functional.kind]
    options: Results = {
        **{"particles": recipe.particles, "truncation": recipe.truncation},
        **{"horizon": recipe.horizon, "batch_size": recipe.batch, "most": task.worst},
        **dict(zip(("lr", "sigma"), strides, strict=True)),
        **{"seed": seed, "progress": False},
        **numbers,
    }
    networks = task.networks(256, 1000 + seed)
    tried: list[float] = []
    with TemporaryDirectory() as folder:
        for done in range(0, iterations + 1, recipe.every):
            found = meta_train(
                *(functional, networks, model, task.data()),
                **{"iterations": done, "checkpoint": Path(folder) / "run"},
                **options,
            )
            losses = trained(task, found, recipe, CHOICE, recipe.chosen_by)
            tried.append(float(losses.mean()))
            if tried[-1] == min(tried):
                best = found
    return Learned(best, tried, int(found.clipped.sum()))


def trained(task: Task, found: MetaTraining, recipe: Recipe, seed: int, n: int) -> Tensor:
    """Losses ``[steps, 1, n]`` of networks that a learned optimizer trains."""
    flat = task.networks(n, seed)
    functional = found.functional.on(traced(task)[1])
    state = start(flat, found.momentum)
    numbers = {"alpha": found.alpha, "beta": found.beta, "momentum": found.momentum}

    @torch.no_grad()
    def update(flat: Tensor, grads: Tensor) -> Tensor:
        nonlocal state
        flat, state = step(flat, grads, state, functional, **numbers)
        return flat

    return train(task, flat, update, recipe, seed, n)


def curves(losses: Tensor) -> Results:
    """Of ``[steps, 1, n]``: the mean over the horizon, its last tenth, and every step's."""
    over = losses.mean((1, 2)).tolist()
    last = over[-max(1, len(over) // 10) :]
    return {
        "mean": round(sum(over) / len(over), 4),
        "final": round(sum(last) / len(last), 4),
        "losses": [float(f"{each:.4g}") for each in over],
    }
