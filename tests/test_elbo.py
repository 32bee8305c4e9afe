"""Pyro's objectives equal the hand-written ELBO, for every likelihood and guide."""

import pyro
import pytest
import torch
from conftest import BY_HAND, CLOSED, PAIRS, SHAPES, images, tiny
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

import pvae
from pvae import temper
from pvae.crosscheck import _Draws, by_hand
from pvae.objectives import OBJECTIVES


def pyro_loss_and_noise(vae, x, elbo, beta):
    """Returns Pyro's loss and the standard noise of the guide's draws; sets the gradients."""
    vae.zero_grad(set_to_none=True)
    with temper(beta), _Draws() as draws:
        loss = elbo.loss_and_grads(vae.model, vae.guide, x)
    z = draws.stacked()["z"].detach()
    q = vae.encode(x).base_dist
    return loss, ((z - q.loc) / q.scale).detach().reshape(-1, *q.loc.shape)


def gradients(vae):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in vae.named_parameters()
    }


def assert_same(vae, loss, expected, tolerance):
    ours = gradients(vae)
    vae.zero_grad(set_to_none=True)
    expected.backward()
    assert abs(loss - expected.item()) <= tolerance * abs(expected.item())
    for name, gradient in gradients(vae).items():
        difference = (gradient - ours[name]).norm()
        assert difference <= tolerance * gradient.norm() + tolerance * 1e-3, name


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_mean_field_elbo_is_the_closed_form(likelihood, guide, shape, beta):
    vae, x = tiny(likelihood, guide, shape).double(), images(likelihood, shape)
    loss, noise = pyro_loss_and_noise(vae, x, TraceMeanField_ELBO(), beta)
    expected = -vae.oracle.terms(x, noise=noise[0]).elbo(beta).sum()
    assert_same(vae, loss, expected, 1e-10)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_trace_elbo_is_the_sampled_form(likelihood, guide, shape, beta):
    vae, x = tiny(likelihood, guide, shape).double(), images(likelihood, shape)
    loss, noise = pyro_loss_and_noise(vae, x, Trace_ELBO(), beta)
    expected = -vae.oracle.terms(x, noise=noise[0]).elbo_sampled(beta).sum()
    assert_same(vae, loss, expected, 1e-10)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_in_float32(likelihood, guide, elbo):
    vae, x = tiny(likelihood, guide), images(likelihood, (1, 8, 8)).float()
    loss, noise = pyro_loss_and_noise(vae, x, elbo(), 1.0)
    terms = vae.oracle.terms(x, noise=noise[0])
    expected = -(terms.elbo() if elbo is TraceMeanField_ELBO else terms.elbo_sampled()).sum()
    assert_same(vae, loss, expected, 1e-5)


@pytest.mark.parametrize("guide", CLOSED)
def test_sampled_and_analytic_kl_agree_in_expectation(guide):
    """The mean difference of the KLs over 20,000 draws is 0 within 4 standard errors.

    The reconstruction is the same in both objectives, so they then agree in expectation.
    """
    vae, x = tiny(guide=guide, net="mlp").double(), images("bernoulli", (1, 8, 8))
    noise = torch.randn(20_000 // len(x), len(x), 3, dtype=torch.float64)
    with torch.no_grad():
        terms = vae.oracle.terms(x, noise=noise)
    difference = (terms.kl_sampled - terms.kl).flatten()
    assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_named_objectives_with_particles_are_their_hand_written_form(name, beta):
    vae, x = tiny().double(), images("bernoulli", (1, 8, 8))
    elbo = OBJECTIVES[name].elbo(4)
    loss, noise = pyro_loss_and_noise(vae, x, elbo, beta)
    assert noise.shape[0] == 4
    formula = by_hand(SVI(vae.model, vae.guide, pyro.optim.Adam({}), elbo))
    assert_same(vae, loss, formula(vae.oracle.terms(x, noise=noise), beta), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO])
def test_vectorized_particles_are_the_looped_ones_in_expectation(elbo):
    """The means of 400 losses of each kind agree within 4 standard errors."""
    vae, x = tiny(), images("bernoulli", (1, 8, 8)).float()
    losses = []
    for vectorized in (True, False):
        objective = elbo(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
        losses.append(torch.tensor([objective.loss(vae.model, vae.guide, x) for _ in range(400)]))
    error = sum(v.var() / len(v) for v in losses) ** 0.5
    assert abs(losses[0].mean() - losses[1].mean()) < 4 * error


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_given_max_plate_nesting_spends_no_random_numbers(name):
    """The first call of a new objective draws as many random numbers as every later call.

    If it had to guess, it would draw more, and a resumed run would differ from a whole one.
    """
    x, vae, elbo = images("bernoulli", (1, 8, 8)).float(), tiny(), OBJECTIVES[name].elbo(2)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append([elbo.loss(vae.model, vae.guide, x) for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf")])
def test_temper_refuses(beta):
    with pytest.raises(ValueError, match=r"beta must be a finite number"):
        temper(beta)


def test_temper_weighs_one_layer():
    vae = pvae.build((1, 8, 8), (3, 2), "mlp", hidden=16).double()
    x = images("bernoulli", (1, 8, 8)).double()
    with temper(0.3, "z1"), temper(2.0, "z2"), _Draws() as draws:
        loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    z = draws.stacked()
    p, q = vae.model.densities(x, z), vae.guide.densities(x, z)
    expected = p["x"] + 0.3 * (p["z1"] - q["z1"]) + 2.0 * (p["z2"] - q["z2"])
    assert loss == pytest.approx(-expected.sum().item(), rel=1e-12)


def test_temper_leaves_observations_alone():
    vae, x = tiny().double(), images("bernoulli", (1, 8, 8))
    with temper(0.0):
        trace = pyro.poutine.trace(vae.model).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["z"]["scale"] == 0.0
    assert trace.nodes["x"]["scale"] == 1.0
