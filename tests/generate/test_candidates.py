"""Candidates: refused with reasons, evaluated all at once, selected, tuned, and compared with their zoo."""

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from small_networks import evaluated
from torch import Tensor, nn

import weightops
from weightops.generate import (
    Span,
    Zoo,
    ZooWriter,
    evaluate,
    fine_tune,
    novelty,
    partial,
    retrieve,
    select,
    span,
    validate,
)
from weightops.population import population_batchnorm, population_forward


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


SPEC = weightops.WeightSpec(
    {
        **{"fc1.weight": ("h", None), "fc1.bias": ("h",)},
        **{f"norm.{name}": ("h",) for name in ("weight", "bias", "running_mean", "running_var")},
        **{"fc2.weight": (None, "h"), "fc2.bias": (None,)},
    },
    {name: tuple(t.shape) for name, t in Net().state_dict().items() if t.dim()},
)
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(8))
TARGETS = X[:, :4].argmax(1)


def networks(seeds: Iterable[int]) -> Tensor:
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = Net()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        rows.append(SPEC.flatten(model).detach())
    return torch.cat(rows)


def trained(seeds: Iterable[int], steps: int = 60) -> Tensor:
    return fine_tune(
        networks(seeds), Net(), (X, TARGETS), [steps], test=(X, TARGETS), learning_rate=0.02
    ).flat


FLAT = networks(range(5))
ZOO = trained(range(12))


def saved(path: Path, flat: Tensor, spec: weightops.WeightSpec = SPEC) -> Zoo:
    with ZooWriter(path, spec, shard_size=5) as writer:
        writer.add(flat, task=torch.arange(len(flat)) % 2)
    return Zoo(path)


# Evaluation


def test_all_networks_are_evaluated_as_each_alone() -> None:
    scores = evaluate(FLAT, Net(), X, TARGETS)
    losses, errors = evaluated(Net(), SPEC, FLAT, X, TARGETS)
    torch.testing.assert_close(scores.loss.double(), losses)
    torch.testing.assert_close(scores.accuracy.double(), 1 - errors)
    assert evaluate(FLAT[:0], Net(), X, TARGETS).loss.shape == (0,)


def test_evaluation_leaves_the_model_as_it_is_and_ignores_its_mode() -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    first = evaluate(FLAT, model, X, TARGETS)
    again = evaluate(FLAT, model.eval(), X, TARGETS)
    assert torch.equal(first.loss, again.loss)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_selection_is_best_first_and_nan_is_worst() -> None:
    scores = torch.tensor([0.5, torch.nan, 0.9, 0.5, -torch.inf])
    flat, places = select(FLAT, scores, 4)
    assert places.tolist() == [2, 0, 3, 1]
    assert torch.equal(flat, FLAT[places])


def test_the_best_network_of_the_zoo_is_retrieved(tmp_path: Path) -> None:
    flat = torch.cat([FLAT, ZOO[:3], FLAT])
    zoo = saved(tmp_path, flat)
    found = retrieve(zoo, Net(), X, TARGETS)
    accuracy, loss = evaluate(flat, Net(), X, TARGETS)
    assert found.accuracy == accuracy.max()
    assert found.loss == loss[accuracy == accuracy.max()].min()
    assert torch.equal(found.flat, flat[found.index])
    assert found.index in (5, 6, 7)
    part = zoo.select(task=1)
    best = retrieve(part, Net(), X, TARGETS)
    assert best.accuracy == accuracy[1::2].max()
    assert torch.equal(best.flat, flat[1::2][best.index])


def test_a_network_without_a_loss_is_retrieved_last(tmp_path: Path) -> None:
    flat = torch.cat([ZOO[:1], ZOO[:1], FLAT])
    SPEC.unflatten(flat)["norm.running_var"][0] = -50.0
    SPEC.unflatten(flat)["fc2.bias"][1, 0] = 99.0
    # Of NaN the first class counts as the largest.
    x, targets = X[TARGETS == 0], TARGETS[TARGETS == 0]
    accuracy, loss = evaluate(flat, Net(), x, targets)
    assert loss[0].isnan()
    assert accuracy[:2].tolist() == [1, 1]
    assert retrieve(saved(tmp_path, flat), Net(), x, targets).index == 1


def test_a_zoo_in_another_order_than_the_model_s_is_retrieved_from(tmp_path: Path) -> None:
    names = list(reversed(SPEC.shapes))
    spec = weightops.WeightSpec(
        {name: SPEC.axes[name] for name in names}, {name: SPEC.shapes[name] for name in names}
    )
    views = SPEC.unflatten(ZOO)
    flat = torch.cat([views[name].flatten(1) for name in names], 1)
    found = retrieve(saved(tmp_path, flat, spec), Net(), X, TARGETS)
    expected = retrieve(saved(tmp_path / "b", ZOO), Net(), X, TARGETS)
    assert (found.index, found.accuracy, found.loss) == (
        expected.index,
        expected.accuracy,
        expected.loss,
    )


class Scaled(nn.Module):
    """With a tensor that has no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(x)


def test_tensors_without_axes_are_networks_weights_too(tmp_path: Path) -> None:
    shapes = {"scale": (), "fc.weight": (4, 6), "fc.bias": (4,)}
    spec = weightops.WeightSpec({k: (None,) * len(shape) for k, shape in shapes.items()}, shapes)
    flat = spec.flatten([Scaled() for _ in range(4)]).detach()
    zoo = saved(tmp_path, flat, spec)
    best = retrieve(zoo, Scaled(), X, TARGETS)
    flat[2, 0] = torch.nan
    found = validate(flat, span(zoo), model=Scaled(), x=X, targets=TARGETS, floor=0.0)
    assert found.reasons == {2: ("is not finite: scale is nan",)}
    assert found.scores is not None
    assert best.index == 2 or found.scores.accuracy[best.index] == best.accuracy


def test_tied_tensors_are_evaluated_under_either_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model = Tied()
    flat = torch.randn(3, 36)
    spec = weightops.WeightSpec({"second.weight": (None, None)}, {"second.weight": (6, 6)})
    found = retrieve(saved(tmp_path, flat, spec), model, X, TARGETS)
    w = flat[found.index].view(6, 6)
    expected = nn.functional.cross_entropy((X @ w.mT).relu() @ w.mT, TARGETS)
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


# Validation


def test_networks_like_the_zoo_s_are_accepted(tmp_path: Path) -> None:
    for zoo in (span(ZOO, SPEC), span(saved(tmp_path, ZOO))):
        found = validate(ZOO, zoo, margin=0.0)
        assert found.accepted.all()
        assert found.reasons == {}
        assert found.scores is None
        assert validate(trained([20, 21]), zoo).accepted.all()
        assert validate(ZOO[:0], zoo).accepted.shape == (0,)


def test_what_a_zoo_spans_is_measured_over_all_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightops.generate.candidates._NETWORKS", 5)
    found = span(saved(tmp_path, ZOO))
    weights = SPEC.unflatten(ZOO.double())["fc2.weight"].flatten(1)
    torch.testing.assert_close(found.mean, ZOO.double().mean(0))
    norms, distances = weights.norm(dim=1), (weights - weights.mean(0)).norm(dim=1)
    assert found.norms["fc2.weight"] == pytest.approx((float(norms.min()), float(norms.max())))
    assert found.distances["fc2.weight"] == pytest.approx(float(distances.max()))
    assert found.spreads["fc2.weight"] == pytest.approx(float(distances.square().mean().sqrt()))


def test_each_refused_candidate_is_named_with_all_its_faults() -> None:
    flat = trained(range(20, 26))
    views = SPEC.unflatten(flat)
    views["fc1.bias"][1, 3] = torch.nan
    views["fc2.weight"][2] *= 5
    views["fc2.weight"][3] *= 0.1
    views["fc1.weight"][3] *= 5
    found = validate(flat, span(ZOO, SPEC))
    assert found.accepted.tolist() == [True, False, False, False, True, True]
    assert found.reasons[1] == ("is not finite: fc1.bias[3] is nan",)
    (reason,) = found.reasons[2]
    assert reason.startswith("fc2.weight is far outside the zoo: its norm is ")
    assert [reason.split(" is ")[0] for reason in found.reasons[3]] == ["fc1.weight", "fc2.weight"]


def test_a_candidate_far_from_the_mean_is_refused_though_its_norms_are_the_zoo_s() -> None:
    zoo = ZOO[:1] + 0.01 * torch.randn(8, SPEC.numel, generator=torch.Generator().manual_seed(1))
    found = validate(torch.cat([zoo, -zoo[:1]]), span(zoo, SPEC))
    assert found.accepted.tolist() == [True] * 8 + [False]
    assert any("its distance to the zoo's mean is" in reason for reason in found.reasons[8])


def test_the_margin_is_what_decides() -> None:
    zoo = span(ZOO, SPEC)
    flat = ZOO[:1].clone()
    view = SPEC.unflatten(flat)["fc2.bias"]
    view *= 1.4 * zoo.norms["fc2.bias"][1] / view.norm()
    assert not validate(flat, zoo, margin=0.3).accepted[0]
    assert not any("norm is" in r for r in validate(flat, zoo, margin=0.5).reasons.get(0, ()))


def test_a_tensor_that_is_zero_throughout_the_zoo_may_be_nearly_zero() -> None:
    zoo, candidate = ZOO.clone(), ZOO[:2].clone()
    SPEC.unflatten(zoo)["fc2.bias"].zero_()
    SPEC.unflatten(candidate)["fc2.bias"][0] = 1e-6
    SPEC.unflatten(candidate)["fc2.bias"][1] = 1.0
    assert validate(candidate, span(zoo, SPEC)).accepted.tolist() == [True, False]


def test_candidates_below_the_floor_are_refused_and_scores_returned() -> None:
    flat = torch.cat([ZOO[:3], ZOO[3:5]])
    views = SPEC.unflatten(flat)
    views["fc2.weight"][1] *= -1
    views["norm.running_var"][2, 0] = -50.0
    views["fc1.weight"][3] = torch.inf
    wide = span(torch.cat([ZOO, flat[1:3]]), SPEC)
    found = validate(flat, wide, model=Net(), x=X, targets=TARGETS, floor=0.8)
    accuracy = evaluate(ZOO[:5], Net(), X, TARGETS).accuracy
    assert (accuracy > 0.8).all()
    assert found.accepted.tolist() == [True, False, False, False, True]
    assert found.reasons[1][0].endswith(", below 0.8")
    assert found.reasons[2] == ("loss on the check set is nan",)
    assert found.reasons[3][0].startswith("is not finite: fc1.weight[0, 0] is inf")
    assert found.scores is not None
    assert found.scores.accuracy[0] == accuracy[0]
    assert found.scores.accuracy[3].isnan()
    with pytest.raises(TypeError, match=r"^validate: a check set needs .* not \['floor'\] None"):
        validate(flat, wide, model=Net(), x=X, targets=TARGETS)


def test_a_zoo_of_one_network_spans_that_one() -> None:
    one = span(ZOO[:1], SPEC)
    assert isinstance(one, Span)
    assert validate(ZOO[:2], one).accepted.tolist() == [True, False]


# Fine-tuning


def test_fine_tuning_measures_accuracy_after_the_given_steps() -> None:
    run = {"learning_rate": 0.02, "seed": 3, "test": (X, TARGETS)}
    data = (X, TARGETS)
    found = fine_tune(FLAT, Net(), data, [0, 5, 40], **run)
    assert found.accuracy.shape == (3, 5)
    assert torch.equal(found.accuracy[0], evaluate(FLAT, Net(), X, TARGETS).accuracy)
    assert torch.equal(found.accuracy[2], evaluate(found.flat, Net(), X, TARGETS).accuracy)
    assert torch.equal(found.accuracy[1], fine_tune(FLAT, Net(), data, [5], **run).accuracy[0])
    assert found.accuracy[2].mean() > found.accuracy[0].mean() + 0.3
    assert torch.equal(found.flat, fine_tune(FLAT, Net(), data, [40], **run).flat)
    assert not torch.equal(found.flat, fine_tune(FLAT, Net(), data, [40], **run | {"seed": 4}).flat)


def test_fine_tuning_trains_all_and_leaves_its_input() -> None:
    before = FLAT.clone()
    tuned = trained(range(5), steps=3)
    views = SPEC.unflatten(tuned)
    for name, start in SPEC.unflatten(FLAT).items():
        assert not torch.equal(views[name], start), name
    assert torch.equal(FLAT, before)


def test_fine_tuned_networks_have_their_own_running_statistics() -> None:
    tuned = trained(range(5), steps=3)
    torch.testing.assert_close(tuned, population_batchnorm(tuned, Net(), X))


# Partial generation


def test_only_named_layers_are_generated() -> None:
    generated = partial(ZOO[0], FLAT, SPEC, ["fc1.weight", "norm"])
    views, base, new = (SPEC.unflatten(each) for each in (generated, ZOO[0], FLAT))
    for name in SPEC.shapes:
        expected = new[name] if name == "fc1.weight" or name.startswith("norm.") else base[name]
        assert torch.equal(views[name], expected.expand_as(views[name])), name
    each_its_own = partial(ZOO[:5], FLAT, SPEC, ["fc2"])
    assert torch.equal(
        SPEC.unflatten(each_its_own)["fc1.bias"], SPEC.unflatten(ZOO[:5])["fc1.bias"]
    )


def test_parts_of_a_tensor_are_named_together() -> None:
    names = ["qkv.weight[0:2]", "qkv.weight[2:6]", "qkvs"]
    spec = weightops.WeightSpec(
        dict.fromkeys(names, (None, None)), dict(zip(names, [(2, 2), (4, 2), (1, 1)]))
    )
    base, new = torch.zeros(13), torch.ones(1, 13)
    for name in ("qkv.weight", "qkv"):
        assert partial(base, new, spec, [name]).sum() == 12
    assert partial(base, new, spec, ["qkv.weight[2:6]"]).sum() == 8


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fc1.weigth", r"did you mean \['fc1.weight'"),
        ("fc3", "did you mean .*'fc[12]'"),
        ("nrom", r"did you mean \['norm'"),
        ("fc", "did you mean"),
        ("transformer", r"the spec has \['fc1.weight'"),
        ("", "the spec has"),
    ],
)
def test_unknown_layers_are_refused_with_close_names(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^partial: names has '{name}', which is no .*; {hint}"):
        partial(ZOO[0], FLAT, SPEC, ["fc1", name])


# Novelty


def test_copies_are_at_no_distance_and_others_at_theirs() -> None:
    flat = torch.cat([ZOO[3:4], FLAT[:1], ZOO[:1] + 1e-4])
    found = novelty(flat, ZOO)
    distances = (flat[:, None].double() - ZOO.double()).norm(dim=-1)
    torch.testing.assert_close(found.distance, distances.min(1).values, rtol=1e-5, atol=1e-6)
    assert found.distance[0] == 0
    assert found.nearest.tolist() == [3, int(distances[1].argmin()), 0]
    assert found.overlap is None
    assert novelty(flat[:0], ZOO).distance.shape == (0,)


def test_a_permuted_copy_is_no_novelty_modulo_permutation() -> None:
    perms = SPEC.random_permutations(2, torch.Generator().manual_seed(3))
    flat = weightops.permute(ZOO[[7, 2]], perms, SPEC)
    assert (novelty(flat, ZOO).distance > 1).all()
    found = novelty(flat, ZOO, SPEC, progress=False)
    assert found.nearest.tolist() == [7, 2]
    assert found.distance.tolist() == [0, 0]
    torch.testing.assert_close(
        novelty(FLAT, ZOO, SPEC).distance <= novelty(FLAT, ZOO).distance,
        torch.ones(5, dtype=torch.bool),
    )


def test_overlap_of_wrong_predictions_is_the_largest_jaccard_index() -> None:
    errors = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    zoo_errors = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]]).bool()
    found = novelty(FLAT[:3], ZOO[:2], errors=errors, zoo_errors=zoo_errors)
    torch.testing.assert_close(found.overlap, torch.tensor([2 / 3, 0, 0], dtype=torch.float64))
    same = novelty(FLAT[:1], ZOO[:1], errors=errors[1:2], zoo_errors=errors[1:2])
    assert same.overlap is not None
    assert same.overlap.tolist() == [1]
    wrong, theirs = (
        population_forward(flat, Net(), X, reduce="errors", targets=TARGETS) for flat in (FLAT, ZOO)
    )
    found = novelty(FLAT, ZOO, errors=wrong, zoo_errors=theirs)
    expected = [max(float((a & b).sum() / (a | b).sum()) for b in theirs) for a in wrong]
    assert found.overlap is not None
    assert found.overlap.tolist() == pytest.approx(expected)
