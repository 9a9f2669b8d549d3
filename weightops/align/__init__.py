"""Alignment of networks: matching by permutation, and barriers along paths between them.

Source: Sharma et al., "Simultaneous linear connectivity of neural networks modulo permutation",
arXiv 2404.06498; Ainsworth et al., "Git Re-Basin", arXiv 2209.04836.
"""

from weightops.align.barrier import Barrier, barrier
from weightops.align.matching import Match, match

__all__ = ["Barrier", "Match", "barrier", "match"]
