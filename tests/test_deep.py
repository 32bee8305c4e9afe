"""The nets `course` and `deep`: sizes, BatchNorm's statistics, the published loss, the example."""

import json
import math
from itertools import pairwise

import pyro
import pytest
import torch
from conftest import example, images
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn import functional as F

import pvae
from pvae import closed_form, temper
from pvae.builder import LIKELIHOODS, compose
from pvae.crosscheck import _Draws
from pvae.heads import Normal, NormalFixedScale
from pvae.nets import Affine, CourseDecoder, CourseEncoder, DeepDecoder, DeepEncoder
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal

deep_conv = example("deep_conv")
SIZES = [(3, 64, 64), (3, 32, 32), (1, 28, 20), (1, 28, 28), (2, 5, 7), (1, 33, 1)]


def count(module):
    return sum(p.numel() for p in module.parameters())


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def statistics(module):
    return [
        t.clone()
        for m in batch_norms(module)
        for t in (m.running_mean, m.running_var, m.num_batches_tracked)
    ]


# ---- the course's CNN ----


def test_the_course_net_goes_in_and_out_of_28x28_exactly():
    encoder, decoder = CourseEncoder((1, 28, 28), (40,)), CourseDecoder((20,), (1, 28, 28))
    sizes = []
    for net, start in ((encoder, torch.zeros(2, 1, 28, 28)), (decoder, torch.zeros(2, 20))):
        hooks = [
            m.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
            for m in net.modules()
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
        ]
        net(start)
        assert len(hooks) == 3
    assert sizes == [(32, 13, 13), (64, 6, 6), (128, 2, 2), (64, 5, 5), (32, 13, 13), (1, 28, 28)]


@pytest.mark.parametrize(("channels", "latent"), [(1, 20), (3, 50)])
def test_parameters_of_the_course_net(channels, latent):
    """The numbers of weights and biases are the published ones, layer by layer."""
    encoder = (
        (channels * 4 * 4 * 32 + 32)
        + (32 * 4 * 4 * 64 + 64)
        + (64 * 4 * 4 * 128 + 128)
        + 2 * (512 * latent + latent)  # two heads, loc and log-scale
    )
    decoder = (
        (latent * 512 + 512)
        + (512 * 5 * 5 * 64 + 64)
        + (64 * 5 * 5 * 32 + 32)
        + (32 * 4 * 4 * channels + channels)
    )
    vae = pvae.build((channels, 28, 28), latent, "course", guide="normal_log_scale")
    assert count(vae.guide) == encoder
    assert count(vae.model) == decoder


def test_the_course_net_is_relu_by_default_and_takes_another_activation():
    for make in (CourseEncoder, CourseDecoder):
        ends = ((1, 28, 28), (4,)) if make is CourseEncoder else ((2,), (1, 28, 28))
        assert sum(isinstance(m, nn.ReLU) for m in make(*ends).modules()) == 3
        assert sum(isinstance(m, nn.Tanh) for m in make(*ends, nn.Tanh).modules()) == 3


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 20), (1, 14, 28)])
def test_the_course_net_refuses_other_sizes_at_construction(shape):
    height, width = shape[1:]
    message = rf"takes 28x28 images alone, not {height}x{width}: .* 1 -> 5 -> 13 -> 28"
    with pytest.raises(ValueError, match=rf"image_shape is .*{message}"):
        CourseEncoder(shape, (4,))
    with pytest.raises(ValueError, match=rf"out_shape is .*{message}"):
        CourseDecoder((2,), shape)
    with pytest.raises(ValueError, match=message):
        pvae.build(shape, 2, "course")


# ---- the deep net ----


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("widths", [(3,), (4, 6, 5)])
def test_the_deep_net_takes_any_size(shape, widths):
    encoder, decoder = DeepEncoder(shape, (6,), widths), DeepDecoder((6,), shape, widths)
    x = torch.rand(4, *shape)
    assert encoder(x).shape == (4, 6)
    assert decoder(torch.randn(4, 6)).shape == x.shape


@pytest.mark.parametrize("shape", SIZES[:4])
def test_a_deep_pair_reconstructs_and_samples(shape):
    vae = pvae.build(shape, 5, "deep", "gaussian", activation="leaky_relu")
    x = torch.rand(3, *shape)
    assert SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO()).step(x) > 0
    assert vae.reconstruct(x).shape == x.shape
    assert vae.sample(2).shape == (2, *shape)


def test_the_deep_net_halves_and_mirrors():
    decoder = DeepDecoder((128,), (3, 64, 64))
    shapes = [tuple(m.weight.shape) for m in decoder.modules() if hasattr(m, "kernel_size")]
    widths = [512, 256, 128, 64, 32, 32]
    assert shapes == [*((a, b, 3, 3) for a, b in pairwise(widths)), (3, 32, 3, 3)]
    assert len(batch_norms(decoder)) == len(batch_norms(DeepEncoder((3, 64, 64), (256,)))) == 5
    assert sum(isinstance(m, nn.LeakyReLU) for m in decoder.modules()) == 5


def test_parameters_of_the_deep_net():
    """At 64x64 RGB and 128 latents, weights and biases are the published ones, layer by layer."""

    def layer(a, b):  # 3x3, with its BatchNorm
        return (a * 9 * b + b) + 2 * b

    down = sum(layer(a, b) for a, b in [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)])
    up = sum(layer(a, b) for a, b in [(512, 256), (256, 128), (128, 64), (64, 32), (32, 32)])
    heads = 2 * (512 * 4 * 128 + 128)
    assert count(DeepEncoder((3, 64, 64), (256,))) == down + heads
    last = 32 * 9 * 3 + 3
    assert count(DeepDecoder((128,), (3, 64, 64))) == (128 * 2048 + 2048) + up + last


@pytest.mark.parametrize("widths", [(), (4, 0)])
def test_bad_widths_are_refused(widths):
    for make in (
        lambda: DeepEncoder((1, 8, 8), (2,), widths),
        lambda: DeepDecoder((2,), (1, 8, 8), widths),
    ):
        with pytest.raises(ValueError, match=r"widths must be .* not \("):
            make()


def test_the_output_bias_of_deep_and_course():
    for net in (DeepDecoder((2,), (3, 28, 28), (4,)), CourseDecoder((2,), (3, 28, 28))):
        raw = torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(3, 28, 28)
        net.set_output_bias(raw)
        torch.testing.assert_close(net.out.bias.detach(), torch.tensor([0.1, 0.2, 0.3]))


# ---- BatchNorm ----


def small(shape=(3, 12, 10), likelihood="gaussian"):
    """Returns a small deep pair composed by hand, for images in [0, 1]."""
    z_head, x_head = Normal((3,)), LIKELIHOODS[likelihood].head(shape)
    posterior = pvae.Conditional(DeepEncoder(shape, (6,), (4, 5)), z_head, event_dim=3)
    decoder = DeepDecoder((3,), x_head.param_shape, (4, 5))
    model = pvae.Model(StandardNormal(3), pvae.Conditional(decoder, x_head, event_dim=1))
    return pvae.VAE(model, pvae.Guide(posterior))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("particles", [1, 3])
def test_a_step_of_svi_moves_each_statistic_once_and_rightly(objective, particles):
    """A step updates each BatchNorm once, by its momentum, with the batch's mean and variance."""
    vae, x = small(), images("gaussian", (3, 12, 10)).float()
    if particles > 1 and not OBJECTIVES[objective].elbo(particles).vectorize_particles:
        pytest.skip("runs the pair once a particle")
    seen = {}
    for m in batch_norms(vae):
        m.register_forward_hook(lambda m, inputs, output: seen.setdefault(m, inputs[0].detach()))
    elbo = OBJECTIVES[objective].elbo(particles)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x)
    assert [*seen] == [*batch_norms(vae.guide), *batch_norms(vae.model)]
    for m, v in seen.items():
        assert m.num_batches_tracked == 1
        torch.testing.assert_close(m.running_mean, 0.1 * v.mean((0, 2, 3)))
        torch.testing.assert_close(m.running_var, 0.9 + 0.1 * v.var((0, 2, 3)))


def test_images_are_shown_in_eval_mode_and_change_nothing():
    vae, x = small(), torch.rand(6, 3, 12, 10)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    before = statistics(vae)
    vae.check(x)
    vae.sample(4)
    vae.interpolate(x[:2], x[2:4])
    shown = vae.reconstruct(x)
    assert vae.training
    assert all(m.training for m in vae.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(vae), strict=True))
    # in eval mode a reconstruction does not depend on the other images of the batch
    torch.testing.assert_close(vae.reconstruct(x[:1]), shown[:1])
    # by hand: a BatchNorm layer normalizes by its running statistics
    vae.eval()
    conv, norm = vae.guide.posterior.net.layers[:2]
    v = conv(x)
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    by_hand = (v - mean) / (var + norm.eps).sqrt() * weight + bias
    torch.testing.assert_close(norm(v), by_hand)


def test_statistics_go_through_save_and_load(tmp_path):
    vae = pvae.build((1, 12, 10), 3, "deep", "gaussian")
    x = torch.rand(6, 1, 12, 10)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    pvae.save(vae, tmp_path / "v.pt")
    again = pvae.load(tmp_path / "v.pt")
    assert not again.training
    pairs = zip(statistics(vae), statistics(again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(m.num_batches_tracked == 3 for m in batch_norms(again))
    assert torch.equal(vae.reconstruct(x), again.reconstruct(x))
    # a new pair without the saved statistics gives other images
    fresh = compose(vae.recipe)
    fresh.load_state_dict(dict(vae.named_parameters()), strict=False)
    assert not torch.allclose(fresh.reconstruct(x), again.reconstruct(x), atol=1e-3)


# ---- the published loss ----


def published(x, t, mu, log_var, weight):
    """Returns the loss as the published code computes it, for images x and t in [-1, 1]."""
    kl = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
    return F.mse_loss(t, x) + weight * kl


SHAPE, WEIGHT = (3, 12, 10), 6 / 50
ELEMENTS = math.prod(SHAPE)
UNTEMPERED = math.sqrt(WEIGHT * ELEMENTS / 2)


def deep_pair(scale):
    """Returns a float64 pair for images in [0, 1] whose networks work in [-1, 1]."""
    encoder = nn.Sequential(Affine(2, -1), DeepEncoder(SHAPE, (6,), (4, 5)))
    tanh = nn.Sequential(DeepDecoder((3,), SHAPE, (4, 5)), nn.Tanh())
    head = NormalFixedScale(SHAPE, scale=scale / 2)
    decoder = pvae.Conditional(nn.Sequential(tanh, Affine(0.5, 0.5)), head, event_dim=1)
    model = pvae.Model(StandardNormal(3), decoder)
    guide = pvae.Guide(pvae.Conditional(encoder, Normal((3,)), event_dim=3))
    vae = pvae.VAE(model, guide).double()
    with torch.no_grad():  # away from the start, where the KL is nearly 0
        encoder[-1].layers[-1].weight.mul_(4)
    return vae, encoder[-1], tanh


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [0.3, 1.0, UNTEMPERED])
def test_the_published_loss_is_a_tempered_elbo_and_so_are_its_gradients(scale, training):
    """SVI's loss is D / (2 s^2) times the published one, plus D log(s sqrt(2 pi) / 2) per image."""
    vae, encoder, tanh = deep_pair(scale)
    vae.train(training)
    x = images("gaussian", SHAPE)
    beta = deep_conv.tempered(WEIGHT, ELEMENTS, scale)
    with temper(beta), _Draws() as draws:
        loss = TraceMeanField_ELBO().loss_and_grads(vae.model, vae.guide, x)
    ours = {name: p.grad for name, p in vae.named_parameters()}
    vae.zero_grad(set_to_none=True)

    mu, log_var = encoder(2 * x - 1).chunk(2, dim=1)
    noise = ((draws.values["z"][0] - mu) / (log_var / 2).exp()).detach()
    theirs = published(2 * x - 1, tanh(mu + (log_var / 2).exp() * noise), mu, log_var, WEIGHT)
    theirs.backward()
    factor = len(x) * ELEMENTS / (2 * scale**2)
    constant = len(x) * ELEMENTS * math.log(scale / 2 * math.sqrt(2 * math.pi))
    by_hand = factor * theirs.item() + constant
    assert abs(loss - by_hand) <= 1e-10 * abs(by_hand)
    total = sum(p.grad.norm() ** 2 for p in vae.parameters()) ** 0.5
    assert total > 0
    for name, p in vae.named_parameters():
        # relative to all gradients, for that of a bias before a BatchNorm in train mode is 0
        assert (ours[name] - factor * p.grad).norm() <= 1e-10 * factor * total, name


def test_it_is_the_elbo_itself_at_one_scale_alone():
    assert deep_conv.untempered(WEIGHT, ELEMENTS) == pytest.approx(UNTEMPERED, rel=1e-15)
    assert deep_conv.tempered(WEIGHT, ELEMENTS, UNTEMPERED) == pytest.approx(1.0, rel=1e-15)
    # by autograd: at any scale, the gradient by the KL is w times the gradient by the error
    for scale in (0.3, 1.0, 7.0):
        error, kl = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        beta = deep_conv.tempered(WEIGHT, ELEMENTS, scale)
        nats = ELEMENTS * error / (2 * scale**2) + beta * kl
        of_error, of_kl = torch.autograd.grad(nats, (error, kl))
        assert (of_kl / of_error).item() == pytest.approx(WEIGHT, rel=1e-12)


@pytest.mark.parametrize("weight", ["0", "-1", "nan"])
def test_without_a_kl_there_is_no_such_scale(weight, capsys):
    with pytest.raises(SystemExit):
        deep_conv.main(["--kl-weight", weight])
    assert f"--kl-weight must be above 0 and finite, not {weight}" in capsys.readouterr().err


def test_the_loss_of_each_image_averages_to_the_published_loss():
    x, t = torch.rand(2, 5, *SHAPE, dtype=torch.float64)
    mu, log_var = torch.randn(2, 5, 3, dtype=torch.float64)
    ours = deep_conv.published(x, t, closed_form.kl_normal(mu, log_var / 2), WEIGHT)
    assert ours.shape == (5,)
    torch.testing.assert_close(
        ours.mean(), published(x, t, mu, log_var, WEIGHT), rtol=1e-12, atol=0
    )


# ---- the example ----


@pytest.mark.slow
def test_the_example_briefly(tmp_path, capsys):
    folder = tmp_path / "r"
    argv = ["--dataset", "digits", "-n", "1", "--widths", "4", "6", "--latent-dim", "3"]
    deep_conv.main([*argv, "-b", "256", "--out", str(folder)])
    assert "loss from the tempered ELBO" in capsys.readouterr().out
    assert {"samples.png", "reconstructions.png", "curves.png", "best.pt"} <= {
        path.name for path in folder.iterdir()
    }
    numbers = json.loads((folder / "results.json").read_text())
    first, second, best = numbers["readings"]
    assert first["beta"] == pytest.approx(1.0)
    for reading in (first, second, best):  # computed in float32
        assert reading["loss_from_elbo"] == pytest.approx(numbers["published_loss"], rel=1e-4)
    assert best["elbo"] > max(first["elbo"], second["elbo"])
    with pytest.raises(ValueError, match="holds no recipe: its VAE was composed by hand"):
        pvae.load(folder)
