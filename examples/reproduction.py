"""What the reproductions do alike: digits to train on and to test on, tables, and files in a folder."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import weightops

Results = dict[str, Any]
#: title -> rows of a table, its head first
Tables = Mapping[str, Sequence[Sequence[str]]]


PROCESSES = 2


@contextmanager
def workers(console: Console) -> Iterator[tuple[ProcessPoolExecutor, Progress, Results]]:
    """Processes of one thread, and as :func:`bars`."""
    with (
        bars(console, f"{PROCESSES} processes of one thread") as (progress, facts),
        ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool,
    ):
        yield pool, progress, facts


@contextmanager
def bars(console: Console, threads: str) -> Iterator[tuple[Progress, Results]]:
    """Bars for work, and facts of the run, whole when all is done."""
    columns = (TextColumn("{task.description:45}"), BarColumn(), TimeElapsedColumn())
    began, used, facts = time.perf_counter(), _cpu_seconds(), {}
    with Progress(*columns, console=console) as progress:
        yield progress, facts
    facts |= {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {threads}",
        "torch": torch.__version__,
        "weightops": weightops.__version__,
        "seconds": round(time.perf_counter() - began),
        "cpu_seconds": round(_cpu_seconds() - used),
    }


def _cpu_seconds() -> float:
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(who) for who in both]
    return sum(each.ru_utime + each.ru_stime for each in used)


@dataclass(frozen=True)
class Digits:
    """Images ``[B, ...]`` in 0 .. 1 and classes ``[B]``."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor

    @classmethod
    def split(cls, images: Tensor, classes: Tensor, train: int) -> Digits:
        """The first ``train`` to train on."""
        return cls(images[:train], classes[:train], images[train:], classes[train:])


def show(console: Console, tables: Tables) -> None:
    for title, (first, *rest) in tables.items():
        table = Table(title=title)
        for n, column in enumerate(first):
            table.add_column(column, justify="right" if n else "left")
        for row in rest:
            table.add_row(*row)
        console.print(table)


def markdown(tables: Tables) -> str:
    """The tables as in docs/reproductions.md."""
    blocks = []
    for title, (first, *rest) in tables.items():
        lines = [first, ["---"] + ["---:"] * (len(first) - 1), *rest]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks.append(f"**{title}**\n\n{table}\n")
    return "\n".join(blocks)


def save(
    name: str,
    results: Results,
    tables: Tables,
    draw: Callable[[Results, Path], None],
    folder: Path,
) -> None:
    """Write the results as ``name.json``, the curves as ``name.svg`` and the tables as ``name.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results) + "\n")
    (folder / f"{name}.md").write_text(markdown(tables))
    draw(results, folder / f"{name}.svg")


def run(
    name: str,
    description: str,
    quick: str,
    compare: Callable[[bool, Console], Results],
    report: Any,
    width: int,
    papers: Callable[[Path, Console], Results] | None = None,
    long: tuple[str, Callable[[Console], Results]] | None = None,
) -> None:
    """The command: compare, show, save. ``report`` has ``tables`` and ``draw``.

    ``papers`` does it at the paper's scale, and keeps what is done in a folder, to go on from there.
    ``long`` is what ``--long`` says in its help, and does.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--save", type=Path, default=Path("reproduced"), help="folder for tables and curves"
    )
    if papers:
        parser.add_argument(
            "--paper-scale",
            type=Path,
            metavar="FOLDER",
            help="steps and seeds of the paper, for days; a run that is killed goes on from FOLDER",
        )
    if long:
        parser.add_argument("--long", action="store_true", help=long[0])
    arguments = parser.parse_args()
    console = Console(width=width)
    if papers and arguments.paper_scale:
        results = papers(arguments.paper_scale, console)
    elif long and arguments.long:
        results = long[1](console)
    else:
        results = compare(arguments.quick, console)
    tables = report.tables(results)
    show(console, tables)
    save(name, results, tables, report.draw, arguments.save)
    console.print(
        f"{results['seconds']} s, {results['cpu_seconds']} s of CPU time. "
        f"Curves: {arguments.save / f'{name}.svg'}"
    )
