"""What the README tells is true: its code runs, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "docs/ops.md", "docs/manifolds.md", "docs/alignment.md"),
        *("docs/populations.md", "docs/learned.md"),
    ],
)
def test_the_ten_lines_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where pictures go
    code = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert code
    for block in code:
        exec(compile(block, name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
