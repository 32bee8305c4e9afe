"""Label joins, pairs conditional on labels, and the examples `cvae.py` and `autoencoder.py`."""

import importlib.util
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from pvae import VAE, ConcatLabel, Conditional, Guide, Model, evaluate, evaluation, plots, report
from pvae.crosscheck import _Draws, by_hand
from pvae.data import Observed, Split, load, observe, pixels
from pvae.heads import Normal, NormalFixedScale, from_log_scale
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal
from pvae.results import Subject, end_of_run

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
K = 4  # classes
Y = torch.tensor([0, 3, 1, 1, 2, 0])


def conditional(likelihood="bernoulli", guide="normal", shape=(1, 8, 8), net="conv", latent_dim=3):
    return pvae.build(shape, latent_dim, net, likelihood, guide, hidden=16, num_classes=K)


# ---- the join ----

LEADS = [  # the leading dimensions of v and the shape of y
    ((), ()),
    ((3,), (3,)),
    ((2, 3), (3,)),  # particles
    ((2, 3), (2, 3)),
    ((3,), (K, 1)),  # the label is enumerated, to the left of the batch
    ((2, 3), (K, 1, 1)),  # enumerated, with particles
    ((2, 1, 3), (K, 1)),
    ((5, 1), (K,)),  # a style for each row, a label for each column
    ((1,), (3,)),
    ((2, 3), ()),  # one label for all images
]


def at(t, index, lead):
    """Returns `t[index]` if the leading dimensions `lead` of `t` broadcast against `index`."""
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
    """The first layer computes W [v, one_hot(y)] + b = W_v v + (W_y[:, y] + b)."""
    vae, x = conditional(net="mlp").double(), images("bernoulli", (1, 8, 8))
    first = vae.guide.posterior.net.hidden[0]
    w_v, w_y = first.weight.split([64, K], dim=1)
    expected = x.flatten(1) @ w_v.T + w_y.T[Y] + first.bias
    joined = vae.guide.posterior.join(x, Y)
    torch.testing.assert_close(first(joined), expected, rtol=1e-12, atol=1e-12)


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
    """Returns Pyro's loss and the standard noise of the guide's draws; sets the gradients."""
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
    elbo = OBJECTIVES[name].elbo(4)
    loss, noise = loss_and_noise(vae, x, Y, elbo)
    loss_by_hand = by_hand(SVI(vae.model, vae.guide, pyro.optim.Adam({}), elbo))
    assert_same(vae, loss, loss_by_hand(vae.oracle.terms(x, Y, noise=noise), 1.0), 1e-10)


def linear_pair(latent_dim=2, size=5, scale=0.3):
    """Returns a linear normal pair whose guide is exact, and log p(x|y) as a function.

    The columns of W are orthogonal, and log p(x|y) = log N(x; V_y + b, W W' + scale^2 I).
    """
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
    # with a wrong label, the same image has another log p(x|y)
    wrong = (Y + 1) % K
    told = evaluate.importance_weighted(vae.model, vae.guide, x, wrong, num_samples=3)
    torch.testing.assert_close(told, log_marginal(x, wrong), rtol=1e-10, atol=1e-10)
    assert (told - tight).abs().min() > 0.01


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_an_enumerated_label_is_the_sum_over_labels(net):
    """TraceEnum_ELBO gives log sum_y p(y) p(x|z, y), the sum by hand over labels."""
    vae, x = conditional(net=net).double(), images("bernoulli", (1, 8, 8))
    z = torch.randn(6, 3, dtype=torch.float64)
    p_y = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(p_y), infer={"enumerate": "parallel"})
            pyro.sample("x", vae.decode(z, y), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, x)
    each = [vae.decode(z, torch.full((6,), k)).log_prob(x) for k in range(K)]
    summed = (torch.stack(each) + p_y.log()[:, None]).logsumexp(0).sum().item()
    assert loss == pytest.approx(-summed, rel=1e-10)


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_moves_and_the_label_is_learned(net, shape):
    """If an image depends on its label alone, a draw for a label is nearest to that label's image.

    The KL has weight 10, so z costs too much and the decoder must use the label.
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
    pvae.save(vae, tmp_path / "v.pt")
    again = pvae.load(tmp_path / "v.pt")
    for a, b in zip(vae.terms(x, {"z": z}, Y), again.terms(x, {"z": z}, Y), strict=True):
        assert torch.equal(a, b)


def test_the_classic_sizes():
    """The net 784-400-20 has the usual number of parameters; labels add weights to two layers."""
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
    numbers = {row.key: row.value.mean for row in end_of_run(Subject(vae, observed(), quiet=True))}
    assert numbers["iwae_elbo"] < numbers["iwae_100"]

    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.stem: figure}))
    trainer = SimpleNamespace(vae=vae, epoch=1)
    report.progress(observed(), tmp_path, 1)(trainer)
    assert "epoch_001" in figures

    epoch = {"epoch": 1, "train_objective": -1.0, "validation_elbo": -1.0, "beta": 1.0}
    epoch |= {"validation_reconstruction": -1.0, "validation_kl": 0.0}
    names = ("a", "b", "c", "d")
    report.pictures(vae, observed(), [epoch], tmp_path, elbo=numbers["elbo"], class_names=names)
    assert ("manifold" in figures) == (latent_dim == 2)
    labels = [text.get_text() for text in figures["samples"].axes[0].get_xticklabels()]
    assert labels == list(names)


def test_a_pair_that_takes_side_vectors_is_drawn(tmp_path, monkeypatch):
    vae = pvae.build((1, 8, 8), 3, "mlp", hidden=4, side_dim=2)
    split = observed().train._replace(labels=torch.rand(40, 2))
    figures, drawn = {}, Observed("dynamic", split, split, split, None)
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.stem: figure}))
    epoch = {"epoch": 1, "train_objective": -1.0, "validation_elbo": -1.0, "beta": 1.0}
    epoch |= {"validation_reconstruction": -1.0, "validation_kl": 0.0}
    report.pictures(vae, drawn, [epoch], tmp_path, elbo=-1.0)
    assert figures["samples"].axes[0].images[0].get_array().shape == (48, 56, 3)  # 40 samples
    assert "label" not in figures["interpolations"].axes[0].get_title()


def test_interpolations_keep_the_label(monkeypatch):
    """Both images at the ends of a row have the label that the pair is given."""
    vae, seen = conditional(net="mlp", latent_dim=2), []
    monkeypatch.setattr(
        vae,
        "interpolate",
        lambda start, end, y: seen.append((start, end, y)) or torch.zeros(len(y), 2, 1, 8, 8),
    )
    test = observed().test
    x, y = pixels(test.images), test.labels
    report._interpolations(vae, x, y, y, report.Drawing.of(observed()))
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
    """Its loss and gradient are those of the oracle's reconstruction term at noise 0.

    They are also the limit of SVI's loss at beta 0 as the posterior's scale goes to 0.
    """
    autoencoder_loss = example("autoencoder").autoencoder_loss
    vae = pvae.build((1, 8, 8), 3, "mlp", likelihood, hidden=16).double()
    x = images(likelihood, (1, 8, 8))
    encoder, decoder = vae.guide.posterior.net, vae.model.likelihood.net
    loss = autoencoder_loss(x, encoder, decoder, likelihood)
    loss.backward()
    terms = vae.oracle.terms(x, noise=torch.zeros(6, 3, dtype=torch.float64))
    expected = -(terms.reconstruction + constant).sum()
    assert_same(vae, loss.item(), expected, 1e-10)

    with torch.no_grad():
        encoder.out.bias[3:] = -80.0  # log-variance: a scale of 4e-18
    with pvae.temper(0.0):
        limit = Trace_ELBO().loss(vae.model, vae.guide, x)
    assert limit - 6 * constant == pytest.approx(loss.item(), rel=1e-10)


def test_the_autoencoder_of_the_tutorials():
    """The networks are plain Sequentials, so no code of pvae but the loss takes part."""
    encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(3, 64)
    x = images("bernoulli", (1, 8, 8)).float().flatten(1)
    loss = example("autoencoder").autoencoder_loss(x, encoder, decoder, "bernoulli")
    logits = decoder(encoder(x)[:, :3])
    expected = binary_cross_entropy_with_logits(logits, x, reduction="none").sum()
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Writes 200 digits of 8x8 pixels, so few that a run takes hardly longer than its start."""
    digits = load_digits()
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, images=np.uint8(digits.images[:200] * 15), labels=digits.target[:200])
    return path


def run_example(name, tmp_path, small, *argv):
    argv = ["--dataset", str(small), "-n", "1", "--quiet", "--out", str(tmp_path / "r"), *argv]
    example(name).main(argv)
    return json.loads((tmp_path / "r" / "results.json").read_text())


def pngs(folder):
    return {path.stem for path in folder.glob("*.png")}


USUAL = {"curves", "interpolations", "latents", "manifold", "reconstructions", "samples"}


def test_cvae(tmp_path, small, capsys):
    numbers = run_example("cvae", tmp_path, small, "--latent-dim", "2")["numbers"]
    assert set(numbers) == {"VAE", "CVAE"}
    less = f"{numbers['CVAE']['elbo']['mean'] - math.log(10):.2f}"
    row = next(line for line in capsys.readouterr().out.splitlines() if "CVAE - log 10" in line)
    assert less in row.split()
    assert pngs(tmp_path / "r" / "vae") == USUAL | {"progress"}
    assert pngs(tmp_path / "r" / "cvae") == USUAL | {"progress", "styles"}


def test_each_pair_of_cvae_is_a_run(tmp_path, small):
    """Each pair can be loaded, and the evaluation repeats the ELBO of the run."""
    numbers = run_example("cvae", tmp_path, small, "--latent-dim", "2", "--conditional")["numbers"]
    run = tmp_path / "r" / "cvae"
    assert pvae.load(run).sample(y=torch.arange(10)).shape == (10, 1, 8, 8)
    none = ["--images", "0", "--annealed-images", "0", "--gap-images", "0", "--nuts-samples", "0"]
    evaluation.main([str(run), *none, "--quiet"])
    again = json.loads((run / "evaluation.json").read_text())["numbers"]
    assert again["elbo"]["mean"] == pytest.approx(numbers["CVAE"]["elbo"]["mean"], abs=1e-3)


@pytest.mark.parametrize(
    "likelihood", ["grey_bernoulli", "gaussian_pixelwise", "discretized_logistic"]
)
def test_cvae_of_grey_pixels(tmp_path, small, capsys, likelihood, monkeypatch):
    """The output says that a head which is not a likelihood gives no bound."""
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(report, "pictures", lambda *args, **options: [])  # also none for the page
    run_example("cvae", tmp_path, small, "--latent-dim", "2", "--likelihood", likelihood)
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "r" / "vae" / "config.json").read_text())
    assert kept["dataset"]["observed"] == "grey"
    assert f"grey, {likelihood} pixels" in said
    assert ("is not a likelihood" in said) == (likelihood == "grey_bernoulli")
    assert said.count(" nothing ") == (2 if likelihood == "grey_bernoulli" else 0)
    assert ("CVAE - log 10" in said) == (likelihood != "grey_bernoulli")


def test_styles_have_the_names_of_the_classes(small):
    dataset = replace(load(str(small)), class_names=tuple("abcdefghij"))
    vae = pvae.build((1, 8, 8), 2, "mlp", hidden=8, num_classes=10)
    figure = example("cvae").styles(vae, dataset)
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names == list(dataset.class_names)


def test_without_labels_there_is_no_cvae(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="no labels to condition on: --no-conditional"):
        run_example("cvae", tmp_path, tmp_path / "x.npy")


def test_autoencoder(tmp_path, small, capsys):
    numbers = run_example("autoencoder", tmp_path, small, "--latent-dim", "2")
    assert "elbo" not in numbers["autoencoder"]
    assert numbers["autoencoder"]["distortion_at_code"] > 0  # Bernoulli pixels, so a probability
    vae = numbers["VAE"]
    assert vae["elbo"] == pytest.approx(-(vae["distortion"] + vae["rate"]), abs=1e-3)
    names = {"reconstructions", "samples", "codes_autoencoder", "codes_VAE"}
    assert pngs(tmp_path / "r") == names
    assert pngs(tmp_path / "r" / "vae") == USUAL
    assert "bounds nothing" in capsys.readouterr().out


def test_each_pair_of_autoencoder_is_loaded(tmp_path, small, monkeypatch):
    """A loaded pair has the same distortion at the codes as the run reported."""
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(report, "pictures", lambda *args, **options: [])  # also none for the page
    numbers = run_example("autoencoder", tmp_path, small, "--likelihood", "gaussian")
    module, data = example("autoencoder"), observe(load(str(small)), "grey")
    for name in ("autoencoder", "VAE"):
        vae = pvae.load(tmp_path / "r" / name.lower())
        again = module.at_codes(Subject(vae, data, quiet=True))
        assert again["distortion_at_code"] == pytest.approx(numbers[name]["distortion_at_code"])


@pytest.mark.slow
def test_manifold(tmp_path, small):
    numbers = run_example("manifold", tmp_path, small)["numbers"]
    assert numbers["iwae_elbo"]["mean"] < numbers["iwae_100"]["mean"]
    assert {"manifold", "latents"} <= pngs(tmp_path / "r")
    assert pvae.load(tmp_path / "r").recipe.activation == "silu"
