"""Weight matching: it undoes a permutation, never gets worse, and merges real networks."""

import pytest
import torch

import weightops
from weightops import align, testing

SPEC = testing.mlp_spec(6, 12, 9, 4)
RECURRENT = weightops.WeightSpec(
    {"w_in": ("h", None), "w_rec": ("h", "h"), "b": ("h",), "w_out": (None, ("h", None))},
    {"w_in": (8, 3), "w_rec": (8, 8), "b": (8,), "w_out": (2, 16)},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spec", [SPEC, RECURRENT, testing.resnet20_spec()], ids=["mlp", "rnn", "resnet"]
)
def test_match_undoes_a_permutation(spec: weightops.WeightSpec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(spec.numel, generator=generator, dtype=dtype)
    hidden = spec.random_permutations(3, generator)
    shuffled = weightops.permute(reference.expand(3, -1), hidden, spec)
    found = align.match(spec, reference, shuffled)
    torch.testing.assert_close(
        weightops.permute(shuffled, found.perms, spec), reference.expand(3, -1), rtol=0, atol=0
    )
    torch.testing.assert_close(found.objective, reference.double().pow(2).sum().expand(3))


@pytest.mark.parametrize("spec", [SPEC, RECURRENT], ids=["mlp", "rnn"])
def test_objective_rises_to_what_the_permutations_give(spec: weightops.WeightSpec) -> None:
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(5, spec.numel, generator=generator)
    found = align.match(spec, flat[0], flat[1:], seed=3)
    assert (found.history.diff(dim=0) >= -1e-5).all()
    # With a label twice in one tensor the proposals are linearised, and a network may stay as it is.
    assert (found.history[-1] > found.history[0]).sum() >= (3 if spec is RECURRENT else 4)
    aligned = weightops.permute(flat[1:], found.perms, spec).double()
    torch.testing.assert_close(found.objective, aligned @ flat[0].double())
    torch.testing.assert_close(found.objective, found.history[-1])


def test_no_swap_of_two_units_improves_the_match() -> None:
    generator = torch.Generator().manual_seed(4)
    flat = torch.randn(2, SPEC.numel, generator=generator, dtype=torch.float64)
    found = align.match(SPEC, flat[0], flat[1:])
    for label, size in SPEC.labels.items():
        for i in range(size):
            for j in range(i):
                swapped = {k: v.clone() for k, v in found.perms.items()}
                swapped[label][0, [i, j]] = swapped[label][0, [j, i]]
                reached = weightops.permute(flat[1:], swapped, SPEC)[0] @ flat[0]
                assert reached <= found.objective[0] + 1e-9


def test_running_statistics_do_not_steer_the_match() -> None:
    spec = weightops.WeightSpec(
        {"w": ("h", None), "norm.running_var": ("h",)}, {"w": (6, 3), "norm.running_var": (6,)}
    )
    generator = torch.Generator().manual_seed(6)
    flat = torch.randn(2, spec.numel, generator=generator)
    other = flat.clone()
    other[:, -6:] = 1e6 * torch.rand(2, 6, generator=generator)
    first, second = (align.match(spec, f[0], f[1:]) for f in (flat, other))
    assert torch.equal(first.perms["h"], second.perms["h"])
    counted = align.match(spec, other[0], other[1:], tensors=["norm.running_var"])
    theirs, ours = other[1, -6:][counted.perms["h"][0]], other[0, -6:]
    assert torch.equal(theirs.argsort(), ours.argsort())


def test_deterministic_under_a_seed() -> None:
    generator = torch.Generator().manual_seed(7)
    flat = torch.randn(3, SPEC.numel, generator=generator)
    first, second = (align.match(SPEC, flat[0], flat[1:], seed=1) for _ in range(2))
    assert all(torch.equal(first.perms[label], second.perms[label]) for label in SPEC.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": None}, "match: spec must be a WeightSpec"),
        (
            {"reference": torch.zeros(3)},
            r"match: reference has shape \[3\], but the spec's networks have",
        ),
        ({"reference": torch.zeros(1, 1, SPEC.numel)}, "match: reference must have shape"),
        ({"reference": torch.zeros(1, SPEC.numel)}, r"match: flat must have shape \[N, T, P\]"),
        ({"flat": torch.zeros(SPEC.numel)}, r"match: flat must have shape \[N, P\]"),
        (
            {"flat": torch.zeros(1, SPEC.numel).double()},
            "match: flat is torch.float64, but reference",
        ),
        (
            {"flat": torch.full((1, SPEC.numel), float("nan"))},
            r"match: flat must be finite, but flat\[0, 0\] is nan",
        ),
        ({"method": "magic"}, "match: method must be one of"),
        ({"max_sweeps": 0}, "match: max_sweeps must be at least 1"),
        ({"tensors": ["nope"]}, "match: tensors has 'nope'"),
        ({"tensors": []}, "match: tensors is empty"),
        ({"seed": "x"}, "match: seed must be an integer"),
    ],
)
def test_match_refuses_bad_input(change: dict, message: str) -> None:
    arguments = {
        "spec": SPEC,
        "reference": torch.zeros(SPEC.numel),
        "flat": torch.zeros(1, SPEC.numel),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        align.match(**(arguments | change))


def test_a_spec_that_nobody_verified_is_warned_of_where_it_is_used() -> None:
    guess = weightops.WeightSpec(SPEC.axes, SPEC.shapes, unverified=True)
    flat = torch.zeros(2, SPEC.numel)
    for use in (
        lambda: align.match(guess, flat[0], flat[1:]),
        lambda: align.match_all(guess, flat, progress=False),
    ):
        with pytest.warns(UserWarning, match="spec was never verified") as seen:
            use()
        assert [each.filename for each in seen] == [__file__]


MODEL = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
LAYERS = weightops.WeightSpec(
    {"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h"), "2.bias": (None,)},
    {name: tensor.shape for name, tensor in MODEL.state_dict().items()},
)
LEARNED = {
    **{"model": MODEL, "inputs": torch.randn(4, 3), "targets": torch.tensor([0, 1, 1, 0])},
    "steps": 2,
}
METHODS = {
    "weight": {},
    "activation": {"model": MODEL, "inputs": torch.randn(4, 3)},
    "straight-through": LEARNED,
    "sinkhorn": LEARNED,
}


@pytest.mark.parametrize("method", METHODS)
def test_no_networks_have_no_permutations(method: str) -> None:
    flat = LAYERS.flatten(MODEL).detach()
    found = align.match(LAYERS, flat[0], flat[:0], method=method, **METHODS[method])
    assert found.perms["h"].shape == (0, 6)
    assert found.objective.shape == (0,)
    assert found.history.shape[1:] == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_need_gradients_give_results_without(method: str) -> None:
    flat = LAYERS.flatten([MODEL, MODEL]).requires_grad_()
    found = align.match(LAYERS, flat[0], flat[1:], method=method, **METHODS[method])
    assert not found.objective.requires_grad
    assert not found.history.requires_grad


@pytest.mark.parametrize("method", ["straight-through", "sinkhorn"])
def test_what_can_not_be_learned_is_said(method: str) -> None:
    flat = LAYERS.flatten([MODEL, MODEL]).detach()
    fixed = weightops.WeightSpec(
        {k: (None,) * len(v) for k, v in LAYERS.shapes.items()}, LAYERS.shapes
    )
    with pytest.raises(
        ValueError, match=r"^match: method .* nothing to learn, as no label of spec"
    ):
        align.match(fixed, flat[0], flat[1:], method=method, **LEARNED)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"^match: method .* inference mode"),
    ):
        align.match(LAYERS, flat[0], flat[1:], method=method, **LEARNED)
    half = flat.half()
    with pytest.raises(TypeError, match=r"^match: method .* can't train .* torch.float16"):
        align.match(LAYERS, half[0], half[1:], method=method, **LEARNED)


def test_products_that_overflow_are_no_fault_of_the_weights() -> None:
    flat = torch.full((2, SPEC.numel), 1e30)
    with pytest.raises(ValueError, match=r"^match: products of weights overflow torch.float32"):
        align.match(SPEC, flat[0], flat[1:])
