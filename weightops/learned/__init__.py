"""Optimizers whose update is learned: a functional of all weights, gradients and momenta.

Source: Zhou, Finn and Harrison 2024, "Universal Neural Functionals", arXiv 2402.05232.
"""

from weightops.learned._cost import StepCost
from weightops.learned._rule import State, start, step
from weightops.learned.functional import Functional
from weightops.learned.meta import MetaTraining, meta_train
from weightops.learned.optimizer import LearnedOptimizer

__all__ = [
    "Functional",
    "LearnedOptimizer",
    "MetaTraining",
    "State",
    "StepCost",
    "meta_train",
    "start",
    "step",
]
