"""Specs derived from models, and their proof."""

from weightops.tracing.verify import Verification, VerificationError, verify

__all__ = ["Verification", "VerificationError", "verify"]
