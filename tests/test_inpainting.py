"""Missing pixels: only seen pixels count, shown by brute force; a short run of the example."""

import importlib.util
import itertools
import json
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from conftest import SHAPES, images
from pyro.infer import Trace_ELBO
from torch import nn

import pvae
from pvae import Conditional, Guide, Model, checkpoint
from pvae.builder import LIKELIHOODS
from pvae.conditional import Masked, concat_mask
from pvae.data import load, observe
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.priors import StandardNormal

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inpainting = example("inpainting")


def masked_pair(likelihood, shape):
    head, z_head = LIKELIHOODS[likelihood].head(shape), Normal((2,))
    decoder = Conditional(MLP((2,), head.param_shape, (8,)), head, event_dim=1)
    encoder = MLP((shape[0] + 1, *shape[1:]), z_head.param_shape, (8,))
    posterior = Conditional(encoder, z_head, event_dim=3, join=concat_mask)
    return pvae.VAE(Model(StandardNormal(2), Masked(decoder)), Guide(posterior)).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("each_channel", [False, True])
def test_the_density_is_the_sum_over_seen_pixels(likelihood, shape, each_channel):
    """The sum by hand takes each seen pixel's density from the unmasked distribution."""
    vae = masked_pair(likelihood, shape)
    x = images(likelihood, shape, 3)
    mask = torch.rand(3, shape[0] if each_channel else 1, *shape[1:]) > 0.4
    z = torch.randn(2, 3, 2, dtype=torch.float64)  # a particle dimension on the left
    pixels = vae.model.likelihood.likelihood(z).base_dist.log_prob(x)  # (2, 3, C, H, W)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for k, b, c, i, j in itertools.product(*map(range, pixels.shape)):
        if mask[b, c if each_channel else 0, i, j]:
            expected[k, b] += pixels[k, b, c, i, j].detach()
    torch.testing.assert_close(vae.decode(z, mask).log_prob(x).detach(), expected)


def test_missing_pixels_are_integrated_out():
    """The masked density is the unmasked density summed over all values of the missing pixels."""
    likelihood = Conditional(nn.Linear(2, 6), Bernoulli((6,)), event_dim=1).double()
    z, x = torch.randn(4, 2).double(), (torch.rand(4, 6) > 0.5).double()
    mask = torch.tensor([True, False, True, True, False, False])
    total = 0
    for values in itertools.product([0.0, 1.0], repeat=3):
        filled = x.clone()
        filled[:, ~mask] = torch.tensor(values, dtype=torch.float64)
        total = total + likelihood(z).log_prob(filled).exp()
    torch.testing.assert_close(Masked(likelihood)(z, mask).log_prob(x), total.log())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_is_missing_counts_for_nothing(likelihood, shape):
    """The loss and all gradients have the same bits for any values of the missing pixels."""
    vae = masked_pair(likelihood, shape)
    x, other = images(likelihood, shape), images(likelihood, shape)
    mask = torch.rand(len(x), 1, *shape[1:]) > 0.5

    def loss_and_gradients(x):
        torch.manual_seed(1)
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x, mask)
        return [loss, *torch.autograd.grad(loss, list(vae.parameters()))]

    first = loss_and_gradients(x)
    again = loss_and_gradients(x.where(mask, other))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    seen_changed = loss_and_gradients(x.where(~mask, other))
    assert not torch.equal(first[0], seen_changed[0])


def test_the_encoder_never_sees_what_is_missing():
    x = torch.rand(2, 3, 4, 5)
    mask = torch.rand(2, 1, 4, 5) > 0.5
    joined = concat_mask(x.masked_fill(~mask, torch.nan), mask)
    assert torch.equal(joined, torch.cat([x * mask, mask.float()], 1))


def test_with_every_pixel_seen_it_is_the_stock_loss():
    vae = masked_pair("bernoulli", SHAPES[0])
    x = images("bernoulli", SHAPES[0])
    plain = Model(StandardNormal(2), vae.model.likelihood.likelihood).double()
    mask = torch.ones(len(x), 1, *SHAPES[0][1:], dtype=torch.bool)
    losses = []
    for program, y in ((vae.model, mask), (lambda x, y: plain(x), mask)):
        torch.manual_seed(1)
        losses.append(Trace_ELBO().loss(program, vae.guide, x, y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


class Joint(nn.Module):
    """A likelihood whose pixels are not independent."""

    def forward(self, z):
        return dist.MultivariateNormal(z, torch.eye(2))


@pytest.mark.parametrize(
    ("likelihood", "mask", "message"),
    [
        (Joint(), torch.ones(2, dtype=torch.bool), "MultivariateNormal"),
        (Joint(), torch.ones(2), "boolean"),
    ],
)
def test_what_cannot_be_masked_is_refused(likelihood, mask, message):
    with pytest.raises(ValueError, match=message):
        Masked(likelihood)(torch.zeros(3, 2), mask)


@pytest.mark.parametrize("name", inpainting.WAYS)
def test_as_much_is_missing_as_is_said(name):
    """The missing share is right within 5 standard errors; for "a half" it is exactly 0.5."""
    mask = inpainting.WAYS[name](torch.zeros(200, 3, 10, 8))
    assert mask.shape == (200, 1, 10, 8)
    share = {"nothing": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "a half": 0.5}[name]
    se = 0.0 if name == "a half" else (share * (1 - share) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean() - share) <= 5 * se


def test_a_mask_travels_as_a_mask():
    """Masks change neither images nor labels, and a pair that takes y gets the mask as y."""
    digits = observe(load("digits"), "dynamic")
    masked = inpainting.with_masks(digits, inpainting.a_half)
    for name in ("train", "validation", "test"):
        before, after = getattr(digits, name), getattr(masked, name)
        assert torch.equal(after.images, before.images)
        assert torch.equal(after.labels, before.labels)
        assert after.y is after.mask
        assert after.mask.shape == before.images.shape
    assert inpainting.masked_vae(torch.rand(1, 8, 8), 2).takes_y


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpainting") / "r"
    argv = ["--dataset", "digits", "-n", "1", "-b", "512", "--quiet", "--out", str(folder)]
    inpainting.main(argv)
    return folder


def test_the_example(finished):
    numbers = json.loads((finished / "results.json").read_text())
    assert numbers["nothing"]["missing_per_pixel"] is None
    assert numbers["75 %"]["seen_elbo"] > numbers["75 %"]["complete_elbo"]
    assert (finished / "inpainting.png").stat().st_size > 10_000


def test_a_pair_composed_by_hand_is_restored(finished):
    """`pvae.load` says that it has no recipe; with its state restored it repeats the numbers."""
    with pytest.raises(ValueError, match="composed by hand"):
        pvae.load(finished / "a_half")
    digits = load("digits")
    vae = inpainting.masked_vae(digits.mean_image, 16)
    checkpoint.restore(vae, checkpoint.read(finished / "a_half" / "best.pt")["model"])
    torch.manual_seed(0)  # as in the run, masks are drawn first
    masked = inpainting.with_masks(observe(digits, "dynamic"), inpainting.a_half)
    again = inpainting.measured(vae, masked.test, 0)
    numbers = json.loads((finished / "results.json").read_text())["a half"]
    assert again == pytest.approx(numbers, rel=1e-5)
