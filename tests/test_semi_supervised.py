"""The model M2: its losses equal sums written by hand, without Pyro; a short run of the example."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pvae
from pvae import closed_form, evaluate
from pvae.data import load, observe

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
SHAPES = [(1, 6, 5), (3, 4, 7)]
K, D, B = 4, 3, 5


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


m2 = example("semi_supervised")


def pair(shape):
    model, guide = m2.m2(torch.rand(shape), K, D, hidden=8)
    nn.ModuleList([model, guide]).double()
    return model, guide, (torch.rand(B, *shape) > 0.5).double()


def log_joint_over_posterior(model, guide, x, y, noise):
    """Returns log p(x|z,y) + log p(y) + log p(z) - log q(z|x,y), `(B,)`, at the noise `(B, D)`.

    It takes only the raw outputs of the networks from the pair.
    """
    one_hot = torch.eye(K, dtype=x.dtype)[y]
    raw = guide.posterior.net(torch.cat([x.flatten(1), one_hot], 1))
    loc, log_scale = closed_form.loc_log_variance(raw)
    z = loc + log_scale.exp() * noise
    logits = model.likelihood.net(torch.cat([z, one_hot], 1))
    kl = closed_form.kl_normal_sampled(z, loc, log_scale)
    return closed_form.bernoulli(x, logits) - math.log(K) - kl


def with_gradients(model, guide, loss):
    torch.manual_seed(3)
    value = loss()
    parameters = [*model.parameters(), *guide.parameters()]
    return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unseen_label_is_summed_out(shape):
    """The loss is -U(x), U(x) = sum_y q(y|x) (L(x, y) - log q(y|x)); all gradients agree too."""
    model, guide, x = pair(shape)

    def by_hand():
        noise = torch.randn(K, B, D, dtype=x.dtype)
        log_q = guide.classifier.net(x).log_softmax(-1)  # (B, K)
        total = x.new_zeros(B)
        for k in range(K):
            y = torch.full((B,), k)
            bound = log_joint_over_posterior(model, guide, x, y, noise[k])
            total = total + log_q[:, k].exp() * (bound - log_q[:, k])
        return -total.sum()

    def by_pyro():
        return m2.UNLABELLED.differentiable_loss(model, guide, x)

    expected = with_gradients(model, guide, by_hand)
    torch.testing.assert_close(with_gradients(model, guide, by_pyro), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seen_label_is_data(shape):
    """The loss is -L(x, y) - alpha log q(y|x) at the same noise; all gradients agree too."""
    model, guide, x = pair(shape)
    y = torch.tensor([0, 1, 2, 3, 3])

    def by_hand():
        bound = log_joint_over_posterior(model, guide, x, y, torch.randn(B, D, dtype=x.dtype))
        log_q = guide.classifier.net(x).log_softmax(-1)
        return -(bound + 7 * log_q[torch.arange(B), y]).sum()

    def by_pyro():
        return m2.LABELLED.differentiable_loss(m2.Labelled(model, guide, 7.0), guide, x, y)

    expected = with_gradients(model, guide, by_hand)
    torch.testing.assert_close(with_gradients(model, guide, by_pyro), expected)


def test_both_bounds_are_below_the_evidence():
    """E U(x) <= log p(x) and E L(x, y) <= log p(x, y), each within 5 standard errors.

    Importance sampling over z gives p(x, y) for each y; their sum over y is p(x).
    """
    model, guide, x = pair(SHAPES[0])
    joint = []
    with torch.no_grad(), evaluate.fixed_noise("cpu", 0):
        for k in range(K):
            y = torch.full((B,), k)
            draws = [
                log_joint_over_posterior(model, guide, x, y, torch.randn(B, D).double())
                for _ in range(500)
            ]
            log_weights = torch.stack(draws)  # (500, B)
            joint.append(log_weights.logsumexp(0) - math.log(500))  # log p(x, y = k)
            mean = log_weights.mean(0)
            se = log_weights.std(0) / math.sqrt(500)
            assert (mean < joint[-1] + 5 * se).all()
        evidence = torch.stack(joint).logsumexp(0).sum()
        losses = [m2.UNLABELLED.loss(model, guide, x) for _ in range(200)]
        se = np.std(losses) / math.sqrt(len(losses))
        assert -np.mean(losses) < evidence + 5 * se


def test_every_parameter_moves_and_the_classifier_learns():
    """Each pixel of a half differs between two classes: from 1 label each, SVI finds the others."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.rand(200, 1, 5, 4).lt(0.2).float()
    x[:, :, :, :2] = torch.where(y[:, None, None, None] == 1, 1 - x[:, :, :, :2], x[:, :, :, :2])
    model, guide = m2.m2(x.mean(0), 2, D, hidden=8)
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    batches = iter([(x, (x[:2], y[:2]))] * 150)
    m2.fit_m2(model, guide, batches, steps=150, rate=0.01, alpha=20.0, title="", quiet=True)
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    share, _ = m2.accuracy(guide.classifier, pvae.data.Split((x * 255).byte(), y))
    assert share > 0.97


def test_labels_are_drawn_evenly_over_the_classes():
    labels = torch.arange(30) % 3
    few = m2.per_class(torch.arange(30).reshape(30, 1, 1, 1), labels, 6, 3)
    assert few.labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(few.images.flatten() % 3, few.labels)


def test_the_usual_numbers_of_labels_are_those_that_there_are():
    assert m2.how_many(None, 1200, 10) == [100, 300, 1000]
    assert m2.how_many(None, 50, 10) == [50]
    assert m2.how_many([20, 50], 50, 10) == [20, 50]


def run(tmp_path, *argv):
    m2.main(["--dataset", "digits", "--quiet", "--out", str(tmp_path / "r"), *argv])


def test_the_example(tmp_path, capsys):
    run(tmp_path, "-n", "1", "-b", "500", "--labels", "50", "100")
    numbers = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [row["labels"] for row in numbers["rows"]] == [50, 100]
    for name in ("accuracy.png", "styles.png", "config.json"):
        assert (tmp_path / "r" / name).exists()
    assert "accuracy, M2" in capsys.readouterr().out


def test_styles_have_the_names_of_the_classes():
    digits = load("digits")
    study = SimpleNamespace(
        dataset=SimpleNamespace(class_names=[f"digit {k}" for k in range(10)]),
        data=observe(digits, "dynamic"),
    )
    axes = m2.styles(*m2.m2(digits.mean_image, 10, 2, hidden=8), study, 100).axes[0]
    assert axes.get_xticklabels()[1].get_text() == "digit 0"
    assert axes.get_yticklabels()[0].get_text().startswith("taken for digit ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--labels", "5000"], "--labels must be from 10 to [0-9,]+, not 5,000"),
        (["--labels", "100", "9"], "--labels must be from 10 to [0-9,]+, not 9"),
        (["--alpha", "-1"], "--alpha must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *argv)
