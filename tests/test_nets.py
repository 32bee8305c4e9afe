"""Nets: any image size, published numbers of parameters, errors that name both sizes."""

import pyro
import pytest
import torch
from conftest import images, tiny
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pvae import SingleOptimizer, build, captured
from pvae.nets import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    CourseDecoder,
    CourseEncoder,
    DeepDecoder,
    DeepEncoder,
    GatedMLP,
    ResNetDecoder,
    ResNetEncoder,
)

SIZES = [(1, 28, 28), (3, 32, 32), (3, 28, 20), (1, 1, 1), (2, 5, 7), (1, 9, 64)]


@pytest.mark.parametrize("shape", SIZES)
def test_any_image_size(shape):
    x = torch.rand(2, *shape)
    assert ConvEncoder(shape, (6,), hidden=8)(x).shape == (2, 6)
    assert ConvDecoder((6,), shape)(torch.zeros(2, 6)).shape == x.shape
    assert MLP(shape, (6,), (8,))(x).shape == (2, 6)
    assert MLP((6,), shape, (8, 9))(torch.zeros(2, 6)).shape == x.shape
    assert GatedMLP(shape, (6,), (8, 9))(x).shape == (2, 6)


@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ((4, 4, 4), {}),
        ((2, 4, 4, 8), {"depths": (0, 2, 1, 0), "hidden": 5}),
        ((4, 4, 4), {"gated": True}),
        ((4,), {"depths": (1,)}),
    ],
)
@pytest.mark.parametrize("shape", SIZES)
def test_a_residual_network_takes_any_image_size(shape, widths, options):
    x = torch.rand(2, *shape)
    assert ResNetEncoder(shape, (6,), widths, **options)(x).shape == (2, 6)
    assert ResNetDecoder((6,), shape, widths, **options)(torch.zeros(2, 6)).shape == x.shape


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_a_residual_block_is_its_formula(gated, groups):
    """The block equals its formula, written with torch's functions at the same weights."""
    net = ResNetEncoder((1, 5, 6), (2,), (4,), depths=(1,), groups=groups, gated=gated)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    f, x = nn.functional, torch.randn(3, 1, 5, 6)
    stem, block, *_, linear = net.layers

    def normed(v, norms):
        weights = [norm for norm in norms if isinstance(norm, nn.GroupNorm)]
        v = v if groups is None else f.group_norm(v, groups, weights[0].weight, weights[0].bias)
        return v * v.sigmoid()

    def conv(v, layer):
        return f.conv2d(v, layer.weight, layer.bias, padding=1)

    one, two = [layer for layer in block.layers if isinstance(layer, nn.Conv2d)]
    half = list(block.layers).index(one)
    v = conv(x, stem)
    h = conv(normed(conv(normed(v, block.layers[:half]), one), block.layers[half + 1 :]), two)
    h = h[:, :4] * h[:, 4:].sigmoid() if gated else h
    out = f.linear(normed(v + h, net.layers[2:]).flatten(1), linear.weight, linear.bias)
    torch.testing.assert_close(net(x), out)


def test_a_gated_layer_is_its_formula():
    net, v = GatedMLP((3,), (2,), (4,), nn.Tanh), torch.randn(5, 3)
    gated = net.hidden[0].linear
    w, u = gated.weight.chunk(2)
    b, c = gated.bias.chunk(2)
    h = (v @ w.T + b).tanh() * (v @ u.T + c).sigmoid()
    torch.testing.assert_close(net(v), h @ net.out.weight.T + net.out.bias)


def test_group_norm_leaves_an_image_alone():
    """In train mode an output depends on its own image, not on the others of the batch."""
    net, x = ResNetEncoder((1, 8, 8), (3,), (4, 4, 4)), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(net(x)[:2], net(x[:2]))


@pytest.mark.parametrize(
    ("widths", "depths", "message"),
    [
        ((), (), r"widths must be channels of at least 1, not \(\)"),
        ((4, 0), (1, 1), r"widths must be .*, not \(4, 0\)"),
        ((4, 4), (1,), r"depths must be .* one for each of 2 widths, not \(1,\)"),
        ((4,), (-1,), r"depths must be blocks of at least 0, .*, not \(-1,\)"),
    ],
)
@pytest.mark.parametrize("make", [ResNetEncoder, ResNetDecoder])
def test_sizes_of_a_residual_network_that_are_none(make, widths, depths, message):
    shapes = ((1, 8, 8), (2,)) if make is ResNetEncoder else ((2,), (1, 8, 8))
    with pytest.raises(ValueError, match=message):
        make(*shapes, widths, depths=depths)


@pytest.mark.parametrize("net", ["gated", "resnet"])
def test_a_net_is_captured(net):
    """Five steps by compiled code and by Pyro's handlers end at the same weights."""
    x, pairs = images("bernoulli", (1, 8, 8)).float(), []
    for make in (SVI, captured.SVI):
        torch.manual_seed(0)
        pyro.clear_param_store()
        vae = tiny(net=net)
        adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-3))
        options = {} if make is SVI else {"strict": True, "compiler": captured.as_traced}
        svi = make(vae.model, vae.guide, adam, Trace_ELBO(), **options)
        for _ in range(5):
            svi.step(x)
        pairs.append(vae)
    assert svi.engine == "captured"
    torch.testing.assert_close(pairs[0].state_dict(), pairs[1].state_dict(), rtol=1e-3, atol=1e-5)


def test_parameters_of_the_published_form():
    """Keras' convolutional VAE with 2 latents has 69,076 and 65,089 parameters."""
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


def test_the_gated_mlp_of_the_vamp_prior():
    """It is 784-300-300-2*40 and 40-300-300-784, with two linear maps in each hidden layer."""
    encoder = 2 * (784 * 300 + 300) + 2 * (300 * 300 + 300) + 300 * 80 + 80
    decoder = 2 * (40 * 300 + 300) + 2 * (300 * 300 + 300) + 300 * 784 + 784
    vae = build((1, 28, 28), 40, "gated")
    assert sum(p.numel() for p in vae.parameters()) == encoder + decoder


@pytest.mark.parametrize(
    "make",
    [
        lambda s: ConvDecoder((2,), s),
        lambda s: MLP((2,), s),
        lambda s: GatedMLP((2,), s),
        lambda s: ResNetDecoder((2,), s, (4, 4, 4)),
    ],
)
@pytest.mark.parametrize("shape", SIZES)
def test_output_bias_is_the_output_at_zero_weights(make, shape):
    net = make(shape)
    net.set_output_bias(torch.full(shape, 0.7))
    for name, p in net.named_parameters():
        if "out.bias" not in name:
            p.data.zero_()
    torch.testing.assert_close(net(torch.randn(2, 2)), torch.full((2, *shape), 0.7))


@pytest.mark.parametrize(
    "net",
    [
        ConvEncoder((1, 8, 8), (2,)),
        ConvDecoder((2,), (1, 8, 8)),
        MLP((1, 8, 8), (2,)),
        ResNetEncoder((1, 8, 8), (2,)),
        ResNetDecoder((2,), (1, 8, 8)),
    ],
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
        (GatedMLP((4,), (2,), (3,)), [*weights("hidden.0.", "linear"), *weights("", "out")]),
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
