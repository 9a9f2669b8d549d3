"""Parts of ``reproduce_d2nwg.py``: tasks, populations of networks, one experiment, report."""
