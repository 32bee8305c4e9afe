"""Exact anchors: models whose evidence is known, and the continuous Bernoulli."""

import math

import mpmath
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pvae import Guide, Model, closed_form, evaluate
from pvae.heads import ContinuousBernoulli, NormalFixedScale
from pvae.priors import StandardNormal

S = 0.7


class ConjugatePosterior(nn.Module):
    """q(z|x) for z ~ N(0, 1), x|z ~ N(z, s^2); it is the exact posterior if `widen` is 1."""

    def __init__(self, widen: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(
            torch.tensor(widen * S / math.sqrt(1 + S**2), dtype=torch.float64)
        )

    def forward(self, x):
        return dist.Normal(x / (1 + S**2), self.scale).to_event(1)


def conjugate(widen: float = 1.0):
    model = Model(StandardNormal(1), nn.Sequential(nn.Identity(), NormalFixedScale((1,), scale=S)))
    return model.double(), Guide(ConjugatePosterior(widen))


X = torch.linspace(-3, 3, 13).double()[:, None]
LOG_EVIDENCE = -(X[:, 0] ** 2 / (1 + S**2) + math.log(2 * math.pi * (1 + S**2))) / 2


@pytest.mark.parametrize("elbo", [Trace_ELBO(), RenyiELBO(num_particles=3)])
def test_with_the_exact_posterior_every_sample_of_the_elbo_is_the_evidence(elbo):
    losses = [elbo.loss(*conjugate(), X) for _ in range(20)]
    assert max(losses) - min(losses) < 1e-10
    assert abs(losses[0] + LOG_EVIDENCE.sum().item()) < 1e-10


@pytest.mark.parametrize("particles", [1, 5])
def test_evaluate_gives_the_evidence_image_by_image(particles):
    bound = evaluate.elbo(*conjugate(), X, num_samples=2000)
    # only the reconstruction is sampled (the KL is analytic): 5 of its standard errors
    error = 5 * bound.reconstruction.std() / 2000**0.5
    assert (bound.elbo - LOG_EVIDENCE).abs().max() < max(error, 0.2)
    iwae = evaluate.importance_weighted(*conjugate(), X, num_samples=particles)
    torch.testing.assert_close(iwae, LOG_EVIDENCE, rtol=0, atol=1e-10)


def test_bounds_with_a_wide_guide_rise_with_k_and_reach_the_evidence():
    """The gap of the ELBO is KL(q || posterior), in closed form.

    The test averages over copies of each datum; k = 1 is noisiest and needs the most copies.
    """
    widen = 1.6
    gap = (widen**2 - 1) / 2 - math.log(widen)
    values = []
    for k, copies in ((1, 2000), (4, 500), (64, 500)):
        found = evaluate.importance_weighted(*conjugate(widen), X.repeat(copies, 1), num_samples=k)
        values.append(evaluate.estimate(found - LOG_EVIDENCE.repeat(copies)))
    assert abs(values[0].mean + gap) < 4 * values[0].se
    assert values[0].mean < values[1].mean < values[2].mean < 4 * values[2].se
    assert values[2].mean > -0.01


def test_streaming_equals_all_at_once(monkeypatch):
    """Twelve weights of an image give the same sum in pieces of 5 as all at once."""
    monkeypatch.setattr(evaluate.importance, "DECODES", 5)
    x = X[:1]
    with evaluate.fixed_noise("cpu", 3):
        streamed = evaluate.importance_weighted(*conjugate(1.6), x, num_samples=12)
    with evaluate.fixed_noise("cpu", 3):
        q = conjugate(1.6)[1].posterior(x)
        z = torch.cat([q.sample((n,)) for n in (5, 5, 2)])
    weights = dist.Normal(0, 1).log_prob(z) + dist.Normal(z, S).log_prob(x)
    weights = weights.sum(-1) - q.log_prob(z)
    torch.testing.assert_close(streamed, weights.logsumexp(0) - math.log(12))


# ---- continuous Bernoulli ----

POSITIVE = [1e-4, 1e-3, 0.01, 0.1, 0.49, 0.51, 1, 3, 10, 17, 20, 30]
LOGITS = [*POSITIVE, *(-logit for logit in POSITIVE)]


def head_log_prob(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return ContinuousBernoulli((1,))(logits[:, None]).log_prob(x[:, None])


def by_hand(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return closed_form.continuous_bernoulli(x[:, None], logits[:, None])


def exact(x: float, logit: float) -> tuple[float, float]:
    """Returns log p(x) and its derivative by the logit, computed with 50 digits."""
    with mpmath.workdps(50):
        l = mpmath.mpf(logit)  # noqa: E741
        value = x * l - mpmath.log(mpmath.expm1(l) / l)
        slope = x - mpmath.exp(l) / mpmath.expm1(l) + 1 / l
        return float(value), float(slope)


@pytest.mark.parametrize("log_prob", [head_log_prob, by_hand])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-11)])
def test_continuous_bernoulli_against_50_digits(log_prob, dtype, tolerance):
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    for value in (0.0, 0.3, 1.0):
        x = torch.full_like(logits, value).detach()
        result = log_prob(x, logits)
        (slope,) = torch.autograd.grad(result.sum(), logits)
        for i in range(len(LOGITS)):
            truth, true_slope = exact(x[i].item(), logits[i].item())
            assert abs(result[i].item() - truth) <= tolerance * max(1, abs(truth))
            assert abs(slope[i].item() - true_slope) <= tolerance * max(1, abs(true_slope))


def test_at_logit_zero_it_is_uniform_with_a_finite_gradient():
    logits = torch.zeros(1, requires_grad=True)
    value = head_log_prob(torch.tensor([0.2]), logits)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), logits)[0].item() == pytest.approx(0.2 - 0.5)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_integrates_to_one_with_its_mean_and_variance(logit):
    x, width = torch.linspace(0, 1, 20_001).double(), 1 / 20_000
    p = ContinuousBernoulli((1,))(torch.tensor([logit]).double())
    density = p.log_prob(x[:, None]).exp()
    total, mean = (torch.trapezoid(density * x**k, dx=width) for k in (0, 1))
    variance = torch.trapezoid(density * (x - mean) ** 2, dx=width)
    assert total.item() == pytest.approx(1, abs=1e-6)
    assert p.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert p.base_dist.variance.item() == pytest.approx(variance.item(), abs=1e-6)


def test_the_published_mean():
    p = ContinuousBernoulli((1,))(torch.tensor([math.log(0.2 / 0.8)]).double())
    assert p.mean.item() == pytest.approx(0.388014, abs=5e-7)


@pytest.mark.parametrize("logit", [-30.0, -1.0, -0.005, 0.0, 0.005, 0.3, 5.0, 30.0])
def test_continuous_bernoulli_draws_have_its_mean(logit):
    """Mean, second moment and gradient of 100,000 draws are exact within 4 standard errors."""
    logits = torch.full((100_000,), logit, dtype=torch.float64, requires_grad=True)
    p = ContinuousBernoulli((100_000,))(logits).base_dist
    draws = p.rsample()
    assert draws.min() >= 0
    assert draws.max() <= 1
    for k, truth in ((1, p.mean[0]), (2, p.variance[0] + p.mean[0] ** 2)):
        power = draws.detach() ** k
        assert (power.mean() - truth).abs() < 4 * power.std() / len(power) ** 0.5
    # d mean / d logit is the variance, and the pathwise gradient is an estimate of it
    (slope,) = torch.autograd.grad(draws.sum(), logits)
    assert (slope.mean() - p.variance[0]).abs() < 4 * slope.std() / len(slope) ** 0.5
