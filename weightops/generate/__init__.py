"""Weight generation: networks for a task, drawn by diffusion given a few examples of it.

Source: Soro et al. 2024, "Diffusion-based Neural Network Weights Generation" (D2NWG), arXiv 2402.18153.
"""

from weightops.generate.encoder import DatasetEncoder, alignment_loss
from weightops.generate.generator import WeightGenerator
from weightops.generate.latent import LatentDiffusion
from weightops.generate.vae import WeightVAE

__all__ = ["DatasetEncoder", "LatentDiffusion", "WeightGenerator", "WeightVAE", "alignment_loss"]
