"""The demo in its short form: real digits, both architectures, and a picture."""

from pathlib import Path

import demo
import pytest
from rich.console import Console


def test_alignment_lowers_barriers_on_real_networks(tmp_path: Path) -> None:
    results = demo.run(True, tmp_path / "demo.png", Console(quiet=True))
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    for result in results:
        assert sum(b.loss for b in result.aligned) < sum(b.loss for b in result.naive)
        assert result.merged > result.merged_naive


@pytest.mark.slow
def test_wide_networks_connect(tmp_path: Path) -> None:
    for result in demo.run(False, tmp_path / "demo.png", Console(quiet=True)):
        assert max(b.loss for b in result.aligned) < 0.3 * min(b.loss for b in result.naive)
        assert result.merged > result.merged_naive + 0.1
        assert result.merged > min(result.alone) - 0.03
