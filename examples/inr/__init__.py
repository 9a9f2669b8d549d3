"""Parts of ``reproduce_inr.py``: digits as networks, what reads them, one experiment, report."""
