"""The examples of the variational-inference course: their laws by an oracle, and short runs."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import example, tiny
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pvae
from pvae import Conditional, Guide, Model, evaluate, evaluation
from pvae.data import load, observe, pixels
from pvae.heads import Normal, NormalFixedScale
from pvae.priors import StandardNormal

X = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()


amortization = example("amortization")
bayesian_decoder = example("bayesian_decoder")
gaussian_prior = example("gaussian_prior")
latent_class = example("latent_class")


# ---- amortized inference against inference for each image ----


def linear_pair():
    """Returns a linear pair, data x, the exact posterior of x and log p(x).

    The model is p(z) N(x; W z, s^2 I) with s = 1/2 and orthogonal columns w_d in W. So the
    posterior is mean-field, N(w_d'x / (|w_d|^2 + s^2), s^2 / (|w_d|^2 + s^2)), and
    x ~ N(0, W W' + s^2 I).
    """
    q, _ = torch.linalg.qr(torch.randn(5, 2))
    w = q * torch.tensor([2.0, 0.7])
    net = nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        net.weight.copy_(w)
    likelihood = Conditional(net, NormalFixedScale((5,), scale=0.5), event_dim=1)
    posterior = Conditional(nn.Linear(5, 4), Normal((2,)), event_dim=1)
    vae = pvae.VAE(Model(StandardNormal(2), likelihood), Guide(posterior))
    evidence = dist.MultivariateNormal(torch.zeros(5), w @ w.T + 0.25 * torch.eye(5))
    x = evidence.sample((20,))
    precision = (w**2).sum(0) + 0.25
    exact = dist.Normal(x @ w / precision, (0.25 / precision).sqrt()).to_event(1)
    return vae, x, exact, evidence.log_prob(x)


def factors_of(vae, x):
    factors = evaluate.one_factor_each(vae.guide, x)
    index = torch.arange(len(x))
    return factors, lambda x, y=None: factors(x, y, index=index)


def test_the_factors_start_as_the_encoder():
    vae = tiny()
    _, per_image = factors_of(vae, X)
    encoder, factor = (amortization.elbos(vae, g, X, seed=3) for g in (vae.guide, per_image))
    torch.testing.assert_close(factor, encoder)


def test_optimized_factors_are_the_exact_posteriors():
    """If the family contains the posterior, optimized factors reach it: only amortization costs.

    ELBO(q) = log p(x) - KL(q || p(z|x)). The KL must be below 0.02 nats, and the mean ELBO of the
    images within 0.02 nats and 5 standard errors of the mean evidence.
    """
    vae, x, exact, evidence = linear_pair()
    decoder = [p.clone() for p in vae.model.parameters()]
    factors, per_image = factors_of(vae, x)
    encoder = amortization.elbos(vae, vae.guide, x, seed=0)
    evaluate.optimize_factors(vae.model, factors, x, steps=400, learning_rate=0.1, particles=64)
    q = factors.posterior(torch.arange(len(x)))
    assert torch.distributions.kl_divergence(q, exact).max() < 0.02
    factor = amortization.elbos(vae, per_image, x, seed=0)
    mean, se = evaluate.estimate(factor - evidence)
    assert abs(mean) < 5 * se + 0.02
    assert (factor > encoder).all()
    assert all(torch.equal(a, b) for a, b in zip(decoder, vae.model.parameters(), strict=True))


def test_the_factors_of_a_decoder_are_no_worse_than_its_encoder():
    """No image loses at the same noise, except by the error of an estimate from 64 draws."""
    vae = tiny(net="mlp")
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(100):
        svi.step(X)
    factors, per_image = factors_of(vae, X)
    encoder = amortization.elbos(vae, vae.guide, X, seed=0)
    evaluate.optimize_factors(vae.model, factors, X, steps=300, learning_rate=0.02, particles=16)
    gap = amortization.elbos(vae, per_image, X, seed=0) - encoder
    assert (gap > -0.05).all()
    assert gap.mean() > 0


# ---- classes summed out ----

CLASSES = 4


def mixture():
    return latent_class.mixture(CLASSES, torch.randn(1, 8, 8)).double()


def styled():
    pair = latent_class.styled(torch.randn(CLASSES, 1, 8, 8), 3)
    model, guide = (program.double() for program in pair)
    for parameter in model.likelihood.net.change.out.parameters():
        nn.init.normal_(parameter, std=0.3)  # the start is zero, at which the style has no effect
    return model, guide


def log_joint(likelihood, x, *z):
    """Returns log p(y) + log p(x | ..., y) of each class y, `(B, K)`, in a loop over classes."""
    each = [
        likelihood(*z, torch.full((len(x),), y)).log_prob(x) - math.log(CLASSES)
        for y in range(CLASSES)
    ]
    return torch.stack(each, dim=1)


def gradients(*programs):
    return [p.grad.clone() for program in programs for p in program.parameters()]


def test_the_mixture_is_the_logsumexp_over_its_classes():
    model, x = mixture(), X.double()
    loss = latent_class.ELBO.loss_and_grads(model, latent_class.nothing, x)
    enumerated = gradients(model)
    model.zero_grad()
    by_hand = -log_joint(model.likelihood, x).logsumexp(1).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), rel=1e-12)
    torch.testing.assert_close(enumerated, gradients(model))


def test_the_styled_mixture_is_the_logsumexp_at_the_same_style():
    (model, guide), x = styled(), X.double()
    torch.manual_seed(5)
    loss = latent_class.ELBO.loss_and_grads(model, guide, x)
    enumerated = gradients(model, guide)
    model.zero_grad()
    guide.zero_grad()
    torch.manual_seed(5)
    q = guide.posterior(x)
    z = q.rsample()
    evidence = log_joint(model.likelihood, x, z).logsumexp(1)
    by_hand = -(evidence + model.prior().log_prob(z) - q.log_prob(z)).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), rel=1e-12)
    torch.testing.assert_close(enumerated, gradients(model, guide))


def test_the_most_probable_class_is_that_of_the_joint():
    (model, guide), x = styled(), X.double()
    torch.manual_seed(5)
    found = latent_class.most_probable(model, guide, x)
    torch.manual_seed(5)
    joint = log_joint(model.likelihood, x, guide.posterior(x).sample())
    assert torch.equal(found, joint.argmax(1))
    plain = mixture()
    found = latent_class.most_probable(plain, latent_class.nothing, x)
    assert torch.equal(found, log_joint(plain.likelihood, x).argmax(1))


def test_a_mixture_finds_the_classes_that_there_are():
    templates = (torch.rand(CLASSES, 1, 8, 8) > 0.5).float()
    labels = torch.arange(80) % CLASSES
    x = templates[labels]
    model = latent_class.mixture(CLASSES, torch.zeros(1, 8, 8))
    with torch.no_grad():  # each class starts near one template
        model.likelihood.net[0].weight.add_(templates.flatten(1) - 0.5)
    batches = iter(lambda: x, None)
    latent_class.fit(model, latent_class.nothing, batches, steps=50, rate=0.1, quiet=True)
    y = latent_class.most_probable(model, latent_class.nothing, x)
    named = latent_class.named(y, labels, CLASSES)
    assert named == [(0.25, str(k), 1.0) for k in range(CLASSES)]


def test_an_empty_class_has_no_label():
    y, labels = torch.tensor([0, 0, 0, 2]), torch.tensor([7, 7, 1, 1])
    named = latent_class.named(y, labels, 3)
    assert [c.label for c in named] == ["7", None, "1"]
    assert [c.share for c in named] == [0.75, 0, 0.25]
    assert [c.purity for c in named] == pytest.approx([2 / 3, 0, 1])


def test_a_class_is_called_by_what_its_label_stands_for():
    named = latent_class.named(torch.tensor([0, 1]), torch.tensor([1, 0]), 2, ["bag", "boot"])
    assert [c.label for c in named] == ["boot", "bag"]


# ---- weights as latents ----


def bayesian_pair(images):
    vae = tiny(net="mlp")
    model = bayesian_decoder.BayesianModel(vae.model.prior, vae.model.likelihood, images)
    guide = bayesian_decoder.BayesianGuide(vae.guide.posterior, vae.model.likelihood, images)
    return vae, model.double(), guide.double()


def loss_at(draws, index, elbo, model, guide, x):
    """Returns the loss of the batch `x[index]` with the weights and z of the trace `draws`."""
    part = draws.copy()
    part.nodes.pop("data")
    part.nodes["z"] = {**draws.nodes["z"], "value": draws.nodes["z"]["value"][index]}
    return elbo.loss(model, pyro.poutine.replay(guide, trace=part), x[index])


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_the_weights_are_counted_once_for_each_data_set(elbo):
    """At the same draws, the mean of the losses of two half-batches is the loss of the whole.

    This holds if each half counts its images twice and the weights once; the KL of the weights is
    far from 0, so a wrong count would be seen.
    """
    x = X.double()
    _, model, guide = bayesian_pair(len(x))
    draws = pyro.poutine.trace(guide).get_trace(x)
    whole, first, second = (
        loss_at(draws, index, elbo, model, guide, x)
        for index in (slice(0, 6), slice(0, 3), slice(3, 6))
    )
    assert (first + second) / 2 == pytest.approx(whole, rel=1e-10)
    assert first != pytest.approx(second, rel=1e-6)
    assert bayesian_decoder.weight_kl(model, guide) > 100


def test_the_loss_of_a_batch_by_hand():
    """It is N / B sum_n [KL(q(z_n) || p(z_n)) - log p(x_n | z_n, w)] + KL(q(w) || p(w)), N = 30."""
    x = X.double()
    vae, model, guide = bayesian_pair(30)
    draws = pyro.poutine.trace(guide).get_trace(x)
    loss = loss_at(draws, slice(0, 6), TraceMeanField_ELBO(), model, guide, x)

    weights = {
        name.removeprefix("w."): site["value"]
        for name, site in draws.nodes.items()
        if name.startswith("w.")
    }
    decoder = vae.model.likelihood.double()
    decoder.load_state_dict(weights)
    images = -decoder(draws.nodes["z"]["value"]).log_prob(x)
    q = guide.posterior(x).base_dist
    images = images + 0.5 * (q.loc**2 + q.scale**2 - 1 - 2 * q.scale.log()).sum(1)
    kl = 0.0
    for name, loc in guide.loc.named_parameters():  # KL(N(m, s) || N(0, t))
        s = dict(guide.log_scale.named_parameters())[name].exp()
        t = loc[0].numel() ** -0.5
        kl += (torch.log(t / s) + (s**2 + loc**2) / (2 * t**2) - 0.5).sum().item()
    assert loss == pytest.approx(30 / 6 * images.sum().item() + kl, rel=1e-10)
    assert bayesian_decoder.weight_kl(model, guide).item() == pytest.approx(kl, rel=1e-10)


def test_all_that_is_the_guides_is_trained_and_nothing_else():
    _, model, guide = bayesian_pair(30)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in guide.named_parameters()}
    adam = torch.optim.Adam(guide.parameters(), lr=1e-2)
    SVI(model, guide, pvae.SingleOptimizer(adam), TraceMeanField_ELBO()).step(X.double())
    assert all((p != before[name]).any() for name, p in guide.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_a_drawn_decoder_is_a_draw_of_the_posterior():
    """Over 400 draws, mean and spread of the weights are right within 5 standard errors."""
    vae, _, guide = bayesian_pair(30)
    draws = []
    for _ in range(400):
        bayesian_decoder.draw_weights(vae, guide)
        draws.append(vae.model.likelihood.net.out.weight.detach().clone())
    draws = torch.stack(draws)
    error = (draws.mean(0) - guide.loc.net.out.weight) / (0.01 / 20)
    assert error.abs().max() < 5
    chi2 = (((draws - guide.loc.net.out.weight) / 0.01) ** 2).mean()
    assert abs(chi2 - 1) < 5 * (2 / draws.numel()) ** 0.5


# ---- a Gaussian prior, pushed onto a ring ----


def test_the_rings_density_is_that_of_g():
    """It equals log N(z) - log |det dg/dz|, with the Jacobian by autograd."""
    z = torch.randn(20, 2, dtype=torch.float64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(gaussian_prior.g, v) for v in z])
    by_hand = StandardNormal(2).double()().log_prob(z) - jacobians.det().abs().log()
    found = gaussian_prior.ring_log_density(gaussian_prior.g(z))
    torch.testing.assert_close(found, by_hand)
    assert gaussian_prior.ring_log_density(torch.tensor([0.3, 0.4])) == -torch.inf


# ---- each example, briefly ----

LITTLE = ["--quiet", "--images", "3", "--num-samples", "5", "--annealed-images", "0"]
LITTLE += ["--gap-images", "0", "--nuts-samples", "0"]


def run(module, folder, capsys, *argv):
    """Runs an example briefly; returns its output and the numbers of `results.json`."""
    module.main(["--out", str(folder), "-n", "1", "--quiet", *argv])
    assert json.loads((folder / "config.json").read_text())["seed"] == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out, json.loads((folder / "results.json").read_text())


def test_a_run_of_amortization_is_one_of_its_pair(tmp_path, capsys):
    folder = tmp_path / "r"
    argv = ["--dataset", "digits", "--images", "20", "--steps", "5", "--latent-dim", "2"]
    said, numbers = run(amortization, folder, capsys, *argv)
    assert "amortization gap" in said
    left = {path.name for path in folder.iterdir()}
    assert {"amortization.png", "largest_gaps.png", "best.pt", "metrics.csv"} <= left
    vae, x = pvae.load(folder), pixels(observe(load("digits"), "dynamic").test.first(20).images)
    elbo = amortization.elbos(vae, vae.guide, x, seed=0).mean().item()  # it is the measured pair
    assert elbo == pytest.approx(numbers["ELBO, encoder"]["mean"], rel=1e-6)
    evaluation.main([str(folder), *LITTLE])
    assert (folder / "evaluation.json").exists()


def test_a_run_of_bayesian_decoder(tmp_path, capsys):
    folder = tmp_path / "r"
    argv = ["--dataset", "digits", "--train-images", "100", "1000", "-b", "512"]
    said, numbers = run(bayesian_decoder, folder, capsys, *argv)
    assert "KL(q(w)||p(w))" in said
    assert list(numbers) == ["100", "1000"]
    left = {"config.json", "results.json", "uncertainty.png", "point_100", "point_1000"}
    assert {path.name for path in folder.iterdir()} == {".lock", *left}
    for size in ("100", "1000"):  # the loaded pair is the measured one: same noise, same ELBO
        point = pvae.load(folder / f"point_{size}")
        x = pixels(observe(load("digits"), "dynamic").test.images)
        with evaluate.fixed_noise("cpu", 0):
            elbo = evaluate.elbo(point.model, point.guide, x).elbo.mean().item()
        assert elbo == pytest.approx(numbers[size]["test ELBO, point weights"], rel=1e-6)
    evaluation.main([str(folder / "point_100"), *LITTLE])
    assert (folder / "point_100" / "evaluation.json").exists()


@pytest.mark.slow
def test_a_run_of_gaussian_prior(tmp_path, capsys):
    said, numbers = run(gaussian_prior, tmp_path / "r", capsys, "-b", "4096")
    assert "the ring's own density" in said
    assert len(numbers) == 4
    assert (tmp_path / "r" / "ring.png").exists()


def test_a_run_of_latent_class(tmp_path, capsys):
    argv = ["--dataset", "digits", "-n", "1", "-b", "512", "--classes", "3", "--quiet"]
    latent_class.main([*argv, "--out", str(tmp_path / "r")])
    left = {"config.json", "results.json", "classes.png", "styles.png"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == {".lock", *left}
    said, numbers = capsys.readouterr().out, json.loads((tmp_path / "r/results.json").read_text())
    assert "majority label" in said
    assert f"styled: ELBO {numbers['styled']['ELBO']:.2f} nats per image" in said
    assert sum(c["share"] for c in numbers["mixture"]["classes"]) == pytest.approx(1)


def test_images_without_labels_have_no_classes_to_name(tmp_path):
    np.save(tmp_path / "x.npy", (torch.rand(40, 8, 8) * 255).byte().numpy())
    argv = ["--dataset", str(tmp_path / "x.npy"), "--quiet", "--out", str(tmp_path / "r")]
    with pytest.raises(ValueError, match="has no labels"):
        latent_class.main(argv)
