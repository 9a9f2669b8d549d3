"""Parts of ``reproduce_manifold.py``: tasks in varying contexts, networks that follow them, training, report."""
