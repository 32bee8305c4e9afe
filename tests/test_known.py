"""The examples with known numbers: probabilistic PCA, and evaluation of a linear model."""

import json
import math

import pytest
import torch
from conftest import example
from torch.nn.functional import adaptive_avg_pool2d

import pvae
from pvae import evaluate
from pvae.closed_form import LinearGaussian
from pvae.data import load, pixels

ppca, anchors = example("ppca"), example("anchors")


def digits() -> torch.Tensor:
    """Returns the embedded digits at 7x7 pixels, uint8."""
    x = adaptive_avg_pool2d(pixels(load("digits").train.images), 7)
    return (255 * x).round().byte()


@pytest.mark.parametrize("k", [2, 10])
def test_the_evidence_of_ppca_is_that_of_the_eigenvalues(k):
    x = pixels(digits()).double()
    exact = LinearGaussian.fit(x, k)
    values = torch.linalg.eigvalsh(x.flatten(1).T.cov(correction=0)).flip(0)
    size, variance = len(values), values[k:].mean()
    log_det = values[:k].log().sum() + (size - k) * variance.log()
    formula = -(size * math.log(2 * math.pi) + log_det + size) / 2
    assert exact.scale**2 == pytest.approx(variance.item())
    assert exact.log_evidence(x).mean().item() == pytest.approx(formula.item(), abs=1e-8)


def linear_vae_at(exact: LinearGaussian) -> pvae.VAE:
    vae = ppca.linear_vae((1, 7, 7), exact.weight.shape[1]).double()
    ppca.put(exact, vae)
    return vae


def test_at_the_optimum_a_diagonal_guide_is_exact():
    """Every draw of Pyro's ELBO is log p(x), for every image."""
    images = digits()[:50]
    exact = ppca.fitted(digits(), 5)
    vae = linear_vae_at(exact)
    x = pixels(images).double()
    found = evaluate.importance_weighted(vae.model, vae.guide, x, num_samples=1)
    torch.testing.assert_close(found, exact.log_evidence(x), rtol=0, atol=1e-8)


def test_calibration_of_ppca():
    """Calibration passes the exact guide of 10 units, and rejects it with 0.7 of its scales."""
    exact = ppca.fitted(digits(), 10)
    vae = linear_vae_at(exact)
    x = torch.zeros(1000, 1, 7, 7).double()
    assert evaluate.calibration(vae.model, vae.guide, x).p_values.min() > 0.05
    vae.guide.posterior.net.out.bias.data[10:] += 2 * math.log(0.7)
    narrow = evaluate.calibration(vae.model, vae.guide, x).p_values
    assert (narrow < 1e-6).all()


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_turning_the_axes_opens_the_gap_of_the_formula(amount):
    """The gap is 1/2 (sum ln M_ii - ln |M|) with M = W'W + s^2 I; log p(x) does not change.

    Pyro's ELBO of 1,439 images has this gap within 4 standard errors.
    """
    x = pixels(digits()).double()
    best = ppca.fitted(digits(), 5)
    a = torch.randn(5, 5).double()
    exact = ppca.turned(best, a - a.T, amount)
    torch.testing.assert_close(exact.log_evidence(x), best.log_evidence(x))
    m = exact.weight.T @ exact.weight + exact.scale**2 * torch.eye(5)
    formula = (m.diagonal().log().sum() - m.logdet()).item() / 2
    assert formula > 0.02
    vae = linear_vae_at(exact)
    elbo = evaluate.elbo(vae.model, vae.guide, x, num_samples=16).elbo
    gap = evaluate.estimate(exact.log_evidence(x) - elbo)
    assert abs(gap.mean - formula) < 4 * gap.se


@pytest.mark.slow
def test_svi_arrives_at_probabilistic_pca():
    """On digits, SVI comes within 0.5 nats of the optimum, in log evidence and in ELBO."""
    images = digits()
    vae = ppca.linear_vae((1, 7, 7), 3)
    vae.model.likelihood.net.set_output_bias(pixels(images).mean(0))
    watched = pixels(images)
    rows = ppca.train(vae, images, watched, epochs=150, batch_size=500, rate=1e-2, quiet=True)
    best = ppca.log_evidence(ppca.fitted(images, 3), images)
    assert best - 0.5 < rows[-1]["log_evidence"] < best + 1e-3
    assert best - 0.5 < rows[-1]["elbo"] < best + 0.1  # the ELBO is noisy: 32 draws
    assert ppca.as_exact(vae).scale ** 2 == pytest.approx(
        ppca.fitted(images, 3).scale ** 2, rel=0.01
    )


def test_the_anchors_of_evaluation_hold():
    """The claims of the figure are true: k-hat rejects narrow guides, annealing's bounds hold."""
    model = anchors.linear_model()
    x = evaluate.simulate(model, torch.zeros(200, 4)).x
    for row in anchors.tails(model, x[:50]):
        if row["c"] < 1:
            assert abs(row["pareto_k"] - row["theory"]) < 0.1
        else:
            assert row["pareto_k"] < 0


# ---- the titles of the figures ----


@pytest.mark.parametrize("lacks", [0.25, 28.0])
def test_the_title_of_ppca_says_how_far_training_came(lacks):
    rows = [{"step": 1, "elbo": 0.0, "log_evidence": 50.0}]
    rows.append({"step": 2, "elbo": 60.0, "log_evidence": 100.0 - lacks})
    turns = [{"amount": t, "log_p": 100.0, "formula": 3 * t, "pyro": 3 * t} for t in (0.0, 0.5)]
    left, right = ppca.figure(rows, 100.0, turns).axes
    assert left.get_title() == f"SVI ends {lacks:.2f} nats below probabilistic PCA, 100.00"
    assert right.get_title() == "W turned: log p(x) moves by 0e+00, the gap to 1.5"


def test_the_titles_of_the_anchors_say_what_came():
    bounds = [{"k": k, "mean": 1 / k, "se": 0.1} for k in (1, 1000)]
    results = {
        "bounds": {"0.5": bounds, "1.5": bounds},
        "tails": [
            {"c": c, "pareto_k": k, "theory": 1 - c**2, "ess": 0.5}
            for c, k in ((0.3, 0.9), (0.5, 0.69), (1.2, -0.4))
        ],
        "annealing": [
            {"temperatures": t, "lower": -1 / t, "lower_se": 0, "upper": 1 / t, "upper_se": 0}
            for t in (3, 100)
        ],
    }
    titles = [
        axes.get_title()
        for axes in anchors.figure(results, torch.randn(5, 2), torch.zeros(1, 4)).axes
    ]
    assert titles[:3] == [
        "IWAE-1,000 lacks 0.001 nats (c = 0.5), 0.001 nats (c = 1.5)",
        "k-hat is above 0.7 for c = 0.3",
        "100 temperatures: bounds -0.010 and +0.010 off log p(x)",
    ]


# ---- the examples themselves ----


def run(main, folder, capsys, *argv):
    main(["--dataset", "digits", "--quiet", "--out", str(folder), *argv])
    return capsys.readouterr().out, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_run_of_ppca(tmp_path, capsys):
    stdout, numbers = run(ppca.main, tmp_path / "r", capsys, "-n", "1")
    assert "1,618 images" in stdout
    assert [row["k"] for row in numbers["closed_form"]] == [2, 10, 20, 50]
    for row in numbers["turned"]:
        assert row["log_p"] == pytest.approx(numbers["reached"]["elbo_optimum"])
    assert (tmp_path / "r" / "ppca.png").exists()


@pytest.mark.slow
def test_a_run_of_anchors(tmp_path, capsys):
    stdout, numbers = run(anchors.main, tmp_path / "r", capsys, "--images", "20", "--draws", "50")
    assert "the best model that ignores z" in stdout
    assert numbers["collapsed"] < 0
    for name in ("anchors", "collapsed"):
        assert (tmp_path / "r" / f"{name}.png").exists()
