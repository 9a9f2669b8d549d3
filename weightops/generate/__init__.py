"""Networks out of networks: zoos, and candidates before they are used.

Source: Soro et al., "Diffusion-based Neural Network Weights Generation", arXiv 2402.18153.
"""

from weightops.generate.candidates import (
    FineTuned,
    Retrieved,
    Scores,
    evaluate,
    fine_tune,
    retrieve,
    select,
)
from weightops.generate.novelty import Novelty, novelty
from weightops.generate.partial import partial
from weightops.generate.state_dicts import import_state_dicts
from weightops.generate.validation import Span, Validation, span, validate
from weightops.generate.writer import ZooWriter
from weightops.generate.zoo import Zoo

__all__ = [
    "FineTuned",
    "Novelty",
    "Retrieved",
    "Scores",
    "Span",
    "Validation",
    "Zoo",
    "ZooWriter",
    "evaluate",
    "fine_tune",
    "import_state_dicts",
    "novelty",
    "partial",
    "retrieve",
    "select",
    "span",
    "validate",
]
