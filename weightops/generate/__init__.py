"""Networks out of networks: zoos, and candidates before they are used.

Source: Soro et al., "Diffusion-based Neural Network Weights Generation", arXiv 2402.18153.
"""

from weightops.generate.writer import ZooWriter, import_state_dicts
from weightops.generate.zoo import Zoo

__all__ = ["Zoo", "ZooWriter", "import_state_dicts"]
