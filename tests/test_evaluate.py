"""Evaluation on models whose evidence and posterior are known.

The linear Gaussian model of `pvae.closed_form` is the oracle: its evidence, its posterior and the
gap of any Gaussian guide are exact.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import example, tiny
from pyro.infer.importance import LogWeightsMixin, psis_diagnostic, vectorized_importance_weights
from torch import nn

import pvae
from pvae import Guide, Model, build, captured, cli, evaluate, evaluation, plots, results
from pvae.builder import PRIORS
from pvae.closed_form import LinearGaussian, collapsed
from pvae.data import Split, load, observe, pixels
from pvae.evaluate.annealed import _Chains, _Path
from pvae.evaluate.calibrating import _p_values
from pvae.heads import NormalFixedScale
from pvae.priors import StandardNormal

EXACT = LinearGaussian(
    torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -0.9], [0.2, 0.4]], dtype=torch.float64),
    torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64),
    0.7,
)
COVARIANCE = torch.linalg.inv(EXACT.precision)  # of the posterior, the same for each image


class Decoder(nn.Module):
    """The likelihood p(x|z) of `EXACT`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = NormalFixedScale((4,), scale=EXACT.scale)

    def forward(self, z):
        return self.head(z @ EXACT.weight.T + EXACT.mean)


class Posterior(nn.Module):
    """The posterior of `EXACT` with its standard deviations multiplied by `widen`."""

    def __init__(self, widen: float) -> None:
        super().__init__()
        self.scale_tril = nn.Parameter(widen * torch.linalg.cholesky(COVARIANCE))

    def forward(self, x):
        return dist.MultivariateNormal(EXACT.posterior_loc(x), scale_tril=self.scale_tril)


def linear(widen: float = 1.0):
    return Model(StandardNormal(2), Decoder()).double(), Guide(Posterior(widen))


def images(n: int) -> torch.Tensor:
    """Returns draws of p(x), `(n, 4)`."""
    z, e = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)
    return z @ EXACT.weight.T + EXACT.mean + EXACT.scale * e


def agree(values: torch.Tensor, truth: torch.Tensor | float, errors: float = 4.0) -> None:
    """Asserts that the mean of `values - truth` is 0 within `errors` standard errors."""
    mean, se = evaluate.estimate(values - truth)
    assert abs(mean) < errors * se, f"{mean} ± {se}"


# ---- importance weights ----


def test_with_the_posterior_as_the_guide_all_weights_are_the_evidence():
    x = images(7)
    found = evaluate.ImportanceSampler(*linear(), num_samples=200)(x)
    torch.testing.assert_close(found.log_evidence, EXACT.log_evidence(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.ess, torch.full((7,), 200.0).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("widen", [0.6, 1.7])
def test_the_bounds_start_at_the_elbo_do_not_fall_and_reach_the_evidence(widen, monkeypatch):
    """On 4,000 images, the mean bound at k = 1 is the closed-form ELBO within 4 standard errors.

    From one k to the next it falls by no more than noise. At k = 500 it lacks at most 0.01 nats
    with the wide guide.
    """
    monkeypatch.setattr(evaluate.importance, "DECODES", 100_000)
    x = images(4000)
    exact, lacks = EXACT.log_evidence(x), []
    for k in (1, 4, 20, 500):
        found = evaluate.importance_weighted(*linear(widen), x, num_samples=k)
        lacks.append(exact - found)
    tril = widen * torch.linalg.cholesky(COVARIANCE).expand(len(x), 2, 2)
    agree(lacks[0], EXACT.gap(x, EXACT.posterior_loc(x), tril))
    means = [evaluate.estimate(lack) for lack in lacks]
    for before, after in pairwise(means):
        assert after.mean < before.mean + 3 * (before.se + after.se)
    assert means[-1].mean > -4 * means[-1].se
    assert means[-1].mean < (0.01 if widen > 1 else 0.1)


def test_streamed_diagnostics_are_pyros_own(monkeypatch):
    """ESS and k-hat of draws in pieces of 1,000 and 130 equal Pyro's, of all draws at once."""
    model, guide = linear(0.6)
    x, k = images(1), 1000
    with evaluate.fixed_noise("cpu", 5):
        k_hat = psis_diagnostic(model, guide, x, num_particles=k, max_plate_nesting=1)
    with evaluate.fixed_noise("cpu", 5):
        found = evaluate.ImportanceSampler(model, guide, num_samples=k)(x)
    assert found.pareto_k.item() == pytest.approx(k_hat, abs=1e-6)

    weights = LogWeightsMixin()
    with evaluate.fixed_noise("cpu", 5), torch.no_grad():
        weights.log_weights, *_ = vectorized_importance_weights(
            model, guide, x, num_samples=k, max_plate_nesting=1
        )
    assert found.ess.item() == pytest.approx(weights.get_ESS().item(), rel=1e-9)
    assert found.log_evidence.item() == pytest.approx(weights.get_log_normalizer().item())

    # in pieces of 130: the draws of one piece after the other
    monkeypatch.setattr(evaluate.importance, "DECODES", 130)
    with evaluate.fixed_noise("cpu", 5):
        pieces = torch.cat(
            [evaluate.importance._log_weights(model, guide, x, None, n) for n in [130] * 7 + [90]]
        )
    with evaluate.fixed_noise("cpu", 5):
        streamed = evaluate.ImportanceSampler(model, guide, num_samples=k)(x)
    weights.log_weights = pieces[:, 0].detach()
    assert streamed.ess.item() == pytest.approx(weights.get_ESS().item(), rel=1e-9)
    largest = pieces[:, 0].sort().values[-math.ceil(3 * k**0.5) - 1 :]
    assert streamed.pareto_k.item() == pytest.approx(evaluate.pareto_k(largest), abs=1e-6)


def test_a_guide_that_is_too_narrow_is_exposed_by_k_hat():
    """If a guide has c < 1 times the posterior's scales, the weights' tail index is 1 - c^2.

    P(w > t) = P(|z|^2 > 2 log t / (1 / c^2 - 1)), and |z|^2 / c^2 has an exponential tail. With
    c > 1 the weights are bounded. The mean k-hat of 100 images may be off by 0.1, because 2,000
    draws show only a part of the tail.
    """
    x = images(100)
    for c in (0.4, 0.6, 0.8, 1.3):
        k_hat = evaluate.ImportanceSampler(*linear(c), num_samples=2000)(x).pareto_k
        mean, _ = evaluate.estimate(k_hat)
        if c < 1:
            assert abs(mean - (1 - c**2)) < 0.1, (c, mean)
        else:
            assert mean < 0.1
    # most images of the narrow guide are above the threshold, and none of the wide guide
    narrow = evaluate.ImportanceSampler(*linear(0.4), num_samples=2000)(x).pareto_k
    wide = evaluate.ImportanceSampler(*linear(1.3), num_samples=2000)(x).pareto_k
    assert (narrow > evaluate.UNRELIABLE).double().mean() > 0.6
    assert (wide > evaluate.UNRELIABLE).double().mean() == 0


@pytest.mark.parametrize("labels", [pytest.param(False, marks=pytest.mark.slow), True])
def test_captured_weights_are_the_eager_ones(labels):
    """At the same noise, captured and eager weights agree: 4,500 draws in pieces of 500."""
    vae = pvae.build((1, 8, 8), 2, "conv", hidden=8, num_classes=3 if labels else None)
    x = (torch.rand(4, 1, 8, 8) > 0.5).float()
    y = torch.tensor([0, 1, 2, 0]) if labels else None
    pair = vae.model, vae.guide
    ours = evaluate.ImportanceSampler(*pair, num_samples=4500, compiler=captured.as_traced)
    with evaluate.fixed_noise("cpu", 3):
        expected = evaluate.ImportanceSampler(*pair, num_samples=4500)(x, y)
    with evaluate.fixed_noise("cpu", 3):
        found = ours(x, y)
    assert ours.log_weights.engine == "captured", ours.log_weights.reason
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # another batch of that shape uses the same graph, and no parameter has a gradient
    assert (ours(1 - x, y).log_evidence != found.log_evidence).all()
    assert ours.log_weights.captures == 1
    assert all(p.grad is None for p in vae.parameters())


def test_too_few_weights_have_no_k_hat():
    found = evaluate.ImportanceSampler(*linear(0.5), num_samples=8)(images(3))
    assert found.pareto_k.isnan().all()
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        evaluate.importance_weighted(*linear(), images(3), num_samples=0)


def test_one_covariance_each_finds_the_exact_posterior():
    """Factors that start three times too narrow, without correlations, reach the posterior.

    After 400 steps the ELBO is the evidence to 0.01 nats, and k-hat is no longer too high.
    """
    x = images(5)
    model, narrow = linear(0.33)
    factors = evaluate.full_covariance_factors(narrow, x)
    evaluate.optimize_factors(model, factors, x, steps=400, learning_rate=0.05, particles=8)
    own = partial(factors, index=torch.arange(5))
    exact = EXACT.log_evidence(x)
    elbo = evaluate.elbo(model, own, x, num_samples=2000).elbo
    assert ((exact - elbo).abs() < 0.01).all()
    q = factors.posterior(torch.arange(5))
    torch.testing.assert_close(q.covariance_matrix.mean(0), COVARIANCE, rtol=0.1, atol=0.01)
    before = evaluate.ImportanceSampler(model, narrow, num_samples=2000)(x)
    after = evaluate.ImportanceSampler(model, own, num_samples=2000)(x)
    assert (before.pareto_k > evaluate.UNRELIABLE).all()
    assert (after.pareto_k < evaluate.UNRELIABLE).all()
    with pytest.raises(ValueError, match="num_draws must be at least 2, for a variance, not 1"):
        evaluate.full_covariance_factors(narrow, x, num_draws=1)
    with pytest.raises(ValueError, match="one latent site, not 2"):
        evaluate.full_covariance_factors(hierarchical, torch.zeros(3, 2))


# ---- annealing ----


@pytest.mark.parametrize("initial", [pytest.param(None, marks=pytest.mark.slow), "guide"])
def test_annealing_sandwiches_the_evidence(initial):
    """On 200 simulated images both bounds hold within 4 standard errors, at 10 and 100 steps.

    With 100 temperatures each bound is the evidence to 0.1 nats and 4 standard errors.
    """
    model, guide = linear(0.6)
    start = guide if initial else None
    made = evaluate.simulate(model, torch.zeros(200, 4, dtype=torch.float64))
    exact, widths = EXACT.log_evidence(made.x), []
    for steps in (10, 100):
        settings = {"initial": start, "num_temperatures": steps, "num_chains": 2}
        lower = evaluate.Annealer(model, **settings, num_leapfrogs=5)(made.x)
        upper = evaluate.Annealer(model, **settings, num_leapfrogs=5).back(made)
        below = evaluate.estimate(exact - lower.log_evidence)
        above = evaluate.estimate(upper.log_evidence - exact)
        assert below.mean > -4 * below.se
        assert above.mean > -4 * above.se
        widths.append(below.mean + above.mean)
    assert widths[1] < widths[0]
    for bound in (below, above):
        assert abs(bound.mean) < 0.1 + 4 * bound.se


def test_step_sizes_are_adapted_to_the_acceptance():
    """Each chain adapts its step size to an acceptance of 0.65, from far too small or large."""
    model, _ = linear()
    x = images(200)
    with evaluate.evaluating(model):
        path = _Path(model, None, x, None, 2)
        chains = _Chains(path, path.pack(path.first), leapfrogs=2)
        chains.step[0], chains.step[1] = 0.02, 4.0
        for move in range(400):
            if move == 300:
                chains.accepted.zero_()
            chains.move(1.0)
    rate = chains.accepted / 100
    assert ((rate.mean(1) - 0.65).abs() < 0.05).all()
    assert (rate.std(1) < 0.1).all()


def test_annealed_weights_are_unbiased():
    """At any number of temperatures, E w = p(x) forward; E 1/w = 1/p(x) back from exact draws.

    The means of 4,000 chains (20 temperatures) must agree within 4 standard errors.
    """
    model, _ = linear()
    made = evaluate.simulate(model, torch.zeros(4000, 4, dtype=torch.float64))
    exact = EXACT.log_evidence(made.x)
    settings = {"num_temperatures": 20, "num_chains": 1, "num_leapfrogs": 3}
    forward = evaluate.Annealer(model, **settings)(made.x).log_evidence
    back = evaluate.Annealer(model, **settings).back(made).log_evidence
    agree((forward - exact).exp(), 1.0)
    agree((exact - back).exp(), 1.0)


def test_simulated_images_and_their_latents_are_a_draw_of_the_joint():
    made = evaluate.simulate(linear()[0], torch.zeros(20_000, 4, dtype=torch.float64))
    joint = torch.cat([made.latents["z"], made.x], dim=1)
    cross = EXACT.weight.T
    x = EXACT.weight @ cross + EXACT.scale**2 * torch.eye(4)
    truth = torch.cat([torch.cat([torch.eye(2), cross], 1), torch.cat([cross.T, x], 1)])
    torch.testing.assert_close(joint.T.cov(), truth, rtol=0, atol=0.06)  # 5 se of the largest


def test_moves_leave_the_posterior_invariant():
    """Exact draws are still exact after 30 moves with a step so large that some are rejected."""
    model, _ = linear()
    x = images(1).expand(20_000, 4)
    draws = torch.randn(20_000, 2).double() @ torch.linalg.cholesky(COVARIANCE).T
    draws = draws + EXACT.posterior_loc(x)
    with evaluate.evaluating(model):
        path = _Path(model, None, x, None, 1)
        chains = _Chains(path, path.pack({"z": draws}), leapfrogs=3)
        for _ in range(30):
            chains.step.fill_(0.75)
            chains.move(1.0)
        log_q0, log_joint = path(chains.z)
    assert 0.3 < chains.accepted.mean() / 30 < 0.97  # some moves are rejected
    torch.testing.assert_close(chains.log_q0, log_q0)  # the kept densities belong to the new z
    torch.testing.assert_close(chains.log_joint, log_joint)
    assert (chains.z[0] != draws).any(1).double().mean() > 0.9  # yet most chains have moved
    agree(chains.z[0, :, 0], EXACT.posterior_loc(x)[0, 0])
    agree(chains.z[0, :, 1], EXACT.posterior_loc(x)[0, 1])
    torch.testing.assert_close(chains.z[0].T.cov(), COVARIANCE, rtol=0.06, atol=0.005)


def hierarchical(x, y=None):
    """z1 ~ N(0, 1), z2 | z1 ~ N(z1 1, I), x | z2 ~ N(z2, I), all in 2-D: x ~ N(0, 2 I + 11')."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1[..., None].expand(*z1.shape, 2), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z2, 1.0).to_event(1), obs=x)


def test_annealing_packs_latents_of_any_shapes():
    made = evaluate.simulate(hierarchical, torch.zeros(300, 2, dtype=torch.float64))
    assert {name: tuple(z.shape) for name, z in made.latents.items()} == {
        "z1": (300,),
        "z2": (300, 2),
    }
    path = _Path(hierarchical, None, made.x, None, 3)
    again = path.unpack(path.pack(made.latents))  # (3, 300, *event), equal by chain
    for name, z in made.latents.items():
        assert torch.equal(again[name], z.expand(3, *z.shape))
    p = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), 2 * torch.eye(2).double() + 1.0
    )
    exact = p.log_prob(made.x)
    settings = {"num_temperatures": 100, "num_chains": 2, "num_leapfrogs": 5}
    lower = evaluate.Annealer(hierarchical, **settings)(made.x).log_evidence
    upper = evaluate.Annealer(hierarchical, **settings).back(made).log_evidence
    assert abs((lower - exact).mean()) < 0.1
    assert abs((upper - exact).mean()) < 0.1


def cubic(x, y=None):
    """z ~ N(0, 1), x ~ N(z^3, 0.5): the gradient of log p grows as z^5, so leapfrogs diverge."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z**3, 0.5).to_event(1), obs=x)


@pytest.mark.slow
def test_chains_that_diverge_stay_and_are_counted():
    """Although leapfrogs overflow, both bounds are near the evidence, known by quadrature."""
    made = evaluate.simulate(cubic, torch.zeros(200, 1, dtype=torch.float64))
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    log_p = torch.distributions.Normal(0, 1).log_prob(grid)
    log_p = log_p + torch.distributions.Normal(grid**3, 0.5).log_prob(made.x)  # (200, grid)
    exact = log_p.logsumexp(1) + (grid[1] - grid[0]).log()
    settings = {"num_temperatures": 100, "num_chains": 2}
    lower = evaluate.Annealer(cubic, **settings)(made.x)
    upper = evaluate.Annealer(cubic, **settings).back(made)
    for found, lack in ((lower, exact - lower[0]), (upper, upper[0] - exact)):
        assert 0.001 < found.diverged.mean() < 0.2
        assert (found.diverged + found.acceptance <= 1).all()
        mean, se = evaluate.estimate(lack)
        assert -4 * se < mean < 0.2 + 4 * se
    both = evaluate.Annealer(cubic, **settings).sandwich(made.x)
    assert both.diverged.shape == (200,)
    assert 0.001 < both.diverged.mean() < 0.2
    calm = evaluate.Annealer(linear()[0], num_temperatures=20)(images(5))
    assert (calm.diverged == 0).all()


def undefined_far_out(x, y=None):
    """The mean of x is infinity minus infinity if z is above 710."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal((2 * z).exp() - z.exp(), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("program", "step"), [(cubic, 1e100), (undefined_far_out, 1e4)])
def test_steps_out_of_the_finite_numbers_move_nothing(program, step):
    x = torch.ones(50, 1, dtype=torch.float64)
    path = _Path(program, None, x, None, 2)
    chains = _Chains(path, path.pack(path.first), leapfrogs=5)
    chains.step[0] = step  # only the first chain of each image
    before = chains.z
    for _ in range(3):
        chains.move(1.0)
    assert torch.equal(chains.z[0], before[0])
    assert (chains.accepted[0] == 0).all()
    assert chains.diverged[0].mean() > 1
    assert chains.diverged[1].mean() < 0.5
    assert (chains.z[1] != before[1]).double().mean() > 0.5
    assert chains.log_joint.isfinite().all()


def test_annealing_refuses_what_it_cannot_move():
    def bounded(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'z' has the support"):
        evaluate.Annealer(bounded)(torch.zeros(3, 2))
    for name in ("num_chains", "num_leapfrogs", "num_temperatures"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            evaluate.Annealer(linear()[0], **{name: 0})(images(2))


def test_a_conditional_pair_is_evaluated_under_its_labels():
    """Annealing estimates log p(x|y): another label gives another number at the same noise."""
    vae = pvae.build((1, 8, 8), 2, "mlp", hidden=8, num_classes=3)
    x = (torch.rand(4, 1, 8, 8) > 0.5).float()
    found = []
    for y in (torch.zeros(4).long(), torch.ones(4).long()):
        with evaluate.fixed_noise("cpu", 0):
            found.append(evaluate.Annealer(vae.model, num_temperatures=20)(x, y).log_evidence)
        iwae = evaluate.importance_weighted(vae.model, vae.guide, x, y, num_samples=2000)
        torch.testing.assert_close(found[-1], iwae, rtol=0, atol=0.5)
        assert evaluate.gaps(vae.model, vae.guide, x, y, steps=3).factor.shape == (4,)
    assert (found[0] - found[1]).abs().min() > 1e-4


# ---- NUTS ----


@pytest.mark.slow
def test_nuts_finds_the_exact_posterior():
    """Mean and covariance of 1,500 draws are exact; `se` is twice that of independent draws."""
    x = images(1)
    before = torch.get_rng_state()
    z = evaluate.nuts(linear()[0], x, num_samples=1500, warmup_steps=200)["z"]
    assert (torch.get_rng_state() == before).all()
    se = 2 * (COVARIANCE.diagonal() / 1500).sqrt()
    assert ((z.mean(0) - EXACT.posterior_loc(x)[0]).abs() < 3 * se).all()
    torch.testing.assert_close(z.T.cov(), COVARIANCE, rtol=0.2, atol=0.02)


def test_nuts_takes_one_image():
    with pytest.raises(ValueError, match=r"x must be one image"):
        evaluate.nuts(linear()[0], images(2))


@pytest.mark.parametrize("prior", PRIORS)
def test_nuts_takes_every_prior(prior):
    vae = build((1, 4, 4), 2, "mlp", prior=prior, hidden=4, num_classes=2)
    x, y = torch.ones(1, 1, 4, 4), torch.tensor([1])
    z = evaluate.nuts(vae.model, x, y, num_samples=2, warmup_steps=2)["z"]
    assert z.shape == (2, 2)
    assert z.isfinite().all()


# ---- latents ----


class Fixed(nn.Module):
    """`q(z|x) = N(spread x, scale^2)` for x `(B, 1, 1, 1)` in [0, 1]."""

    def __init__(self, spread: float, scale: float) -> None:
        super().__init__()
        self.spread, self.scale = spread, scale

    def forward(self, x):
        return dist.Normal(self.spread * x.flatten(1), self.scale).to_event(1)


def latent_pair(spread: float, scale: float):
    likelihood = nn.Sequential(nn.Linear(1, 1), NormalFixedScale((1,)))
    likelihood = nn.Sequential(
        likelihood[0], nn.Unflatten(-1, (1, 1, 1)), NormalFixedScale((1, 1, 1))
    )
    return Model(StandardNormal(1), likelihood), Guide(Fixed(spread, scale))


def split_of(values) -> Split:
    return Split(torch.as_tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1), None)


def test_information_by_quadrature():
    """Both numbers are integrals if images have one of two posteriors that overlap.

    1,000 images have N(0, s^2) and 1,000 have N(d, s^2); I(x; z) is that of a binary channel.
    """
    d, s = 1.5, 0.8
    found = evaluate.information(*latent_pair(d, s), split_of([0, 255] * 1000))
    grid = torch.linspace(-12, 14, 200_001, dtype=torch.float64)
    q0, q1 = (torch.distributions.Normal(loc, s).log_prob(grid) for loc in (0.0, d))
    q = torch.logaddexp(q0, q1) - math.log(2)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    mutual = torch.trapezoid(q0.exp() * (q0 - q) + q1.exp() * (q1 - q), grid).item() / 2
    aggregate = torch.trapezoid(q.exp() * (q - prior), grid).item()
    assert abs(found.mutual.mean - mutual) < 4 * found.mutual.se
    assert abs(found.aggregate.mean - aggregate) < 4 * found.aggregate.se
    assert found.mutual.se < 0.02


def test_information_is_nothing_where_q_is_the_prior_and_log_n_where_codes_are_apart():
    none = evaluate.information(*latent_pair(0.0, 1.0), split_of(range(200)))
    assert abs(none.mutual.mean) < 1e-5
    assert abs(none.aggregate.mean) < 1e-5
    apart = evaluate.information(*latent_pair(1e4, 0.1), split_of(range(200)))
    assert apart.mutual.mean == pytest.approx(math.log(200), abs=1e-4)


def test_information_refuses():
    with pytest.raises(ValueError, match="num_draws must be at least 2, not 1"):
        evaluate.information(*latent_pair(1.0, 1.0), split_of([0, 1]), num_draws=1)
    with pytest.raises(ValueError, match=r"site must be .* only latent"):
        evaluate.information(*latent_pair(1.0, 1.0), split_of([0, 1]), site="w")


def test_factors_leave_the_pair_as_it_was():
    vae = tiny(net="mlp")
    vae.train()
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    evaluate.gaps(vae.model, vae.guide, (torch.rand(5, 1, 8, 8) > 0.5).float(), steps=5)
    assert all(p.requires_grad for p in vae.parameters())
    assert all(m.training for m in vae.modules())
    assert all(torch.equal(state[name], t) for name, t in vae.state_dict().items())
    with pytest.raises(ValueError, match=r"guide must be a pvae.Guide with a pvae.Conditional"):
        evaluate.one_factor_each(linear()[1], images(3))


def test_the_probe_finds_labels_that_are_there_and_none_that_are_not():
    codes, labels = torch.randn(600, 5), torch.arange(600) % 3
    chance = evaluate.probe(codes[:400], labels[:400], codes[400:], labels[400:])
    told = codes + 5 * torch.eye(5)[labels]
    found = evaluate.probe(told[:400], labels[:400], told[400:], labels[400:])
    for guess, hit in zip(chance, found, strict=True):
        assert abs(guess.mean - 1 / 3) < 4 * guess.se
        assert hit.mean > 0.97
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate.probe(codes, 0 * labels, codes, labels)


def test_the_picture_of_a_posterior_refuses():
    z = torch.randn(10, 3)
    for arguments, message in (
        ((z, z[:, :2], (0, 1)), "exact and guide must have shapes"),
        ((z, z, (0, 3)), r"units must be from 0 to 2, not"),
        ((z * torch.nan, z, (0, 1)), "NUTS must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.posterior(*arguments)


# ---- the collapsed model ----


def test_the_collapsed_model_is_the_best_that_ignores_z():
    """The closed form is the mean log-likelihood of binarised digits; no other rate does better.

    The mean is over 20 binarisations, within 4 standard errors.
    """
    x = pixels(load("digits").train.images).double()
    mean = x.mean(0)
    draws = torch.stack(
        [
            torch.distributions.Bernoulli(mean).log_prob(torch.bernoulli(x)).sum((1, 2, 3)).mean()
            for _ in range(20)
        ]
    )
    agree(draws, collapsed(mean))

    def expected(rate):
        return (torch.xlogy(mean, rate) + torch.xlogy(1 - mean, 1 - rate)).sum()

    assert expected(mean) == pytest.approx(collapsed(mean))
    for shift in (-0.01, 0.01):
        assert expected((mean + shift).clamp(0.001, 0.999)) < collapsed(mean)


def test_observed_digits_reach_it_in_the_mean():
    """Dynamic epochs from `data` have the same mean log-likelihood at the mean image."""
    digits = load("digits")
    mean = digits.mean_image.double()
    values = [
        torch.distributions.Bernoulli(mean).log_prob(x.double()).sum((1, 2, 3)).mean()
        for epoch in range(20)
        for x, _ in observe(digits, "dynamic").batches(2000, seed=0, epoch=epoch)
    ]
    agree(torch.stack(values), collapsed(mean))


# ---- memory ----

MEMORY = """
import sys, torch
from growth import peak
from pvae import build, evaluate
torch.set_num_threads(1)
vae = build((1, 28, 28), 8, "mlp", hidden=64)
x = (torch.rand(20, 1, 28, 28) > 0.5).float()
evaluate.ImportanceSampler(vae.model, vae.guide, num_samples=int(sys.argv[1]))(x)
print(peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_weights():
    """The peak memory for k = 10,000 is below 1.2 times that for k = 100, one piece of draws.

    All images of k = 10,000 at once would take 630 MB, more than the whole process.
    """
    peaks = {}
    for k in (100, 10_000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(k)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(pvae.__file__).parent.parent / "benchmarks",
        )
        peaks[k] = float(done.stdout)
    assert peaks[10_000] < 1.2 * peaks[100], peaks


# ---- calibration ----


class Shifted(nn.Module):
    """The posterior of `EXACT` with its mean moved by `shift` standard deviations."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift * COVARIANCE.diagonal().sqrt()

    def forward(self, x):
        return dist.MultivariateNormal(EXACT.posterior_loc(x) + self.shift, COVARIANCE)


class Prior(nn.Module):
    """A guide that ignores x: q(z|x) = p(z)."""

    def forward(self, x):
        return dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)


def least(guide: Guide, count: int = 1000, num_draws: int = 100) -> float:
    model = linear()[0]
    found = evaluate.calibration(model, guide, torch.zeros(count, 4).double(), num_draws=num_draws)
    assert found.ranks.shape == (count, 2)
    return found.p_values.min().item()


def test_calibration_passes_the_exact_guide_and_exposes_others():
    assert least(linear()[1]) > 0.05
    assert least(linear(0.7)[1]) < 1e-6
    assert least(linear(1.4)[1]) < 1e-6
    assert least(Guide(Shifted(0.4))) < 1e-6
    assert least(Guide(Prior())) > 0.05  # calibration cannot find this guide, as the docs say


@pytest.mark.parametrize(("count", "num_draws"), [(1000, 100), (1000, 7), (60, 100)])
def test_p_values_of_calibration_are_uniform(count, num_draws):
    """Uniform ranks give uniform p-values, also if bins differ in size.

    Of 300 p-values, the shares below 0.05 and 0.5 are right within 4 standard errors.
    """
    ranks = torch.randint(0, num_draws + 1, (count, 300))
    p_values = _p_values(ranks, num_draws)
    for level in (0.05, 0.5):
        share = (p_values < level).double().mean().item()
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 300)


def test_a_narrow_unit_alone_is_found_and_named():
    """The guide of a pair with 5 units is too narrow in unit 3, and only this unit is rejected."""
    scale = torch.full((5,), math.sqrt(0.5))
    scale[3] *= 0.7
    model = Model(StandardNormal(5), nn.Sequential(NormalFixedScale((5,))))

    class Half(nn.Module):
        def forward(self, x):
            return dist.Normal(x / 2, scale).to_event(1)

    p = evaluate.calibration(model, Guide(Half()), torch.zeros(1000, 5)).p_values
    assert (p < 0.05).tolist() == [False, False, False, True, False]
    figure = plots.calibration(torch.randint(0, 101, (1000, 5)), 100, p)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()][-1] == "unit 3"


def test_calibration_under_labels():
    """With a prior that depends on y, the exact guide passes; a guide that ignores y is rejected.

    Images are taken in pieces, and each image must keep its own label.
    """

    class Labelled(nn.Module):
        takes_y = True

        def forward(self, y):
            return dist.Normal(3.0 * y[:, None].double(), 1.0).to_event(1)

    class Half(nn.Module):
        takes_y = True

        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x, y):
            loc = (x + self.weight * 3.0 * y[:, None]) / 2
            return dist.Normal(loc, math.sqrt(0.5)).to_event(1)

    class Likelihood(nn.Module):
        takes_y = True

        def forward(self, z, y):
            return dist.Normal(z, 1.0).to_event(1)

    y = torch.randint(0, 3, (350,))
    x = torch.zeros(350, 1).double()
    p = [
        evaluate.calibration(Model(Labelled(), Likelihood()), Guide(Half(w)), x, y).p_values.item()
        for w in (1.0, 0.0)
    ]
    assert p[0] > 0.01
    assert p[1] < 1e-6


def test_calibration_refuses():
    model, guide = linear()
    x = torch.zeros(20, 4).double()
    with pytest.raises(ValueError, match="x must hold at least 20 images, not 19"):
        evaluate.calibration(model, guide, x[:19])
    with pytest.raises(ValueError, match="num_draws must be at least 4, not 3"):
        evaluate.calibration(model, guide, x, num_draws=3)
    deep = build((1, 4, 4), (2, 2), "mlp", hidden=4)
    with pytest.raises(ValueError, match=r"one latent site, .* not .*z1.*z2"):
        evaluate.calibration(deep.model, deep.guide, torch.zeros(20, 1, 4, 4))
    with pytest.raises(ValueError, match=r"ranks must be .* from 0 to num_draws = 10, not"):
        plots.calibration(torch.full((3, 2), 11), 10, torch.ones(2))
    with pytest.raises(ValueError, match="p_values must hold one number for each unit"):
        plots.calibration(torch.zeros(3, 2).long(), 10, torch.ones(3))


@pytest.mark.slow
def test_calibration_over_20_seeds():
    """In all of 20 seeds the narrow and the shifted guide are rejected, the exact one in at most 1.

    Each test has 1,000 images and 100 draws.
    """
    accused = dict.fromkeys(("exact", "narrow", "shifted"), 0)
    for seed in range(20):
        torch.manual_seed(seed)
        for name, guide in zip(
            accused, (linear()[1], linear(0.7)[1], Guide(Shifted(0.3))), strict=True
        ):
            accused[name] += least(guide) < 0.05
    assert accused["narrow"] == accused["shifted"] == 20
    assert accused["exact"] <= 1


# ---- the command ----


def command(*argv):
    evaluation.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "r"
    small = ["--dataset", "digits", "--net", "mlp", "--hidden", "32", "--latent-dim", "3"]
    example("mnist_svi").main([*small, "-n", "2", "--quiet", "--out", str(folder)])
    return folder


SMALL = ["--images", 10, "--num-samples", 50, "--annealed-images", 3, "--temperatures", 5]
SMALL += ["--gap-images", 3, "--simulated-images", 30, "--nuts-samples", 5]


@pytest.mark.slow
def test_the_command_prints_a_table_and_keeps_it(digits_run):
    argv = [sys.executable, "-m", "pvae.evaluate", digits_run, *map(str, SMALL)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    saved = json.loads((digits_run / "evaluation.json").read_text())["numbers"]
    for row in saved.values():
        assert row["label"] in done.stdout
    elbo = saved["elbo"]["mean"]
    assert elbo == pytest.approx(-saved["distortion"]["mean"] - saved["rate"]["mean"], abs=1e-3)
    end_of_run = results.read(digits_run / "results.json")
    assert elbo == pytest.approx(end_of_run["elbo"].mean)
    bits = -elbo / 784 / math.log(2)
    assert saved["bits_per_dimension"]["mean"] == pytest.approx(bits, rel=1e-5)
    assert saved["iwae_50"]["images"] == 10
    assert saved["mutual_information"]["mean"] <= math.log(179)
    assert set(end_of_run) - {"iwae_100"} <= set(saved)  # both files use the same keys
    assert 0 <= saved["calibration_p"]["mean"] <= 1
    assert (digits_run / "posterior.png").exists()
    assert (digits_run / "calibration.png").exists()


NOTHING = ["--images", 0, "--annealed-images", 0, "--gap-images", 0, "--nuts-samples", 0]
NOTHING += ["--simulated-images", 0]


def test_parts_are_left_out_at_zero(digits_run, capsys):
    command(digits_run, *NOTHING, "--quiet")
    out = capsys.readouterr().out
    assert "IWAE-1,000  " not in out
    assert "AIS: annealed" not in out  # no explanation of a row that is left out
    assert "active units: those" in out
    saved = results.read(digits_run / "evaluation.json")
    assert "iwae_1000" not in saved
    assert "elbo" in saved


def test_wrong_input_is_a_plain_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda: command("nowhere"))
    assert "nowhere is not the folder of a run" in str(stop.value)
    with pytest.raises(SystemExit):
        command("nowhere", "--images", -1)
    assert "must be a whole number at least 0" in capsys.readouterr().err
    for flag, least in (("--simulated-images", 20), ("--nuts-samples", 2)):
        with pytest.raises(SystemExit):
            command("nowhere", flag, 1)
        assert f"{flag} must be 0 or at least {least}, not 1" in capsys.readouterr().err


def test_a_study_of_several_runs_is_refused(digits_run):
    study = digits_run.parent
    shutil.copy(digits_run / "config.json", study)
    with pytest.raises(ValueError, match=f"{study} holds several runs: .* such as {digits_run}"):
        command(study)
    (study / "config.json").unlink()


def test_a_wrong_image_is_refused_before_the_numbers(digits_run, capsys):
    with pytest.raises(ValueError, match=r"--image must be below 179, .*, not 179"):
        command(digits_run, *NOTHING, "--image", 179)
    assert "ELBO" not in capsys.readouterr().out


def test_no_images_and_no_draws_are_refused():
    vae = tiny()
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        evaluate.elbo(vae.model, vae.guide, torch.zeros(2, 1, 8, 8), num_samples=0)
    with pytest.raises(ValueError, match="split must hold an image or more"):
        evaluate.over(Split(torch.zeros(0, 1, 8, 8), None), print, batch_size=2, seed=0)


def test_codes_of_one_class_are_not_probed(digits_run):
    subject, _ = evaluation.opened(evaluation.arguments([str(digits_run), "--quiet"]))
    assert {"knn", "logistic"} <= {row.key for row in evaluation.latent_rows(subject)}
    held_out = subject.data.validation
    one = replace(subject.data, validation=held_out._replace(labels=0 * held_out.labels))
    keys = {row.key for row in evaluation.latent_rows(replace(subject, data=one))}
    assert "active_units" in keys
    assert not {"knn", "logistic"} & keys


def test_a_run_on_other_data_is_refused(digits_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits_run, other)
    config = json.loads((other / "config.json").read_text())
    config["dataset"]["sha256"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="but the data found now is digits"):
        command(other, "--quiet")


def test_a_run_of_version_0_1_is_evaluated(digits_run, tmp_path, capsys):
    """Such a run has one seed for everything, and its results have the old keys."""
    old = tmp_path / "old"
    shutil.copytree(digits_run, old)
    config = json.loads((old / "config.json").read_text())
    del config["data_seed"], config["arguments"]["data_seed"]
    (old / "config.json").write_text(json.dumps(config))
    command(old, *NOTHING, "--quiet")
    now = results.read(old / "evaluation.json")
    numbers = {"test_elbo": now["elbo"].mean, "test_kl": now["rate"].mean, "iwae_500": -1.0}
    numbers |= {"test_reconstruction": -now["distortion"].mean, "iwae_500_se": 0.5}
    (old / "results.json").write_text(json.dumps(numbers))
    read = results.read(old / "results.json")
    assert all(read[key].mean == now[key].mean for key in ("elbo", "rate", "distortion"))
    assert read["iwae_500"] == (-1.0, 0.5)
    (old / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no results of a run"):
        results.read(old / "results.json")


# ---- what a table may say ----


@pytest.mark.parametrize("how", ["grey", "dequantized"])
def test_what_is_no_likelihood_has_no_bits_and_says_so(how):
    vae = build((1, 28, 28), 2, "mlp", "grey_bernoulli", hidden=8)
    subject = results.Subject(vae, observe(load("digits"), how), quiet=True)
    rows = results.end_of_run(subject)
    assert "bits_per_dimension" not in {row.key for row in rows}
    assert "is not a likelihood" in results.table(rows, subject, "digits")


def test_a_pair_that_hardly_uses_z_is_told_what_helps():
    vae = build((1, 28, 28), 3, "mlp", hidden=8)
    torch.nn.init.zeros_(vae.guide.posterior.net.out.weight)
    subject = results.Subject(vae, observe(load("digits"), "dynamic"), quiet=True)
    text = results.table(results.end_of_run(subject), subject, "digits")
    assert "warning: 0 of 3 units are active" in text
