"""Turns a pytest-benchmark JSON into the table of the README, and keeps it with machine and date.

Every row is one run's: our time, the time of the floor (copying the same bytes, measured beside it),
the best of what a user has today, and the ratios, with what they were meant to reach.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from goals import (
    CALL_GOAL_US,
    EXTRA_MEMORY_GOAL,
    GOALS,
    LAYER_CALL_GOAL_US,
    TRACE_GOAL_S,
    WARM_GOAL,
    against,
)

FLOORS = ("copy_", "clone")
# What stands beside a problem without solving it, or solves it at another precision.
NO_PEERS = ("weightops*", "medium-*", "adamw-step", "read*", "write", "F.linear", *FLOORS)
# The first words of groups whose floor is counted: their bytes and FLOPs at this machine's rates.
COUNTED = (
    *("circles", "fourier_signal", "functional", "learned", "manifold", "match"),
    *("population", "token_pair_linear", "universe"),
)
# The first word of a group -> the table it stands in.
HEADINGS = {
    "equivariant": "Equivariant layers",
    "manifold": "Weight manifolds",
    **dict.fromkeys(("match", "universe", "barrier", "trace", "verify"), "Alignment"),
    **dict.fromkeys(("population", "tokens"), "Populations"),
    **dict.fromkeys(("circles", "token_pair_linear", "fourier_signal"), "Circles"),
    **dict.fromkeys(("functional", "learned"), "Learned optimizers"),
}


@dataclass(frozen=True)
class Row:
    """One problem; times in milliseconds (the least of many), ``None`` where there is no such side."""

    work: str
    ours: float
    iqr: float | None
    floor: float | None = None
    over_floor: float | None = None
    peer: str | None = None
    peer_ms: float | None = None
    times_faster: float | None = None
    goal: str = ""
    met: bool | None = None


def rows_of(benchmarks: list[dict]) -> list[Row]:
    groups: dict[str, dict[str, dict]] = defaultdict(dict)
    for each in benchmarks:
        implementation = (each.get("params") or {}).get("implementation", "weightops")
        groups[each["group"]][implementation] = each
    return [row for name, members in groups.items() for row in _rows(name, members)]


def _ms(benchmark: dict, statistic: str = "min") -> float:
    on_gpu = benchmark["extra_info"].get("gpu_seconds")
    return 1e3 * (
        on_gpu if on_gpu is not None and statistic == "min" else benchmark["stats"][statistic]
    )


def _rows(name: str, members: dict[str, dict]) -> list[Row]:
    ours = members["weightops"]
    time, iqr = _ms(ours), _ms(ours, "iqr")
    if name == "permute call":
        over = 1e3 * time - ours["extra_info"]["copy_us"]
        what = f"{name}, over the copy"
        goal = f"<= {CALL_GOAL_US:g} us"
        return [Row(what, over / 1e3, iqr, goal=goal, met=over <= CALL_GOAL_US)]
    if name == "equivariant call":
        goal = f"<= {LAYER_CALL_GOAL_US:g} us"
        return [Row(name, time, iqr, goal=goal, met=1e3 * time <= LAYER_CALL_GOAL_US)]
    if name.startswith("trace"):
        goal = f"<= {TRACE_GOAL_S:g} s"
        return [Row(name, time, iqr, goal=goal, met=time <= 1e3 * TRACE_GOAL_S)]
    if name == "equivariant 32 particles":
        return [
            _faster(f"{name}, own theta, {what}", ours, members, peer, goal, met)
            for peer, what, goal, met in (
                ("shared-theta", "against shared", ">= 0.33 x", lambda gain: gain >= 1 / 3),
                ("python-loop", "against a loop", ">= 15 x", lambda gain: gain >= 15),
            )
        ]
    floor = _floor(name, members)
    over_floor = time / floor if floor else None
    peer = _best(members, ("*",), NO_PEERS)
    peer_ms = _ms(members[peer]) if peer else None
    faster = peer_ms / time if peer_ms else None
    most, least = GOALS.get(name, (None, None))
    met = None
    if most is not None or least is not None:
        met = (most is None or (over_floor or 0) <= most) and (
            least is None or (faster or 0) >= least
        )
    goal = ", ".join(
        text
        for value, text in ((most, f"<= {most} x floor"), (least, f">= {least} x peer"))
        if value is not None
    )
    rows = [Row(name, time, iqr, floor, over_floor, peer, peer_ms, faster, goal, met)]
    for other in against(name):
        peer = _best(members, other.peers)
        if peer and other.ours in members:
            mine = members[other.ours]
            rows.append(
                _faster(f"{name}, {other.what}", mine, members, peer, other.goal, other.met)
            )
    if (part := ours["extra_info"].get("functional_ms")) is not None:
        rows.append(Row(f"{name}, the functional in it", part, None))
    for variant, what in (
        ("weightops-streamed-copy", "nothing permuted"),
        ("weightops-products", "torch.mm of its types and a read alone"),
        ("weightops-warm", "warm, against cold"),
        ("weightops-useless-duals", "useless duals, against cold"),
    ):
        if variant in members:
            large_gram = "gram" in name and not name.endswith("x64")
            wanted = WARM_GOAL if "warm" in variant and large_gram else None
            rows.append(
                _faster(f"{name}, {what}", members[variant], members, "weightops",
                        f">= {wanted} x" if wanted else "",
                        lambda gain, wanted=wanted: gain >= wanted if wanted else None)
            )  # fmt: skip
    return rows + _memory_rows(name, members)


def _floor(name: str, members: dict[str, dict]) -> float | None:
    """Milliseconds of what no implementation can go without."""
    counted = members["weightops"]["extra_info"].get("floor_ms")
    if name.startswith("equivariant") and counted is not None:
        return counted
    reads = [_ms(each) for key, each in members.items() if key.startswith("read")]
    if reads:
        return min(reads) + (_ms(members["write"]) if "write" in members else 0)
    for key in FLOORS:
        if key in members:
            return _ms(members[key])
    return counted if name.startswith(COUNTED) else None


def _best(
    members: dict[str, dict], patterns: tuple[str, ...], but: tuple[str, ...] = ()
) -> str | None:
    def fits(key: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in patterns)

    found = [key for key in members if fits(key, patterns) and not fits(key, but)]
    return min(found, key=lambda key: _ms(members[key]), default=None)


def _faster(
    what: str,
    ours: dict,
    members: dict[str, dict],
    peer: str,
    goal: str,
    met: Callable[[float], bool | None],
) -> Row:
    time, other = _ms(ours), _ms(members[peer])
    return Row(what, time, _ms(ours, "iqr"), peer=peer, peer_ms=other,
               times_faster=other / time, goal=goal, met=met(other / time))  # fmt: skip


def _memory_rows(name: str, members: dict[str, dict]) -> list[Row]:
    """Memory in MiB where other rows have milliseconds."""
    ours, theirs = (
        members.get(key, {"extra_info": {}})["extra_info"].get("extra_bytes")
        for key in ("weightops", "condconv")
    )
    if ours is None or theirs is None:
        return []
    share = max(ours, 0) / theirs
    return [
        Row(f"{name}, extra memory in MiB, against condconv", ours / 2**20, None, peer="condconv",
            peer_ms=theirs / 2**20, times_faster=1 / share if share else None,
            goal=f"<= {EXTRA_MEMORY_GOAL:g} x its memory", met=share <= EXTRA_MEMORY_GOAL)
    ]  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """A table, and one under a heading of its own for each family that has one."""
    tables: dict[str, list[Row]] = {heading: [] for heading in ("", *HEADINGS.values())}
    for row in rows:
        tables[HEADINGS.get(row.work.split()[0], "")].append(row)
    return "\n\n".join(
        (f"### {heading}\n\n" if heading else "") + _table(members)
        for heading, members in tables.items()
        if members
    )


def _table(rows: list[Row]) -> str:
    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}g}"

    lines = [
        "| work | weightops, ms | IQR | floor, ms | over floor | best today | ms | times faster | goal | met |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- | --- |",
    ]
    for r in rows:
        met = "" if r.met is None else "yes" if r.met else "**no**"
        cells = [r.work, number(r.ours), number(r.iqr, 2), number(r.floor), number(r.over_floor),
                 r.peer or "", number(r.peer_ms), number(r.times_faster), r.goal, met]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--save", type=Path, help="folder for the rows as JSON and as a table")
    arguments = parser.parse_args()
    import torch

    from weightops import info

    data = json.loads(arguments.json.read_text())
    rows = rows_of(data["benchmarks"])
    device = (
        "cuda"
        if any(b["extra_info"].get("device") == "cuda" for b in data["benchmarks"])
        else "cpu"
    )
    table = markdown(rows)
    print(table)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        name = (
            torch.cuda.get_device_name().replace(" ", "-").lower()
            if device == "cuda"
            else "cpu-2-threads"
        )
        facts = {
            "date": data["datetime"][:10],
            "device": name,
            "processor": processor(),
            "info": info.collect(),
            "rows": [asdict(row) for row in rows],
        }
        (arguments.save / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        (arguments.save / f"{name}.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
