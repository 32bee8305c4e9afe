"""The examples on the ELBO and on estimators of its gradient: their laws, and one run of each."""

import importlib
import json
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import EXAMPLES
from pyro.infer import Trace_ELBO

import pvae
from pvae import evaluate, evaluation, heads
from pvae.closed_form import LinearGaussian
from pvae.nets import MLP

sys.path.insert(0, str(EXAMPLES))
elbo = importlib.import_module("elbo")
estimators = importlib.import_module("gradient_estimators")

SHAPE = (1, 2, 3)


def exact_model(latent_dim: int = 2) -> LinearGaussian:
    weight = torch.randn(math.prod(SHAPE), latent_dim, dtype=torch.float64)
    return LinearGaussian(weight, torch.randn(math.prod(SHAPE), dtype=torch.float64), 0.6)


def marginal(exact):
    """Returns p(x) as torch's dense multivariate normal."""
    noise = exact.scale**2 * torch.eye(len(exact.mean), dtype=torch.float64)
    return dist.MultivariateNormal(exact.mean, exact.weight @ exact.weight.T + noise)


def posterior(exact, x):
    """Returns p(z|x) by conditioning the joint normal of (z, x), not by the precision of z."""
    gain = exact.weight.T @ torch.linalg.inv(marginal(exact).covariance_matrix)  # (D, E)
    eye = torch.eye(len(gain), dtype=torch.float64)
    loc = (x.flatten(1) - exact.mean) @ gain.T
    return dist.MultivariateNormal(loc, eye - gain @ exact.weight)


def random_q(n: int, latent_dim: int = 2, full: bool = True):
    scale_tril = torch.randn(n, latent_dim, latent_dim, dtype=torch.float64).tril(-1) * full
    scale_tril += (1.5 * torch.randn(n, latent_dim, dtype=torch.float64)).exp().diag_embed()
    return 2 * torch.randn(n, latent_dim, dtype=torch.float64), scale_tril


def images(n: int) -> torch.Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64)


# ---- the linear Gaussian model ----


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_evidence_and_posterior_are_those_of_the_joint_normal(latent_dim):
    exact, x = exact_model(latent_dim), images(7)
    truth = posterior(exact, x)
    torch.testing.assert_close(exact.log_evidence(x), marginal(exact).log_prob(x.flatten(1)))
    torch.testing.assert_close(exact.posterior_loc(x), truth.loc)
    torch.testing.assert_close(exact.precision, truth.precision_matrix[0])


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_elbo_and_gap_are_those_of_torch_and_sum_to_the_evidence(latent_dim, full):
    """log p(x, z) is quadratic in z, so its mean is its value at the loc + tr(Hessian S) / 2."""
    exact, x = exact_model(latent_dim), images(20)
    loc, scale_tril = random_q(20, latent_dim, full)
    q = dist.MultivariateNormal(loc, scale_tril=scale_tril)

    def log_joint(z):
        pixels = dist.Normal(exact.weight @ z + exact.mean, exact.scale).log_prob(x[0].flatten())
        return pixels.sum() + dist.Normal(0, 1).log_prob(z).sum()

    hessian = torch.autograd.functional.hessian(log_joint, loc[0])
    expected = log_joint(loc[0]) + (hessian * q.covariance_matrix[0]).sum() / 2
    truth = expected + q.entropy()[0]
    torch.testing.assert_close(exact.elbo(x, loc, scale_tril)[0], truth)
    kl = torch.distributions.kl_divergence(q, posterior(exact, x))
    torch.testing.assert_close(exact.gap(x, loc, scale_tril), kl)
    total = exact.elbo(x, loc, scale_tril) + exact.gap(x, loc, scale_tril)
    evidence = exact.log_evidence(x)
    assert ((total - evidence).abs() <= 1e-10 * evidence.abs().clamp(min=1)).all()


def test_at_the_posterior_the_elbo_is_the_evidence():
    exact, x = exact_model(), images(5)
    q = posterior(exact, x)
    torch.testing.assert_close(exact.elbo(x, q.loc, q.scale_tril), exact.log_evidence(x))
    assert exact.gap(x, q.loc, q.scale_tril).abs().max() < 1e-10


def test_the_mean_field_gap_is_the_least():
    exact, x = exact_model(), images(1)
    best = exact.precision.diagonal().rsqrt()
    loc = exact.posterior_loc(x)
    at_best = exact.gap(x, loc, best.diag()[None]).item()
    assert at_best == pytest.approx(exact.mean_field_gap(), abs=1e-12)
    assert at_best > 1e-3
    for _ in range(20):
        scale = best * (0.1 * torch.randn(2, dtype=torch.float64)).exp()
        moved = loc + 0.01 * torch.randn(1, 2, dtype=torch.float64)
        assert exact.gap(x, moved, scale.diag()[None]).item() > at_best


def test_fit_is_the_maximum_of_the_likelihood():
    """At the fit, the gradient of the mean log evidence is 0, by autograd of torch's density."""
    x = images(50) * torch.linspace(0.5, 2, 3, dtype=torch.float64)
    exact = LinearGaussian.fit(x, 2)
    weight, mean = exact.weight.clone().requires_grad_(), exact.mean.clone().requires_grad_()
    scale = torch.tensor(exact.scale, dtype=torch.float64, requires_grad=True)
    log_prob = marginal(LinearGaussian(weight, mean, scale)).log_prob(x.flatten(1)).mean()
    for gradient in torch.autograd.grad(log_prob, (weight, mean, scale)):
        assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("latent_dim", [0, 6])
def test_fit_refuses_a_latent_dimension_without_noise(latent_dim):
    with pytest.raises(ValueError, match=f"latent_dim must be .* not {latent_dim}"):
        LinearGaussian.fit(images(10), latent_dim)
    with pytest.raises(ValueError, match="s would be 0"):
        LinearGaussian.fit(torch.zeros(10, 3), 1)


def test_turning_the_latent_axes_leaves_the_evidence_but_not_the_mean_field_bound():
    x = images(50) * torch.linspace(0.5, 3, 3, dtype=torch.float64)
    exact = LinearGaussian.fit(x, 3)
    turned = elbo.turned(exact)
    torch.testing.assert_close(turned.log_evidence(x), exact.log_evidence(x))
    assert exact.mean_field_gap() == pytest.approx(0, abs=1e-10)
    assert turned.mean_field_gap() > 0.01


# ---- the Pyro pair of that model ----


def test_pyros_elbo_is_the_closed_form_one():
    """For a random guide, means of 4,000 draws are within 4 standard errors, for each image."""
    exact, x = exact_model(), images(5)
    model = elbo.linear_model(exact, SHAPE).double()
    guide = elbo.linear_guide(heads.Normal((2,)), SHAPE).double()
    with torch.no_grad():
        q = guide.posterior(x)
        truth = exact.elbo(x, q.mean, q.stddev.diag_embed())
    x = x.repeat(4000, 1, 1, 1)
    draws = evaluate.importance_weighted(model, guide, x, num_samples=1).reshape(4000, 5)
    assert ((draws.mean(0) - truth).abs() < 4 * draws.std(0) / 4000**0.5).all()


def test_with_the_posterior_as_the_guide_every_draw_is_the_evidence():
    """The linear guide with `SharedCovariance` can be p(z|x); then the ELBO has no variance."""
    exact, x = exact_model(), images(5)
    model = elbo.linear_model(exact, SHAPE).double()
    guide = elbo.linear_guide(elbo.SharedCovariance(torch.ones(2, 2)), SHAPE).double()
    truth, net, head = posterior(exact, x), guide.posterior.net.out, guide.posterior.head
    with torch.no_grad():
        scale_tril = truth.scale_tril[0]
        head.raw.copy_(scale_tril.tril(-1) + scale_tril.diagonal().log().diag())
        net.bias.copy_(exact.posterior_loc(torch.zeros_like(x[:1]))[0])
        units = torch.eye(6, dtype=torch.float64)
        net.weight.copy_((exact.posterior_loc(units) - net.bias).T)
    evidence = exact.log_evidence(x).sum().item()
    losses = [Trace_ELBO().loss(model, guide, x) for _ in range(20)]
    assert max(abs(loss + evidence) for loss in losses) < 1e-10 * abs(evidence)
    draws = evaluate.importance_weighted(model, guide, x, num_samples=1)
    torch.testing.assert_close(draws, exact.log_evidence(x), rtol=0, atol=1e-10)


def test_the_mean_field_mask_keeps_the_covariance_diagonal():
    head = elbo.SharedCovariance(torch.eye(3))
    torch.nn.init.normal_(head.raw)
    covariance = head(torch.zeros(4, 3)).covariance_matrix
    torch.testing.assert_close(covariance, covariance.diagonal(dim1=-2, dim2=-1).diag_embed())


# ---- gradient estimators ----

LITTLE = ["--images", "3", "--num-samples", "5", "--annealed-images", "0", "--gap-images", "0"]
LITTLE += ["--nuts-samples", "0"]
NAMES = ["none", "decaying", "neural", "reparameterized"]


@pytest.fixture(scope="module")
def found():
    """The exact gradient, and 100 estimates of it by each estimator for L = 1 and 10."""
    pyro.set_rng_seed(0)
    # as in a VAE, most of an image's cost does not depend on z; a baseline removes this part
    exact, x = exact_model(), 2 * images(6)
    exact = LinearGaussian(0.3 * exact.weight, exact.mean, exact.scale)
    model = elbo.linear_model(exact, SHAPE).double()
    guide = elbo.linear_guide(heads.Normal((2,)), SHAPE).double()
    with torch.no_grad():  # scales near 1 avoid heavy tails, so standard errors can be trusted
        for parameter in guide.parameters():
            parameter.mul_(0.2)
    score = elbo.linear_guide(heads.ScoreFunctionNormal((2,)), SHAPE).double()
    score.load_state_dict(guide.state_dict())
    net = MLP(SHAPE, (1,), hidden=(16,)).double()
    estimators.fit_baseline(model, score, net, x)
    plans = {
        "none": (score, lambda n: estimators.no_baseline),
        "decaying": (score, lambda n: estimators.decaying_average),
        "neural": (score, lambda n: estimators.neural(net, n)),
        "reparameterized": (guide, lambda n: estimators.no_baseline),
    }
    estimates = {
        (name, n): estimators.gradients(model, g, options(n), x, n, 100)
        for name, (g, options) in plans.items()
        for n in (1, 10)
    }
    return estimators.exact_gradient(exact, guide, x), estimates


def variance(estimates):
    """Returns the variance over replicates, summed over parameters, and its standard error."""
    squares = (estimates - estimates.mean(0)).square().sum(1)
    return squares.mean().item(), squares.std().item() / len(squares) ** 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("particles", [1, 10])
def test_every_estimator_is_unbiased(found, name, particles):
    """Each of 20 random projections of the gradient is right within 4 standard errors."""
    truth, estimates = found
    assert estimators.projections(estimates[name, particles], truth).abs().max() < 4
    # the test is sharp enough to find a gradient that is wrong by a third
    if name == "reparameterized":
        assert estimators.projections(estimates[name, particles], truth / 1.5).abs().max() > 4


@pytest.mark.parametrize("name", NAMES)
def test_the_variance_falls_as_one_over_the_draws(found, name):
    """The variance at L = 1 is 10 times that at L = 10, within 4 standard errors."""
    _, estimates = found
    (one, one_se), (ten, ten_se) = (variance(estimates[name, n]) for n in (1, 10))
    assert abs(one - 10 * ten) < 4 * math.hypot(one_se, 10 * ten_se)
    assert one > 4 * ten


def test_baselines_and_reparameterization_reduce_the_variance(found):
    """Each reduces the variance at L = 10 by more than 4 standard errors."""
    _, estimates = found
    value, error = zip(*(variance(estimates[name, 10]) for name in NAMES), strict=True)
    for worse, better in ((0, 1), (0, 2), (1, 3), (2, 3)):
        assert value[better] + 4 * math.hypot(error[better], error[worse]) < value[worse]


def test_the_score_normal_is_not_differentiated_through_its_draws():
    q = heads.ScoreFunctionNormal((2,))(torch.zeros(3, 4, requires_grad=True))
    assert not q.has_rsample
    assert not q.sample().requires_grad
    assert not q.expand((5, 3)).has_rsample


def test_a_baselines_network_is_trained_with_the_guide():
    exact, x = exact_model(), images(6).float()
    model = elbo.linear_model(exact, SHAPE).float()
    guide = elbo.linear_guide(heads.ScoreFunctionNormal((2,)), SHAPE)
    guide.baseline = MLP(SHAPE, (1,), hidden=(4,))
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    adam = pvae.SingleOptimizer(torch.optim.Adam(guide.parameters(), lr=0.01))
    pyro.infer.SVI(model, guide, adam, estimators.objective(1)).step(x)
    for name, p in guide.named_parameters():
        assert not p.equal(before[name]), name


@pytest.mark.parametrize("error", [2.5, -7.25])
def test_the_title_says_how_far_off_the_mean_gradients_are(error):
    found = {
        name: {"variance": [1.0, 0.1, 0.01], "errors": [0.5, error]} for name in estimators.COLOURS
    }
    bias, *_ = estimators.figure(found, {"reparameterized": [-200.0, -100.0]}).axes
    said = f"mean gradients, L = 1: the largest of 8 errors is {abs(error):.1f} se"
    assert bias.get_title() == said
    low, high = bias.get_ylim()
    assert low < error < high


# ---- the examples themselves ----


def run(module, folder, capsys, *argv):
    module.main(
        ["--dataset", "digits", "--quiet", "--out", str(folder), "-n", "1", "-b", "256", *argv]
    )
    return json.loads((folder / "results.json").read_text()), capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_elbo(tmp_path, capsys):
    numbers, shown = run(elbo, tmp_path / "r", capsys, "--latent-dim", "3")
    assert numbers["largest_error"] < 1e-10
    assert "sd of one draw" in shown
    for rows in numbers["curves"].values():
        assert all(row["elbo"] < row["log_evidence"] for row in rows)
        assert rows[-1]["kl"] < rows[0]["kl"]
    files = {path.name for path in (tmp_path / "r").iterdir()}
    assert files == {".lock", "config.json", "results.json", "elbo.png"}


@pytest.mark.slow
def test_a_run_of_gradient_estimators(tmp_path, capsys):
    numbers, shown = run(estimators, tmp_path / "r", capsys, "--replicates", "5")
    assert list(numbers["gradients"]) == list(estimators.COLOURS)
    assert {len(curve) for curve in numbers["validation_elbo"].values()} == {2}
    assert "reparameterized" in shown
    pairs = [path for path in (tmp_path / "r").iterdir() if path.is_dir()]
    assert {path.name for path in pairs} == {"score_function", "score_function_baseline", "normal"}
    for path in pairs:
        assert pvae.load(path).recipe.guide == path.name
    evaluation.main([str(pairs[0]), "--quiet", *LITTLE])
    assert (pairs[0] / "evaluation.json").exists()


def test_one_estimate_has_no_variance(capsys):
    with pytest.raises(SystemExit):
        estimators.main(["--replicates", "1"])
    assert "--replicates must be at least 2, for a variance, not 1" in capsys.readouterr().err
