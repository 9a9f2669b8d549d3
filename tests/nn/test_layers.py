"""What each layer computes, on its own."""

import torch

from weightops import WeightSpec, testing
from weightops.nn import (
    EquivariantDropout,
    EquivariantNorm,
    Featurize,
    InvariantPool,
    PositionalEncoding,
)

DOUBLE = torch.float64
MLP = testing.mlp_spec(6, 5, 4, 3)
RNN = testing.rnn_spec(3, 4, 2)
CNN = WeightSpec(
    {
        "conv.weight": ("c2", "c1", None, None),
        "conv.bias": ("c2",),
        "fc.weight": (None, ("c2", None)),
    },
    {"conv.weight": (4, 5, 3, 3), "conv.bias": (4,), "fc.weight": (6, 16)},
)


def test_the_pool_is_every_mean_of_a_tensor_and_of_its_diagonals(
    generator: torch.Generator,
) -> None:
    pool = InvariantPool(RNN)
    x = torch.randn(2, RNN.numel, 3, generator=generator, dtype=DOUBLE)
    views = RNN.unflatten(x.movedim(2, 0))
    expected = {str(term): term.input for term in pool.plan.terms}
    assert len(expected) == pool.num_readers == 6
    y = pool(x).unflatten(1, (6, 3))
    for r, (text, name) in enumerate(expected.items()):
        view = views[name]
        whole = view.diagonal(0, -2, -1) if "[aa]" in text else view
        torch.testing.assert_close(y[:, r], whole.flatten(2).mean(-1).T)
    assert pool(x[:0]).shape == (0, 18)
    index = InvariantPool(MLP, fixed="index")
    assert index.num_readers == 6 + 1 + 1 + 1 + 3 + 3
    torch.autograd.gradcheck(pool, (x.requires_grad_(),))


def test_positions_along_fixed_axes_are_told_apart() -> None:
    for kind in ("learned", "sinusoidal"):
        encoding = PositionalEncoding(CNN, 8, kind).encoding()
        assert encoding.shape == (CNN.numel, 8)
        views = CNN.unflatten(encoding.T)
        assert not views["conv.bias"].any()
        kernel = views["conv.weight"]
        assert (kernel == kernel[:, :1, :1]).all()  # permutable axes have no position
        assert len({tuple(tap) for tap in kernel[:, 0, 0].flatten(1).T.tolist()}) == 9
        fc = views["fc.weight"].unflatten(2, (4, 4))  # [C, classes, channel, pixel]
        assert (fc == fc[:, :, :1]).all()
        assert len({tuple(e) for e in fc[:, :, 0].flatten(1).T.tolist()}) == 6 * 4
        x = torch.zeros(2, CNN.numel, 8)
        assert torch.equal(PositionalEncoding(CNN, 8, "sinusoidal")(x)[1], encoding) or (
            kind == "learned"
        )


def test_norm_makes_tensors_of_mean_0_and_variance_1(generator: torch.Generator) -> None:
    x = 5 + 3 * torch.randn(2, RNN.numel, 3, generator=generator)
    for view in RNN.unflatten(EquivariantNorm(RNN, 3)(x).movedim(2, 1)).values():
        view = view.flatten(1)
        torch.testing.assert_close(view.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(view.var(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    half = EquivariantNorm(RNN, 3, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        kept = x.clone()
        assert half.forward_(x.bfloat16()).dtype == torch.bfloat16
        expected = EquivariantNorm(RNN, 3)(x)
        assert EquivariantNorm(RNN, 3).forward_(kept) is kept
        torch.testing.assert_close(kept, expected)


def test_dropout_drops_channels_of_a_sample() -> None:
    torch.manual_seed(0)
    x = torch.ones(50, 7, 20)
    layer = EquivariantDropout(0.25)
    y = layer(x)
    assert (y == y[:, :1]).all()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 0.2 < (y == 0).float().mean() < 0.3
    assert layer.eval()(x) is x


def test_featurize_divides_by_the_rms_of_a_tensor(generator: torch.Generator) -> None:
    x = torch.randn(2, MLP.numel, 2, generator=generator)
    x[:, MLP.offsets["fc2.bias"] : MLP.offsets["fc3.weight"]] = 0
    for name, view in MLP.unflatten(Featurize(MLP, 2)(1e-3 * x).movedim(2, 1)).items():
        rms = view.flatten(2).square().mean(-1).sqrt()
        expected = torch.full_like(rms, name != "fc2.bias")
        torch.testing.assert_close(rms, expected, atol=1e-4, rtol=0)
    gaussian = Featurize(MLP, 2, normalize="none", embedding="gaussian", size=3)
    y = gaussian(x)
    assert y.shape[2] == gaussian.out_channels == 2 + 6
    assert torch.equal(y[..., :2], x)
    torch.testing.assert_close(y[..., 2:5].square() + y[..., 5:].square(), torch.ones(2, 74, 3))
    half = Featurize(MLP, 2, embedding="sinusoidal", size=2)(x.half() * 1e-4)
    assert half.shape[2] == 2 + 8
    assert half.isfinite().all()
