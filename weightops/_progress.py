"""Progress bars of long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterable[T]:
    """``items``, with a bar on standard error where that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(
        items, description, total=len(items), console=Console(stderr=True), transient=True
    )
