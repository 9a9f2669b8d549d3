"""The whole generator: training that stops and goes on, seeds, files, bad input."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightops import WeightSpec, _checkpoints, testing
from weightops._checkpoints import CheckpointError
from weightops.generate import WeightGenerator, _training
from weightops.tokens import statistics

SPEC = testing.mlp_spec(4, 6, 3)
P = SPEC.numel
STEPS = (4, 3, 5)
OPTIONS = {
    "autoencoder": {"hidden": (16, 12)},
    "encoder": {"hidden": 8, "heads": 2, "points": 2},
    "diffusion": {"width": 16, "blocks": 1, "times": 50},
}
FORMS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "convolution": {
        "form": "convolution",
        "options": OPTIONS | {"autoencoder": {"side": 8, "channels": (4, 4)}},
    },
    "chunks": {"chunk": 20},
    "guided": {"drop": 0.3},
    "extractor": {"extractor": nn.Linear(4, 4)},
}


def make(spec: WeightSpec = SPEC, **changes: Any) -> WeightGenerator:
    return WeightGenerator(
        spec, 4, 3, **{"latent": 8, "condition": 8, "examples": 2, "options": OPTIONS} | changes
    )


def data(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Three classes of inputs [12, 4], whose order is another one in each dataset."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(4)
    centres = torch.randn(3, 4, generator=generator)
    return [
        (centres[(labels + n) % 3] + 0.1 * torch.randn(12, 4, generator=generator), labels)
        for n in range(count)
    ]


ZOO = torch.randn(10, P, generator=torch.Generator().manual_seed(1))
TASKS = torch.arange(2).repeat(5)


def fit(model: WeightGenerator, **changes: Any) -> dict[str, Tensor]:
    given = {"flat": ZOO, "tasks": TASKS, "datasets": data(), "steps": STEPS, "batch": 4}
    return model.fit(**given | {"progress": False} | changes)


class Stopped(Exception):
    pass


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training end with :class:`Stopped` before its step number ``steps``, counted over all stages."""
    left = iter(range(steps))

    def track(items: Sequence, description: str, *, enabled: bool = True) -> Iterable:
        for item in items:
            if next(left, None) is None:
                raise Stopped
            yield item

    monkeypatch.setattr(_training, "track", track)


def assert_same(first: WeightGenerator, second: WeightGenerator) -> None:
    expected = first.state_dict()
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_training_stopped_and_resumed_equals_training_at_a_stretch(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(**FORMS[form])
    losses = fit(whole)
    assert {name: len(each) for name, each in losses.items()} == {
        "autoencoder": 4,
        "alignment": 3,
        "diffusion": 5,
    }
    # Within each stage, at their ends, and before the first checkpoint; some stop more than once.
    for n, stops in enumerate(([1], [3], [4], [6, 1], [9], [5, 3, 2], [11, 11])):
        path = tmp_path / f"{n}.safetensors"
        for steps in stops:
            with monkeypatch.context() as patch, pytest.raises(Stopped):
                stop_after(steps, patch)
                fit(make(**FORMS[form]), checkpoint=path, every=2)
                raise Stopped  # what was left was short enough
        resumed = make(**FORMS[form])
        found = fit(resumed, checkpoint=path, every=2)
        assert_same(whole, resumed)
        assert all(torch.equal(found[name], each) for name, each in losses.items())
        assert not list(tmp_path.glob(".*"))


def test_training_goes_on_from_the_checkpoint_not_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(10, patch)
        fit(make(), checkpoint=path, every=2)
    # Written after 4, 4 + 3 and 4 + 3 + 2 of 12 steps.
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        fit(make(), checkpoint=path, every=2)


def test_a_finished_training_is_read_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    first, again = make(), make()
    fit(first, checkpoint=path)
    stop_after(0, monkeypatch)
    fit(again, checkpoint=path)
    assert_same(first, again)


def test_a_seed_decides_on_training_and_nothing_global_does() -> None:
    first, same, other = make(), make(), make()
    fit(first, seed=3)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    fit(same, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, same)
    fit(other, seed=4)
    assert not torch.equal(first.projection.weight, other.projection.weight)
    fit(same, seed=4)  # a second training starts anew
    assert_same(other, same)


def test_a_checkpoint_that_can_not_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(3, patch)
        fit(make(), checkpoint=path, every=2)
    kept = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(_checkpoints.os, "replace", full)
        fit(make(), checkpoint=path, every=2)
    assert path.read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": (4, 3, 6)}, "steps"),
        ({"flat": ZOO + 1}, "data"),
        ({"tasks": 1 - TASKS}, "data"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, change: dict, name: str
) -> None:
    path = tmp_path / "run.safetensors"
    fit(make(), checkpoint=path)
    with pytest.raises(CheckpointError, match=f"run.safetensors: is .* another .* whose {name} is"):
        fit(make(), checkpoint=path, **change)


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    model, saved, run = make(), tmp_path / "model.safetensors", tmp_path / "run.safetensors"
    fit(model, checkpoint=run)
    model.save(saved)
    short = tmp_path / "short.safetensors"
    short.write_bytes(saved.read_bytes()[:-9])
    foreign = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, foreign)
    load = WeightGenerator.load
    attempts: list[tuple[Callable, Path, str]] = [
        (load, short, "short.safetensors: is truncated or no safetensors file"),
        (load, tmp_path / "none.safetensors", "none.safetensors: No such file"),
        (load, foreign, "foreign.safetensors: was not written by weightops"),
        (load, run, "run.safetensors: is a checkpoint of a training, but no trained model"),
        (lambda path: fit(make(), checkpoint=path), short, "short.safetensors: is truncated"),
        (lambda path: fit(make(), checkpoint=path), saved, "is no checkpoint of a training, but a"),
        (
            model.save,
            tmp_path / "no" / "m.safetensors",
            "m.safetensors: can't be written: .*no is no folder",
        ),
    ]
    for attempt, path, message in attempts:
        with pytest.raises(CheckpointError, match=message):
            attempt(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_read_from_its_file_generates_the_same_networks(form: str, tmp_path: Path) -> None:
    model, path = make(**FORMS[form]), tmp_path / "model.safetensors"
    fit(model)
    model.save(path)
    read = WeightGenerator.load(path, extractor=FORMS[form].get("extractor"))
    assert read.spec == SPEC
    assert_same(model, read)
    for each in data():
        assert torch.equal(model.generate(each, 3, steps=5), read.generate(each, 3, steps=5))


def test_generated_networks_depend_on_seed_and_dataset_and_differ_from_each_other() -> None:
    model = make()
    fit(model)
    first, second = data()
    networks = model.generate(first, 4, steps=5, seed=0)
    assert networks.shape == (4, P)
    assert networks.dtype == torch.float32
    assert not networks.requires_grad
    assert torch.equal(networks, model.generate(first, 4, steps=5, seed=0))
    for other in (model.generate(first, 4, steps=5, seed=1), model.generate(second, 4, steps=5)):
        assert not torch.equal(networks, other)
    assert len(networks.unique(dim=0)) == 4
    assert model.generate(first, 0).shape == (0, P)


def test_a_dataset_decides_which_networks_are_generated() -> None:
    """A zoo of two tight clusters, one a task: networks generated for a task lie in its cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, P, generator=generator)
    tasks = torch.arange(2).repeat(20)
    zoo = centres[tasks] + 0.05 * torch.randn(40, P, generator=generator)
    model = make()
    losses = fit(model, flat=zoo, tasks=tasks, steps=(200, 60, 400), batch=32, rate=5e-3)
    assert losses["diffusion"][-50:].mean() < 0.5 * losses["diffusion"][:10].mean()
    for task, dataset in enumerate(data()):
        nearest = torch.cdist(model.generate(dataset, 30), centres).argmin(1)
        assert (nearest == task).float().mean() > 0.9
    error = (model.reconstruct(zoo) - zoo).abs().mean()
    assert error < 0.3 * (zoo - zoo.mean(0)).abs().mean()


def test_tensors_are_standardised_one_by_one_and_constant_ones_are_kept() -> None:
    zoo = ZOO.clone()
    views = SPEC.unflatten(zoo)
    names = list(views)
    views[names[0]].mul_(1000).add_(5)
    views[names[1]].fill_(2.0)
    model = make()
    fit(model, flat=zoo, steps=(0, 0, 0))
    tokens = SPEC.unflatten(model._tokens(zoo).flatten(1))
    assert tokens[names[0]].mean().abs() < 1e-5
    torch.testing.assert_close(tokens[names[0]].std(correction=0), torch.tensor(1.0))
    assert (tokens[names[1]] == 0).all()


def test_running_variances_stay_within_the_zoos() -> None:
    spec = WeightSpec(
        {"bn.weight": ("c",), "bn.running_var": ("c",)}, {"bn.weight": (5,), "bn.running_var": (5,)}
    )
    zoo = torch.cat([torch.randn(6, 5), torch.rand(6, 5) + 0.5], 1)
    model = make(spec)
    fit(model, flat=zoo, tasks=torch.zeros(6, dtype=torch.int64), steps=(1, 1, 1))
    centre = zoo.mean(0)
    model.statistics = statistics(100 * (zoo - centre) + centre, spec)  # far outside
    found = spec.unflatten(model.generate(data()[0], 20, steps=2))
    assert found["bn.running_var"].min() == zoo[:, 5:].min()
    assert found["bn.weight"].min() < -1


def test_a_resnet_is_generated_in_chunks() -> None:
    spec = testing.resnet20_spec()
    zoo = torch.rand(3, spec.numel) + 0.5
    model = make(spec, chunk=8192, latent=4)
    fit(model, flat=zoo, tasks=torch.tensor([0, 1, 1]), steps=(2, 1, 2))
    found = model.generate(data()[0], 2, steps=2)
    assert found.shape == (2, spec.numel)
    assert found.isfinite().all()
    assert model.reconstruct(zoo).shape == zoo.shape


ONE = data(1)[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flat": [1.0]}, TypeError, r"fit: flat must be a tensor \[N, P\], not list"),
        ({"flat": ZOO[:, 1:]}, ValueError, rf"fit: flat has shape \[10, {P - 1}\]"),
        ({"flat": ZOO.long()}, TypeError, "fit: flat must be floating point, not torch.int64"),
        ({"flat": ZOO[:0], "tasks": TASKS[:0]}, ValueError, "fit: flat holds no network"),
        (
            {"flat": ZOO.clone().index_fill_(0, torch.tensor([2]), torch.inf)},
            ValueError,
            r"fit: flat must be finite, but flat\[2, 0\] is inf",
        ),
        ({"tasks": TASKS.float()}, TypeError, "tasks must be int64 or int32, not torch.float32"),
        ({"tasks": TASKS[1:]}, ValueError, "tasks has length 9, but flat's axis 0 has size 10"),
        ({"tasks": TASKS + 1}, ValueError, r"tasks\[1\] is 2, outside 0..1, as there are 2 datas"),
        ({"datasets": [ONE]}, ValueError, r"tasks\[1\] is 1, outside 0..0, as there are 1 datas"),
        ({"datasets": [ONE, (ONE[0], ONE[1] % 2)]}, ValueError, "has no example of class 2"),
        (
            {"datasets": [ONE, (ONE[0], ONE[1] + 1)]},
            ValueError,
            r"\[1\]'s labels\[2\] is 3, outside",
        ),
        ({"datasets": [ONE, (ONE[0][:0], ONE[1][:0])]}, ValueError, r"\[1\] holds no example"),
        ({"steps": (1, 2)}, TypeError, "steps must be three integers, of autoencoder, alignment"),
        ({"steps": (1, 2, -1)}, ValueError, "steps of the diffusion must be at least 0, not -1"),
        ({"batch": 0}, ValueError, "batch must be at least 1, not 0"),
        ({"rate": -1.0}, ValueError, r"rate must be in \[0, 1.0\), not -1.0"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), not 1.0"),
        ({"redraws": 0}, ValueError, "redraws must be at least 1, not 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, not -1"),
        ({"every": 0}, ValueError, "every must be at least 1, not 0"),
        ({"progress": 1}, TypeError, "progress must be True or False, not int 1"),
    ],
)
def test_bad_input_to_fit_is_named(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(make(), **change)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((ONE[0][:0], ONE[1][:0]), r"generate: dataset holds no example"),
        ((ONE[0], ONE[1] % 2), "has no example of class 2"),
        ((ONE[0], ONE[1] + 1), r"labels\[2\] is 3, outside 0..2"),
    ],
)
def test_datasets_that_say_too_little_are_refused(dataset: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().generate(dataset, 2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="spec must be a WeightSpec, not dict"):
        make({})
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        make(chunk=0)
    with pytest.raises(ValueError, match="options must be one of 'autoencoder', 'encoder', 'diff"):
        make(options={"unet": {}})
    with pytest.raises(ValueError, match="num_networks must be at least 0, not -1"):
        make().generate(ONE, -1)
    with pytest.raises(ValueError, match=rf"reconstruct: flat has shape \[1, {P + 1}\]"):
        make().reconstruct(torch.zeros(1, P + 1))
