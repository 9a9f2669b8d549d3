"""The parts of ``reproduce_unf_optimizer.py``."""
