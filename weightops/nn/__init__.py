"""Layers that read the weights of other networks, and layers whose own weights follow a context.

The first commute with permuting neurons (Zhou, Finn and Harrison, "Universal Neural Functionals", arXiv
2402.05232); the weights of the others lie on a manifold (Benjamin et al., "Walking the Weight Manifold",
arXiv 2505.22994).
"""

from weightops.nn.encoding import Featurize, PositionalEncoding
from weightops.nn.equivariant import EquivariantLinear
from weightops.nn.functional import UNF
from weightops.nn.manifold import ManifoldLinear
from weightops.nn.manifold_conv import ManifoldConv1d, ManifoldConv2d
from weightops.nn.manifold_embedding import ManifoldEmbedding
from weightops.nn.manifold_norm import ManifoldNorm
from weightops.nn.norm import EquivariantDropout, EquivariantNorm
from weightops.nn.pool import InvariantPool

__all__ = [
    "UNF",
    "EquivariantDropout",
    "EquivariantLinear",
    "EquivariantNorm",
    "Featurize",
    "InvariantPool",
    "ManifoldConv1d",
    "ManifoldConv2d",
    "ManifoldEmbedding",
    "ManifoldLinear",
    "ManifoldNorm",
    "PositionalEncoding",
]
