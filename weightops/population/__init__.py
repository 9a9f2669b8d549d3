"""Populations of small networks ``[N, P]``: forward, losses and training of all of them at once."""

from weightops.population._resolve import explain
from weightops.population.forward import overlap, population_forward, population_loss

__all__ = ["explain", "overlap", "population_forward", "population_loss"]
