"""Alignment of networks: matching by permutation, and barriers along paths between them.

Source: Sharma et al., "Simultaneous linear connectivity of neural networks modulo permutation",
arXiv 2404.06498; Ainsworth et al., "Git Re-Basin", arXiv 2209.04836.
"""

from weightops.align.barrier import Barrier, barrier
from weightops.align.matching import match
from weightops.align.plot import plot_barrier, plot_simplex
from weightops.align.simplex import Simplex, barrier_simplex
from weightops.align.statistics import repair
from weightops.align.weights import Match

__all__ = [
    "Barrier",
    "Match",
    "Simplex",
    "barrier",
    "barrier_simplex",
    "match",
    "plot_barrier",
    "plot_simplex",
    "repair",
]
