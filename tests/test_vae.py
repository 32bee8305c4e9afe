"""The methods of a pair; the builder; saving and loading."""

import copy
import json
import os
import threading
from pathlib import Path

import pyro
import pytest
import torch
from conftest import PAIRS, SHAPES, images, tiny
from safetensors import safe_open

import pvae
from pvae import checkpoint, heads, nets, priors
from pvae.crosscheck import cross_check
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
        (
            {"net": "cnn"},
            "net must be one of conv, mlp, gated, resnet, course, deep, conv1d, not 'cnn'",
        ),
        ({"likelihood": "beta"}, "likelihood must be one of bernoulli, .* not 'beta'"),
        ({"guide": "flow"}, "guide must be one of normal, normal_log_scale, .* not 'flow'"),
        ({"prior": "gmm"}, "prior must be one of standard_normal, .* not 'gmm'"),
        ({"activation": "elu"}, "activation must be one of silu, .* not 'elu'"),
        ({"latent_dim": 0}, r"latent_dims must be .* at least 1, not \(0,\)"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, not 0"),
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
        (lambda v: v.model(size=0), "size must be at least 1, not 0"),
        (lambda v: v.sample(3, torch.zeros(2).long()), "n must be left out, or 2, the length of y"),
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
    pvae.save(vae, tmp_path / "v.pt")
    again = pvae.load(tmp_path / "v.pt")
    for a, b in zip(vae.terms(x, {"z": z}), again.terms(x, {"z": z}), strict=True):
        assert torch.equal(a, b)


def test_a_recipe_of_a_later_version_is_refused_plainly(tmp_path):
    state = checkpoint.pair_state(tiny())
    checkpoint.write(tmp_path / "v.pt", {**state, "recipe": {**state["recipe"], "depth": 3}})
    with pytest.raises(ValueError, match=r"v\.pt was written by another version of pvae: .*depth"):
        pvae.load(tmp_path / "v.pt")


def test_a_composed_pair_is_not_loaded_by_guess(tmp_path):
    vae = tiny()
    composed = VAE(vae.model, vae.guide)
    pvae.save(composed, tmp_path / "v.pt")
    with pytest.raises(ValueError, match="holds no recipe"):
        pvae.load(tmp_path / "v.pt")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pt"):
        pvae.load(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a checkpoint"):
        pvae.load(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a checkpoint of pvae"):
        pvae.load(tmp_path / "other.pt")
    vae = tiny()
    pvae.save(vae, tmp_path / "v.pt")
    data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read"):
        pvae.load(tmp_path / "cut.pt")


# a file of version 0.1: the names and shapes of its state, and the arguments of its `build`
FORMAT_1 = {
    "model.top.logits": (2,),
    "model.top.loc": (2, 1),
    "model.top.log_scale": (2, 1),
    "model.prior.net.hidden.0.weight": (3, 1),
    "model.prior.net.hidden.0.bias": (3,),
    "model.prior.net.out.weight": (4, 3),
    "model.prior.net.out.bias": (4,),
    "model.likelihood.net.hidden.0.weight": (3, 2),
    "model.likelihood.net.hidden.0.bias": (3,),
    "model.likelihood.net.out.weight": (4, 3),
    "model.likelihood.net.out.bias": (4,),
    "guide.posterior.net.hidden.0.weight": (3, 4),
    "guide.posterior.net.hidden.0.bias": (3,),
    "guide.posterior.net.out.weight": (4, 3),
    "guide.posterior.net.out.bias": (4,),
    "guide.top.net.hidden.0.weight": (3, 2),
    "guide.top.net.hidden.0.bias": (3,),
    "guide.top.net.out.weight": (2, 3),
    "guide.top.net.out.bias": (2,),
}
RECIPE_1 = {
    "image_shape": [1, 2, 2],
    "latent_dim": 2,
    "net": "mlp",
    "likelihood": "bernoulli",
    "guide": "normal",
    "prior": "mixture",
    "hidden": 3,
    "activation": "silu",
    "num_classes": None,
    "side_dim": None,
    "top_dim": 1,
    "components": 2,
    "num_data": None,
}


def test_a_checkpoint_of_format_1_loads(tmp_path):
    state = {name: torch.randn(shape) for name, shape in FORMAT_1.items()}
    history = [{"epoch": 1, "train_elbo": -3.0}]
    old = {"format": 1, "model": state, "recipe": RECIPE_1, "history": history}
    torch.save(old, tmp_path / "old.pt")
    vae = pvae.load(tmp_path / "old.pt")
    assert vae.recipe == pvae.builder.Recipe(
        (1, 2, 2), (2, 1), "mlp", prior="mixture", hidden=3, activation="silu", components=2
    )
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    assert checkpoint.read(tmp_path / "old.pt")["history"] == [{"epoch": 1, "train_objective": -3}]


def test_format_1_kept_what_its_parts_had_no_use_for(tmp_path):
    recipe = {**RECIPE_1, "image_shape": [1, 28, 28], "net": "course", "top_dim": None}
    recipe |= {"prior": "standard_normal", "hidden": 256, "activation": "relu", "components": 50}
    vae = pvae.build((1, 28, 28), 2, "course")
    torch.save({"format": 1, "model": vae.state_dict(), "recipe": recipe}, tmp_path / "old.pt")
    assert pvae.load(tmp_path / "old.pt").recipe.hidden is None


# ---- files of safetensors ----

VERSION_1 = Path(__file__).parent / "data" / "version_1.safetensors"


def waves(vae: VAE) -> VAE:
    """Sets element n of each tensor to sin n."""
    for t in vae.state_dict().values():
        t.copy_(torch.arange(t.numel()).sin().view_as(t))
    return vae


def test_a_file_of_the_first_version_loads():
    """The file must not change: every later version must read the same pair from it."""
    vae = pvae.load(VERSION_1)
    assert vae.recipe == pvae.builder.Recipe((1, 4, 4), (2,), "mlp", hidden=3)
    assert checkpoint.read(VERSION_1)["data"] == "digits"
    expected = waves(pvae.build((1, 4, 4), 2, "mlp", hidden=3)).state_dict()
    assert vae.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in vae.state_dict().items())


@pytest.mark.parametrize(
    "pair",
    [
        tiny(),
        tiny(guide="iaf", net="mlp"),
        pvae.build((1, 8, 8), 2, "mlp", prior="vamp", components=3, hidden=4),
        pvae.build((1, 8, 8), (3, 2), "mlp", num_classes=4, hidden=4),
        tiny().to(memory_format=torch.channels_last),
        tiny().double(),
    ],
    ids=["conv", "iaf", "vamp", "deep", "channels_last", "double"],
)
def test_safetensors_keep_every_tensor(pair, tmp_path):
    path = tmp_path / "v.safetensors"
    pvae.save(pair, path, {"epoch": 3})
    kept = checkpoint.read(path)
    assert kept["epoch"] == 3
    assert "data" not in kept
    assert all(torch.equal(t, kept["model"][name]) for name, t in pair.state_dict().items())
    vae = pvae.load(path)
    assert vae.recipe == pair.recipe
    assert not vae.training
    for name, t in vae.state_dict().items():
        torch.testing.assert_close(t, kept["model"][name], check_dtype=False)


def test_safetensors_are_read_by_their_own_library(tmp_path):
    pvae.save(tiny(), tmp_path / "v.safetensors", data="digits")
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        ours = json.loads(file.metadata()["pvae"])
        assert set(file.keys()) == set(tiny().state_dict())
    assert (ours["format"], ours["data"], ours["recipe"]["net"]) == (1, "digits", "conv")


def test_a_pair_composed_by_hand_is_kept_without_a_recipe(tmp_path):
    built = tiny()
    pair = pvae.VAE(built.model, built.guide)
    pvae.save(pair, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="holds no recipe: its VAE was composed by hand"):
        pvae.load(tmp_path / "v.safetensors")
    checkpoint.restore(tiny(), checkpoint.read(tmp_path / "v.safetensors")["model"])


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("model.prior", priors.MixtureOfNormals(2)),
        ("model.likelihood.head", heads.NormalFixedScale((1, 8, 8), scale=0.5)),
        ("guide.posterior.head", heads.Laplace((2,))),
        ("guide.posterior.net", nets.MLP((1, 8, 8), (4,), (7,))),
    ],
)
def test_a_built_pair_with_another_part_has_no_recipe(place, part):
    """Its old recipe and its hand-written ELBO would belong to another pair."""
    pair = tiny("gaussian", latent_dim=2)
    copied = copy.deepcopy(pair)
    assert copied.recipe == pair.recipe
    assert copied.oracle is not None
    owner, _, name = place.rpartition(".")
    setattr(pair.get_submodule(owner), name, part)
    assert pair.recipe is None
    assert pair.oracle is None
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
    assert cross_check(svi, pair, X).agrees


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_of_a_later_version_says_so(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"v.{suffix}"
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    monkeypatch.setattr(checkpoint, "SAFETENSORS_FORMAT", 7)
    pvae.save(tiny(), path)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=rf"v\.{suffix} was written by a later version of pvae: .* 7"
    ):
        pvae.load(path)


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
    checkpoint.write(path, {"a": 1})
    with pytest.raises((TypeError, AttributeError)):
        checkpoint.write(path, {"a": threading.Lock()})
    assert checkpoint.read(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
