"""Parts of ``reproduce_circles.py``: trained networks, the studies of them, report, pictures."""
