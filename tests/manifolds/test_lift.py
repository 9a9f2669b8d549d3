"""Lifting a model onto a manifold changes nothing at first; a slice of it is an ordinary model again."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightops.manifolds import (
    Bezier,
    BSpline,
    Ellipse,
    Fourier,
    Lifted,
    Line,
    Manifold,
    Product,
    Simplex,
    Torus,
    at,
    lift,
    slice_at,
)
from weightops.nn import ManifoldConv2d, ManifoldEmbedding, ManifoldLinear, ManifoldNorm

DOUBLE = torch.float64
CIRCLES = [Ellipse(), Fourier(3), Torus(), Torus(additive=True), Product(Ellipse(), Fourier(2))]
OTHERS = [Line(), Bezier(3), BSpline(6), BSpline(5, 2, ring=True), Simplex(3)]
MIXED = [Product(Line(), Ellipse()), Product(Simplex(3), Bezier(2))]
ALL = [*CIRCLES, *OTHERS, *MIXED]


def close(given: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(given, expected, **tolerance)


class Net(nn.Module):
    """Every layer that can be lifted, an attention-free mixer over tokens, and a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.image = nn.Conv2d(1, 6, 2, stride=2)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True)])
        self.batch = nn.BatchNorm1d(6)
        self.last = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6))
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        x = self.embed(ids).mT + self.image(picture).flatten(2)
        for norm in self.norms:
            x = norm(self.conv(x).relu())
        return self.out(self.last(self.last(self.batch(x).mT)))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    ids, picture = data(20)
    for _ in range(3):
        model(ids, picture)  # running statistics
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or "last" in name:
                param += 0.1 * torch.randn_like(param)
    return model.eval()


def data(n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (n, 4), generator=generator)
    return ids, torch.randn(n, 1, 4, 4, generator=generator, dtype=DOUBLE)


def contexts(manifold: Manifold, n: int = 4) -> Tensor:
    return manifold.sample(n, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def same(given: nn.Module, expected: nn.Module, exactly: bool) -> None:
    state, other = given.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        if exactly:
            assert torch.equal(value, other[name]), name
        else:
            close(value, other[name])


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_the_constant_is_one_everywhere(manifold: Manifold) -> None:
    constant = manifold.constant
    assert constant.dtype == DOUBLE
    ones = manifold.coeffs(contexts(manifold, 20)) @ constant
    close(ones, torch.ones_like(ones))


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_bases_around_a_mean(manifold: Manifold) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(30, 100, generator=generator, dtype=DOUBLE)
    noise = 0.3 * torch.randn(manifold.num_coeffs, 30, 100, generator=generator, dtype=DOUBLE)
    bases = manifold.around(mean, noise)
    close(torch.tensordot(manifold.gram @ manifold.constant, bases, 1), mean)
    # The mean square over the domain is the Gram's quadratic form.
    rest = (bases - manifold.around(mean)).flatten(1)
    square = ((manifold.gram @ rest) * rest).sum(0).mean()
    close(square, torch.tensor(0.09, dtype=DOUBLE), rtol=0.1, atol=0)


@pytest.mark.parametrize("manifold", ALL, ids=repr)
def test_without_spread_every_slice_is_the_model(manifold: Manifold) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    lifted = lift(model, manifold, batch_norm="regions", regions=2)
    s = contexts(manifold)
    for context in s:
        # A point of a partition of unity is rounded; a constant, sine and cosine are not.
        same(slice_at(lifted, context), model, exactly=manifold in CIRCLES)
    close(lifted(*data(), context=s), model(*data()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not lifted.ordinary


@pytest.mark.parametrize("manifold", [Ellipse(), Line(), Torus(), Simplex(3)], ids=repr)
def test_a_slice_computes_what_the_lifted_model_does_there(manifold: Manifold) -> None:
    torch.manual_seed(0)
    lifted = lift(net(), manifold, spread=0.4, batch_norm="regions", regions=3)
    for buffer in lifted.buffers():
        if buffer.is_floating_point() and buffer.shape[-1] == 6:
            buffer.uniform_(0.5, 1.5)  # regions that differ
    ids, picture = data()
    s = contexts(manifold)
    y = lifted(ids, picture, context=s)
    on_the_first = []
    for b, context in enumerate(s):
        module = lifted.slice_at(context)
        assert isinstance(module, Net)
        assert type(module.batch) is nn.BatchNorm1d
        assert not module.training
        assert module.out.weight is module.embed.weight
        close(module(ids, picture)[b], y[b])
        on_the_first.append(module(ids, picture)[0, :, 1:])
        close(slice_at(lifted.model, coeffs=manifold.coeffs(context))(ids, picture)[b], y[b])
    assert torch.stack(on_the_first).std(0).min() > 0.01


def test_spread_says_how_far_weights_differ() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 50, padding_idx=3), nn.Linear(50, 80), nn.LayerNorm(80))
    for spread in (0.1, 2.0):
        lifted = lift(model, Line(), spread=spread)
        ends = [lifted.slice_at(torch.tensor(s)) for s in (0.0, 0.5, 1.0)]
        for name, given in model.named_parameters():
            middle, last = (end.get_parameter(name) for end in ends[1:])
            close(middle, given)
            if name == "2.bias":  # of zeros
                assert torch.equal(last, given)
                continue
            # On a line through the mean, the mean square is a third of an end's.
            apart = ((last - given).square().mean() / given.square().mean() / 3).sqrt()
            close(apart, torch.tensor(spread), rtol=0.3, atol=0)
        assert not lifted.model[0].weight[:, 3].any()


def test_the_context_is_an_argument_or_around() -> None:
    lifted, (ids, picture) = lift(net(), Ellipse(), spread=0.3, batch_norm="batch"), data()
    s = contexts(Ellipse())
    y = lifted(ids, picture=picture, context=s)
    with at(s):
        assert torch.equal(lifted(ids, picture), y)
        assert not torch.equal(lifted(ids, picture, context=s[0]), y)
        assert torch.equal(lifted(ids, picture), y)
    assert torch.equal(lifted(ids, picture, coeffs=Ellipse().coeffs(s)), y)
    few = lifted(ids, picture, context=s[:2], index=torch.tensor([0, 1, 1, 0]))
    close(few, lifted(ids, picture, context=s[[0, 1, 1, 0]]))
    with pytest.raises(ValueError, match=r"^Lifted: needs a context; give context="):
        lifted(ids, picture)
    with pytest.raises(ValueError, match=r"^Line: context must lie in \[0, 1\]"):
        lift(net(), Line(), batch_norm="batch")(ids, picture, context=s + 1)


def test_what_is_shared_stays_shared() -> None:
    torch.manual_seed(0)
    block = nn.Linear(4, 4)
    head = nn.Linear(4, 4)
    head.bias = block.bias
    lifted = lift(nn.ModuleDict({"a": block, "b": block, "c": head}), Ellipse(), spread=0.1)
    inner: Any = lifted.model
    assert inner["a"] is inner["b"]
    assert inner["c"].bias is inner["a"].bias
    assert len(list(lifted.parameters())) == 3
    module: Any = lifted.slice_at(torch.tensor(0.2))
    assert module["a"] is module["b"]
    assert module["c"].bias is module["a"].bias
    whole = lift(net(), Ellipse(), batch_norm="batch")
    assert whole.model.out.weight is whole.model.embed.weight
    with pytest.raises(ValueError, match=r"out.weight is a parameter of embed too.*out is not"):
        lift(net(), Ellipse(), skip=["out"], batch_norm="batch")


class Custom(nn.Linear):
    """A subclass, whose forward pass is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Tokens(nn.Module):
    """A transformer with parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.memory = nn.GRU(8, 8, batch_first=True)
        self.head = Custom(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        x = self.encoder(x, src_key_padding_mask=mask)
        return self.head(self.memory(x)[0])


def test_what_can_not_be_lifted_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = Tokens()
    with pytest.warns(UserWarning, match=r"^lift: these stay as they are, .*start: belongs to no"):
        lifted = lift(model, Ellipse(), spread=0.2)
    attention = (
        "MultiheadAttention reads the weights of its projections itself, once for the whole batch"
    )
    assert lifted.ordinary == {
        "start": "belongs to no layer",
        "encoder.layers.0.self_attn": attention,
        "encoder.layers.1.self_attn": attention,
        "memory": "GRU runs in a kernel that takes one set of weights for the whole batch",
        "head": "Custom has no manifold version",
    }
    assert type(lifted.model.encoder.layers[0].linear1) is ManifoldLinear
    meant = lift(model, Ellipse(), skip=["start", nn.MultiheadAttention, nn.RNNBase, "head"])
    assert not meant.ordinary
    # In eval torch's own fast path would take the bases for weights.
    x, s = torch.randn(3, 5, 8), torch.rand(3)
    mask = torch.arange(6).expand(3, 6) > torch.tensor([[5], [3], [4]])
    for m in (None, mask):
        expected = lifted.train()(x, m, context=s)
        with torch.no_grad():
            close(lifted.eval()(x, m, context=s), expected)
            module = lifted.slice_at(s[1])
            close(module(x, m)[1], expected[1])


def test_layers_that_do_more_stay() -> None:
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(
        nn.Linear(3, 3),
        hooked,
        parametrized,
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        nn.Embedding(3, 3, max_norm=1.0),
        nn.ConvTranspose1d(3, 3, 1),
        nn.Linear(3, 3, dtype=torch.complex64),
        nn.LayerNorm(3, elementwise_affine=False),
    )
    with pytest.warns(UserWarning, match="lift: these stay"):
        lifted = lift(model, Line())
    assert lifted.ordinary == {
        "1": "Linear has hooks, which would be lost",
        "2": "ParametrizedLinear has no manifold version",
        "3": "Linear has hooks, which would be lost",
        "4": "Embedding has max_norm",
        "5": "ConvTranspose1d has no manifold version",
        "6": "Linear has parameters that are not floating point of 16 to 64 bits",
    }
    assert type(lifted.model[0]) is ManifoldLinear
    for n in range(1, 8):
        assert type(lifted.model[n]) is type(model[n])


def test_only_and_skip_choose() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)),
        nn.Linear(2, 2),
    )
    for options, expected in (
        ({"only": ["1"]}, ["Conv2d", "GroupNorm", "ManifoldConv2d", "ManifoldNorm", "Linear"]),
        ({"only": [nn.Linear]}, ["Conv2d", "GroupNorm", "Conv2d", "GroupNorm", "ManifoldLinear"]),
        (
            {"skip": [nn.GroupNorm, "2"]},
            ["ManifoldConv2d", "GroupNorm", "ManifoldConv2d", "GroupNorm", "Linear"],
        ),
        (
            {"only": [nn.Conv2d, "1.1"], "skip": ["0"]},
            ["Conv2d", "GroupNorm", "ManifoldConv2d", "ManifoldNorm", "Linear"],
        ),
    ):
        lifted = lift(model, Ellipse(), **options)  # type: ignore[arg-type]
        named = dict(lifted.model.named_modules())
        given = [type(named[n]).__name__ for n in ("0.0", "0.1", "1.0", "1.1", "2")]
        assert given == expected
        assert not lifted.ordinary


def test_a_model_can_be_lifted_in_parts() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    first = lift(model, Ellipse(), only=["0"])
    with torch.no_grad():
        first.model[0].weight.add_(0.1)
    both = lift(first.model, Ellipse())
    assert torch.equal(both.model[0].weight, first.model[0].weight)
    x, s = torch.randn(4, 3), torch.rand(4)
    close(both(x, context=s), first(x, context=s))
    assert len(list(both.bases())) == 4


def test_running_statistics_must_be_decided_about() -> None:
    with pytest.raises(
        ValueError, match=r"^lift: batch keeps a running mean.*batch_norm='regions'"
    ):
        lift(net(), Ellipse())
    assert type(lift(net(), Ellipse(), skip=["batch"]).model.batch) is nn.BatchNorm1d
    free = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False))
    assert type(lift(free, Ellipse()).model[0]) is ManifoldNorm
    tracked = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(ValueError, match=r"is for BatchNorm1d to 3d; InstanceNorm2d takes 'batch'"):
        lift(tracked, Ellipse(), batch_norm="regions")
    bare = nn.Sequential(nn.BatchNorm2d(2, affine=False)).eval()
    x = torch.randn(3, 2, 4, 4)
    lifted = lift(bare, Ellipse(), batch_norm="regions")
    close(lifted(x, context=torch.rand(3)), bare(x))


def test_a_lifted_batch_norm_keeps_regions_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    lifted = lift(model, Ellipse(), batch_norm="regions", regions=4)
    for _ in range(200):
        s = torch.rand(64)
        # Brightness depends on the context: one mean for all would fit none.
        lifted(torch.randn(64, 1, 4, 4) + 10 * s[:, None, None, None], context=s)
    lifted.eval()
    for center in (0.125, 0.625):
        x = torch.randn(500, 1, 4, 4) + 10 * center
        s = torch.tensor(center)
        normed = lifted.model[1](lifted.model[0](x, s), s)
        assert normed.mean((0, 2, 3)).abs().max() < 0.5
        close(lifted.slice_at(s)(x), lifted(x, context=s), rtol=1e-4, atol=1e-4)


def small() -> Lifted:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return lift(model, Ellipse(), spread=0.2, batch_norm="regions", regions=2)


X, S = torch.randn(5, 1, 4, 4), torch.rand(5)


def test_state_dicts_go_through_safetensors(tmp_path: Path) -> None:
    lifted, other = small(), small()
    lifted(X, context=S)  # running statistics
    for param in other.parameters():
        param.data.zero_()
    save_file(lifted.state_dict(), tmp_path / "lifted.safetensors")
    other.load_state_dict(load_file(tmp_path / "lifted.safetensors"), strict=True)
    for a, b in zip(lifted.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(other.eval()(X, context=S), lifted.eval()(X, context=S))
    module = lifted.slice_at(S[0])
    save_file(module.state_dict(), tmp_path / "sliced.safetensors")
    ordinary = nn.Sequential(*[copy.deepcopy(part) for part in module])
    ordinary.load_state_dict(load_file(tmp_path / "sliced.safetensors"), strict=True)


def test_they_are_copied_pickled_and_cast() -> None:
    lifted = small().eval()
    y = lifted(X, context=S)
    buffer = io.BytesIO()
    torch.save(lifted, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(lifted),
        pickle.loads(pickle.dumps(lifted)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(X, context=S), y)
    close(lifted.double()(X.double(), context=S.double()), y.double(), rtol=1e-4, atol=1e-5)
    half = lifted.to(torch.bfloat16)(X.bfloat16(), context=S)
    assert half.dtype == torch.bfloat16
    close(half.float(), y, rtol=0.1, atol=0.1)


def test_parameters_and_modes_stay_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[0].weight.requires_grad_(False)
    model[:2].eval()
    lifted = lift(model, Line(), batch_norm="regions")
    assert [p.requires_grad for p in lifted.parameters()] == [False, True, True, True]
    assert [m.training for m in lifted.model] == [False, False, True]
    assert not lifted.model[1].norm.training
    module: Any = lifted.slice_at(torch.tensor(0.3))
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert [m.training for m in module] == [False, False, True]
    held = dict(lifted.bases())
    assert list(held) == ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]
    assert all(p.shape[0] == 2 for p in held.values())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_compiled_whole(name: str) -> None:
    lifted = small().eval()
    if name == "mlp":
        lifted = lift(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), BSpline(5))
    x = X.flatten(1) if name == "mlp" else X
    torch._dynamo.reset()
    compiled: Any = torch.compile(lifted, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in (S, 1 - S):
            y, expected = compiled(x, context=s), lifted(x, context=s)
            close(y, expected)
            grads = [torch.autograd.grad(v.sum(), lifted.parameters()) for v in (y, expected)]
            for one, other in zip(*grads, strict=True):
                close(one, other, rtol=1e-4, atol=1e-5)


def test_torch_func_takes_them() -> None:
    lifted = small().eval()
    params = {**dict(lifted.named_parameters()), **dict(lifted.named_buffers())}

    def call(params: dict, x: Tensor, s: Tensor) -> Tensor:
        return torch.func.functional_call(lifted, params, (x,), {"context": s})

    y = lifted(X, context=S)
    assert torch.equal(call(params, X, S), y)
    each = torch.func.vmap(lambda x, s: call(params, x[None], s)[0])(X, S)
    close(each, y)
    held = dict(lifted.named_parameters())
    given = torch.func.grad(lambda p: call({**params, **p}, X, S).sum())(held)
    for one, other in zip(
        given.values(), torch.autograd.grad(y.sum(), list(held.values())), strict=True
    ):
        close(one, other)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, x, s: call({**params, **p}, x[None], s).sum()), (None, 0, 0)
    )(held, X, S)
    for name, grads in per_sample.items():
        close(grads.sum(0), given[name], rtol=1e-4, atol=1e-5)


def test_a_single_layer_can_be_the_model() -> None:
    layer = nn.Linear(3, 2)
    lifted = lift(layer, Ellipse())
    assert type(lifted.model) is ManifoldLinear
    module = lifted.slice_at(torch.tensor(0.7))
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, layer.weight)


def test_a_mixture_of_experts_is_sliced_by_its_coefficients() -> None:
    model = nn.Sequential(ManifoldConv2d(1, 2, 3, 4), ManifoldEmbedding(3, 2, 4))
    mixing = torch.rand(4)
    module: Any = slice_at(model, mixing)
    assert [type(m) for m in module] == [nn.Conv2d, nn.Embedding]
    close(module[0](X), model[0](X, mixing))


TWO = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
SPUN: Any = lift(TWO, Torus())
BAD = [
    (lambda: lift("x", Line()), TypeError, "^lift: model must be a module, not str 'x'"),
    (lambda: lift(TWO, 3), TypeError, "^lift: manifold must be a Manifold, not int 3"),
    (lambda: lift(TWO, Line(), spread=-1), ValueError, r"^lift: spread must be in \[0, inf\)"),
    (lambda: lift(TWO, Line(), spread="1"), TypeError, "^lift: spread must be a number"),
    (lambda: lift(TWO, Line(), only="0"), TypeError, "^lift: only must list names and types of"),
    (lambda: lift(TWO, Line(), skip=[3]), TypeError, "^lift: skip must list names and .* int 3"),
    (lambda: lift(TWO, Line(), skip=["2"]), ValueError, "^lift: skip names '2', which the model"),
    (
        lambda: lift(TWO, Line(), only=["0.weight"]),
        ValueError,
        "^lift: only names '0.weight', which the model has not",
    ),
    (
        lambda: lift(TWO, Line(), batch_norm="no"),
        ValueError,
        "^lift: batch_norm must be one of 'batch', 'regions', not 'no'",
    ),
    (lambda: lift(TWO, Line(), regions=0), ValueError, "^lift: regions must be at least 1, not 0"),
    (lambda: lift(nn.ReLU(), Line()), ValueError, "^lift: found nothing to lift in ReLU"),
    (lambda: lift(SPUN, Line()), ValueError, r"^lift: model.0 is on a manifold already, Torus\("),
    (
        lambda: lift(ManifoldLinear(2, 2, Line()), Ellipse()),
        ValueError,
        r"^lift: the model itself is on a manifold already, Line\(\)",
    ),
    (
        lambda: lift(nn.Sequential(nn.LazyLinear(3)), Line()),
        ValueError,
        "^lift: 0 has no shape yet; run the model once before",
    ),
    (
        lambda: lift(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(5)]), Line()),
        ValueError,
        "^lift: 0, 1, 2, ... keeps a running mean and variance",
    ),
    (lambda: slice_at(TWO, torch.rand(())), ValueError, "^slice_at: Sequential has no layer on a"),
    (lambda: slice_at("x", torch.rand(())), TypeError, "^slice_at: module must be a module, not"),
    (
        lambda: SPUN.slice_at(torch.rand(3, 2)),
        ValueError,
        r"^slice_at: takes one context, with coefficients \[K\], not \[3, 9\]",
    ),
    (
        lambda: SPUN.slice_at(torch.rand(3)),
        ValueError,
        r"^Torus: context must have shape \[..., 2\], not \[3\]",
    ),
    (lambda: SPUN.slice_at(), ValueError, "^slice_at: takes a context or coeffs, but neither is"),
    (
        lambda: SPUN(torch.rand(1, 2), context=torch.rand(2), coeffs=torch.rand(9)),
        ValueError,
        "^Lifted: takes a context or coeffs, but both are given",
    ),
    (
        lambda: SPUN(torch.rand(1, 2), index=torch.zeros(1, dtype=torch.int64)),
        ValueError,
        "^Lifted: takes a context or coeffs, but neither is given",
    ),
    (
        lambda: SPUN(torch.rand(1, 2), context=0.5),
        TypeError,
        r"^Lifted: context must be a tensor \[...\], not float 0.5",
    ),
    (lambda: at(0.5).__enter__(), TypeError, r"^at: context must be a tensor \[...\], not float"),
    (lambda: at().__enter__(), ValueError, "^at: takes a context or coeffs, but neither is given"),
    (lambda: Line().grid(0), ValueError, "^Line.grid: n must be at least 1, not 0"),
    (
        lambda: Line().grid(2, dtype=torch.int64),
        TypeError,
        "^Line.grid: dtype must be a floating point dtype",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
