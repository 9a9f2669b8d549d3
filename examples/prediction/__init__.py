"""The parts of ``reproduce_unf_zoo.py``."""
