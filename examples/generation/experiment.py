"""One experiment: a zoo, a generator trained on it, and networks for tasks that the zoo does not have."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import weightops
from generation import population
from generation.tasks import FAMILIES, MODELS, Tasks, initial, traced
from weightops import align, generate
from weightops.generate import WeightGenerator

FINE_TUNED = (0, 1, 2, 5, 10, 20, 40, 80)

Results = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A zoo and how a generator is trained on it.

    Attributes:
        start: ``"shared"``, one initialisation for the whole zoo, ``"own"``, one for each network, or
            ``"aligned"``, the same networks permuted towards the first of them.
        seen: tasks of the zoo.
        networks: of each task.
        trained: steps of each network's training.
        steps: of autoencoder, alignment and diffusion.
        generated: networks generated for each task.
        seed: of all of it but the tasks.
    """

    family: str
    model: str = "MLP"
    start: str = "shared"
    seen: int = 20
    unseen: int = 4
    networks: int = 16
    trained: int = 300
    steps: tuple[int, int, int] = (600, 150, 2500)
    generated: int = 16
    seed: int = 0

    @property
    def name(self) -> str:
        starts = {"shared": "", "own": ", own initialisations", "aligned": ", own ones aligned"}
        return f"{self.family}, {self.model}{starts[self.start]}"


class Zoo:
    """Networks of all seen tasks, and what tests networks on any task."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tasks: Tasks = FAMILIES[recipe.family](recipe.seen, recipe.unseen)
        self.model = MODELS[recipe.model](self.tasks.classes)
        self.spec = traced(self.model)
        self.images, self.classes = self.tasks.train()
        self.task = torch.arange(recipe.seen).repeat_interleave(recipe.networks)
        shared = recipe.start == "shared"
        count = 1 if shared else len(self.task)
        self.start = initial(self.model, self.spec, count, seed=recipe.seed)
        start = self.start.expand(len(self.task), -1)
        (flat,) = self.train(start, self.task, [recipe.trained], 2 * recipe.seed)
        if recipe.start == "aligned":
            flat = weightops.permute(flat, align.match(self.spec, flat[0], flat).perms, self.spec)
        self.flat = flat

    def train(self, flat: Tensor, tasks: Tensor, steps: Any, seed: int) -> list[Tensor]:
        return population.train(
            *(flat, self.model, self.images, self.classes, tasks), steps=steps, seed=seed
        )

    def wrong(self, flat: Tensor, task: int) -> Tensor:
        """Which of a task's test images networks take for another class, bool ``[N, B]``."""
        data = self.tasks.data[task]
        return population.errors(flat, self.model, data.test, data.test_classes)

    def accuracy(self, flat: Tensor, task: int) -> Tensor:
        return 1 - self.wrong(flat, task).float().mean(1)

    def of(self, task: int) -> Tensor:
        return self.flat[self.task == task]

    def best(self, flat: Tensor, task: int, count: int) -> Tensor:
        """Those of the networks that are best on a task's training images, best first."""
        images, classes = self.images[task], self.classes[task]
        found = population.accuracy(flat, self.model, images, classes)
        return generate.select(flat, found, count)[0]

    def halfway(self, task: int) -> Tensor:
        """Means of the weights of two networks each, of the tasks that an unseen one lies between."""
        before, after = self.tasks.between[task]
        return (self.of(before) + self.of(after)) / 2


def compare(recipe: Recipe) -> Results:
    """Accuracies on test images, fine-tuning and novelty for one zoo."""
    torch.set_num_threads(1)
    began = time.process_time()
    zoo = Zoo(recipe)
    tasks = zoo.tasks
    generator = WeightGenerator(zoo.spec, 64, tasks.classes, options={"encoder": {"points": 8}})
    datasets = [(each.train, each.train_classes) for each in tasks.data]
    losses = generator.fit(
        zoo.flat,
        zoo.task,
        datasets[: recipe.seen],
        steps=recipe.steps,
        seed=recipe.seed,
        progress=False,
    )
    generated = [
        generator.generate(dataset, recipe.generated, seed=n) for n, dataset in enumerate(datasets)
    ]
    seen, unseen = range(recipe.seen), tasks.unseen
    retrieved = {task: zoo.best(zoo.flat, task, recipe.generated) for task in unseen}

    def mean(networks: Callable[[int], Tensor], where: range) -> list[float]:
        """One mean accuracy a task."""
        return [round(zoo.accuracy(networks(task), task).mean().item(), 4) for task in where]

    fresh = initial(zoo.model, zoo.spec, recipe.generated, seed=100 + recipe.seed)
    half = recipe.seen // 2
    return {
        "recipe": vars(recipe) | {"steps": list(recipe.steps)},
        "tasks": list(tasks.names),
        "weights": zoo.spec.numel,
        "accuracy": {
            "zoo": mean(zoo.of, seen),
            "reconstructed": mean(lambda task: generator.reconstruct(zoo.of(task)), seen),
            "generated, seen": mean(lambda task: generated[task], seen),
            "generated, unseen": mean(lambda task: generated[task], unseen),
            "best generated": mean(lambda task: zoo.best(generated[task], task, 1), unseen),
            "retrieved": mean(lambda task: retrieved[task][:1], unseen),
            "halfway": mean(zoo.halfway, unseen) if tasks.between else [],
            # Of rotations, the opposite one.
            "wrong task": mean(lambda task: generated[(task + half) % recipe.seen], seen),
            "random": mean(lambda task: fresh, unseen),
        },
        "fine-tuned": fine_tuned(zoo, generated, retrieved, fresh),
        "novelty": novelty(zoo, generator, generated),
        "losses": {
            name: [round(part.mean().item(), 4) for part in each.chunk(20)]
            for name, each in losses.items()
        },
        "cpu_seconds": round(time.process_time() - began),
    }


def fine_tuned(
    zoo: Zoo, generated: list[Tensor], retrieved: dict[int, Tensor], fresh: Tensor
) -> dict[str, list[float]]:
    """Accuracy on unseen tasks after each of ``FINE_TUNED`` steps, by what training starts from."""
    unseen = list(zoo.tasks.unseen)
    count, seed = zoo.recipe.generated, 2 * zoo.recipe.seed + 1
    starts = {
        "generated": [generated[task] for task in unseen],
        "retrieved": [retrieved[task] for task in unseen],
        "zoo's mean": [zoo.flat.mean(0).expand(count, -1)] * len(unseen),
        "random": [fresh] * len(unseen),
    }
    if zoo.recipe.start == "shared":
        starts["shared initialisation"] = [zoo.start.expand(count, -1)] * len(unseen)
    tasks = torch.tensor(unseen).repeat_interleave(count)
    return {
        name: [
            round(
                torch.cat([zoo.accuracy(flat[tasks == task], task) for task in unseen])
                .mean()
                .item(),
                4,
            )
            for flat in zoo.train(torch.cat(networks), tasks, FINE_TUNED, seed)
        ]
        for name, networks in starts.items()
    }


def novelty(zoo: Zoo, generator: WeightGenerator, generated: list[Tensor]) -> Results:
    """How far networks are from the nearest one of the zoo, and how alike their wrong predictions.

    Distances are modulo permutation and in units of the mean distance between two networks of one
    task. Overlap is that of the sets of images taken for another class, with the network of the same
    task that has most of it. Networks are compared with those of the zoo that they are not made of.
    """
    kinds = ("zoo", "reconstructed", "generated")
    found: dict[str, Results] = {kind: {"distance": [], "overlap": []} for kind in kinds}
    pairs = []
    for task in range(0, zoo.recipe.seen, max(1, zoo.recipe.seen // 5)):
        own = zoo.of(task)
        pairs.append(torch.pdist(own).mean().item())
        for n in range(min(4, len(own))):
            others = torch.cat([own[:n], own[n + 1 :]])
            for kind, network, against in (
                ("zoo", own[n], others),
                ("reconstructed", generator.reconstruct(own[n : n + 1])[0], others),
                ("generated", generated[task][n], own),
            ):
                nearest = generate.novelty(
                    network[None],
                    against,
                    zoo.spec,
                    errors=zoo.wrong(network[None], task),
                    zoo_errors=zoo.wrong(against, task),
                    progress=False,
                )
                found[kind]["distance"].append(nearest.distance.item())
                found[kind]["overlap"].append(nearest.overlap.item())
    unit = sum(pairs) / len(pairs)
    return {
        kind: {
            "distance": round(sum(each["distance"]) / len(each["distance"]) / unit, 3),
            "overlap": round(sum(each["overlap"]) / len(each["overlap"]), 3),
        }
        for kind, each in found.items()
    }
