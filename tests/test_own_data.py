"""A user's own data: arrays that are not pictures, splits, counts, signals, their figures."""

import json
import re

import numpy as np
import pyro
import pytest
import torch
from conftest import example, tiny
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import captured, cli, heads, plots, report
from pvae.closed_form import negative_binomial, poisson
from pvae.data import Dataset, Scaling, Split, load, observe, pixels
from pvae.nets import Conv1dDecoder, Conv1dEncoder
from pvae.train import Trainer

mnist_svi, own_data = example("mnist_svi"), example("own_data")


def counts(n, *shape):
    return np.random.default_rng(0).poisson(3.0, (n, *shape))


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


# ----- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.bool_, ">i2"])
@pytest.mark.parametrize("shape", [(5,), (2, 5, 4), (2, 3, 2, 2)])
def test_data_of_any_shape_stay_as_they_are(tmp_path, shape, dtype):
    array = counts(30, *shape).astype(dtype)
    data = load(saved(tmp_path / "a.npz", x=array, y=np.arange(30)))
    assert not data.pictures
    assert data.image_shape == shape
    x = torch.cat([split.images for split in data.splits])
    y = torch.cat([split.labels for split in data.splits])
    assert torch.equal(x, torch.from_numpy(array.astype(np.float32))[y])
    seen = observe(data, "as_is")
    assert torch.equal(seen.test.images, data.test.images)
    torch.testing.assert_close(seen.mean_image, data.train.images.mean(0))
    with pytest.raises(ValueError, match=r"how must be grey, as_is, not 'dynamic': a\.npz holds"):
        observe(data, "dynamic")


def test_what_looks_like_pictures_is_data_where_it_is_said(tmp_path):
    signals = np.random.default_rng(0).standard_normal((20, 2, 9))
    path = saved(tmp_path / "a.npz", x=signals)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\].*by as_is=True \(--as-is\)"):
        load(path)
    assert load(path, as_is=True).image_shape == (2, 9)


# ----- splits -------------------------------------------------------------------------------------

KEYS = [("train", "validation", "test"), ("train_images", "val_images", "test_images")]
KEYS += [("x_train", "x_val", "x_test"), ("train", "test"), ("x_train", "x_test")]


@pytest.mark.parametrize("keys", KEYS)
def test_own_splits_go_in_as_they_are(tmp_path, keys):
    labels = {k: k.replace("_images", "") + "_labels" for k in keys}
    labels = {k: f"y_{k[2:]}" if k.startswith("x_") else v for k, v in labels.items()}
    table = np.arange(40 * 5).reshape(40, 5)
    arrays = dict(zip(keys, np.split(table, [20, 30][: len(keys) - 1]), strict=True))
    given = {labels[k]: a[:, :1] // 5 for k, a in arrays.items()}  # (N, 1), as MedMNIST has them
    data = load(saved(tmp_path / "a.npz", **arrays, **given))
    for split in data.splits:
        assert torch.equal(split.images[:, 0].long() // 5, split.labels)
    assert torch.equal(data.test.images, torch.from_numpy(arrays[keys[-1]]).float())
    held_out = "no validation split, so a tenth of the training data" in data.note
    assert held_out == (len(keys) == 2)
    if held_out:
        assert len(data.validation.images) == 2
    with pytest.raises(ValueError, match=r"split must be None, .*a\.npz has splits of its own"):
        load(tmp_path / "a.npz", split=(0.8, 0.1, 0.1))


def test_what_is_in_two_splits_is_counted(tmp_path):
    table = np.arange(40 * 3).reshape(40, 3)
    path = saved(tmp_path / "a.npz", train=table[:20], validation=table[18:30], test=table[29:])
    note = "a.npz: 2 of the 12 data of validation are in train too, 1 of the 11 data of test are in"
    assert load(path).note.startswith(note)
    saved(path, train=table[:20], test=table[:20][::-1])
    with pytest.raises(ValueError, match="its splits must differ, but test holds the very data of"):
        load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"train": counts(20, 4), "test": counts(9, 5)},
            r"one shape, not \(4,\) \(train\), \(5,\)",
        ),
        ({"train": counts(20, 4), "test": counts(9, 4) / 2}, "one kind, not int64 .*float64"),
        ({"train": counts(20, 4), "test": counts(0, 4)}, r"at least 1, not \(0, 4\)"),
        ({"train": counts(20, 4), "validation": counts(9, 4)}, "must hold train and test"),
        ({"train": counts(20, 4)}, "must hold train and test"),
        ({"train": counts(20, 4), "test": counts(9, 4), "z": counts(1)}, "nothing else, not .*, z"),
        (
            {"train": counts(20, 4), "test": counts(9, 4), "train_labels": np.arange(20)},
            "for all of them or none",
        ),
    ],
)
def test_splits_that_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(saved(tmp_path / "a.npz", **arrays))
    assert "a.npz" in str(caught.value)


def test_fractions_of_a_file(tmp_path):
    path = saved(tmp_path / "a.npz", x=np.arange(60).reshape(20, 3))
    data = load(path, split=(0.5, 0.3, 0.2))
    assert [len(split.images) for split in data.splits] == [10, 6, 4]
    assert torch.cat([s.images for s in data.splits]).flatten().sort().values.tolist() == [
        *range(60)
    ]
    for bad in ((0.5, 0.5), (0.5, 0.4, 0.2), (1.1, -0.2, 0.1)):
        with pytest.raises(ValueError, match="must be three fractions above 0 that sum to 1"):
            load(path, split=bad)
    with pytest.raises(ValueError, match=r"no part empty, not 0.98 0.01 0.01: of 20 data"):
        load(path, split=(0.98, 0.01, 0.01))


# ----- standardised -------------------------------------------------------------------------------


def test_standardised_by_the_training_data_alone(tmp_path):
    x = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 0.1, 0.0]) + torch.tensor([0.0, 5, 1e4, 7])
    parts = Split(x[:30], None), Split(x[30:40], None), Split(x[40:], None)
    seen = observe(Dataset("mine", *parts, sha256=""), "as_is", standardize=True)
    assert seen.label == "as they are, standardised"
    torch.testing.assert_close(seen.train.images.mean(0), torch.zeros(4), rtol=0, atol=1e-2)
    sd = seen.train.images[:, :2].std(0, correction=0)
    torch.testing.assert_close(sd, torch.ones(2), rtol=0, atol=1e-4)
    assert seen.train.images[:, 3].unique().tolist() == [0]  # an element that never changes
    torch.testing.assert_close(seen.scaling.undo(seen.test.images), x[40:])
    expected = (x[40:, 1] - x[:30, 1].mean()) / x[:30, 1].std(correction=0)
    torch.testing.assert_close(seen.test.images[:, 1], expected)
    seen.scaling.save(tmp_path / "scaling.npz")
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "scaling.npz")["sd"]), seen.scaling.sd)
    with pytest.raises(ValueError, match="standardize must be False, not True: 'dynamic' draws"):
        observe(load("digits"), "dynamic", standardize=True)


# ----- counts and signals -------------------------------------------------------------------------


def test_a_negative_binomial_is_a_poisson_whose_rate_varies():
    """Its limit, its moments, and its density as a mixture over gamma rates are right."""
    x, h = torch.arange(8.0).double()[:, None], torch.tensor([[0.7]]).double()
    none, some = torch.full_like(h, -18.0), torch.full_like(h, -0.5)
    torch.testing.assert_close(negative_binomial(x, h, none), poisson(x, h), rtol=0, atol=1e-5)
    r = (-some).exp().item()
    rates = torch.linspace(1e-6, 80, 200_001).double()
    log_rate = torch.distributions.Gamma(r, r / h.exp().item()).log_prob(rates)
    each = torch.distributions.Poisson(rates).log_prob(x) + log_rate  # (8, rates)
    truth = torch.trapezoid(each.exp(), rates).log()
    torch.testing.assert_close(negative_binomial(x, h, some), truth, rtol=1e-4, atol=1e-4)
    p = heads.NegativeBinomial((1,), min_dispersion=0.0).double()(torch.cat([h, some], -1))
    torch.testing.assert_close(p.mean, h.exp())
    torch.testing.assert_close(p.variance, h.exp() + some.exp() * h.exp() ** 2)


def test_large_counts_train_from_the_start():
    """Counts of thousands train, although without log(1 + x) the encoder's scale would overflow."""
    x = 1000 + torch.arange(64.0).expand(16, 64) * torch.arange(16.0)[:, None]
    vae = pvae.build((64,), 2, "mlp", "poisson", mean_image=x.mean(0))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert all(svi.step(x) < 1e7 for _ in range(3))


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 96), (4, 31)])
def test_conv1d_takes_any_signal(shape):
    x = torch.rand(2, *shape)
    assert Conv1dEncoder(shape, (6,), hidden=8)(x).shape == (2, 6)
    decoder = Conv1dDecoder((6,), shape)
    assert decoder(torch.zeros(2, 6)).shape == x.shape
    decoder.set_output_bias(torch.arange(shape[0]).float()[:, None].expand(shape))
    assert decoder.out.bias.tolist() == [*range(shape[0])]


@pytest.mark.parametrize("net", ["conv", "resnet", "course", "deep", "conv1d"])
def test_a_net_that_does_not_suit_is_refused_with_both_shapes(net):
    given = (1, 8, 8) if net == "conv1d" else (64,)
    sizes = r"\(channels, length\)" if net == "conv1d" else r"\(channels, height, width\)"
    with pytest.raises(ValueError, match=rf"must be {sizes}, not .*8|64.*net '{net}'.*mlp, gated"):
        pvae.build(given, 2, net)


@pytest.mark.parametrize(
    ("likelihood", "shape", "net"),
    [
        ("poisson", (7,), "mlp"),
        ("negative_binomial", (2, 9), "conv1d"),
        pytest.param("negative_binomial", (3, 4, 2, 2), "mlp", marks=pytest.mark.slow),
        pytest.param("gaussian_pixelwise", (7,), "gated", marks=pytest.mark.slow),
        pytest.param("laplace", (2, 9), "conv1d", marks=pytest.mark.slow),
    ],
)
def test_any_event_is_captured_and_held_against_the_formulas(likelihood, shape, net):
    x = torch.from_numpy(counts(12, *shape)).float()
    torch.manual_seed(0)
    vae = tiny(likelihood, shape=shape, net=net)
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-3))
    svi = captured.SVI(
        vae.model, vae.guide, adam, Trace_ELBO(), strict=True, compiler=captured.as_traced
    )
    parts = Split(x[:8], None), Split(x[8:10], None), Split(x[10:], None)
    data = observe(Dataset("mine", *parts, sha256=""), "as_is")
    trainer = Trainer(vae, svi, data, epochs=1, batch_size=4, quiet=True)
    trainer.fit()
    assert svi.engine == "captured"
    assert trainer.history[-1]["check_relative"] < 1e-4
    assert vae.sample(3).shape == (3, *shape)


@pytest.mark.parametrize("bad", [-1.0, 2.5])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_counts_that_are_none_are_refused_before_a_run(part, bad):
    tables = [torch.ones(n, 3) for n in (700, 600, 600)]
    tables[part][-1, 2] = bad
    data = observe(Dataset("mine", *(Split(t, None) for t in tables), sha256=""), "as_is")
    vae = pvae.build((3,), 2, "mlp", "poisson")
    adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    svi = SVI(vae.model, vae.guide, adam, Trace_ELBO())
    with pytest.raises(ValueError, match=r"\(1 of .* takes counts, whole numbers of at least 0"):
        Trainer(vae, svi, data, epochs=1, batch_size=4, quiet=True)


# ----- figures ------------------------------------------------------------------------------------


def test_ink_is_as_high_as_the_numbers():
    x = torch.tensor([[[0.0, 5.0, 10.0, 20.0]]])
    bars = plots.drawn(x, low=0, high=10, bars=True)
    ink = (bars < 1).any(1)[0].float()  # (H, W)
    shares = ink[:, 17::35].mean(0)  # in the middle of each bar
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.5, 1.0, 1.0]), rtol=0, atol=0.02)
    lines = (plots.drawn(x, low=0, high=10) < 1).any(1)[0]  # (H, W)
    middle = lines[:, 17].nonzero().float().mean()
    assert 1 - (middle + 0.5) / len(lines) == pytest.approx(0.0, abs=0.03)
    assert plots.drawn(x.expand(3, 2, 4), x.expand(3, 2, 4), low=-1, high=9).shape[:2] == (3, 3)
    for arguments in ((x[0],), (x, x[..., :2])):
        with pytest.raises(ValueError, match="shape"):
            plots.drawn(*arguments, low=0, high=1)
    with pytest.raises(ValueError, match="high must be above low, 1, not 1"):
        plots.drawn(x, low=1, high=1)


def test_figures_are_in_the_units_of_the_data():
    x = torch.cat([torch.zeros(500, 1, 4), torch.full((500, 1, 4), 8.0)])
    dataset = Dataset("mine", *[Split(x, None)] * 3, sha256="")
    drawing = report.Drawing.of(observe(dataset, "as_is", standardize=True))
    assert (drawing.low, drawing.high, drawing.bars, drawing.pictures) == (0, 8, True, False)
    plain = report.Drawing.of(observe(dataset, "as_is"))
    scaled = Scaling.of(x).apply(x[-2:])
    assert torch.equal(drawing(scaled), plain(x[-2:]))
    grey = observe(load("digits"), "grey")
    assert torch.equal(report.Drawing.of(grey)(pixels(grey.test.images)), pixels(grey.test.images))
    as_counts = observe(load("digits"), "as_is")
    shown = report.Drawing.of(as_counts)(as_counts.test.images)
    assert 0.99 < shown.max() <= 1


# ----- from the command line ----------------------------------------------------------------------


def numbers(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["numbers"]


def test_from_a_table_of_counts_to_the_evaluation(tmp_path, capsys):
    own_data.write_counts(tmp_path / "in" / "counts.npz", 200)
    given = ["--dataset", str(tmp_path / "in" / "counts.npz"), "-n", "1", "--out"]
    own_data.main([*given, str(tmp_path / "r"), "--quiet"])
    out = capsys.readouterr().out
    assert "counts.npz test set, as they are" in out
    elbo = numbers(tmp_path / "r", "results")["elbo"]["mean"]
    assert numbers(tmp_path / "r", "evaluation")["elbo"]["mean"] == pytest.approx(elbo, rel=0.1)
    x = load(tmp_path / "in" / "counts.npz").test.images
    assert elbo < own_data.log_evidence(x).mean()
    total = sum(own_data.log_evidence(torch.tensor([[k]])).exp() for k in range(200))
    assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_example_makes_its_own_inputs(tmp_path, capsys):
    own_data.main(["-n", "2", "--out", str(tmp_path / "r"), "--quiet"])
    assert "log p(x) of the model that made the counts" in capsys.readouterr().out
    for name in ("pictures", "counts"):
        assert {"evaluation.json", "reconstructions.png"} <= {
            path.name for path in (tmp_path / "r" / name).iterdir()
        }


def test_signals_standardised_keep_their_scaling(tmp_path):
    draw = np.random.default_rng(0)
    path = saved(tmp_path / "s.npz", x=5 + draw.standard_normal((40, 2, 12)))
    how = ["--likelihood", "gaussian_shared", "--net", "conv1d", "--hidden", "8", "--standardize"]
    split = ["--split", "0.5", "0.25", "0.25", "--latent-dim", "3", "-n", "1", "--quiet"]
    mnist_svi.main(["--dataset", str(path), *how, *split, "--out", str(tmp_path / "r")])
    kept = np.load(tmp_path / "r" / "scaling.npz")
    assert kept["mean"].shape == (2, 12)
    found = numbers(tmp_path / "r", "results")
    assert found["elbo"]["data"] == 10  # the key is "data", for signals are not images
    assert "bits_per_dimension" not in found
    assert (tmp_path / "r" / "traversals.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--likelihood", "poisson", "--standardize"], "gives real numbers; .* poisson has counts"),
        (["--as-is", "--binarize", "static"], "--as-is and --standardize exclude"),
        (["--as-is"], "of counts and real numbers, not for --likelihood bernoulli"),
        (
            ["--likelihood", "poisson", "--binarize", "static"],
            "must have counts, not statically binarised ones",
        ),
        (["--split", "0.8", "0.2"], "expected 3 arguments"),
        (["--split", "1", "0", "0"], "must be a number above 0 and below 1, not '1'"),
    ],
)
def test_arguments_that_do_not_fit(capsys, argv, message):
    with pytest.raises(SystemExit):
        cli.parse(cli.parser(""), argv)
    assert re.search(message, capsys.readouterr().err)


def test_what_is_of_pixels_is_refused_for_data_that_have_none(tmp_path):
    path = saved(tmp_path / "a.npz", x=counts(20, 4))
    argv = ["--dataset", str(path), "--net", "mlp", "--binarize", "static", "--quiet", "--out"]
    with pytest.raises(
        ValueError, match=r"--binarize static is for pictures, and a\.npz holds none"
    ):
        mnist_svi.main([*argv, str(tmp_path / "r")])
