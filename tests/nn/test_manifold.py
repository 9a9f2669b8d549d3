"""Layers on a manifold against torch's own with the weights of each context, and how contexts reach them."""

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from condconv import condconv2d
from torch import Tensor, nn

from weightops.manifolds import BSpline, Ellipse, Line, Manifold, Product, Simplex, Torus, at
from weightops.nn import (
    ManifoldConv1d,
    ManifoldConv2d,
    ManifoldEmbedding,
    ManifoldLinear,
    ManifoldNorm,
)

DOUBLE = torch.float64
CIRCLE = Ellipse()
CONTEXTS = torch.tensor([0.1, 0.35, 0.6, 0.85], dtype=DOUBLE)
INDEX = torch.tensor([3, 0, 0, 2, 1])
B = len(INDEX)


def close(given: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(given, expected, **tolerance)


def on(layer: Callable[..., Any], *sizes: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return layer(*sizes, CIRCLE, dtype=DOUBLE, **options)


def norm_of(norm: nn.Module, **options: Any) -> ManifoldNorm:
    torch.manual_seed(0)
    layer = ManifoldNorm(norm.double(), CIRCLE, **options)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_()
    return layer


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


IDS = torch.tensor([[0, 2, 1], [2, 2, 6], [5, 1, 0], [3, 3, 1], [6, 2, 4]])
#: a layer, its input, and torch's function of input, weight and bias
LAYERS: dict[str, tuple[Callable[[], Any], Tensor, Callable[..., Tensor]]] = {
    "linear": (lambda: on(ManifoldLinear, 4, 3), images(B, 4), F.linear),
    "linear of sequences": (
        lambda: on(ManifoldLinear, 4, 3, bias=False),
        images(B, 2, 6, 4),
        F.linear,
    ),
    "conv1d": (
        lambda: on(ManifoldConv1d, 4, 6, 3, stride=2, padding=1, groups=2),
        images(B, 4, 9),
        lambda x, w, b: F.conv1d(x, w, b, 2, 1, 1, 2),
    ),
    "conv2d": (
        lambda: on(ManifoldConv2d, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        images(B, 2, 7, 6),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2)),
    ),
    "conv2d, same": (
        lambda: on(ManifoldConv2d, 2, 3, (5, 3), padding="same", bias=False),
        images(B, 2, 5, 6),
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
    ),
    "conv2d, circular": (
        lambda: on(ManifoldConv2d, 2, 3, 3, padding=(1, 2), padding_mode="circular"),
        images(B, 2, 5, 6),
        lambda x, w, b: F.conv2d(F.pad(x, (2, 2, 1, 1), "circular"), w, b),
    ),
    "conv1d, reflected": (
        lambda: on(ManifoldConv1d, 2, 3, 4, padding="same", padding_mode="reflect"),
        images(B, 2, 7),
        lambda x, w, b: F.conv1d(F.pad(x, (1, 2), "reflect"), w, b),
    ),
    "embedding": (lambda: on(ManifoldEmbedding, 7, 3), IDS, lambda x, w, b: F.embedding(x, w)),
    "embedding of single ids": (
        lambda: on(ManifoldEmbedding, 7, 3),
        IDS[:, 0].int(),
        lambda x, w, b: F.embedding(x, w),
    ),
    "layer norm": (
        lambda: norm_of(nn.LayerNorm((4, 3))),
        images(B, 2, 4, 3),
        lambda x, w, b: F.layer_norm(x, (4, 3), w, b),
    ),
    "layer norm of one axis": (
        lambda: norm_of(nn.LayerNorm(3, bias=False)),
        images(B, 3),
        lambda x, w, b: F.layer_norm(x, (3,), w, b),
    ),
    "rms norm": (
        lambda: norm_of(nn.RMSNorm(3, eps=0.1)),
        images(B, 4, 3),
        lambda x, w, b: F.rms_norm(x, (3,), w, 0.1),
    ),
    "group norm": (
        lambda: norm_of(nn.GroupNorm(2, 6)),
        images(B, 6, 3, 2),
        lambda x, w, b: F.group_norm(x, 2, w, b),
    ),
    "instance norm": (
        lambda: norm_of(nn.InstanceNorm2d(4, affine=True)),
        images(B, 4, 3, 2),
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    ),
}


def at_each(layer: Any, x: Tensor, coeffs: Tensor, function: Callable[..., Tensor]) -> Tensor:
    """The definition: for each entry torch's function, with weights mixed for it."""
    rows = []
    for b in range(len(x)):
        params = [
            None if bases is None else torch.tensordot(coeffs[b], bases, 1)
            for bases in (layer.weight, getattr(layer, "bias", None))
        ]
        rows.append(function(x[b : b + 1], *params))
    return torch.cat(rows)


@pytest.mark.parametrize("name", LAYERS)
def test_every_entry_meets_the_weights_of_its_context(name: str) -> None:
    make, x, function = LAYERS[name]
    layer = make()
    coeffs = CIRCLE.coeffs(CONTEXTS)
    close(layer(x, CONTEXTS, index=INDEX), at_each(layer, x, coeffs[INDEX], function))
    close(layer(x, coeffs=coeffs, index=INDEX.int()), layer(x, CONTEXTS, index=INDEX))
    close(layer(x[:4], CONTEXTS), at_each(layer, x[:4], coeffs, function))
    close(layer(x, CONTEXTS[1]), at_each(layer, x, coeffs[1].expand(B, 3), function))
    close(layer(x, coeffs=coeffs[1]), layer(x, CONTEXTS[1]))
    assert layer(x[:0], CONTEXTS[:0]).shape == layer(x, CONTEXTS, index=INDEX)[:0].shape
    with at(CONTEXTS, index=INDEX):
        assert torch.equal(layer(x), layer(x, CONTEXTS, index=INDEX))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_input_context_and_bases(name: str) -> None:
    make, x, _ = LAYERS[name]
    layer = make()
    names, params = zip(*layer.named_parameters(), strict=True)
    floating = x.is_floating_point()

    def f(context: Tensor, *tensors: Tensor) -> Tensor:
        given, weights = (tensors[0], tensors[1:]) if floating else (x[:2], tensors)
        return torch.func.functional_call(
            layer, dict(zip(names, weights, strict=True)), (given, context)
        )

    held = [CONTEXTS[:2], *([x[:2]] if floating else []), *params]
    inputs = tuple(t.detach().clone().requires_grad_() for t in held)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", LAYERS)
def test_the_ordinary_layer_at_a_context_is_torchs(name: str) -> None:
    make, x, _ = LAYERS[name]
    layer = make()
    coeffs = CIRCLE.coeffs(CONTEXTS[2])

    def mixed(bases: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.tensordot(coeffs, bases.detach(), 1))

    module = layer.ordinary(mixed, coeffs)
    assert type(module).__module__.startswith("torch.nn")
    close(module(x), layer(x, CONTEXTS[2]))
    again = type(layer).lifted(module, CIRCLE, lambda p: nn.Parameter(CIRCLE.around(p.detach())))
    assert repr(again) == repr(layer)
    close(again(x, CONTEXTS[0]), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_halves_take_contexts_of_float32(name: str, dtype: torch.dtype) -> None:
    make, x, _ = LAYERS[name]
    layer = make()
    eps = torch.finfo(dtype).eps
    given = x.to(dtype) if x.is_floating_point() else x
    lower = copy.deepcopy(layer).to(dtype)
    for context in (CONTEXTS.float(), CONTEXTS.to(dtype)):
        y = lower(given, context, index=INDEX)
        assert y.dtype == dtype
        expected = copy.deepcopy(lower).double()(
            given.double() if x.is_floating_point() else x, context.double(), index=INDEX
        )
        close(y.double(), expected, rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("manifold", [CIRCLE, Line(), Torus(), BSpline(6), Simplex(4)], ids=repr)
@pytest.mark.parametrize("spread", [0.0, 0.5, 0.9])
def test_initial_weights_have_an_ordinary_layers_variance(
    manifold: Manifold, spread: float
) -> None:
    torch.manual_seed(0)
    layer = ManifoldLinear(300, 200, manifold, spread=spread)
    contexts = manifold.sample(400, stratified=True)
    with torch.no_grad():
        weights = torch.tensordot(manifold.coeffs(contexts)[:, :], layer.weight, 1)[:, :, ::5]
    ordinary = nn.Linear(300, 200).weight.var()
    close(weights.square().mean(), ordinary, rtol=0.1, atol=0)
    differing = (weights - weights.mean(0)).square().mean() / ordinary
    close(differing, torch.tensor(spread**2), rtol=0.1, atol=1e-3)
    assert layer.bias.abs().max() > 0.01


def test_bases_of_a_number_are_each_drawn_as_torch_draws_them() -> None:
    torch.manual_seed(0)
    layer = ManifoldConv2d(20, 30, 3, 4)
    bound = 1 / 180**0.5
    for basis in layer.weight:
        assert basis.abs().max() <= bound
        close(basis.var(), torch.tensor(bound**2 / 3), rtol=0.05, atol=0)
    norm = ManifoldNorm(nn.GroupNorm(2, 4), 3)
    assert torch.equal(norm.weight, torch.ones(3, 4))
    embedding = ManifoldEmbedding(50, 40, CIRCLE, padding_idx=-1)
    assert embedding.padding_idx == 49
    assert not embedding.weight[:, 49].any()
    close(embedding.weight[0, :49].var(), torch.tensor(0.75), rtol=0.1, atol=0)


def test_one_context_needs_no_batch() -> None:
    for name in ("linear", "layer norm of one axis", "embedding of single ids"):
        layer, x = LAYERS[name][0](), LAYERS[name][1]
        close(layer(x[2], CONTEXTS[1]), layer(x, CONTEXTS[1])[2])


def test_a_padding_row_stays() -> None:
    layer = on(ManifoldEmbedding, 7, 3, padding_idx=2)
    layer(IDS, CONTEXTS, index=INDEX).sum().backward()
    assert not layer.weight.grad[:, 2].any()
    assert layer.weight.grad[:, 1].all()


class Counted(Ellipse):
    """An ellipse that counts."""

    calls = 0

    def coeffs(self, context: Tensor) -> Tensor:
        type(self).calls += 1
        return super().coeffs(context)


def two_layers(manifold: Manifold | int = CIRCLE) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = ManifoldLinear(4, 8, manifold), ManifoldLinear(8, 2, manifold)
    return nn.Sequential(first, nn.Tanh(), last)


def test_coefficients_are_computed_once_for_all_layers() -> None:
    net, x, s = two_layers(Counted()), torch.randn(3, 4), torch.rand(3)
    Counted.calls = 0
    with at(s):
        net(x)
        with torch.no_grad():
            net(x)
        assert Counted.calls == 1
        y = net(x)
        s.add_(0.25)  # what is new is seen
        assert not torch.equal(net(x), y)
        assert Counted.calls == 2
    with torch.inference_mode(), at(s):
        net(x)
        net(x)
    assert Counted.calls == 3


def test_a_learned_context_has_a_graph_of_its_own_in_every_pass() -> None:
    net, x, s = two_layers(), torch.randn(3, 4), torch.rand(3, requires_grad=True)
    (expected,) = torch.autograd.grad(net[2](net[1](net[0](x, s)), s).sum(), s)
    with at(s):
        with torch.no_grad():
            net(x)
        for _ in range(2):
            (grad,) = torch.autograd.grad(net(x).sum(), s)
            close(grad, expected)
        with torch.inference_mode():
            net(x)
        net(x).sum().backward()
    close(s.grad, expected)  # type: ignore[arg-type]


def test_what_is_cached_in_inference_mode_is_not_trained_with() -> None:
    net, x, s = two_layers(), torch.randn(3, 4), torch.rand(3)
    with at(s):
        with torch.inference_mode():
            net(x)
        net(x).sum().backward()
    assert net[0].weight.grad is not None


def test_the_innermost_context_counts() -> None:
    net, x = two_layers(), torch.randn(3, 4)
    a, b = torch.tensor(0.1), torch.tensor(0.6)
    with at(a):
        outer = net(x)
        with at(b):
            inner = net(x)
            assert torch.equal(net[0](x, a), net[0](x, coeffs=CIRCLE.coeffs(a)))
        assert torch.equal(net(x), outer)
        with pytest.raises(ZeroDivisionError), at(b):
            raise ZeroDivisionError
        assert torch.equal(net(x), outer)
    with at(coeffs=CIRCLE.coeffs(b)):
        assert torch.equal(net(x), inner)
    with pytest.raises(ValueError, match=r"^ManifoldLinear: needs a context"):
        net(x)


def test_threads_and_tasks_have_contexts_of_their_own() -> None:
    net, x = two_layers(), torch.randn(1, 4)
    contexts = torch.linspace(0, 0.9, 5)
    expected = [net[2](net[1](net[0](x, s)), s) for s in contexts]
    found: dict[str, Tensor] = {}
    barrier = threading.Barrier(5)

    def thread(n: int) -> None:
        with at(contexts[n]):
            barrier.wait()
            found[f"thread {n}"] = net(x)

    async def task(n: int) -> None:
        with at(contexts[n]):
            await asyncio.sleep(0.01 * (5 - n))
            found[f"task {n}"] = net(x)

    async def tasks() -> None:
        await asyncio.gather(*map(task, range(5)))

    with at(contexts[0]):
        threads = [threading.Thread(target=thread, args=(n,)) for n in range(5)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        asyncio.run(tasks())
        found["here"] = net(x)
    expected.append(expected[0])
    for n, y in enumerate(expected[:5]):
        assert torch.equal(found[f"thread {n}"], y)
        assert torch.equal(found[f"task {n}"], y)
    assert torch.equal(found["here"], expected[0])


def test_layers_of_several_manifolds_share_a_context() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(ManifoldLinear(4, 8, Line()), ManifoldLinear(8, 2, CIRCLE))
    x, s = torch.randn(3, 4), torch.rand(3)
    with at(s):
        y = net(x)
    close(y, net[1](net[0](x, s), s))


def test_contexts_of_several_numbers_and_of_none() -> None:
    torch.manual_seed(0)
    layer = ManifoldLinear(4, 2, Product(Line(), CIRCLE))
    x, s = torch.randn(3, 4), torch.rand(3, 2)
    close(layer(x, s)[1], layer(x, s[1])[1])
    experts = ManifoldLinear(4, 2, 5)
    mixing = torch.rand(3, 5)
    close(experts(x, mixing), experts(x, coeffs=mixing))
    with at(mixing):
        close(experts(x), experts(x, mixing))


@pytest.mark.parametrize("where", ["argument", "around"])
def test_compiled_whole_and_once(where: str) -> None:
    net, x = two_layers(), torch.randn(3, 4)

    def inside(x: Tensor, s: Tensor) -> Tensor:
        with at(s):
            return net(x)

    torch._dynamo.reset()
    compiled: Any = torch.compile(inside if where == "argument" else net, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            s = torch.rand(3, generator=torch.Generator().manual_seed(seed))
            if where == "argument":
                y = compiled(x, s)
            else:
                with at(s):
                    y = compiled(x)
            close(y, inside(x, s))
            grads = [torch.autograd.grad(v.sum(), net.parameters()) for v in (y, inside(x, s))]
            for one, other in zip(*grads, strict=True):
                close(one, other, rtol=1e-4, atol=1e-5)
    if where == "around":
        with pytest.raises(Exception, match="needs a context"):
            compiled(x)


def test_compiled_code_leaves_the_context_that_it_found() -> None:
    net, x = two_layers(), torch.randn(3, 4)

    def nested(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with at(a):
            with at(b):
                inner = net(x)
            return inner, net(x)

    torch._dynamo.reset()
    compiled: Any = torch.compile(nested, fullgraph=True, backend="eager")
    a, b = torch.rand(2, 3)
    for given, expected in zip(compiled(x, a, b), nested(x, a, b), strict=True):
        assert torch.equal(given, expected)
    with pytest.raises(Exception, match="needs a context"):
        torch.compile(net, fullgraph=True, backend="eager")(x)


def test_torch_func_sees_through_at() -> None:
    net, x, s = two_layers(), torch.randn(3, 4), torch.rand(3)
    params = dict(net.named_parameters())

    def loss(params: dict, x: Tensor, s: Tensor) -> Tensor:
        with at(s):
            return torch.func.functional_call(net, params, (x,)).square().sum()

    value = loss(params, x, s)
    expected = torch.autograd.grad(value, list(params.values()))
    given = torch.func.grad(loss)(params, x, s)
    for one, other in zip(given.values(), expected, strict=True):
        close(one, other)
    rows = torch.func.vmap(loss, (None, 0, 0))(params, x[:, None], s[:, None])
    close(rows.sum(), value)
    by_context = torch.func.grad(loss, 2)(params, x, s)
    tangent = torch.rand(3)
    _, pushed = torch.func.jvp(lambda s: loss(params, x, s), (s,), (tangent,))
    close(pushed, by_context @ tangent)
    with at(s):  # outside of the transform
        again = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())(
            params
        )
        net(x)
    for one, other in zip(again.values(), expected, strict=True):
        close(one, other)


def test_autocast_reaches_them_as_it_reaches_torchs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        ManifoldConv1d(2, 4, 3, CIRCLE, padding=1),
        ManifoldNorm(nn.GroupNorm(2, 4), CIRCLE),
        ManifoldLinear(5, 3, CIRCLE),
    )
    x, s = torch.randn(6, 2, 5), torch.rand(6)
    with at(s):
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            assert net[0](x).dtype == net[1](net[0](x)).dtype == y.dtype == torch.bfloat16
        close(y.float(), expected, rtol=0.1, atol=0.05)
        y.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_they_are_saved_copied_and_shown() -> None:
    for make, x, _ in LAYERS.values():
        layer = make()
        again = make()
        with torch.no_grad():
            for param in again.parameters():
                param.zero_()
        again.load_state_dict(layer.state_dict())
        for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x, CONTEXTS[0]), layer(x, CONTEXTS[0]))
        assert "Ellipse()" in repr(layer)
    assert set(LAYERS["conv2d"][0]().state_dict()) == {"weight", "bias"}
    assert repr(ManifoldLinear(2, 3, 4)) == "ManifoldLinear(2, 3, manifold=4, bias=True)"
    shown = (
        "ManifoldConv2d(2, 4, kernel_size=(3, 3), stride=(2, 2), groups=2, manifold=5, bias=False)"
    )
    assert repr(ManifoldConv2d(2, 4, 3, 5, stride=2, groups=2, bias=False)) == shown
    assert repr(ManifoldEmbedding(2, 4, 3, padding_idx=0)) == (
        "ManifoldEmbedding(2, 4, padding_idx=0, manifold=3)"
    )


# Batch norm.

BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_with_one_region_it_is_batch_norm(axes: int, momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = BATCH[axes](3, momentum=momentum).double()
    layer = ManifoldNorm(plain, CIRCLE, batch_norm="regions", regions=1)
    for step in range(3):
        x = (images(B, 3, *[4] * axes) + step).requires_grad_()
        y, expected = layer(x, CONTEXTS, index=INDEX), plain(x)
        close(y, expected)
        weights = torch.randn_like(x)
        for f in (y, expected):
            (f * weights).sum().backward()
        close(layer.weight.grad[0], plain.weight.grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(layer.norm, name)[0], getattr(plain, name))
    x = images(B, 3, *[4] * axes)
    close(layer.eval()(x, CONTEXTS, index=INDEX), plain.eval()(x))
    if axes == 1:
        close(layer(x[..., 0], CONTEXTS[0]), plain(x[..., 0]))
        close(layer.train()(x[..., 0], CONTEXTS[0]), plain.train()(x[..., 0]))


def test_every_region_is_normalised_by_itself() -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(3, momentum=0.5, affine=False).double()
    layer = ManifoldNorm(plain, CIRCLE, batch_norm="regions", regions=4)
    assert layer.weight is None
    context = torch.tensor([0.01, 0.26, 0.24, 0.49, 0.9, 0.1], dtype=DOUBLE)
    region = torch.tensor([0, 1, 0, 1, 3, 0])
    assert torch.equal(layer.norm.region(CIRCLE.coeffs(context)), region)
    x = images(6, 3)
    y = layer(x, context)
    for r in (0, 1):
        close(y[region == r], F.batch_norm(x[region == r], None, None, training=True))
    close(y[4], x[4] / (1 + 1e-5) ** 0.5)  # alone: by the running statistics
    assert layer.norm.num_batches_tracked.tolist() == [1, 1, 0, 0]
    close(layer.norm.running_mean[0], 0.5 * x[region == 0].mean(0))
    close(layer.norm.running_var[1], 0.5 + 0.5 * x[region == 1].var(0))
    close(layer.norm.running_mean[2:], torch.zeros(2, 3, dtype=DOUBLE))
    layer.eval()
    mean, var = layer.norm.running_mean[region], layer.norm.running_var[region]
    close(layer(x, context), (x - mean) / (var + 1e-5).sqrt())
    sliced = layer.ordinary(lambda p: p, CIRCLE.coeffs(context[1]))
    assert type(sliced) is nn.BatchNorm1d
    close(sliced(x), layer(x, context[1]))
    assert torch.autograd.gradcheck(
        lambda x: copy.deepcopy(layer).train()(x, context), (x.requires_grad_(),)
    )


def test_regions_divide_every_domain() -> None:
    for manifold, count in (
        (Line(), 5),
        (BSpline(7, ring=True), 5),
        (Torus(), 25),
        (Simplex(3), 25),
    ):
        layer = ManifoldNorm(nn.BatchNorm2d(2), manifold, batch_norm="regions", regions=5)
        contexts = manifold.sample(4000, stratified=True, dtype=DOUBLE)
        found = layer.norm.region(manifold.coeffs(contexts))
        assert len(found.unique()) == count
        if count == 5:
            parts = (contexts * 5).floor().clamp(0, 4).long()
            assert (found == parts).double().mean() > 0.97
        centers = manifold.coeffs(manifold.grid(5))
        assert torch.equal(layer.norm.region(centers), torch.arange(count))


def test_batch_statistics_are_kept_by_nobody() -> None:
    layer = ManifoldNorm(nn.BatchNorm2d(3).double(), CIRCLE, batch_norm="batch")
    x = images(B, 3, 4, 4)
    for training in (True, False):
        y = layer.train(training)(x, CONTEXTS[0])
        close(y, F.batch_norm(x, None, None, training=True))
    assert set(layer.state_dict()) == {"weight", "bias"}
    close(layer.ordinary(lambda p: nn.Parameter(p[0].detach()), CONTEXTS[:3])(x), y)
    free = nn.BatchNorm2d(3, track_running_stats=False)
    assert set(ManifoldNorm(free, CIRCLE).state_dict()) == {"weight", "bias"}


# CondConv.

CONDCONV = [
    {"kernel_size": 3, "num_experts": 4},
    {"kernel_size": 3, "num_experts": 3, "bias": True, "stride": 2, "groups": 2},
    {"kernel_size": (3, 5), "dilation": 2, "padding": (2, 1), "bias": True},
    {"kernel_size": 1},
    {"kernel_size": 2, "padding": "same", "bias": True},
]


@pytest.mark.parametrize("options", CONDCONV, ids=str)
def test_condconv_is_a_mixture_of_bases(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = condconv2d()(4, 6, **options).double()
    ours = ManifoldConv2d.from_condconv(theirs)
    x = images(B, 4, 7, 8).requires_grad_()
    routing = torch.sigmoid(images(B, theirs.num_experts)).requires_grad_()
    results = []
    for conv in (theirs, ours):
        y = conv(x, routing)
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=DOUBLE).view(y.shape)).sum()
        grads = torch.autograd.grad(loss, (x, routing, *conv.parameters()))
        results.append((y, *grads))
    for given, expected in zip(*reversed(results), strict=True):
        close(given.reshape(expected.shape), expected)
    state = {name: p.view(getattr(ours, name).shape) for name, p in theirs.state_dict().items()}
    ours.load_state_dict(state)
    close(ours(x, coeffs=routing), results[0][0])


def test_condconv_that_pads_by_its_input_is_refused() -> None:
    with pytest.raises(ValueError, match="from_condconv: module pads by the size of its input"):
        ManifoldConv2d.from_condconv(condconv2d()(4, 6, 3, stride=2, padding="same"))
