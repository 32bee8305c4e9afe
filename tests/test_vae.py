"""What people do with a pair; the builder; saving and loading."""

import os
import threading

import pytest
import torch
from conftest import PAIRS, SHAPES, images, tiny

import pvae
from pvae import checkpoint
from pvae.vae import VAE

X = (torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_what_people_do(likelihood, guide, shape, net):
    vae, x = tiny(likelihood, guide, shape, net), images(likelihood, shape).float()
    vae.check(x)
    assert vae.encode(x).sample().shape == (6, 3)
    assert vae.decode(torch.randn(2, 6, 3)).sample().shape == (2, 6, *shape)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.sample(5).shape == (5, *shape)
    path = vae.interpolate(x[:2], x[2:4], steps=5)
    assert path.shape == (2, 5, *shape)
    torch.testing.assert_close(path[:, 0], vae.reconstruct(x[:2]))
    torch.testing.assert_close(path[:, -1], vae.reconstruct(x[2:4]))


def test_checking_spends_no_random_numbers():
    vae = tiny()
    state = torch.get_rng_state()
    vae.check(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_reconstruction_is_the_mean_at_the_mean():
    vae = tiny()
    loc = vae.guide.posterior.raw(X)[:, :3]
    torch.testing.assert_close(vae.reconstruct(X), vae.model.likelihood.raw(loc).sigmoid())


@pytest.mark.parametrize("likelihood", pvae.builder.LIKELIHOODS)
def test_output_starts_at_the_mean_image(likelihood):
    mean = torch.full((1, 8, 8), 0.13)
    vae = pvae.build((1, 8, 8), 2, likelihood=likelihood, mean_image=mean)
    assert (vae.sample(20).mean() - 0.13).abs() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": "cnn"}, "net must be one of conv, mlp, course, deep, not 'cnn'"),
        ({"likelihood": "beta"}, "likelihood must be one of bernoulli, .* not 'beta'"),
        ({"guide": "flow"}, "guide must be one of normal, normal_log_scale, .* not 'flow'"),
        ({"prior": "gmm"}, "prior must be one of standard_normal, .* not 'gmm'"),
        ({"activation": "elu"}, "activation must be one of silu, .* not 'elu'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, not 0"),
        ({"hidden": 0}, "hidden must be at least 1, not 0"),
        ({"image_shape": (28, 28)}, r"must be \(channels, height, width\), not \(28, 28\)"),
    ],
)
def test_bad_names_and_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        pvae.build(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.sample(0), "n must be at least 1, not 0"),
        (lambda v: v.interpolate(X, X, 1), "steps must be at least 2, not 1"),
        (lambda v: v.interpolate(X, X[:2]), r"\(6, 1, 8, 8\) and \(2, 1, 8, 8\)"),
        (lambda v: v.encode(X * float("nan")), "NaN"),
        (lambda v: v.encode(X.byte()), "dtype torch.uint8"),
        (lambda v: v.encode(X[:, 0]), r"\(1, 8, 8\) each.*\(6, 8, 8\)"),
        (lambda v: v.check(X * 0.5), r"outside the likelihood's support .* \[0, 0.5\].*Bernoulli"),
        (lambda v: v.encode(X, torch.zeros(6)), "takes no labels"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


# ---- saving and loading ----


@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize(("likelihood", "guide"), PAIRS)
def test_saved_and_loaded_it_gives_the_same_numbers(tmp_path, likelihood, guide, net):
    vae = tiny(likelihood, guide, net=net)
    x, z = images(likelihood, (1, 8, 8)).float(), torch.randn(6, 3)
    checkpoint.save(tmp_path / "v.pt", {"model": vae.state_dict(), "recipe": vae.recipe})
    again = pvae.load(tmp_path / "v.pt")
    for a, b in zip(vae.terms(x, {"z": z}), again.terms(x, {"z": z}), strict=True):
        assert torch.equal(a, b)


def test_a_composed_pair_is_not_loaded_by_guess(tmp_path):
    vae = tiny()
    composed = VAE(vae.model, vae.guide)
    checkpoint.save(tmp_path / "v.pt", {"model": composed.state_dict(), "recipe": composed.recipe})
    with pytest.raises(ValueError, match="holds no recipe"):
        pvae.load(tmp_path / "v.pt")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pt"):
        pvae.load(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a checkpoint"):
        pvae.load(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a checkpoint of this version"):
        pvae.load(tmp_path / "other.pt")
    vae = tiny()
    checkpoint.save(tmp_path / "v.pt", {"model": vae.state_dict(), "recipe": vae.recipe})
    data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read"):
        pvae.load(tmp_path / "cut.pt")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": Bomb()}, "bomb.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read("bomb.pt")
    assert not os.path.exists("exploded")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"a": 1})
    with pytest.raises((TypeError, AttributeError)):
        checkpoint.save(path, {"a": threading.Lock()})
    assert checkpoint.read(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
