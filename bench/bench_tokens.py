"""Packing whole networks to tokens and back, and a zoo's statistics, against what users have today."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import resnet18
from torch import Tensor

from weightops import WeightSpec, tokens, trace
from weightops.tokens import Statistics, TokenPlan

SPEC: list[WeightSpec] = []


def resnet18_spec() -> WeightSpec:
    """ResNet-18 of the usual width: 11.2 million weights, 102 tensors with the norms' statistics."""
    if not SPEC:
        SPEC.append(trace(resnet18(64).eval(), torch.randn(1, 3, 32, 32)))
    return SPEC[0]


def pack_layer_by_layer(flat: Tensor, plan: TokenPlan, found: Statistics | None) -> Tensor:
    """Rows of each layer side by side, standardised, padded and cut, as token code is written today."""
    views, number = plan.spec.unflatten(flat), {name: i for i, name in enumerate(plan.spec.shapes)}
    mean, std = ([], []) if found is None else (found.mean.tolist(), found.std.tolist())
    tokens = []
    for names in plan.layers:
        columns = []
        for name in names:
            rows = views[name].reshape(len(flat), plan.spec.shapes[name][0], -1)
            if found is not None:
                rows = (rows - mean[number[name]]) / (std[number[name]] or 1.0)
            columns.append(rows)
        rows = torch.cat(columns, 2)
        rows = F.pad(rows, (0, -rows.shape[2] % plan.size))
        tokens.append(rows.reshape(len(flat), -1, plan.size))
    return torch.cat(tokens, 1)


def pack_as_sane(flat: Tensor, plan: TokenPlan, found: Statistics | None) -> Tensor:
    """The same with zeros to write into, a mask and positions for each network, as SANE's released code does."""
    views = plan.spec.unflatten(flat[0])
    if found is not None:
        mean, std = found.mean.tolist(), found.std.tolist()
        for n, name in enumerate(views):
            views[name] = (views[name] - mean[n]) / (std[n] or 1.0)
    tokens, masks, positions = [], [], []
    for layer, names in enumerate(plan.layers):
        first = views[names[0]]
        rows = first.reshape(first.shape[0], -1)
        for name in names[1:]:
            rows = torch.cat([rows, views[name].unsqueeze(1)], 1)
        channels, length = rows.shape
        parts = -(-length // plan.size)
        positions += [[layer, channel] for channel in range(channels) for _ in range(parts)]
        mask, padded = torch.zeros(2, channels, parts * plan.size)
        mask[:, :length] = 1
        padded[:, :length] = rows
        tokens.append(padded.view(-1, plan.size))
        masks.append(mask.view(-1, plan.size).bool())
    packed, _ = torch.cat(tokens), torch.cat(masks)
    torch.tensor([(n, *position) for n, position in enumerate(positions)])
    return packed[None]


def unpack_layer_by_layer(packed: Tensor, plan: TokenPlan, found: Statistics | None) -> Tensor:
    shapes, number = plan.spec.shapes, {name: i for i, name in enumerate(plan.spec.shapes)}
    mean, std = ([], []) if found is None else (found.mean.tolist(), found.std.tolist())
    first, pieces = 0, {}
    for names in plan.layers:
        rows = shapes[names[0]][0]
        widths = [shapes[name].numel() // rows for name in names]
        count = rows * -(-sum(widths) // plan.size)
        each = packed[:, first : first + count].reshape(len(packed), rows, -1)
        first += count
        for name, piece in zip(names, each[..., : sum(widths)].split(widths, 2), strict=True):
            if found is not None:
                piece = piece * (std[number[name]] or 1.0) + mean[number[name]]
            pieces[name] = piece.reshape(len(packed), -1)
    return torch.cat([pieces[name] for name in shapes], 1)


def zoo(spec: WeightSpec, count: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(count, spec.numel, generator=generator)).to(device)


@pytest.mark.parametrize("implementation", ["weightops", "clone", "layer-by-layer", "sane-style"])
@pytest.mark.parametrize("standardised", [False, True], ids=["plain", "standardised"])
@pytest.mark.parametrize("way", ["pack", "unpack"])
def test_channel_tokens(
    way: str, standardised: bool, implementation: str, measure, benchmark, device
) -> None:
    """ResNet-18 in tokens of 288, as SANE cuts it; ``clone`` copies what is to be written."""
    if implementation == "sane-style" and (way == "unpack" or device != "cpu"):
        pytest.skip("packs, on a CPU")
    benchmark.group = f"tokens {way} resnet18" + (" standardised" if standardised else "")
    plan = TokenPlan(resnet18_spec(), "channel", size=288)
    flat = zoo(plan.spec, 1, device)
    found = tokens.statistics(flat, plan) if standardised else None
    packed = tokens.pack(flat, plan, statistics=found)
    given, written, ours, theirs = {
        "pack": (flat, packed, tokens.pack, pack_layer_by_layer),
        "unpack": (packed, flat, tokens.unpack, unpack_layer_by_layer),
    }[way]
    if implementation == "sane-style":
        theirs = pack_as_sane
    torch.testing.assert_close(
        ours(given, plan, statistics=found), theirs(given, plan, found), rtol=1e-4, atol=1e-5
    )
    f = {
        "weightops": lambda: ours(given, plan, statistics=found),
        "clone": written.clone,
    }.get(implementation, lambda: theirs(given, plan, found))
    measure(f, 4 * (flat.numel() + packed.numel()))


@pytest.mark.parametrize("implementation", ["weightops", "sum", "var_mean-by-tensor"])
def test_statistics(implementation: str, measure, benchmark, device) -> None:
    """Means and deviations of each tensor of 16 networks; ``sum`` reads them once."""
    spec = resnet18_spec()
    benchmark.group = "tokens statistics resnet18x16"
    flat = zoo(spec, 16, device)
    f = {
        "weightops": lambda: tokens.statistics(flat, spec),
        "sum": lambda: flat.sum(),
        "var_mean-by-tensor": lambda: [
            torch.var_mean(each, correction=0) for each in spec.unflatten(flat).values()
        ],
    }[implementation]
    measure(f, flat.nbytes)
