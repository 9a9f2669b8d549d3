"""Specs derived from models, and their proof."""

from weightops.tracing.explain import Explanation, Label, explain
from weightops.tracing.graph import trace
from weightops.tracing.verify import Verification, VerificationError, verify

__all__ = [
    "Explanation",
    "Label",
    "Verification",
    "VerificationError",
    "explain",
    "trace",
    "verify",
]
