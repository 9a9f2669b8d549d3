"""Populations of small networks ``[N, P]``: forward, losses and training of all of them at once."""

from weightops.population._loop import Training, TrainingState
from weightops.population._probes import SignalProbe
from weightops.population._resolve import explain
from weightops.population.batchnorm import population_batchnorm
from weightops.population.forward import overlap, population_forward, population_loss
from weightops.population.training import population_train

__all__ = [
    "SignalProbe",
    "Training",
    "TrainingState",
    "explain",
    "overlap",
    "population_batchnorm",
    "population_forward",
    "population_loss",
    "population_train",
]
