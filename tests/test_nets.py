"""Nets: any image size, the published sizes, errors with both sizes."""

import pytest
import torch
from torch import nn

from pvae import build
from pvae.nets import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    CourseDecoder,
    CourseEncoder,
    DeepDecoder,
    DeepEncoder,
)

SIZES = [(1, 28, 28), (3, 32, 32), (3, 28, 20), (1, 1, 1), (2, 5, 7), (1, 9, 64)]


@pytest.mark.parametrize("shape", SIZES)
def test_any_image_size(shape):
    x = torch.rand(2, *shape)
    assert ConvEncoder(shape, (6,), hidden=8)(x).shape == (2, 6)
    assert ConvDecoder((6,), shape)(torch.zeros(2, 6)).shape == x.shape
    assert MLP(shape, (6,), (8,))(x).shape == (2, 6)
    assert MLP((6,), shape, (8, 9))(torch.zeros(2, 6)).shape == x.shape


def test_parameters_of_the_published_form():
    """Keras' convolutional VAE, latent 2: encoder 69,076 and decoder 65,089 parameters."""
    encoder = ConvEncoder((1, 28, 28), (4,), hidden=16, activation=nn.ReLU)
    decoder = ConvDecoder((2,), (1, 28, 28), activation=nn.ReLU)
    # Keras: conv 320 + 18,496, dense 50,192, two dense heads 2 * 34
    assert sum(p.numel() for p in encoder.parameters()) == 320 + 18_496 + 50_192 + 68
    # Keras: dense 9,408, transposed convolutions 36,928 + 18,464 + 289
    assert sum(p.numel() for p in decoder.parameters()) == 9_408 + 36_928 + 18_464 + 289


def test_the_classic_mlp():
    vae = build((1, 28, 28), 20, net="mlp", hidden=400)
    expected = (784 * 400 + 400 + 400 * 40 + 40) + (20 * 400 + 400 + 400 * 784 + 784)
    assert sum(p.numel() for p in vae.parameters()) == expected


@pytest.mark.parametrize("make", [lambda s: ConvDecoder((2,), s), lambda s: MLP((2,), s)])
@pytest.mark.parametrize("shape", SIZES)
def test_output_bias_is_the_output_at_zero_weights(make, shape):
    net = make(shape)
    net.set_output_bias(torch.full(shape, 0.7))
    for name, p in net.named_parameters():
        if "out.bias" not in name:
            p.data.zero_()
    torch.testing.assert_close(net(torch.randn(2, 2)), torch.full((2, *shape), 0.7))


@pytest.mark.parametrize(
    "net", [ConvEncoder((1, 8, 8), (2,)), ConvDecoder((2,), (1, 8, 8)), MLP((1, 8, 8), (2,))]
)
def test_wrong_input_is_refused_with_both_sizes(net):
    with pytest.raises(
        ValueError, match=r"built for inputs of shape \(.*\) each, .*given \(3, 9, 9\)"
    ):
        net(torch.zeros(4, 3, 9, 9))


@pytest.mark.parametrize("shape", [(28, 28), (1, 0, 28), (1, 28, 28, 1)])
@pytest.mark.parametrize("make", [lambda s: ConvEncoder(s, (2,)), lambda s: ConvDecoder((2,), s)])
def test_wrong_image_shapes_are_refused(make, shape):
    with pytest.raises(ValueError, match=r"must be \(channels, height, width\)"):
        make(shape)


def weights(prefix, *layers):
    return [f"{prefix}{i}.{kind}" for i in layers for kind in ("weight", "bias")]


def batch_norm(i):
    running = [f"layers.{i}.{kind}" for kind in ("running_mean", "running_var")]
    return [*weights("layers.", i), *running, f"layers.{i}.num_batches_tracked"]


@pytest.mark.parametrize(
    ("net", "keys"),
    [
        (MLP((4,), (2,), (3, 3)), weights("hidden.", 0, 2) + weights("", "out")),
        (ConvEncoder((1, 28, 28), (4,)), weights("layers.", 0, 2, 5, 7)),
        (ConvDecoder((2,), (1, 28, 28)), weights("layers.", 0, 3, 5) + weights("", "out")),
        (CourseEncoder((1, 28, 28), (4,)), weights("layers.", 0, 2, 4, 7)),
        (CourseDecoder((2,), (1, 28, 28)), weights("layers.", 0, 3, 5) + weights("", "out")),
        (
            DeepEncoder((1, 28, 28), (4,), (8,)),
            weights("layers.", 0) + batch_norm(1) + weights("layers.", 4),
        ),
        (
            DeepDecoder((2,), (1, 28, 28), (8,)),
            weights("layers.", 0, 2) + batch_norm(3) + weights("", "out"),
        ),
    ],
)
def test_the_names_of_parameters_stay_so_that_checkpoints_load(net, keys):
    assert list(net.state_dict()) == keys
