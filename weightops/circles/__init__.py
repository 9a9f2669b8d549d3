"""Networks that add modulo p, the circles of their embeddings, and which of them survive.

Source: Ding et al. 2024, "Survival of the Fittest Representation", arXiv 2405.17420.
"""

from weightops.circles._sweep import sweep
from weightops.circles.dynamics import Dynamics, fit_dynamics
from weightops.circles.model import PairNetwork, pair_accuracy, pair_logits, pair_spec
from weightops.circles.signals import (
    alive,
    circularity,
    construct,
    count_circles,
    frequency_gradients,
    isolate,
    single_circle_accuracy,
)
from weightops.circles.training import State, Training, train

__all__ = [
    "Dynamics",
    "PairNetwork",
    "State",
    "Training",
    "alive",
    "circularity",
    "construct",
    "count_circles",
    "fit_dynamics",
    "frequency_gradients",
    "isolate",
    "pair_accuracy",
    "pair_logits",
    "pair_spec",
    "single_circle_accuracy",
    "sweep",
    "train",
]
