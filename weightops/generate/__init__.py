"""Networks out of networks: zoos, models that generate weights for a task, candidates before they are used.

Source: Soro et al. 2024, "Diffusion-based Neural Network Weights Generation" (D2NWG), arXiv 2402.18153.
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
from weightops.generate.encoder import DatasetEncoder, alignment_loss
from weightops.generate.generator import WeightGenerator
from weightops.generate.latent import LatentDiffusion
from weightops.generate.novelty import Novelty, novelty
from weightops.generate.partial import partial
from weightops.generate.state_dicts import import_state_dicts
from weightops.generate.vae import WeightVAE
from weightops.generate.validation import Span, Validation, span, validate
from weightops.generate.writer import ZooWriter
from weightops.generate.zoo import Zoo

__all__ = [
    "DatasetEncoder",
    "FineTuned",
    "LatentDiffusion",
    "Novelty",
    "Retrieved",
    "Scores",
    "Span",
    "Validation",
    "WeightGenerator",
    "WeightVAE",
    "Zoo",
    "ZooWriter",
    "alignment_loss",
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
