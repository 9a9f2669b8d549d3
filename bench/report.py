"""Turns a pytest-benchmark JSON into the table of the README, and keeps it with machine and date.

Every row is one run's: our time, the time of the floor (copying the same bytes, measured beside it),
the best of what a user has today, and the ratios, with what they were meant to reach.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

FLOORS = ("copy_", "clone")
# group -> (most times over the floor, least times faster than the best peer)
GOALS: dict[str, tuple[float | None, float | None]] = {
    "permute_axes 64x128x128": (2.0, 4.0),
    "permute_axes 8x512x512": (2.0, 4.0),
    "permute_axes 8x2048x2048": (1.3, 4.0),
    "permute_axes 64x512x512": (1.8, 1.8),
    "permute_axes 8x512x512x3x3": (2.8, 2.2),
    "permute vgg16x1": (1.8, 8.0),
    "permute resnet20x1": (3.0, 4.0),
    "merge 8x2048x2048x8": (1.6, None),
    **{
        f"assign {family}-64x{n}": (None, 1.0)
        for family in ("gram", "uniform")
        for n in (64, 256, 512, 1024)
    },
}
for _space, _forward in (
    ("mlp", 1.6),
    ("transformer", 1.6),
    ("cnn", 2.0),
    ("rnn", 2.0),
    ("gru", 2.0),
):
    for _layer in ("16->16 B=8", "32->32 B=8", "16->16 B=32"):
        GOALS[f"equivariant {_space} {_layer} forward"] = (_forward, None)
        GOALS[f"equivariant {_space} {_layer} forward+backward"] = (1.8, None)
for _space in ("mlp 64-32-10", "cnn 1-16-32", "rnn 32-128-32"):
    GOALS[f"equivariant {_space} 32->1, 32 particles"] = (3.0, None)
# space -> peer -> how many times faster
AGAINST = {
    "mlp": {"per-term": 10.0, "per-term-compiled": 10.0, "nfn": 6.0},
    "cnn": {"nfn": 6.0},
    "transformer": {"per-term": 10.0},
    "rnn": {"per-term": 20.0, "per-term-compiled": 20.0},
    "gru": {"per-term": 20.0},
    "stack": {"singly": 1.25},
}
LAYER_CALL_GOAL_US = 60.0
WARM_GOAL = 4.0  # times faster than cold, on Grams of 256 and more
CALL_GOAL_US = 25.0  # over the copy


@dataclass(frozen=True)
class Row:
    """One problem; times in milliseconds (the least of many), ``None`` where there is no such side."""

    work: str
    ours: float
    iqr: float
    floor: float | None
    over_floor: float | None
    peer: str | None
    peer_ms: float | None
    times_faster: float | None
    goal: str
    met: bool | None


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
        return [
            Row(f"{name}, over the copy", over / 1e3, iqr, None, None, None, None, None,
                f"<= {CALL_GOAL_US:g} us", over <= CALL_GOAL_US)
        ]  # fmt: skip
    if name == "equivariant call":
        return [
            Row(name, time, iqr, None, None, None, None, None, f"<= {LAYER_CALL_GOAL_US:g} us",
                1e3 * time <= LAYER_CALL_GOAL_US)
        ]  # fmt: skip
    if name == "equivariant 32 particles":
        return [
            Row(f"{name}, own theta, {what}", time, iqr, None, None, peer, _ms(members[peer]),
                _ms(members[peer]) / time, goal, met(_ms(members[peer]) / time))
            for peer, what, goal, met in (
                ("shared-theta", "against shared", ">= 0.33 x", lambda gain: gain >= 1 / 3),
                ("python-loop", "against a loop", ">= 15 x", lambda gain: gain >= 15),
            )
        ]  # fmt: skip
    floor = ours["extra_info"].get("floor_ms") if name.startswith("equivariant") else None
    if name.startswith("merge") and "read" in members:
        floor = _ms(members["read"]) + _ms(members["write"])
    for candidate in FLOORS:
        if candidate in members and floor is None:
            floor = _ms(members[candidate])
    no_peers = ("weightops", "read", "write", *FLOORS)
    peers = {
        k: _ms(v)
        for k, v in members.items()
        if k not in no_peers and not k.startswith("weightops-")
    }
    peer = min(peers, key=lambda k: peers[k]) if peers else None
    over_floor = time / floor if floor else None
    faster = peers[peer] / time if peer else None
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
    rows = [
        Row(
            name,
            time,
            iqr,
            floor,
            over_floor,
            peer,
            peers[peer] if peer else None,
            faster,
            goal,
            met,
        )
    ]
    against = AGAINST.get(name.split()[1], {}) if name.startswith("equivariant") else {}
    for other, wanted in against.items():
        if other in members:
            gain = _ms(members[other]) / time
            rows.append(
                Row(f"{name}, against {other}", time, iqr, None, None, other, _ms(members[other]), gain,
                    f">= {wanted:g} x", gain >= wanted)
            )  # fmt: skip
    for variant, what in (
        ("weightops-streamed-copy", "nothing permuted"),
        ("weightops-products", "torch.mm of its types and a read alone"),
        ("weightops-warm", "warm, against cold"),
        ("weightops-useless-duals", "useless duals, against cold"),
    ):
        if variant in members:
            gain = time / _ms(members[variant])
            wanted = (
                WARM_GOAL
                if "warm" in variant and "gram" in name and not name.endswith("x64")
                else None
            )
            rows.append(
                Row(f"{name}, {what}", _ms(members[variant]), _ms(members[variant], "iqr"), None, None,
                    "weightops", time, gain, f">= {wanted} x" if wanted else "",
                    gain >= wanted if wanted else None)
            )  # fmt: skip
    return rows


def markdown(rows: list[Row]) -> str:
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
