"""Datasets as vectors: what they depend on, how examples are drawn, what alignment rewards."""

import math

import pytest
import torch
from torch import nn

from weightops.generate import DatasetEncoder, alignment_loss
from weightops.generate.encoder import ClassIndex


def make(**options: object) -> DatasetEncoder:
    torch.manual_seed(0)
    return DatasetEncoder(6, 3, 16, **{"hidden": 16, "heads": 2, "points": 4} | options).double()


def examples(n: int = 2, size: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, size, 2, 3, dtype=torch.float64)


def test_the_order_of_examples_within_a_class_has_no_influence() -> None:
    encoder, x = make(), examples()
    order = torch.stack([torch.randperm(5) for _ in range(6)]).view(2, 3, 5)
    shuffled = x.gather(2, order[..., None, None].expand_as(x))
    assert not torch.equal(shuffled, x)
    torch.testing.assert_close(encoder(shuffled), encoder(x))


def test_which_class_examples_belong_to_has_an_influence() -> None:
    encoder, x = make(), examples()
    assert (encoder(x[:, [1, 0, 2]]) - encoder(x)).abs().max() > 1e-3


def test_datasets_of_a_batch_do_not_see_each_other() -> None:
    encoder, x = make(), examples(4)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


def test_any_number_of_examples_will_do() -> None:
    encoder = make()
    assert encoder(examples(2, 1)).shape == encoder(examples(2, 9)).shape == (2, 16)


def test_every_parameter_gets_a_gradient_and_the_extractor_too() -> None:
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(6, 6))
    encoder = make(extractor=extractor)
    encoder(examples()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    assert extractor[1].weight.grad is None  # a copy is trained


def dataset(counts: list[int], first: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [B, 1] that count up from ``first``, in a shuffled order of classes."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return first + torch.arange(len(labels)).float()[:, None], labels


def test_examples_are_drawn_from_their_task_and_class_and_all_of_them() -> None:
    data = [dataset([3, 1, 4], 0.0), dataset([2, 5, 2], 100.0)]
    index = ClassIndex("test", data, 3)
    tasks = torch.tensor([1, 0, 1])
    drawn = index.draw(tasks, 200, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 3, 200, 1)
    for row, task in enumerate(tasks.tolist()):
        inputs, labels = data[task]
        for c in range(3):
            assert set(drawn[row, c].flatten().tolist()) == set(
                inputs[labels == c].flatten().tolist()
            )


def test_draws_repeat_with_the_generator_and_change_with_it() -> None:
    index = ClassIndex("test", [dataset([30, 30, 30], 0.0)], 3)
    tasks = torch.zeros(2, dtype=torch.int64)
    first, same, other = (
        index.draw(tasks, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_alignment_is_lowest_where_rows_belong_together() -> None:
    vectors = torch.eye(6, 8)
    together = alignment_loss(vectors, vectors, temperature=0.05)
    apart = alignment_loss(vectors, vectors.roll(1, 0), temperature=0.05)
    assert together < 1e-3
    assert apart > 5


def test_alignment_takes_networks_of_one_task_alike() -> None:
    """Two rows of one task: swapping them costs nothing, and the loss is the targets' entropy."""
    vectors = torch.eye(3, 8)[[0, 0, 1, 2]]
    loss = alignment_loss(vectors, vectors, temperature=0.05)
    torch.testing.assert_close(loss, torch.tensor(0.5 * math.log(2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        alignment_loss(vectors, vectors[[1, 0, 2, 3]], temperature=0.05), loss
    )


def test_alignment_brings_a_linear_map_to_its_tasks() -> None:
    torch.manual_seed(0)
    tasks = torch.arange(5).repeat(4)
    datasets, networks = torch.randn(5, 12)[tasks], torch.randn(5, 9)[tasks]
    datasets = datasets + 0.1 * torch.randn_like(datasets)
    maps = nn.Linear(12, 8), nn.Linear(9, 8)
    optimizer = torch.optim.Adam([*maps[0].parameters(), *maps[1].parameters()], lr=1e-2)
    for _ in range(200):
        loss = alignment_loss(maps[0](datasets), maps[1](networks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosines = nn.functional.cosine_similarity(
        maps[0](datasets)[:, None], maps[1](networks)[None], dim=-1
    )
    assert (tasks[cosines.argmax(1)] == tasks).all()


INPUTS, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        ([], TypeError, r"f: datasets must be a non-empty list of \(inputs, labels\)"),
        ([INPUTS], TypeError, r"f: datasets\[0\] must be a pair \(inputs, labels\), not a torch"),
        ([(INPUTS, [0])], TypeError, r"datasets\[0\]'s labels must be a tensor \[B\], not list"),
        ([(INPUTS.long(), LABELS)], TypeError, "inputs must be floating point, not torch.int64"),
        ([(INPUTS, LABELS.float())], TypeError, "labels must be int64 or int32, not torch.float32"),
        ([(INPUTS[:, 0], LABELS)], ValueError, r"inputs must have shape \[B, ...\], not \[6\]"),
        ([(INPUTS[:5], LABELS)], ValueError, "labels has length 6, but its inputs has size 5"),
        ([(INPUTS[:0], LABELS[:0])], ValueError, r"datasets\[0\] holds no example"),
        ([(INPUTS, LABELS + 1)], ValueError, r"datasets\[0\]'s labels\[2\] is 3, outside 0..2"),
        ([(INPUTS, LABELS - 1)], ValueError, r"datasets\[0\]'s labels\[0\] is -1, outside 0..2"),
        ([(INPUTS, LABELS % 2)], ValueError, r"datasets\[0\] has no example of class 2"),
        (
            [(INPUTS, LABELS), (INPUTS[:, :3], LABELS)],
            ValueError,
            r"datasets\[1\] has inputs \[3\], datasets\[0\] has \[4\]",
        ),
        (
            [(INPUTS.clone().index_fill_(0, torch.tensor([2]), torch.nan), LABELS)],
            ValueError,
            r"datasets\[0\]'s inputs must be finite, but .*\[2, 0\] is nan",
        ),
    ],
)
def test_datasets_that_can_not_be_drawn_from_are_refused(
    datasets: list, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        ClassIndex("f", datasets, 3)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="hidden 15 must be a multiple of heads 2"):
        make(hidden=15)
    with pytest.raises(TypeError, match="extractor must be a module or None, not int 3"):
        make(extractor=3)
    with pytest.raises(ValueError, match=r"examples must have shape \[B, 3, S, ...\] with S > 0"):
        make()(torch.zeros(2, 4, 5, 6))
    with pytest.raises(ValueError, match=r"extractor must give features \[30, 6\], not \[30, 7\]"):
        make()(torch.zeros(2, 3, 5, 7))
    with pytest.raises(ValueError, match=r"networks must have shape \[2, 3\] as datasets, not"):
        alignment_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"datasets must be a tensor \[B, E\], not list"):
        alignment_loss([1.0], torch.zeros(2, 4))
