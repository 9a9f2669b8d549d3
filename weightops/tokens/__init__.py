"""Networks as sequences of tokens: packing, standardisation, canonical order.

Source: Schürholt, Mahoney, Borth, "Towards Scalable and Versatile Weight Space Learning" (SANE),
arXiv 2406.09997; Soro et al., "Diffusion-based Neural Network Weights Generation" (D2NWG),
arXiv 2402.18153.
"""

from weightops.tokens.order import canonical
from weightops.tokens.packing import pack, unpack
from weightops.tokens.plan import TokenPlan
from weightops.tokens.statistics import Statistics, statistics

__all__ = ["Statistics", "TokenPlan", "canonical", "pack", "statistics", "unpack"]
