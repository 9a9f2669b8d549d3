"""What the report makes of benchmarks, and that its goals are benchmarks' own."""

import bench_circles
import bench_manifold
import goals
import pytest
import report


def benchmark(group: str, implementation: str, ms: float, **extra: float) -> dict:
    stats = {"min": ms / 1e3, "iqr": 0.0}
    params = {"implementation": implementation}
    return {"group": group, "params": params, "stats": stats, "extra_info": extra}


def rows_of(group: str, times: dict[str, float], **extra: dict) -> dict[str, report.Row]:
    each = [benchmark(group, name, ms, **extra.get(name, {})) for name, ms in times.items()]
    return {row.work.removeprefix(group).lstrip(", "): row for row in report.rows_of(each)}


def test_a_layer_is_held_against_eager_at_the_same_and_at_lower_precision() -> None:
    times = {
        "weightops": 10.0,
        "weightops-high": 8.0,
        "weightops-medium": 6.0,
        "wide": 20.0,
        "matmuls": 16.0,
        "medium-wide": 7.0,
        "medium-matmuls": 9.0,
    }
    extra = {"weightops": {"floor_ms": 4.0}}
    rows = rows_of("manifold per-sample 256->256 B=32 K=3 forward", times, **extra)
    expected = {
        "": ("matmuls", 1.6, False),
        "against medium": ("medium-wide", 0.7, False),
        "medium against medium": ("medium-wide", 7 / 6, True),
        "high against default": ("matmuls", 2.0, None),
    }
    assert {k: (r.peer, pytest.approx(r.times_faster), r.met) for k, r in rows.items()} == expected
    assert rows[""].over_floor == 2.5


def test_groups_are_held_against_a_plain_layer_which_is_no_peer() -> None:
    times = {"weightops": 10.0, "wide": 50.0, "loop": 16.0, "loop-sorted": 18.0, "F.linear": 12.0}
    name = "manifold 8 contexts 256->256 B=512 K=3 forward"
    rows = rows_of(name, times)
    assert rows[""].peer == "loop"
    assert rows["against per-sample eager"].met is True
    assert rows["against a loop over contexts"].met is False
    assert rows["against F.linear"].met is True
    assert rows["against F.linear"].goal == "<= 0.85 x its time"
    assert all(row.met is None for row in rows_of(f"{name}+backward", times).values())


def test_the_floor_of_one_row_is_the_fastest_read() -> None:
    times = {"weightops": 1.1, "matmuls": 3.0, "read-sum": 1.0, "read-amax": 2.0}
    extra = {"weightops": {"floor_ms": 9.0}}
    rows = rows_of("manifold per-sample 1024->1024 B=1 K=9 forward", times, **extra)
    assert (rows[""].floor, rows[""].met, rows[""].peer) == (1.0, True, "matmuls")


@pytest.mark.parametrize(("ours", "met"), [(2**20, True), (2**22, False), (0, True)])
def test_memory_is_a_share_of_condconvs(ours: int, met: bool) -> None:
    extra = {"weightops": {"extra_bytes": ours}, "condconv": {"extra_bytes": 11 * 2**20}}
    rows = rows_of("manifold conv x forward", {"weightops": 1.0, "condconv": 5.0}, **extra)
    row = rows["extra memory in MiB, against condconv"]
    assert (row.ours, row.peer_ms, row.met) == (ours / 2**20, 11.0, met)
    assert rows["against condconv"].met is True


def test_every_goal_of_the_manifolds_has_its_benchmark() -> None:
    groups = {f"manifold {problem} {passes}" for problem, passes, _ in bench_manifold.PER_SAMPLE}
    groups.add(f"manifold synthesize {bench_manifold.NETWORK}")
    assert {name for name in goals.GOALS if name.startswith("manifold")} <= groups


def test_training_of_circles_is_held_against_loops_probes_and_fewer_networks() -> None:
    times = {
        "weightops": 10.0,
        "weightops-probes": 10.2,
        "weightops-16s": 8.0,
        "loop": 80.0,
        "factored": 19.0,
        "medium-factored": 15.0,
    }
    for networks in bench_circles.TRAININGS:
        name = f"circles training {networks} networks"
        rows = rows_of(name, times, weightops={"floor_ms": 6.0})
        assert {what: row.met for what, row in rows.items()} == {
            "": True,
            "against loop": True,
            "against factored": False,
            "against factored at medium": None,
            "probes of every step, against none": True,
            "against 16 networks at a time": False,
        }
        assert (rows[""].peer, rows[""].over_floor) == ("factored", pytest.approx(10 / 6))
    assert {name for name in goals.GOALS if name.startswith("circles")} == {
        f"circles training {networks} networks" for networks in bench_circles.TRAININGS
    }


def test_families_have_tables_of_their_own() -> None:
    rows = [report.Row(f"{family} x", 1.0, 0.1) for family in ("manifold", "assign", "equivariant")]
    first, *others = report.markdown(rows).split("\n\n### ")
    assert first.splitlines()[2].startswith("| assign x | 1 |")
    assert [each.splitlines()[0] for each in others] == ["Equivariant layers", "Weight manifolds"]
