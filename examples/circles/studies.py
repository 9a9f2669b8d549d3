"""What is asked of trained networks. Frequencies are k = 1 .. K; results are lists, to be written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import weightops
from circles.networks import Networks
from weightops.circles import (
    Dynamics,
    alive,
    circularity,
    count_circles,
    fit_dynamics,
    frequency_gradients,
    isolate,
    single_circle_accuracy,
)

Results = dict[str, Any]
#: the paper's, of the dynamics
FITTED, ALPHA = 1000, 0.01
#: frequencies that count as an embedding's strongest, and as its weakest
FEW = 5
#: frequencies in a picture that do not survive
DEAD = 3


def listed(values: Tensor, digits: int = 4) -> list:
    return np.round(values.double().numpy(), digits).tolist()


def counts(networks: Networks) -> Results:
    """One number per network: circles by both definitions, and accuracy on pairs that were held out."""
    return {
        "accuracy": listed(networks.accuracy()),
        "circles": networks.alive.sum(1).tolist(),
        "level": count_circles(networks.end, by="level").tolist(),
    }


def over_time(networks: Networks, every: int) -> Results:
    """Circles at each recorded step, ``[R][M]``, and the first network's signals, ``[R][K]``."""
    return {
        "steps": [every * record for record in range(len(networks.signals))],
        "circles": count_circles(networks.signals).tolist(),
        "level": count_circles(networks.signals, by="level").tolist(),
        "signals": listed(networks.signals[:, 0], 2),
        "alive": networks.alive[0].tolist(),
    }


def survival(networks: Networks) -> Results:
    """Which frequencies become circles, ``[M][K]``, and how well a classifier tells from what is known early."""
    start, growth = networks.signals[0], frequency_gradients(networks.signals)
    return {
        "start": listed(start, 2),
        "growth": listed(growth, 5),
        "alive": networks.alive.int().tolist(),
        "auc": {
            "initial signal": told([start], networks.alive),
            "early growth": told([growth], networks.alive),
            "both": told([start, growth], networks.alive),
        },
    }


def told(features: Sequence[Tensor], survivors: Tensor) -> float:
    """Area under the curve of a logistic classifier of frequencies, fitted to other networks than it is asked of."""
    networks, frequencies = survivors.shape
    found = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        torch.stack(features, 2).flatten(0, 1).numpy(),
        survivors.flatten().numpy(),
        groups=np.arange(networks).repeat(frequencies),
        cv=GroupKFold(min(8, networks)),
        method="decision_function",
    )
    return round(roc_auc_score(survivors.flatten().numpy(), found), 4)


def circles_alone(networks: Networks) -> Results:
    """How circular frequencies are, and what a network can with some of them alone: means per network."""
    survivors, others = networks.alive, ~networks.alive
    shape = circularity(networks.embedding)
    alone = single_circle_accuracy(networks.flat, networks.spec, networks.held_out)

    def mean(values: Tensor, where: Tensor) -> list[float]:
        some = where.any(1)
        return listed((values * where).sum(1)[some] / where.sum(1)[some])

    return {
        "circularity": {"circles": mean(shape, survivors), "others": mean(shape, others)},
        "accuracy": {
            "a circle alone": mean(alone, survivors),
            "the best one": listed(alone.amax(1)),
            "all circles": listed(networks.accuracy(isolate(networks.embedding, survivors))),
            "all others": listed(networks.accuracy(isolate(networks.embedding, others))),
            "the embedding": listed(networks.accuracy()),
        },
    }


def one_embedding(networks: Networks, each: int) -> Results:
    """Of every ``each`` networks with one initial embedding, which frequencies survive."""
    survivors = networks.alive.double()
    start = networks.signals[0, ::each]
    rates = survivors.unflatten(0, (-1, each)).mean(1)
    order = start.argsort(1, descending=True)
    ranked = rates.gather(1, order)
    embedding = torch.arange(len(start)).repeat_interleave(each)
    same = embedding[:, None] == embedding
    shared = survivors @ survivors.T / survivors.sum(1, keepdim=True).clamp(min=1)
    return {
        "networks": each,
        "start": listed(start, 2),
        "rates": listed(rates),
        "correlation": [
            round(float(np.corrcoef(s, r)[0, 1]), 4) for s, r in zip(start, rates, strict=True)
        ],
        "strongest": listed(ranked[:, :FEW].mean(1)),
        "between": listed(ranked[:, FEW:-FEW].mean(1)),
        "weakest": listed(ranked[:, -FEW:].mean(1)),
        # Of one network's circles, how many are circles of another one.
        "shared": [
            listed(shared[same & ~torch.eye(len(same), dtype=torch.bool)].mean()),
            listed(shared[~same].mean()),
        ],
    }


def competition(networks: Networks, pairs: Sequence[tuple[int, int]], each: int) -> list[Results]:
    """Of every ``each`` networks, of one ratio, how often which of the two frequencies survives, the stronger first,
    and which circles there are that were not at the start.
    """
    index = torch.tensor(pairs) - 1
    survive = networks.alive.gather(1, index)
    born = networks.alive.scatter(1, index, False)
    accuracy = networks.accuracy()
    odd = torch.zeros_like(born)
    for row, (stronger, _) in zip(odd, pairs, strict=True):
        row[torch.tensor(odd_multiples(stronger, networks.embedding.shape[1])) - 1] = True
    return [
        {
            "stronger": listed(survive[at, 0].double().mean()),
            "weaker": listed(survive[at, 1].double().mean()),
            "born": born[at].sum(1).tolist(),
            "odd": (born & odd)[at].sum(1).tolist(),
            "accuracy": listed(accuracy[at]),
        }
        for at in torch.arange(len(pairs)).split(each)
    ]


def odd_multiples(k: int, p: int) -> list[int]:
    """The frequencies of 3, 5 and 7 k, which a wave of frequency k has that is more of a square."""
    return [min(k * n % p, -k * n % p) for n in (3, 5, 7)]


def dynamics(networks: Networks) -> Results:
    """Linear systems fitted to each network's signals: of the changes, and run from the start."""
    signals = networks.signals[:FITTED].double()
    fits = {"least squares": fit_dynamics(signals), "Lasso": fit_dynamics(signals, alpha=ALPHA)}
    runs = {name: fit.rollout(signals[0], len(signals) - 1) for name, fit in fits.items()}
    final = alive(signals[-1])
    first = networks.signals[0, 0].argsort(descending=True)
    shown = torch.cat([first[final[0, first]], first[~final[0, first]][:DEAD]])
    times = torch.linspace(0, len(signals) - 1, 41).long()
    return {
        "steps": len(signals),
        **{
            name: {
                "r2": listed(fit.r2),
                "rollout": listed(explained(signals, runs[name])),
                "right": (alive(runs[name][-1]) == final).all(1).tolist(),
                "zeros": listed((fit.matrix == 0).double().mean((1, 2))),
                "another": listed(of_another(fit, signals)),
            }
            for name, fit in fits.items()
        },
        "example": {
            "steps": times.tolist(),
            "frequencies": (shown + 1).tolist(),
            "alive": final[0, shown].tolist(),
            "true": listed(signals[times, 0][:, shown], 2),
            **{name: listed(run[times, 0][:, shown], 2) for name, run in runs.items()},
        },
    }


def explained(signals: Tensor, found: Tensor) -> Tensor:
    """R^2 of signals ``[T, M, K]``, ``[M]``."""
    left = (signals - found).square().sum((0, 2))
    return 1 - left / (signals - signals.mean(0)).square().sum((0, 2))


def of_another(fit: Dynamics, signals: Tensor) -> Tensor:
    """R^2 of the changes of each network by the system of the one before it, ``[M]``."""
    matrix, offset = fit.matrix.roll(1, 0), fit.offset.roll(1, 0)
    found = torch.einsum("mij,tmj->tmi", matrix, signals[:-1]) + offset
    return explained(signals.diff(dim=0), found)


def planes(start: Tensor, networks: Networks, few: int = FEW) -> Results:
    """The first network's tokens in the planes of its circles, before ``[p, d]`` and after training, and in that of
    the frequency that was strongest of those that are none.
    """
    first = networks.signals[0, 0].argsort(descending=True)
    survivors = networks.alive[0, first]
    chosen = [*first[survivors][:few].tolist(), first[~survivors][0].item()]

    def seen(embedding: Tensor) -> list:
        transform = weightops.fourier_transform(len(embedding)).to(embedding)
        found = []
        for k in chosen:
            rows = transform[:, k] @ embedding
            found.append(listed(embedding @ (rows / rows.norm(dim=1, keepdim=True)).T, 3))
        return found

    return {
        "frequencies": [k + 1 for k in chosen],
        "alive": [True] * (len(chosen) - 1) + [False],
        "start": seen(start),
        "end": seen(networks.embedding[0]),
    }
