"""Traced specs: proven on many architectures, with the labels that were counted by hand."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import architectures
import demo
import pytest
import torch
import torch.nn.functional as F
from architectures import Apply, FusedAttention, Recurrent, TorchAttention
from torch import Tensor, nn

from weightops import WeightSpec, testing
from weightops.tracing import VerificationError, explain, trace, verify

IMAGES, SMALL = (torch.randn(2, 3, 32, 32),), (torch.randn(2, 3, 8, 8),)
TOKENS, SERIES = (torch.randint(11, (2, 7)),), (torch.randn(2, 5, 4),)
VECTORS = (torch.randn(3, 4),)


def sequential(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*modules)


def two_inputs(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model.head(model.bilinear(model.left(x).relu(), model.right(y).relu()))


#: architecture -> (model, inputs, sizes of its labels, times each): derived by hand
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[int, int]]] = {
    "MLP": (lambda: demo.MLP(9), (torch.randn(2, 784),), {9: 3}),
    # The stem's stream is layer1's; then a stream a stage, and one inside each block.
    "ResNet-18": (architectures.resnet18, IMAGES, {8: 3, 16: 3, 32: 3, 64: 3}),
    # Stem; a stream a stage (32 .. 256); two inside each of 3, 4, 6, 3 blocks.
    "ResNet-50": (
        architectures.resnet50,
        IMAGES,
        {8: 1 + 6, 16: 8, 32: 1 + 12, 64: 1 + 6, 128: 1, 256: 1},
    ),
    "VGG-16-BN": (architectures.VGG, IMAGES, {4: 2, 8: 2, 16: 3 + 1, 32: 6, 12: 1}),
    # Depthwise convolutions carry the channels of the one before.
    "MobileNetV2": (
        architectures.MobileNet,
        IMAGES,
        {8: 2, 4: 1, 6: 1, 12: 1, 18: 2, 24: 1, 20: 1},
    ),
    "squeeze-excite": (
        lambda: architectures.MobileNet(excite=3),
        IMAGES,
        {8: 2, 4: 1, 6: 1, 12: 1, 18: 2, 24: 1, 20: 1, 3: 5},
    ),
    # Every layer's output keeps a label of its own in all that concatenate it.
    "DenseNet": (architectures.DenseNet, SMALL, {6: 1, 8: 6, 4: 6, 9: 1}),
    "ShuffleNet unit": (architectures.Shuffle, SMALL, {4: 3}),
    # The stream; in each of two blocks heads, query-key and value dimensions, hidden units.
    "ViT, nn.MultiheadAttention": (
        lambda: architectures.ViT(TorchAttention),
        SMALL,
        {12: 1, 3: 2, 4: 4, 36: 2},
    ),
    "ViT, timm": (architectures.ViT, SMALL, {12: 1, 3: 2, 4: 4, 36: 2}),
    "ViT, timm, unfused": (
        lambda: architectures.ViT(partial(FusedAttention, fused=False)),
        SMALL,
        {12: 1, 3: 2, 4: 4, 36: 2},
    ),
    "GPT-2": (architectures.GPT, TOKENS, {12: 1, 3: 2, 4: 4, 48: 2}),
    # Rotary tables fix query-key dimensions: key heads, queries of one key, values, hidden units.
    "Llama": (architectures.Llama, TOKENS, {16: 1, 2: 4, 4: 2, 20: 2}),
    "Llama, gate and up in one": (
        lambda: architectures.Llama(fused_mlp=True, persistent=False),
        TOKENS,
        {16: 1, 2: 4, 4: 2, 20: 2},
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
        (torch.randn(2, 5, 16),),
        {2: 1, 8: 2, 24: 1},
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), num_layers=2
        ),
        (torch.randn(2, 5, 16), torch.randn(2, 3, 16)),
        {2: 4, 8: 8, 24: 2},
    ),
    "LSTM": (Recurrent, SERIES, {6: 1}),
    "GRU": (partial(Recurrent, nn.GRU), SERIES, {6: 1}),
    "RNN": (partial(Recurrent, nn.RNN), SERIES, {6: 1}),
    "LSTM, stacked, bidirectional": (
        partial(Recurrent, num_layers=2, bidirectional=True),
        SERIES,
        {6: 4},
    ),
    "LSTM, last state": (partial(Recurrent, last=True, num_layers=2), SERIES, {6: 2}),
    "LSTM, projected": (partial(Recurrent, proj_size=2), SERIES, {6: 1, 2: 1}),
    "LSTMCell": (architectures.RecurrentCell, SERIES, {6: 1}),
    "GRUCell": (partial(architectures.RecurrentCell, nn.GRUCell), SERIES, {6: 1}),
    # Experts, stream, hidden units; a choice of experts fixes them, not what is in them.
    "mixture of experts": (architectures.DenseMoE, VECTORS, {3: 1, 6: 1, 7: 1}),
    "mixture of top experts": (architectures.TopMoE, VECTORS, {6: 1, 7: 3}),
    "mixture of top experts, stacked": (architectures.TopStackedMoE, VECTORS, {6: 1, 7: 1}),
    "weight norm": (
        sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
            nn.ReLU(),
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
            nn.ReLU(),
            nn.Linear(5, 2),
        ),
        VECTORS,
        {6: 1, 5: 1},
    ),
    "spectral norm": (
        sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)
        ),
        VECTORS,
        {6: 1},
    ),
    "LoRA": (
        sequential(architectures.LoRALinear(4, 6, 2), nn.ReLU(), architectures.LoRALinear(6, 5, 3)),
        VECTORS,
        {2: 1, 6: 1, 3: 1},
    ),
    "bilinear": (
        lambda: Apply(
            two_inputs,
            left=nn.Linear(4, 5),
            right=nn.Linear(3, 6),
            bilinear=nn.Bilinear(5, 6, 7),
            head=nn.Linear(7, 2),
        ),
        (torch.randn(3, 4), torch.randn(3, 3)),
        {5: 1, 6: 1, 7: 1},
    ),
    "1-D convolution": (
        sequential(nn.Conv1d(4, 6, 3, padding="same"), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 3)),
        (torch.randn(2, 4, 9),),
        {6: 1},
    ),
    "3-D convolution, flattened": (
        sequential(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 8, 2)),
        (torch.randn(2, 2, 3, 3, 3),),
        {6: 1},
    ),
    "flattened [C, H, W]": (
        sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(6 * 36, 2)),
        (torch.randn(3, 8, 8),),
        {6: 1},
    ),
    "flattened tokens": (
        lambda: Apply(
            lambda model, x: model.head(model.embed(x).relu().flatten(1)),
            embed=nn.Linear(4, 6),
            head=nn.Linear(5 * 6, 2),
        ),
        SERIES,
        {6: 1},
    ),
    # Groups permute as wholes, and the channels of all groups alike.
    "grouped convolution": (
        sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1)),
        SMALL,
        {2: 1, 3: 1, 4: 1},
    ),
    "depthwise with a multiplier": (
        sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 10, 3, groups=5), nn.Conv2d(10, 2, 1)),
        SMALL,
        {5: 1, 2: 1},
    ),
    "transposed convolution": (
        sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.Conv2d(5, 2, 1)),
        SMALL,
        {6: 1, 5: 1},
    ),
    "transposed convolution, grouped": (
        sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1)),
        SMALL,
        {2: 1, 3: 1, 4: 1},
    ),
    "group norm": (
        sequential(
            nn.Conv2d(3, 6, 3),
            nn.GroupNorm(2, 6),
            nn.Conv2d(6, 5, 3),
            nn.GroupNorm(1, 5),
            nn.Conv2d(5, 4, 1),
            nn.GroupNorm(4, 4),
            nn.Conv2d(4, 2, 1),
        ),
        SMALL,
        {2: 1, 3: 1, 5: 1, 4: 1},
    ),
    "instance norm": (
        sequential(
            nn.Conv2d(3, 6, 3),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.InstanceNorm2d(5),
            nn.Conv2d(5, 2, 1),
        ),
        SMALL,
        {6: 1, 5: 1},
    ),
    "local response norm": (
        sequential(
            nn.Conv2d(3, 6, 3), nn.LocalResponseNorm(3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)
        ),
        SMALL,
        {4: 1},
    ),
    "U-Net": (
        lambda: Apply(
            lambda m, x: m.head(
                torch.cat([a := m.down(x).relu(), m.up(m.mid(F.max_pool2d(a, 2)).relu())], 1)
            ),
            down=nn.Conv2d(3, 4, 3, padding=1),
            mid=nn.Conv2d(4, 6, 3, padding=1),
            up=nn.ConvTranspose2d(6, 4, 2, stride=2),
            head=nn.Conv2d(8, 2, 1),
        ),
        SMALL,
        {4: 2, 6: 1},
    ),
    "pixel shuffle": (
        sequential(nn.Conv2d(3, 20, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(5, 2, 3)),
        SMALL,
        {5: 1},
    ),
    "embedding bag": (
        sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 2)),
        TOKENS,
        {6: 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_traced_spec_is_proven_and_has_the_labels_counted_by_hand(name: str) -> None:
    torch.manual_seed(0)
    build, inputs, sizes = CASES[name]
    model = build()
    spec = trace(model, *inputs)
    assert Counter(spec.labels.values()) == Counter(sizes), spec
    assert spec.unverified
    proof = verify(spec, model, *inputs, trials=1)
    assert proof.error < 1e-9
    assert not spec.unverified


def same_up_to_names(spec: WeightSpec, other: WeightSpec, tensors: list[str]) -> bool:
    """Whether labels of the two correspond one to one on ``tensors``."""
    pairs = set()
    for name in tensors:
        for axis in range(len(spec.shapes[name])):
            ours, theirs = spec.factors(name, axis), other.factors(name, axis)
            if [size for _, size in ours] != [size for _, size in theirs]:
                return False
            pairs |= {(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True)}
    forward, backward = dict(pairs), {b: a for a, b in pairs}
    return len(forward) == len(pairs) == len(backward)


class Transformer(nn.Module):
    """Blocks with the tensors of :func:`weightops.testing.transformer_spec`, between two maps."""

    def __init__(self, blocks: int, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(3, dim), nn.Linear(dim, 2)
        for b in range(blocks):
            layers = {each: nn.Linear(dim, dim) for each in ("query", "key", "value", "out")}
            layers |= {"up": nn.Linear(dim, hidden), "down": nn.Linear(hidden, dim)}
            layers |= {"norm1": nn.LayerNorm(dim), "norm2": nn.LayerNorm(dim)}
            self.add_module(str(b), nn.ModuleDict(layers))
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for b in range(self.blocks):
            block = getattr(self, str(b))
            y = block["norm1"](x)
            q, k, v = (
                block[each](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for each in ("query", "key", "value")
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["out"](y)
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.out(x)


def test_traced_specs_are_the_hand_written_ones() -> None:
    mlp = trace(demo.MLP(9), torch.randn(1, 784))
    written = testing.mlp_spec(784, 9, 9, 9, 10)
    assert list(mlp.shapes) == list(written.shapes)
    assert same_up_to_names(mlp, written, list(mlp.shapes))
    cnn = trace(demo.CNN(6), torch.randn(1, 1, 28, 28))
    assert same_up_to_names(cnn, demo.cnn_spec(6), list(cnn.shapes))
    assert cnn.axes["fc.weight"] == (None, ("conv2", None))
    transformer = trace(Transformer(2, 12, 20, 3), torch.randn(1, 5, 3))
    written = testing.transformer_spec(2, dim=12, hidden=20, heads=3)
    assert same_up_to_names(transformer, written, list(written.shapes))
    wrong = testing.transformer_spec(2, dim=12, hidden=20, heads=4)
    assert not same_up_to_names(transformer, wrong, list(written.shapes))


def relabelled(spec: WeightSpec, changes: dict[tuple[str, int], Any]) -> WeightSpec:
    axes = {name: list(entries) for name, entries in spec.axes.items()}
    for (name, axis), entry in changes.items():
        axes[name][axis] = entry
    return WeightSpec(axes, spec.shapes, sizes=spec.labels)


def test_frozen_axes_can_not_permute() -> None:
    torch.manual_seed(0)
    model = architectures.Llama(depth=1)
    spec = trace(model, *TOKENS)
    q, k = spec.axes["layers.0.q_proj.weight"][0], spec.axes["layers.0.k_proj.weight"][0]
    assert isinstance(q, tuple)
    assert isinstance(k, tuple)
    assert (q[2], k[1]) == (None, None)
    wrong = relabelled(
        spec,
        {("layers.0.q_proj.weight", 0): (*q[:2], "x"), ("layers.0.k_proj.weight", 0): (k[0], "x")},
    )
    with pytest.raises(VerificationError):
        verify(wrong, model, *TOKENS)

    model = architectures.TopMoE()
    spec = trace(model, *VECTORS)
    assert spec.axes["router.weight"] == (None, "embed")
    with pytest.raises(VerificationError):
        verify(relabelled(spec, {("router.weight", 0): "x"}), model, *VECTORS)

    model = demo.CNN(6)
    inputs = (torch.randn(1, 1, 28, 28),)
    spec = trace(model, *inputs)
    for place in (("conv2.weight", 2), ("fc.bias", 0)):
        with pytest.raises(VerificationError):
            verify(relabelled(spec, {place: "x"}), model, *inputs)


def test_labels_that_are_traced_apart_are_not_one_too_few() -> None:
    # Were two labels one in truth, permuting them alone would change the function.
    torch.manual_seed(0)
    model = architectures.DenseNet()
    spec = trace(model, *SMALL)
    first, second, *_ = (label for label, size in spec.labels.items() if size == 8)
    place = next(p for p in spec.occurrences(first))
    with pytest.raises(VerificationError):
        verify(relabelled(spec, {place: second}), model, *SMALL)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (architectures.resnet50, IMAGES),
        (lambda: architectures.ViT(FusedAttention, depth=12), SMALL),
        (lambda: architectures.GPT(depth=12), TOKENS),
    ],
    ids=["ResNet-50", "ViT-12", "GPT-12"],
)
def test_deep_models_are_traced_in_seconds(build: Any, inputs: Any) -> None:
    model = build()
    began = time.process_time()
    trace(model, *inputs)
    assert time.process_time() - began < 15


def test_names_are_those_of_the_modules_that_write_the_label() -> None:
    vit = trace(architectures.ViT(depth=1), *SMALL)
    assert list(vit.labels) == [
        "patch_embed",
        "blocks.0.attn.qkv[0:12][0]",
        "blocks.0.attn.qkv[0:12][1]",
        "blocks.0.attn.qkv[24:36][1]",
        "blocks.0.mlp.0",
    ]
    gpt = trace(architectures.GPT(depth=1), *TOKENS)
    assert next(iter(gpt.labels)) == "wte"
    assert "lm_head.weight" not in gpt.shapes
    lstm = trace(Recurrent(), *SERIES)
    assert lstm.axes["rnn.weight_hh_l0"] == ((None, "rnn.weight_ih_l0"), "rnn.weight_ih_l0")
    assert trace(architectures.ViT(depth=1), *SMALL) == vit


def test_tracing_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    for model, inputs in ((architectures.MobileNet(), IMAGES), (Recurrent(num_layers=2), SERIES)):
        model.train()
        frozen = next(model.children())
        frozen.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        parameters = list(map(id, model.parameters()))
        trace(model, *inputs)
        assert [module.training for module in model.modules()] == modes
        assert list(map(id, model.parameters())) == parameters
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        model(*inputs)[0].sum().backward()


def test_explain_says_where_labels_come_from_and_why_axes_are_fixed() -> None:
    told = explain(architectures.Llama(depth=1), *TOKENS)
    assert told.spec == trace(architectures.Llama(depth=1), *TOKENS)
    assert told.labels["embed"].size == 16
    assert told.labels["embed"].origin == "embed.weight axis 1 (Embedding)"
    assert ("lm_head.weight", 1) in told.labels["embed"].occurrences
    reason = told.frozen["layers.0.q_proj.weight", 0]
    assert reason == "the constant buffer inv_freq, at mul in layers.0"
    assert told.frozen["lm_head.weight", 0] == "the model's output"
    assert 1 - told.permutable == pytest.approx(2 / told.spec.numel)
    text = str(told)
    assert "the constant buffer inv_freq, at mul in layers.0" in text
    assert "99.9 % of 2,130 weights are permutable, by 5 labels" in text
