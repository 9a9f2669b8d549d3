"""What the experiments of ``examples`` show, in short form and in full, and what the docs tell of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce_circles
import reproduce_connectivity
import reproduce_d2nwg
import reproduce_inr
import reproduce_manifold
import reproduce_unf_optimizer
import reproduce_unf_zoo
import reproduction
import torch
from circles import report as circles
from connectivity import report as connectivity
from generation import report as generation
from inr import report as inr
from manifold import report
from optimizer import experiment, tasks
from optimizer import report as optimizer
from prediction import report as prediction
from prediction import zoo
from rich.console import Console

from weightops.learned import Functional

DOCS = Path(__file__).resolve().parent.parent / "docs"


def save(name: str, results: reproduction.Results, report: Any, folder: Path) -> None:
    tables = report.tables(results)
    reproduction.show(Console(quiet=True), tables)
    reproduction.save(name, results, tables, report.draw, folder)


def means(results: reproduction.Results, task: str, part: str) -> dict[str, float]:
    found = results["tasks"][task]
    return {
        name: report.over(method["scores"], found["parts"][part]).mean()
        for name, method in found["methods"].items()
    }


def test_weights_on_an_ellipse_reach_into_a_held_out_arc(tmp_path: Path) -> None:
    results = reproduce_manifold.compare(True, Console(quiet=True))
    save("manifold", results, report, tmp_path)
    assert (tmp_path / "manifold.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "manifold.json").read_text()) == results
    arc = means(results, "rotation, an arc held out", "held-out arc")
    ellipse = arc["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.2 + arc["no context"]
    assert ellipse > 0.2 + arc["concatenation, equal parameters"]
    assert ellipse > 0.1 + arc["line (wrong topology), ManifoldDescent(SGD)"]


def check_trends(results: reproduction.Results) -> None:
    circle = means(results, "rotation", "all angles")
    ellipse = circle["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.96
    assert ellipse > 0.03 + circle["no context"]
    assert ellipse > 0.005 + circle["concatenation, equal parameters"]

    arc = means(results, "rotation, an arc held out", "held-out arc")
    ellipse = arc["ellipse, ManifoldDescent(SGD)"]
    assert ellipse > 0.15 + arc["no context"]
    assert ellipse > 0.02 + arc["concatenation"]
    assert ellipse > 0.01 + arc["concatenation, equal parameters"]
    assert ellipse > 0.01 + arc["line (wrong topology), ManifoldDescent(SGD)"]

    noise = means(results, "noise", "noise up to 2")
    line = noise["line, ManifoldDescent(SGD)"]
    assert line > 0.003 + noise["no context"]
    assert line > 0.003 + noise["ellipse (wrong topology), ManifoldDescent(SGD)"]

    square = means(results, "rotation and hue", "held-out square")
    torus = square["torus, ManifoldDescent(SGD)"]
    assert torus > 0.02 + square["concatenation, equal parameters"]
    assert torus > 0.05 + square["square (wrong topology), ManifoldDescent(SGD)"]

    error = means(results, "denoising", "all times")
    spline = error["B-spline, AdamW"]
    assert spline < 0.85 * error["no noise level"]
    assert spline < error["time embedding, equal parameters"]
    assert spline < error["ellipse (wrong topology), AdamW"]


@pytest.mark.slow
def test_trends_of_the_full_experiment() -> None:
    check_trends(reproduce_manifold.compare(False, Console(quiet=True)))


def excesses(results: reproduction.Results, kind: str, name: str) -> dict[int, float]:
    """Width -> mean loss barrier of all groups of three networks."""
    return {
        int(width): float(np.mean(connectivity.group_means(groups, kind, name, "loss")))
        for width, groups in results["widths"].items()
    }


def along(found: list, name: str, metric: str) -> np.ndarray:
    """Means over pairs of networks, ``[checkpoints]`` or ``[densities]``."""
    return np.array([connectivity.of([at[name] for at in pair], metric) for pair in found]).mean(0)


def test_matching_connects_networks_their_checkpoints_and_their_prunings(tmp_path: Path) -> None:
    results = reproduce_connectivity.compare(reproduce_connectivity.QUICK, Console(quiet=True))
    save("connectivity", results, connectivity, tmp_path)
    assert (tmp_path / "connectivity.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "connectivity.json").read_text()) == results
    loss = {name: excesses(results, "pairs", name) for name in ("naive", "weak")}
    assert all(loss["weak"][width] < 0.5 * loss["naive"][width] for width in loss["naive"])
    quarter = results["trajectories"]["shares"].index(0.25)
    for pairs in results["trajectories"]["widths"].values():
        assert along(pairs, "final", "loss")[quarter] < 0.3 * along(pairs, "naive", "loss")[quarter]
    pruned = [[at["barriers"] for at in pair] for pair in results["pruning"]["pairs"]]
    assert (along(pruned, "final", "error") < 0.5 * along(pruned, "naive", "error")).all()
    trained = [[at["rewound"] for at in pair[1:]] for pair in results["pruning"]["pairs"]]
    assert along(trained, "transported", "error")[-1] < 0.8 * along(trained, "as is", "error")[-1]


def check_connectivity(results: reproduction.Results) -> None:
    pairs = {name: excesses(results, "pairs", name) for name in connectivity.SEGMENTS}
    triangles = {name: excesses(results, "triangles", name) for name in connectivity.TRIANGLES}
    for width in pairs["naive"]:
        assert pairs["naive"][width] > 0.6
        assert triangles["naive"][width] > 1.2
        assert pairs["weak"][width] < 0.35 * pairs["naive"][width]
    for width in (16, 32, 64):
        assert pairs["third"][width] > 1.5 * pairs["weak"][width]
        assert pairs["universe"][width] < 0.6 * pairs["third"][width]
        assert triangles["universe"][width] < 0.7 * triangles["third"][width]
    for width in (128, 256, 512):
        assert pairs["weak"][width] < 0.02
        assert triangles["universe"][width] < 0.03
    assert pairs["third"][16] > 0.5
    assert pairs["third"][512] < 0.03

    shares = results["trajectories"]["shares"]
    for checkpoints in results["trajectories"]["widths"].values():
        naive, final, weight, activation = (
            along(checkpoints, name, "loss") for name in connectivity.PERMUTATIONS
        )
        later = shares.index(0.1)
        assert (naive[later:] > 0.6).all()
        assert (final[later:] < 0.1).all()
        early = shares.index(0.05)
        assert final[early] < 0.7 * naive[early]
        assert final[early] < 0.8 * weight[early]
        assert activation[early] < 0.8 * weight[early]

    pruned = [[at["barriers"] for at in pair] for pair in results["pruning"]["pairs"]]
    assert (along(pruned, "naive", "loss") > 0.5).all()
    assert (along(pruned, "final", "loss") < 0.05).all()

    own, transported, as_is, random = (
        along(
            [[at["rewound"] for at in pair[1:]] for pair in results["pruning"]["pairs"]],
            name,
            "error",
        )
        for name in connectivity.MASKS
    )
    assert (transported < own + 2).all()
    assert (transported[-3:] < as_is[-3:] - 1).all()
    assert (transported[-3:] < random[-3:] - 2.5).all()

    for at in results["rates"]:
        naive, weight, activation = (
            np.mean(connectivity.of((pair[name] for pair in at["pairs"]), "loss"))
            for name in connectivity.METHODS
        )
        assert weight < 0.3 * naive
        assert activation < 0.3 * naive
        assert abs(weight - activation) < 0.15
        if (at["optimizer"], at["rate"]) in (("SGD", 0.03), ("SGD", 0.1), ("AdamW", 0.01)):
            assert max(weight, activation) < 0.05


@pytest.mark.slow
def test_claims_of_the_full_connectivity_experiment() -> None:
    check_connectivity(
        reproduce_connectivity.compare(reproduce_connectivity.FULL, Console(quiet=True))
    )


def test_networks_are_generated_for_rotations_that_the_zoo_does_not_have(tmp_path: Path) -> None:
    results = reproduce_d2nwg.compare(reproduce_d2nwg.QUICK, Console(quiet=True))
    save("generation", results, generation, tmp_path)
    assert (tmp_path / "generation.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "generation.json").read_text()) == results
    (runs,) = results["zoos"].values()
    found = {row: generation.accuracy(runs, row) for row in generation.ROWS}
    assert found["reconstructed"] > found["zoo"] - 0.05
    for row in ("generated, seen", "generated, unseen"):
        assert found[row] > 0.2 + found["wrong task"]
        assert found[row] > 0.3 + found["random"]
    five = generation.after(results, runs, "generated", 5)
    assert five > 0.3 + generation.after(results, runs, "random", 5)


def check_generation(results: reproduction.Results) -> None:
    zoos = results["zoos"]
    for name in ("rotations, MLP", "rotations, CNN"):
        assert len(zoos[name]) == reproduce_d2nwg.SEEDS
        for run in zoos[name]:
            five = generation.after(results, [run], "generated", 5)
            assert five > generation.after(results, [run], "random", 80)
            assert generation.accuracy([run], "wrong task") < 0.6
            assert run["novelty"]["generated"]["overlap"] < 0.95
        best, retrieved = (
            generation.accuracy(zoos[name], row) for row in ("best generated", "retrieved")
        )
        assert best > 0.005 + retrieved
        unseen, retrieved = (
            generation.accuracy(zoos[name], row) for row in ("generated, unseen", "retrieved")
        )
        assert unseen > 0.01 + retrieved
        for run in zoos[name]:
            assert generation.accuracy([run], "generated, unseen") > 0.85
        # Narrow networks of neighbouring angles have less in between.
        narrow = zoos[name.replace("rotations, ", "rotations, narrow ")]
        assert generation.accuracy(narrow, "generated, unseen") < unseen - 0.02
    own, aligned = (
        generation.accuracy(zoos[f"rotations, MLP, own {way}"], "generated, unseen")
        for way in ("initialisations", "ones aligned")
    )
    assert aligned > 0.1 + own


@pytest.mark.slow
def test_claims_of_the_full_generation_experiment() -> None:
    check_generation(reproduce_d2nwg.compare(reproduce_d2nwg.FULL, Console(quiet=True)))


def test_few_circles_survive_and_the_start_tells_which(tmp_path: Path) -> None:
    results, again = (
        reproduce_circles.compare(reproduce_circles.QUICK, Console(quiet=True), tmp_path / "sweeps")
        for _ in range(2)
    )
    # The second time from what the first one kept.
    assert {**again, "seconds": 0, "cpu_seconds": 0} == {**results, "seconds": 0, "cpu_seconds": 0}
    save("circles", results, circles, tmp_path)
    assert (tmp_path / "circles.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "circles.json").read_text()) == json.loads(json.dumps(results))
    trained = results["dimensions"]["64"]
    assert min(trained["accuracy"]) > 0.9
    assert 2 < np.mean(trained["circles"]) < 6
    survivors, others = circles.means(results, "start")
    assert survivors > others + 1
    assert min(results["alone"]["circularity"]["circles"]) > 0.97
    assert np.mean(results["alone"]["accuracy"]["a circle alone"]) < 0.5
    weak, equal = results["competition"]
    assert weak["stronger"] > weak["weaker"]
    assert equal["weaker"] > weak["weaker"]
    exact, sparse = (results["dynamics"][name]["r2"] for name in ("least squares", "Lasso"))
    assert min(exact) > 0.9
    assert np.mean(exact) > np.mean(sparse)


def check_circles(results: reproduction.Results) -> None:
    trained = results["dimensions"]
    assert len(trained["128"]["accuracy"]) == 24
    assert min(trained["128"]["accuracy"]) >= 0.99
    assert 3 <= np.mean(trained["128"]["circles"]) <= 6
    assert np.mean(trained["16"]["circles"]) < np.mean(trained["128"]["circles"]) - 0.5

    level = np.mean(results["over time"]["level"], 1)
    assert level[0] == 29
    assert level[-1] < 10

    survivors, others = circles.means(results, "start")
    assert survivors > others + 2
    survivors, others = circles.means(results, "growth")
    assert survivors > others
    quarters = circles.of_quartiles(results, "start")
    assert quarters[0] < 0.05
    assert quarters[3] > 0.3
    told = results["survival"]["auc"]
    assert told["initial signal"] > 0.75
    assert told["both"] > told["initial signal"] + 0.01

    found = results["one embedding"]
    assert min(found["correlation"]) > 0.4
    assert np.mean(found["strongest"]) > 3 * np.mean(found["between"])
    assert np.mean(found["weakest"]) < 0.05
    assert found["shared"][0] > found["shared"][1] + 0.15

    first, *_, last = results["competition"]
    assert all(at["stronger"] == 1 for at in results["competition"])
    assert first["weaker"] < 0.3
    assert np.mean(first["born"]) > 1
    assert first["odd"] == first["born"]
    assert last["weaker"] > 0.7

    for fit, least in (("least squares", 0.95), ("Lasso", 0.6)):
        assert min(results["dynamics"][fit]["r2"]) > least
        assert max(results["dynamics"][fit]["another"]) < 0
    assert np.mean(results["dynamics"]["Lasso"]["r2"]) < 0.9
    assert min(results["alone"]["circularity"]["circles"]) > 0.98
    accuracy = results["alone"]["accuracy"]
    assert max(accuracy["the best one"]) < 0.3
    assert min(accuracy["all circles"]) > 0.95
    assert max(accuracy["all others"]) < 0.3


@pytest.mark.slow
def test_claims_of_the_full_circles_experiment() -> None:
    check_circles(reproduce_circles.short(False, Console(quiet=True)))


def test_equivariant_layers_read_digits_from_weights(tmp_path: Path) -> None:
    results = reproduce_inr.compare(reproduce_inr.QUICK, Console(quiet=True))
    save("inr", results, inr, tmp_path)
    assert (tmp_path / "inr.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "inr.json").read_text()) == results
    assert "one call (C++)" in results["fits"]["own"]["kernel"]
    assert results["fits"]["own"]["psnr"][0] > 20
    for name in ("UNF", "UNF, permuted"):
        for other in ("MLP", "MLP, permuted"):
            assert inr.mean(results, "own", name) > 0.05 + inr.mean(results, "own", other)


def check_inr(results: reproduction.Results) -> None:
    own, shared = (results["readers"][start] for start in ("own", "shared"))
    for name in ("UNF", "UNF, permuted"):
        for other in ("MLP", "MLP, permuted"):
            assert min(own[name]["accuracy"]) > 0.2 + max(own[other]["accuracy"])
            assert min(own[name]["together"]) > 0.4 + max(own[other]["together"])
        for other in ("Deep Sets", "Deep Sets, permuted"):
            assert min(own[name]["accuracy"]) > 0.05 + max(own[other]["accuracy"])
    unf, mlp = (shared[name]["accuracy"] for name in ("UNF, permuted", "MLP, permuted"))
    assert min(unf) > 0.1 + max(mlp)
    # Not so where units have the same place in all networks.
    assert inr.mean(results, "shared", "UNF") < inr.mean(results, "shared", "MLP")


@pytest.mark.slow
def test_claims_of_the_full_inr_experiment() -> None:
    check_inr(reproduce_inr.compare(reproduce_inr.FULL, Console(quiet=True)))


def test_accuracies_are_told_from_weights(tmp_path: Path) -> None:
    results = reproduce_unf_zoo.compare(reproduce_unf_zoo.QUICK, Console(quiet=True))
    save("prediction", results, prediction, tmp_path)
    assert (tmp_path / "prediction.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "prediction.json").read_text()) == results
    low, high = np.quantile(results["zoo"]["accuracy"], (0.1, 0.9))
    assert high - low > 0.1
    for name in results["predictors"]:
        assert prediction.taus(results, name).min() > 0.6


def test_networks_trained_at_once_are_the_module() -> None:
    model = zoo.Elman()
    characters = torch.randint(len(zoo.CHARACTERS), (2, 3, zoo.LENGTH))
    one_hot = torch.nn.functional.one_hot(characters, len(zoo.CHARACTERS)).float()
    flat = zoo.traced().flatten([model, zoo.Elman()])
    torch.testing.assert_close(zoo.logits(flat, characters)[0], model(one_hot[0]))


def check_prediction(results: reproduction.Results) -> None:
    found = {name: prediction.taus(results, name) for name in results["predictors"]}
    assert len(found["UNF"]) == 5
    assert found["UNF"].mean() > 0.85
    assert found["UNF"].mean() > 0.005 + found["Deep Sets"].mean()
    assert found["UNF"].mean() > 0.005 + found["StatNN, boosted trees"].mean()
    assert found["UNF"].mean() > found["StatNN, perceptron"].mean()


@pytest.mark.slow
def test_claims_of_the_full_prediction_experiment() -> None:
    check_prediction(reproduce_unf_zoo.compare(reproduce_unf_zoo.FULL, Console(quiet=True)))


def test_optimizers_are_tuned_and_learned(tmp_path: Path) -> None:
    results = reproduce_unf_optimizer.compare(reproduce_unf_optimizer.QUICK, Console(quiet=True))
    save("optimizer", results, optimizer, tmp_path)
    assert (tmp_path / "optimizer.svg").stat().st_size > 10_000
    assert json.loads((tmp_path / "optimizer.json").read_text()) == json.loads(json.dumps(results))
    (task,) = results["tasks"].values()
    for name in optimizer.COLORS:
        assert optimizer.of(task, name, "final").max() < 0.5 * np.log(10)
    for name, (_, grid) in experiment.RULES.items():
        tried = np.array(task["rules"][name]["tried"])
        at = grid[int(tried.argmin())]
        assert min(rates := [each[0] for each in grid]) < at[0] < max(rates)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_deep_sets_with_all_terms_is_the_same_functional(name: str) -> None:
    _, spec = tasks.traced(tasks.TASKS[name])
    functional = Functional(spec, "deep_sets")
    x, time = torch.randn(2, spec.numel, 8), torch.randn(11)
    with torch.no_grad():
        torch.testing.assert_close(
            experiment.with_all_terms(functional)(x, time), functional(x, time)
        )


def test_rules_are_those_of_torch() -> None:
    """SGD's rate is ``alpha (1 - momentum)``."""
    first, grads = torch.randn(1, 5), torch.randn(4, 1, 5)
    pairs: list[tuple[Any, Any]] = [
        (
            experiment.sgd(torch.tensor([[2.0]]), torch.tensor([[0.8]])),
            lambda p: torch.optim.SGD([p], 0.4, momentum=0.8),
        ),
        (
            experiment.adam(*(torch.tensor([[each]]) for each in (0.1, 0.8, 0.99))),
            lambda p: torch.optim.Adam([p], 0.1, betas=(0.8, 0.99)),
        ),
    ]
    for update, make in pairs:
        flat, parameter = first, torch.nn.Parameter(first.clone())
        reference = make(parameter)
        for grad in grads:
            flat = update(flat, grad)
            parameter.grad = grad
            reference.step()
        torch.testing.assert_close(flat, parameter.detach())


def check_optimizer(results: reproduction.Results) -> None:
    found = results["tasks"]
    assert list(found) == list(tasks.TASKS)
    for name, part in (("MLP on digits", 0.85), ("CNN on digits", 0.95)):
        sgd = optimizer.of(found[name], "SGD")[0]
        for kind in experiment.KINDS:
            losses = optimizer.of(found[name], kind)
            assert len(losses) == 3
            assert losses.mean() < part * sgd
    for task in found.values():
        for kind in experiment.KINDS:
            assert optimizer.of(task, kind).mean() < optimizer.of(task, "SGD")[0]


@pytest.mark.slow
def test_claims_of_the_full_optimizer_experiment() -> None:
    check_optimizer(
        reproduce_unf_optimizer.compare(reproduce_unf_optimizer.FULL, Console(quiet=True))
    )


@pytest.mark.parametrize(
    ("name", "tables", "check"),
    [
        ("manifold", report.tables, check_trends),
        ("connectivity", connectivity.tables, check_connectivity),
        ("generation", generation.tables, check_generation),
        ("circles", circles.tables, check_circles),
        ("inr", inr.tables, check_inr),
        ("prediction", prediction.tables, check_prediction),
        ("optimizer", optimizer.tables, check_optimizer),
    ],
)
def test_docs_tell_the_committed_run(name: str, tables: Callable, check: Callable) -> None:
    results = json.loads((DOCS / f"{name}.json").read_text())
    page = (DOCS / "reproductions.md").read_text()
    assert reproduction.markdown(tables(results)) in page
    assert results["date"] in page
    check(results)
