"""match_weights: the kernel does what the textbook algorithm does, visit by visit."""

import pytest
import torch

import weightops
from weightops import testing
from weightops._load import has_kernel
from weightops.ops.match import match_weights, plan, reference
from weightops.ops.match.plan import decode

HEADS = weightops.WeightSpec(
    {
        "q": (("head", "dim"), "d"),
        "n": ("d",),
        "o": ("d", ("head", "dim")),
        "c": (None, "d", None),
        "s": (),
    },
    {"q": (24, 16), "n": (16,), "o": (16, 24), "c": (2, 16, 3), "s": ()},
    sizes={"head": 4},
)
RECURRENT = weightops.WeightSpec(
    {"w_in": ("h", None), "w_rec": ("h", "h"), "b": ("h",), "w_out": (None, ("h", None))},
    {"w_in": (24, 3), "w_rec": (24, 24), "b": (24,), "w_out": (2, 48)},
)
SPECS = {
    "mlp": testing.mlp_spec(20, 40, 50, 30, 10),
    "cnn": testing.resnet20_spec(),
    "heads": HEADS,
    "rnn": RECURRENT,
    "nothing permutable": weightops.WeightSpec({"w": (None, None)}, {"w": (3, 4)}),
}


def problem(
    spec: weightops.WeightSpec, networks: int, copies: int = 1, dtype: torch.dtype = torch.float64
) -> tuple:
    """Networks that share half of their weights up to a permutation, so that descents are long."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(copies, spec.numel, generator=generator, dtype=dtype)
    other = torch.randn(networks, copies, spec.numel, generator=generator, dtype=dtype)
    perms = spec.random_permutations(networks, generator)
    shuffled = torch.stack(
        [weightops.permute(common[t] + other[:, t], perms, spec) for t in range(copies)], 1
    )
    order = torch.rand(30, len(spec.labels), generator=generator).argsort(1)
    return common, shuffled, plan(spec, list(spec.shapes), copies), order


@pytest.mark.parametrize(("networks", "copies"), [(1, 1), (5, 1), (3, 4)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_same_permutations_as_the_textbook(
    spec: weightops.WeightSpec, networks: int, copies: int
) -> None:
    arguments = problem(spec, networks, copies)
    found, history, sweeps = match_weights(*arguments)
    expected, expected_history, expected_sweeps = reference.match_weights(*arguments)
    assert torch.equal(found, expected)
    for n in range(networks):
        # The kernel may need one more, over scores that nothing was added to.
        assert expected_sweeps[n] <= sweeps[n] <= expected_sweeps[n] + 1
        upto = int(expected_sweeps[n]) + 1
        torch.testing.assert_close(history[:upto, n], expected_history[:upto, n])
        torch.testing.assert_close(history[sweeps[n], n], expected_history[upto - 1, n])


def test_random_specs_match_as_the_textbook_does() -> None:
    for seed in range(40):
        spec = testing.random_spec(torch.Generator().manual_seed(seed))
        arguments = problem(spec, 2)
        torch.testing.assert_close(
            match_weights(*arguments)[0], reference.match_weights(*arguments)[0], msg=f"seed {seed}"
        )


def test_descents_are_long_enough_to_add_to_scores() -> None:
    """Else the tests above would compare full products only."""
    common, shuffled, code, order = problem(SPECS["mlp"], 3)
    sweeps = match_weights(common, shuffled, code, order)[2]
    assert (sweeps >= 4).all()


def test_float32_reaches_the_same_objective() -> None:
    for spec in SPECS.values():
        common, shuffled, code, order = problem(spec, 2)
        _, history, sweeps = match_weights(common.float(), shuffled.float(), code, order)
        _, expected, counts = reference.match_weights(common, shuffled, code, order)
        reached, best = history.gather(0, sweeps[None]), expected.gather(0, counts[None])
        torch.testing.assert_close(reached, best, rtol=1e-5, atol=1e-5)


def test_stops_after_the_sweeps_it_is_given() -> None:
    common, shuffled, code, order = problem(SPECS["mlp"], 2)
    found, history, sweeps = match_weights(common, shuffled, code, order[:2])
    expected = reference.match_weights(common, shuffled, code, order[:2])
    assert sweeps.tolist() == [2, 2]
    assert torch.equal(found, expected[0])
    torch.testing.assert_close(history, expected[1])


def test_threads_do_not_change_what_is_found() -> None:
    arguments = problem(testing.mlp_spec(30, 200, 200, 10), 2, dtype=torch.float32)
    together = match_weights(*arguments)
    alone = match_weights(arguments[0], arguments[1][:1], *arguments[2:])
    assert torch.equal(together[0][:1], alone[0])


def test_plan_lists_every_place_once() -> None:
    places = decode(plan(RECURRENT, list(RECURRENT.shapes), 1)).places[0]
    assert [(p.offset, p.stride, p.run) for p in places] == [
        (0, 3, 3),
        (72, 24, 1),
        (72, 1, 1),
        (648, 1, 1),
        (672, 2, 2),
    ]
    assert [p.counts for p in places] == [1, 1, 0, 1, 1]
    twice = decode(plan(RECURRENT, ["b"], 2)).places[0]
    assert [(p.offset, p.others) for p in twice] == [(648, ((-1, 2, RECURRENT.numel),))]


@pytest.mark.parametrize("where", [0, 1])
def test_refuses_weights_that_are_not_finite(where: int) -> None:
    for spec in (SPECS["mlp"], SPECS["nothing permutable"]):
        arguments = list(problem(spec, 1))
        arguments[where] = arguments[where].clone()
        arguments[where].view(-1)[-1] = float("nan")
        with pytest.raises(RuntimeError, match="match_weights: weights must be finite"):
            match_weights(*arguments)


def test_the_op_keeps_torchs_contract() -> None:
    torch.library.opcheck(match_weights, problem(SPECS["mlp"], 2))
    common, shuffled, code, order = problem(SPECS["heads"], 4)
    batched = torch.vmap(lambda flat: match_weights(common, flat, code, order)[0])(
        shuffled.view(2, 2, 1, -1)
    )
    assert torch.equal(batched.flatten(0, 1), match_weights(common, shuffled, code, order)[0])


@pytest.mark.skipif(
    not has_kernel("match_weights", "cpu"), reason="the definition uses no addresses"
)
@pytest.mark.parametrize(
    ("what", "position", "value"),
    [
        *[("labels", 0, 4), ("size of a label", 1, 5), ("size of a label", 1, 0)],
        *[("begin", 5, -1), ("begin", 5, 10**6), ("end", 6, 10**6)],
        *[("offset", 8, -1), ("offset", 8, 10**6), ("stride", 9, -1), ("stride", 9, 2**62)],
        *[("run", 10, 0), ("run", 10, 2**62), ("others", 13, 9), ("label", 14, 3)],
        *[("size", 15, 2**62), ("size", 15, 0), ("stride", 16, -1), ("stride", 16, 10**6)],
    ],
)
def test_a_plan_that_does_not_fit_the_networks_is_refused(
    what: str, position: int, value: int
) -> None:
    """The kernel reads where a plan says."""
    common, shuffled, code, order = problem(SPECS["heads"], 1)
    with pytest.raises(IndexError, match="the plan does not fit the networks"):
        match_weights(common, shuffled, [*code[:position], value, *code[position + 1 :]], order)


@pytest.mark.skipif(
    not has_kernel("match_weights", "cpu"), reason="the definition uses no addresses"
)
def test_the_plan_of_a_larger_spec_is_refused() -> None:
    code, order = problem(SPECS["heads"], 1)[2:]
    few = torch.zeros(1, 6, dtype=torch.float64)
    with pytest.raises(IndexError, match="the plan does not fit the networks"):
        match_weights(few, few[None], code, order)
    with pytest.raises(ValueError, match="the plan ends early"):
        match_weights(*problem(SPECS["heads"], 1)[:2], code[:-1], order)
