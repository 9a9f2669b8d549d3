"""Specs derived from models, and their proof."""

from weightops.tracing.explanation import Explanation, Label, explain
from weightops.tracing.graph import trace
from weightops.tracing.verification import Verification, VerificationError, verify

__all__ = [
    "Explanation",
    "Label",
    "Verification",
    "VerificationError",
    "explain",
    "trace",
    "verify",
]
