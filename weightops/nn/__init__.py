"""Layers whose inputs are the weights of other networks, and that commute with permuting their neurons.

Source: Zhou, Finn and Harrison, "Universal Neural Functionals", arXiv 2402.05232.
"""

from weightops.nn.encoding import Featurize, PositionalEncoding
from weightops.nn.equivariant import EquivariantLinear
from weightops.nn.functional import UNF
from weightops.nn.norm import EquivariantDropout, EquivariantNorm
from weightops.nn.pool import InvariantPool

__all__ = [
    "UNF",
    "EquivariantDropout",
    "EquivariantLinear",
    "EquivariantNorm",
    "Featurize",
    "InvariantPool",
    "PositionalEncoding",
]
