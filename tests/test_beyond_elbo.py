"""The pairs of `examples/beyond_elbo.py`: their losses by hand; the MMD and its closed form."""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from pyro.infer import Trace_ELBO

import pvae
from pvae.objectives import inverse_multiquadric, mmd

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
SHAPES = [(1, 6, 5), (3, 4, 7)]


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beyond_elbo = example("beyond_elbo")


# ---- the MMD ----


def rbf(scale):
    """The kernel `exp(-d^2 / (2 scale^2))` of squared distances; its expectations are known."""
    return lambda squared: (-squared / (2 * scale**2)).exp()


def expected_rbf(shift, variance, scale, dim):
    """Returns E exp(-|u|^2 / (2 scale^2)) for u ~ N(shift, variance I), a Gaussian integral."""
    total = scale**2 + variance
    return (scale**2 / total) ** (dim / 2) * math.exp(-dim * shift**2 / (2 * total))


@pytest.mark.parametrize(("shift", "std"), [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0)])
def test_the_mmd_is_unbiased(shift, std):
    """The mean of 4,000 estimates of the MMD of N(0, I) and N(shift, std^2 I) is the closed form.

    The tolerance is 4 standard errors. The MMD is 0 if the two are equal, else far above 0.
    """
    dim, scale = 3, 1.5
    estimates = torch.stack(
        [
            mmd(torch.randn(6, dim), shift + std * torch.randn(9, dim), rbf(scale))
            for _ in range(4000)
        ]
    ).double()
    exact = (
        expected_rbf(0, 2, scale, dim)
        + expected_rbf(0, 2 * std**2, scale, dim)
        - 2 * expected_rbf(shift, 1 + std**2, scale, dim)
    )
    se = estimates.std().item() / math.sqrt(len(estimates))
    assert abs(estimates.mean().item() - exact) < 4 * se
    if (shift, std) == (0.0, 1.0):
        assert exact == pytest.approx(0, abs=1e-12)
    else:
        assert estimates.mean() > 8 * se


def test_the_mmd_is_the_sum_over_pairs():
    a, b = torch.randn(4, 2).double(), torch.randn(3, 2).double()
    kernel = inverse_multiquadric(0.7)

    def k(u, v):
        return 0.49 / (0.49 + (u - v).square().sum())

    total = sum(k(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    total += sum(k(b[i], b[j]) for i in range(3) for j in range(3) if i != j) / 6
    total -= 2 * sum(k(u, v) for u in a for v in b) / 12
    torch.testing.assert_close(mmd(a, b, kernel), total)
    assert torch.autograd.gradcheck(lambda t: mmd(t, b, kernel), a.requires_grad_())


@pytest.mark.parametrize("shapes", [((1, 2), (3, 2)), ((3, 2), (1, 2)), ((3, 2), (3, 4))])
def test_the_mmd_of_too_little_is_refused(shapes):
    with pytest.raises(ValueError, match="two draws"):
        mmd(*(torch.zeros(shape) for shape in shapes), rbf(1.0))


# ---- the programs ----


def made(shape):
    args = argparse.Namespace(latent_dim=3, seed=0, mmd_weight=7.0, error_weight=2.0)
    pairs = beyond_elbo.pairs(args, torch.rand(shape))
    for pair in pairs.values():
        torch.nn.ModuleList([pair.model, pair.guide]).double()
    x = torch.rand(5, *shape, dtype=torch.float64)
    return pairs, x


def loss_and_gradients(pair, loss):
    """Returns the loss, at fixed noise, and its gradient by each parameter of model and guide."""
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    torch.manual_seed(1)
    value = loss()
    return value, torch.autograd.grad(value, parameters)


def by_svi(pair, x):
    with pvae.temper(pair.kl_weight):
        return Trace_ELBO().differentiable_loss(pair.model, pair.guide, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_aggregate_is_regularized_once_for_the_batch(shape):
    """SVI's loss is -sum log N(x; loc, 0.1^2) + lambda B MMD^2; all gradients agree too."""
    pairs, x = made(shape)
    pair = pairs["MMD"]

    def by_hand():
        z = pair.guide.posterior(x).rsample()
        prior_draws = torch.randn(len(x), 3, dtype=torch.float64)
        error = (x - pair.picture(z)).square().sum() / (2 * 0.1**2)
        constant = x.numel() * math.log(0.1 * math.sqrt(2 * math.pi))
        kernel = inverse_multiquadric(math.sqrt(6))
        return error + constant + 7 * len(x) * mmd(z, prior_draws, kernel)

    expected = loss_and_gradients(pair, by_hand)
    torch.testing.assert_close(loss_and_gradients(pair, lambda: by_svi(pair, x)), expected)


def test_the_discrepancy_moves_the_encoder_alone():
    pairs, x = made(SHAPES[0])
    pair = pairs["MMD"]
    _, full = loss_and_gradients(pair, lambda: by_svi(pair, x))
    pair.model.weight = 0.0
    _, without = loss_and_gradients(pair, lambda: by_svi(pair, x))
    moved = [not torch.allclose(a, b) for a, b in zip(full, without, strict=True)]
    decoder = len(list(pair.model.parameters()))
    assert not any(moved[:decoder])
    assert all(moved[decoder:])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_of_ones_own_is_added_as_it_stands(shape):
    """SVI's loss is the sum over images of w e(x, m(z)) + log q(z|x) - log p(z)."""
    pairs, x = made(shape)
    pair = pairs["own error"]

    def by_hand():
        q = pair.guide.posterior(x)
        z = q.rsample()
        m = pair.picture(z)
        log_p = -(z.square() + math.log(2 * math.pi)).sum() / 2
        total = q.log_prob(z).sum() - log_p
        t = x - m
        for part in (t, t[..., 1:, :] - t[..., :-1, :], t[..., 1:] - t[..., :-1]):
            total = total + 2 * (part**2 + 0.001**2).sqrt().sum()
        return total

    expected = loss_and_gradients(pair, by_hand)
    torch.testing.assert_close(loss_and_gradients(pair, lambda: by_svi(pair, x)), expected)


def test_an_error_bounds_nothing_and_is_not_reported_as_if_it_did():
    pairs, x = made(SHAPES[0])
    test = pvae.data.Split(x, None)
    elbos = {name: beyond_elbo.measured(pair, test, 0)["elbo"] for name, pair in pairs.items()}
    assert [name for name, elbo in elbos.items() if elbo is None] == ["own error"]


def test_the_four_start_alike():
    pairs, x = made(SHAPES[0])
    first, *others = (pair.guide.posterior(x).mean for pair in pairs.values())
    assert all(torch.equal(first, other) for other in others)


def test_the_example(tmp_path, capsys):
    argv = ["--dataset", "digits", "-n", "1", "-b", "512", "--latent-dim", "2", "--quiet"]
    beyond_elbo.main([*argv, "--out", str(tmp_path / "r")])
    numbers = json.loads((tmp_path / "r" / "results.json").read_text())
    assert list(numbers) == ["fixed scale", "scale from net", "MMD", "own error"]
    assert (tmp_path / "r" / "beyond_elbo.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "MMD^2 of 179 draws" in said
    assert "is not a likelihood" in said
    row = next(line for line in said.splitlines() if line.startswith("  own error "))
    assert row.split()[2] == "none"


@pytest.mark.parametrize("flag", ["--mmd-weight", "--error-weight"])
def test_a_weight_below_zero_is_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} must be at least 0, not -1"):
        beyond_elbo.main([flag, "-1"])
