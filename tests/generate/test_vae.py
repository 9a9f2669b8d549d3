"""The autoencoder of weights: both forms, chunks, what training does."""

import pytest
import torch
from torch import Tensor

from weightops.generate import WeightVAE

SMALL = {
    "mlp": {"hidden": (32, 16)},
    "convolution": {"form": "convolution", "side": 8, "channels": (8, 8)},
}


def make(form: str, width: int = 30, latent: int = 8, **options: object) -> WeightVAE:
    torch.manual_seed(0)
    return WeightVAE(width, latent, **SMALL[form], **options)


def train(model: WeightVAE, steps: int, x: Tensor, kl: float = 1e-4) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x, kl=kl, generator=generator).backward()
        optimizer.step()


@pytest.mark.parametrize("form", SMALL)
def test_a_trained_autoencoder_gives_back_what_the_mean_does_not_tell(form: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(32, 3) @ torch.randn(3, 30)
    model = make(form)
    train(model, 400, x)
    error = (model.decode(model.encode(x)[0]) - x).abs().mean()
    assert error < 0.3 * (x - x.mean(0)).abs().mean()
    assert model.log_scale.exp() < 1  # the learned scale follows the error


@pytest.mark.parametrize("form", SMALL)
def test_all_chunks_at_once_equal_chunks_one_by_one_and_differ_by_position(form: str) -> None:
    model = make(form, chunks=3)
    x = torch.randn(4, 3, 30)
    mean, log_variance = model.encode(x)
    assert mean.shape == log_variance.shape == (4, 3, 8)
    z = torch.randn(4, 3, 8)
    decoded = model.decode(z)
    assert decoded.shape == x.shape
    for t in range(3):
        chunk = torch.full((4,), t)
        torch.testing.assert_close(model.encode(x[:, t], chunk)[0], mean[:, t])
        torch.testing.assert_close(model.decode(z[:, t], chunk), decoded[:, t])
    other = torch.full((4,), 1)
    assert (model.encode(x[:, 0], other)[0] - mean[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("form", SMALL)
def test_chunks_of_one_value_are_told_apart_by_their_embedding(form: str) -> None:
    model = make(form, chunks=2)
    targets = torch.stack([torch.zeros(30), torch.ones(30)]).expand(8, 2, 30)
    # So much divergence leaves nothing in the latents: what differs comes from the embedding.
    train(model, 300, targets, kl=10.0)
    decoded = model.decode(torch.zeros(1, 2, 8))
    assert (decoded[0, 1] - decoded[0, 0]).mean() > 0.5


def test_latents_draw_near_a_normal_distribution_as_the_divergence_weighs_more() -> None:
    x = torch.randn(64, 30)
    free, bound = make("mlp"), make("mlp")
    train(free, 200, x, kl=0.0)
    train(bound, 200, x, kl=1.0)
    means = [model.encode(x)[0].square().mean() for model in (free, bound)]
    assert means[1] < 0.1 * means[0]


def test_samples_are_of_the_shape_of_networks_and_repeat_with_the_generator() -> None:
    for model, shape in ((make("mlp"), (5, 30)), (make("mlp", chunks=3), (5, 3, 30))):
        first, second = (model.sample(5, torch.Generator().manual_seed(seed)) for seed in (0, 0))
        assert first.shape == shape
        assert torch.equal(first, second)
        assert not torch.equal(first, model.sample(5, torch.Generator().manual_seed(1)))
        assert model.sample(0).shape == (0, *shape[1:])


def test_noise_is_what_the_encoder_sees_not_what_is_to_be_given_back() -> None:
    model = make("mlp")
    x = torch.zeros(16, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # All weights zero: decoded is 0, and so is the error, whatever the encoder saw.
    assert model.loss(x, kl=0, noise=100.0) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, "WeightVAE: width must be at least 1, not 0"),
        ({"latent": 1.5}, TypeError, "WeightVAE: latent must be an integer, not float 1.5"),
        ({"form": "unet"}, ValueError, "form must be one of 'mlp', 'convolution', not 'unet'"),
        ({"hidden": ()}, TypeError, "hidden must be a non-empty list of integers, not tuple"),
        ({"hidden": (4, 0)}, ValueError, r"hidden\[1\] must be at least 1, not 0"),
        ({"chunks": 0}, ValueError, "chunks must be at least 1, not 0"),
        ({"form": "convolution", "side": 12}, ValueError, "side must be a multiple of 8.* not 12"),
        (
            {"form": "convolution", "latent": 6, "side": 16},
            ValueError,
            "latent must be a multiple of 4, the pixels of the smallest image, not 6",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        WeightVAE(**{"width": 30, "latent": 8} | options)


def test_weights_of_another_shape_are_refused() -> None:
    whole, chunked = make("mlp"), make("mlp", chunks=3)
    with pytest.raises(TypeError, match=r"encode: x must be a tensor \[..., 30\], not list"):
        whole.encode([1.0])
    with pytest.raises(ValueError, match=r"encode: x must have shape \[..., 30\], not \[4, 29\]"):
        whole.encode(torch.zeros(4, 29))
    with pytest.raises(ValueError, match=r"decode: z must have shape \[..., 8\], not \[8\]"):
        whole.decode(torch.zeros(8))
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3, 30\] without chunk, not"):
        chunked.encode(torch.zeros(4, 30))
    with pytest.raises(ValueError, match=r"chunk must have shape \[4\] as x \[4, 30\], not \[3\]"):
        chunked.encode(torch.zeros(4, 30), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk is given, but this autoencoder has no chunks"):
        whole.encode(torch.zeros(4, 30), torch.zeros(4, dtype=torch.int64))
