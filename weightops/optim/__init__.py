"""Descent on weight manifolds, around any optimizer of torch.

Source: Benjamin et al. 2025, "Walking the Weight Manifold", arXiv 2505.22994.
"""

from weightops.optim.descent import ManifoldDescent

__all__ = ["ManifoldDescent"]
