"""Topologies of weight manifolds: a context ``s`` gives the coefficients of ``W(s) = sum_k phi_k(s) W_k``.

Source: Benjamin et al. 2025, "Walking the Weight Manifold", arXiv 2505.22994.
"""

from weightops.manifolds.circles import Ellipse, Fourier, Torus
from weightops.manifolds.context import at
from weightops.manifolds.curves import Bezier, BSpline, Line
from weightops.manifolds.lift import Lifted, lift, slice_at
from weightops.manifolds.manifold import Manifold
from weightops.manifolds.product import Product
from weightops.manifolds.simplex import Simplex

__all__ = [
    "BSpline",
    "Bezier",
    "Ellipse",
    "Fourier",
    "Lifted",
    "Line",
    "Manifold",
    "Product",
    "Simplex",
    "Torus",
    "at",
    "lift",
    "slice_at",
]
