"""Label joins, pairs conditional on labels, and the examples that draw what they learn."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import BY_HAND, PAIRS, SHAPES, images
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from test_elbo import assert_same
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pvae
from pvae import VAE, ConcatLabel, Conditional, Guide, Model, checkpoint, evaluate, plots, report
from pvae.builder import OBJECTIVES
from pvae.crosscheck import _Draws
from pvae.data import Observed, Split
from pvae.heads import Normal, NormalFixedScale, from_log_scale
from pvae.priors import StandardNormal

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
K = 4  # classes
Y = torch.tensor([0, 3, 1, 1, 2, 0])


def conditional(likelihood="bernoulli", guide="normal", shape=(1, 8, 8), net="conv", latent_dim=3):
    return pvae.build(shape, latent_dim, net, likelihood, guide, hidden=16, num_classes=K)


# ---- the join ----

LEADS = [  # leading dimensions of v, and the shape of y
    ((), ()),
    ((3,), (3,)),
    ((2, 3), (3,)),  # particles
    ((2, 3), (2, 3)),
    ((3,), (K, 1)),  # a label enumerated to the left of the batch
    ((2, 3), (K, 1, 1)),  # the same with particles
    ((2, 1, 3), (K, 1)),
    ((5, 1), (K,)),  # one style a row, one label a column
    ((1,), (3,)),
    ((2, 3), ()),  # one label for all
]


def at(t, index, lead):
    """`t[index]` where the leading dimensions `lead` of `t` broadcast against `index`."""
    own = index[len(index) - len(lead) :]
    return t[tuple(0 if size == 1 else i for i, size in zip(own, lead, strict=True))]


@pytest.mark.parametrize("event", [(2,), (1, 4, 3), (3, 2, 5)])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("lead", "y_shape"), LEADS)
def test_the_join_is_a_loop_over_every_v_and_y(lead, y_shape, event, flatten):
    v, y = torch.randn(*lead, *event), torch.randint(K, y_shape)
    join = ConcatLabel(K, event_dim=len(event), flatten=flatten)
    joined = join(v, y)
    batch = torch.broadcast_shapes(lead, y_shape)
    assert joined.shape == (*batch, *join.joined_shape(event))
    for index in itertools.product(*map(range, batch)):
        one, label = at(v, index, lead), int(at(y, index, y_shape))
        one = one.flatten() if flatten else one
        assert torch.equal(joined[index][: len(one)], one)
        for k, plane in enumerate(joined[index][len(one) :]):
            assert (plane == float(k == label)).all()


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize(("lead", "y_shape"), LEADS)
def test_a_conditional_is_a_loop_over_every_v_and_y(lead, y_shape, net):
    vae = conditional(net=net).double()
    y = torch.randint(K, y_shape)
    batch = torch.broadcast_shapes(lead, y_shape)
    for module, event in (
        (vae.model.likelihood, (3,)),
        (vae.guide.posterior, (1, 8, 8)),
    ):
        v = torch.randn(*lead, *event, dtype=torch.float64)
        raw = module.raw(v, y)
        assert module(v, y).batch_shape == batch
        for index in itertools.product(*map(range, batch)):
            alone = module.raw(at(v, index, lead)[None], at(y, index, y_shape)[None])[0]
            torch.testing.assert_close(raw[index], alone, rtol=1e-12, atol=1e-12)


def test_a_joined_label_is_a_bias_of_its_own_in_the_first_layer():
    """W [v, one_hot(y)] + b = W_v v + (W_y[:, y] + b)."""
    vae, x = conditional(net="mlp").double(), images("bernoulli", (1, 8, 8))
    first = vae.guide.posterior.net.hidden[0]
    w_v, w_y = first.weight.split([64, K], dim=1)
    by_hand = x.flatten(1) @ w_v.T + w_y.T[Y] + first.bias
    joined = vae.guide.posterior.join(x, Y)
    torch.testing.assert_close(first(joined), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("v", "y", "message"),
    [
        ((3, 2), torch.tensor([0, 4, 1]), r"the label 4; .* 0 to 3 \(num_classes is 4\)"),
        ((3, 2), torch.tensor([0, -1, 1]), "the label -1"),
        ((3, 2), torch.zeros(3), "dtype torch.float32"),
        ((3, 2), torch.zeros(3, dtype=torch.bool), "dtype torch.bool"),
        ((3, 2), torch.tensor([0, 1]), r"v \(3, 2\) and y \(2,\) do not broadcast"),
        ((3, 2), torch.zeros(5, 2, dtype=torch.long), r"v \(3, 2\) and y \(5, 2\)"),
        ((), torch.tensor([0]), r"v \(\) and y \(1,\)"),
    ],
)
def test_bad_labels(v, y, message):
    with pytest.raises(ValueError, match=message):
        ConcatLabel(K)(torch.zeros(v), y)


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"num_classes": 3, "event_dim": 0}])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        ConcatLabel(**sizes)


def test_a_conditional_pair_needs_its_labels():
    vae = conditional()
    for call in (lambda: vae.encode(torch.zeros(6, 1, 8, 8)), lambda: vae.sample(2)):
        with pytest.raises(ValueError, match="y is missing"):
            call()


# ---- the pair as Pyro programs, against the hand-written ELBO and exact marginals ----


def loss_and_noise(vae, x, y, elbo):
    """Pyro's loss, its gradients (left in .grad), and the standard noise of the guide's draws."""
    vae.zero_grad(set_to_none=True)
    with _Draws() as draws:
        loss = elbo.loss_and_grads(vae.model, vae.guide, x, y)
    z = draws.stacked()["z"].detach()
    q = vae.encode(x, y).base_dist
    return loss, ((z - q.loc) / q.scale).detach().reshape(-1, *q.loc.shape)


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_both_elbos_are_the_closed_form_at_the_same_noise(likelihood, guide, shape, net):
    vae, x = conditional(likelihood, guide, shape, net).double(), images(likelihood, shape)
    loss, noise = loss_and_noise(vae, x, Y, TraceMeanField_ELBO())
    assert_same(vae, loss, -vae.oracle.terms(x, Y, noise=noise[0]).elbo().sum(), 1e-10)
    loss, noise = loss_and_noise(vae, x, Y, Trace_ELBO())
    assert_same(vae, loss, -vae.oracle.terms(x, Y, noise=noise[0]).elbo_sampled().sum(), 1e-10)


@pytest.mark.parametrize("name", BY_HAND)
def test_named_objectives_with_particles(name):
    vae, x = conditional().double(), images("bernoulli", (1, 8, 8))
    loss, noise = loss_and_noise(vae, x, Y, OBJECTIVES[name].elbo(4))
    by_hand = OBJECTIVES[name].by_hand(vae.oracle.terms(x, Y, noise=noise), 1.0)
    assert_same(vae, loss, by_hand, 1e-10)


def linear_pair(latent_dim=2, size=5, scale=0.3):
    """A linear normal p(x|z, y) whose columns are orthogonal, its exact posterior, and the exact
    log p(x|y) = log N(x; V_y + b, W W' + scale^2 I)."""
    w = torch.linalg.qr(torch.randn(size, latent_dim, dtype=torch.float64)).Q * 1.7
    v, b = torch.randn(size, K, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    decoder = nn.Linear(latent_dim + K, size).double()
    encoder = nn.Linear(size + K, 2 * latent_dim).double()
    variance = 1 / (1 + 1.7**2 / scale**2)
    a = w.T * variance / scale**2
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([w, v], dim=1))
        decoder.bias.copy_(b)
        encoder.weight.zero_()
        encoder.weight[:latent_dim] = torch.cat([a, -a @ v], dim=1)
        encoder.bias[:latent_dim] = -a @ b
        encoder.bias[latent_dim:] = math.log(variance) / 2
    likelihood = Conditional(
        decoder, NormalFixedScale((size,), scale=scale), event_dim=1, join=ConcatLabel(K)
    )
    head = Normal((latent_dim,), link=from_log_scale)
    posterior = Conditional(encoder, head, event_dim=1, join=ConcatLabel(K))
    prior = StandardNormal(latent_dim).double()

    def log_marginal(x, y):
        covariance = w @ w.T + scale**2 * torch.eye(size, dtype=torch.float64)
        return dist.MultivariateNormal(v.T[y] + b, covariance).log_prob(x)

    return VAE(Model(prior, likelihood), Guide(posterior)), log_marginal


def test_at_the_exact_posterior_every_bound_is_log_p_of_x_given_y():
    vae, log_marginal = linear_pair()
    x = torch.randn(6, 5, dtype=torch.float64)
    exact = log_marginal(x, Y)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x, Y)
    assert loss == pytest.approx(-exact.sum().item(), rel=1e-10)
    tight = evaluate.importance_weighted(vae.model, vae.guide, x, Y, num_samples=3)
    torch.testing.assert_close(tight, exact, rtol=1e-10, atol=1e-10)
    # told a wrong label, the same image has another marginal
    wrong = (Y + 1) % K
    told = evaluate.importance_weighted(vae.model, vae.guide, x, wrong, num_samples=3)
    torch.testing.assert_close(told, log_marginal(x, wrong), rtol=1e-10, atol=1e-10)
    assert (told - tight).abs().min() > 0.01


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_an_enumerated_label_is_the_sum_over_labels(net):
    """log sum_y p(y) p(x|z, y) by TraceEnum_ELBO, against each label given in turn."""
    vae, x = conditional(net=net).double(), images("bernoulli", (1, 8, 8))
    z = torch.randn(6, 3, dtype=torch.float64)
    p_y = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(p_y), infer={"enumerate": "parallel"})
            pyro.sample("x", vae.decode(z, y), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    each = [vae.decode(z, torch.full((6,), k)).log_prob(x) for k in range(K)]
    by_hand = (torch.stack(each) + p_y.log()[:, None]).logsumexp(0).sum().item()
    assert loss == pytest.approx(-by_hand, rel=1e-10)


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_moves_and_the_label_is_learned(net, shape):
    """Images that are all their label's: of all of them, a drawn image is nearest to its own.

    The KL's weight of 10 makes z dear, so that only the label can tell them.
    """
    vae = conditional(shape=shape, net=net).to(memory_format=torch.channels_last)
    patterns = (torch.rand(K, *shape) > 0.5).float()
    y = torch.arange(K).repeat(8)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    for _ in range(60):
        with pvae.temper(10.0):
            svi.step(patterns[y], y)
    assert all(not torch.equal(p, before[name]) for name, p in vae.named_parameters())
    drawn = vae.sample(y=torch.arange(K))
    distances = torch.cdist(drawn.flatten(1), patterns.flatten(1))
    assert distances.argmin(1).tolist() == list(range(K))


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_saved_and_loaded_it_gives_the_same_numbers(tmp_path, net):
    vae, x, z = conditional(net=net), images("bernoulli", (1, 8, 8)).float(), torch.randn(6, 3)
    checkpoint.save(tmp_path / "v.pt", {"model": vae.state_dict(), "recipe": vae.recipe})
    again = pvae.load(tmp_path / "v.pt")
    for a, b in zip(vae.terms(x, {"z": z}, Y), again.terms(x, {"z": z}, Y), strict=True):
        assert torch.equal(a, b)


def test_the_classic_sizes():
    """784-400-20: one bias and one weight for each pair of units that are joined."""
    layers = [(784, 400), (400, 40), (20, 400), (400, 784)]
    classic = sum((i + 1) * o for i, o in layers)
    for num_classes, expected in ((None, classic), (10, classic + 2 * 10 * 400)):
        vae = pvae.build((1, 28, 28), 20, "mlp", hidden=400, num_classes=num_classes)
        assert sum(p.numel() for p in vae.parameters()) == expected


# ---- the report of a conditional pair ----


def observed(n=40, shape=(1, 8, 8)):
    split = Split(torch.randint(256, (n, *shape), dtype=torch.uint8), torch.arange(n) % K)
    return Observed("grey", split, split, split, None)


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_a_conditional_pair_is_reported(tmp_path, latent_dim, monkeypatch):
    vae = conditional("continuous_bernoulli", net="mlp", latent_dim=latent_dim)
    numbers = report.results(vae, observed(), labels=True, quiet=True)
    assert numbers["test_elbo"] < numbers["iwae_500"]
    report.progress_picture(vae, observed(), 1, tmp_path, labels=True)
    assert (tmp_path / "progress" / "epoch_001.png").exists()

    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.stem: figure}))
    epoch = {"epoch": 1, "train_elbo": -1.0, "validation_elbo": -1.0, "beta": 1.0}
    epoch |= {"validation_reconstruction": -1.0, "validation_kl": 0.0}
    report.pictures(vae, observed(), [epoch], tmp_path, numbers, labels=True)
    assert ("manifold" in figures) == (latent_dim == 2)
    labels = [text.get_text() for text in figures["samples"].axes[0].get_xticklabels()]
    assert labels == ["0", "1", "2", "3"]


def test_interpolations_keep_the_label(tmp_path, monkeypatch):
    """Both ends of each row are of the label that is given."""
    vae, seen = conditional(net="mlp", latent_dim=2), []
    monkeypatch.setattr(
        vae,
        "interpolate",
        lambda start, end, y: seen.append((start, end, y)) or torch.zeros(len(y), 2, 1, 8, 8),
    )
    x, y = report._first(observed().test, 40)
    report._interpolations(vae, x, y, labels=True)
    ((start, end, given),) = seen
    label = {image.numpy().tobytes(): int(k) for image, k in zip(x, y, strict=True)}
    assert [label[image.numpy().tobytes()] for image in end] == given.tolist()
    assert [label[image.numpy().tobytes()] for image in start] == given.tolist()


# ---- the examples ----


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("likelihood", "constant"), [("bernoulli", 0.0), ("gaussian", 64 * math.log(2 * math.pi) / 2)]
)
def test_the_autoencoder_is_the_vae_without_noise_and_kl(likelihood, constant):
    """Its loss and gradient are those of the oracle's reconstruction term at noise 0; and of
    SVI's loss at beta 0 as the posterior's scale goes to 0."""
    autoencoder_loss = example("autoencoder").autoencoder_loss
    vae = pvae.build((1, 8, 8), 3, "mlp", likelihood, hidden=16).double()
    x = images(likelihood, (1, 8, 8))
    encoder, decoder = vae.guide.posterior.net, vae.model.likelihood.net
    loss = autoencoder_loss(x, encoder, decoder, likelihood)
    loss.backward()
    terms = vae.oracle.terms(x, noise=torch.zeros(6, 3, dtype=torch.float64))
    by_hand = -(terms.reconstruction + constant).sum()
    assert_same(vae, loss.item(), by_hand, 1e-10)

    with torch.no_grad():
        encoder.out.bias[3:] = -80.0  # log-variance: a scale of 4e-18
    with pvae.temper(0.0):
        limit = Trace_ELBO().loss(vae.model, vae.guide, x)
    assert limit - 6 * constant == pytest.approx(loss.item(), rel=1e-10)


def test_the_autoencoder_of_the_tutorials():
    """With the networks as plain Sequentials, so that nothing of ours takes part."""
    encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(3, 64)
    x = images("bernoulli", (1, 8, 8)).float().flatten(1)
    loss = example("autoencoder").autoencoder_loss(x, encoder, decoder, "bernoulli")
    logits = decoder(encoder(x)[:, :3])
    expected = binary_cross_entropy_with_logits(logits, x, reduction="none").sum()
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """200 digits as they are, 8x8: small enough that a run is mostly start-up."""
    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, images=np.uint8(digits.images[:200] * 15), labels=digits.target[:200])
    return path


def run_example(name, tmp_path, small, *argv):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--dataset", small, "-n", "1", "--quiet"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--out", tmp_path / "r", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((tmp_path / "r" / "results.json").read_text())


def pngs(folder):
    return {path.stem for path in folder.glob("*.png")}


@pytest.mark.slow
def test_cvae(tmp_path, small):
    stdout, numbers = run_example("cvae", tmp_path, small, "--latent-dim", "2")
    assert set(numbers) == {"VAE", "CVAE", "seconds"}
    assert "log p(x|y)" in stdout
    assert "CVAE - log 10" in stdout
    usual = {"curves", "interpolations", "latents", "manifold", "reconstructions", "samples"}
    assert pngs(tmp_path / "r" / "vae") == usual | {"progress"}
    assert pngs(tmp_path / "r" / "cvae") == usual | {"progress", "styles"}
    again = pvae.load(tmp_path / "r" / "cvae")
    assert again.sample(y=torch.arange(10)).shape == (10, 1, 8, 8)


@pytest.mark.slow
def test_autoencoder(tmp_path, small):
    stdout, numbers = run_example("autoencoder", tmp_path, small, "--latent-dim", "2")
    assert "elbo" not in numbers["autoencoder"]
    vae = numbers["VAE"]
    assert vae["elbo"] == pytest.approx(vae["reconstruction"] - vae["kl"], abs=1e-3)
    names = {"reconstructions", "samples", "codes_autoencoder", "codes_VAE"}
    assert pngs(tmp_path / "r") == names
    assert "bounds nothing" in stdout


@pytest.mark.slow
def test_manifold(tmp_path, small):
    _, numbers = run_example("manifold", tmp_path, small)
    assert numbers["test_elbo"] < numbers["iwae_500"]
    assert {"manifold", "latents"} <= pngs(tmp_path / "r")
    assert pvae.load(tmp_path / "r").recipe["activation"] == "relu"
