"""Parts of ``reproduce_connectivity.py``: networks and their training, the three claims, report."""
