"""Alignment of networks: matching by permutation, and barriers along paths between them.

Source: Sharma et al., "Simultaneous linear connectivity of neural networks modulo permutation",
arXiv 2404.06498; Ainsworth et al., "Git Re-Basin", arXiv 2209.04836; Crisostomi et al., "C2M3",
arXiv 2405.17897.
"""

from weightops.align.barrier import Barrier, barrier
from weightops.align.cycles import CycleError, compose_path, cycle_error
from weightops.align.many import MatchAll, match_all
from weightops.align.matching import match
from weightops.align.plot import plot_barrier, plot_simplex
from weightops.align.simplex import Simplex, barrier_simplex
from weightops.align.statistics import repair
from weightops.align.weights import Match
from weightops.align.widths import PartialMatch, match_partial, widen

__all__ = [
    "Barrier",
    "CycleError",
    "Match",
    "MatchAll",
    "PartialMatch",
    "Simplex",
    "barrier",
    "barrier_simplex",
    "compose_path",
    "cycle_error",
    "match",
    "match_all",
    "match_partial",
    "plot_barrier",
    "plot_simplex",
    "repair",
    "widen",
]
