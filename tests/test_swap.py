"""The swap table: what its arguments mean, and one short run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import pvae
from pvae import evaluation

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import swap  # noqa: E402


def test_a_combination_is_the_first_one_but_for_what_it_names():
    assert swap.combination("") == swap.BASE
    changed = swap.combination("guide=iaf,beta=2")
    assert changed == {**swap.BASE, "guide": "iaf", "beta": "2"}


def test_the_usual_combinations_are_some():
    for text in swap.DEFAULT_COMBINATIONS:
        assert swap.combination(text) != swap.BASE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iaf", "NAME=VALUE of likelihood, guide, prior, objective, beta"),
        ("guide=gauss", "guide must be one of normal, .* not 'gauss'"),
        ("beta=-1", "beta must be a number of at least 0, not '-1'"),
        ("beta=two", "beta must be a number of at least 0, not 'two'"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        swap.combination(text)


@pytest.mark.parametrize(
    ("other", "message"),
    [("categorical", "not of binary; levels"), ("grey_bernoulli", "binary; continuous, not a")],
)
def test_numbers_on_different_data_are_not_set_side_by_side(other, message):
    with pytest.raises(ValueError, match=message):
        swap.common_observation([swap.BASE, swap.combination(f"likelihood={other}")])


def test_what_is_no_likelihood_is_not_set_beside_likelihoods():
    names = ("grey_bernoulli", "continuous_bernoulli")  # both take the same data
    with pytest.raises(ValueError, match="one kind of data, not of continuous; continuous, not a"):
        swap.common_observation([swap.combination(f"likelihood={name}") for name in names])


@pytest.mark.parametrize(
    ("likelihoods", "how"),
    [
        (["bernoulli"], "dynamic"),
        (["categorical", "logistic_mixture"], "grey"),
        (["laplace", "gaussian_pixelwise"], "dequantized"),
        (["grey_bernoulli"], "dequantized"),
    ],
)
def test_how_the_data_is_observed(likelihoods, how):
    made = [swap.combination(f"likelihood={name}") for name in likelihoods]
    assert swap.common_observation(made) == how


def short_run(tmp_path, *combinations, options=()):
    argv = ["--dataset", "digits", "-n", "1", "-b", "512", "--hidden", "16", "--latent-dim", "2"]
    argv += ["--combinations", *combinations, "--quiet", "--out", str(tmp_path / "r"), *options]
    swap.main(argv)
    return json.loads((tmp_path / "r" / "results.json").read_text())


def test_a_short_run(tmp_path, capsys):
    numbers = short_run(tmp_path, "guide=iaf", "objective=free_bits,guide=iaf")
    said = capsys.readouterr().out
    # the second combination is refused with a reason; the others have run
    assert "objective=free_bits,guide=iaf is refused: free bits needs" in said
    assert "IWAE-100: of 179 images" in said
    assert list(numbers) == ["the first", "guide=iaf"]
    for of in numbers.values():
        elbo, distortion, rate = (of[key]["mean"] for key in ("elbo", "distortion", "rate"))
        assert elbo == pytest.approx(-(distortion + rate), abs=1e-3)
    assert (tmp_path / "r" / "swap.png").stat().st_size > 10_000

    # each combination is a run, for which the evaluation finds the same ELBO
    run = tmp_path / "r" / "guide=iaf"
    assert pvae.load(run).recipe.guide == "iaf"
    less = ["--images", "0", "--annealed-images", "0", "--gap-images", "0", "--nuts-samples", "0"]
    evaluation.main([str(run), *less, "--quiet"])
    again = json.loads((run / "evaluation.json").read_text())["numbers"]
    assert again["elbo"]["mean"] == pytest.approx(numbers["guide=iaf"]["elbo"]["mean"], abs=1e-3)


def numbers(elbo, seconds):
    row = {"label": "ELBO", "mean": elbo, "se": 0.5, "images": 10}
    return {"elbo": row, "seconds_per_epoch": seconds}


def test_the_mean_and_sd_over_seeds():
    alone = numbers(-100.0, 1.0)
    assert swap.pooled({7: alone}) == alone
    of = swap.pooled({0: numbers(-100.0, 1.0), 1: numbers(-102.0, 2.0), 2: numbers(-104.0, 3.0)})
    assert of["elbo"] == {"label": "ELBO", "mean": -102, "se": None, "sd": 2, "images": 10}
    assert of["seconds_per_epoch"] == 2
    assert list(of["seeds"]) == [0, 1, 2]
    assert swap.shown(of["elbo"]) == "-102.00 ± 2.00"
    assert swap.shown(alone["elbo"]) == "-100.00 ± 0.50"


@pytest.mark.slow
def test_several_seeds_go_on_with_what_is_missing(tmp_path, capsys):
    first = short_run(tmp_path, "beta=2", options=["--seeds", "2", "--seed", "3"])
    assert "mean and sd of 2 seeds" in capsys.readouterr().out
    folder = tmp_path / "r"
    names = [f"{name},seed={seed}" for name in ("the_first", "beta=2") for seed in (3, 4)]
    assert sorted(names) == sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name, kept in (("the first", "the_first"), ("beta=2", "beta=2")):
        found = [
            json.loads((folder / f"{kept},seed={seed}" / "results.json").read_text())["numbers"]
            for seed in (3, 4)
        ]
        a, b = (of["elbo"]["mean"] for of in found)
        assert a != b
        assert first[name]["elbo"]["mean"] == pytest.approx((a + b) / 2)
        assert first[name]["elbo"]["sd"] == pytest.approx(abs(a - b) / 2**0.5)
        assert first[name]["seeds"]["3"]["elbo"] == found[0]["elbo"]
    config = json.loads((folder / "beta=2,seed=4" / "config.json").read_text())
    assert (config["seed"], config["arguments"]["beta"]) == (4, "2")

    # if one run is lost, only this run is repeated
    pages = [folder / name / "report.html" for name in names]
    before = [page.stat().st_mtime_ns for page in pages]
    (folder / "beta=2,seed=4" / "results.json").unlink()
    swap.main(["--resume", str(folder)])
    after = [page.stat().st_mtime_ns for page in pages]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, True, False]
    again = json.loads((folder / "results.json").read_text())
    assert again["beta=2"]["elbo"] == first["beta=2"]["elbo"]


def test_data_that_are_no_images(tmp_path, capsys):
    path = tmp_path / "counts.npz"
    np.savez(path, x=np.random.default_rng(0).poisson(3, (40, 6)))
    argv = ["--dataset", str(path), "-n", "1", "--hidden", "4", "--latent-dim", "2", "--quiet"]
    argv += ["--combinations", "likelihood=poisson", "--out", str(tmp_path / "r")]
    swap.main(argv)
    said = capsys.readouterr().out
    assert "nats per datum (IWAE-100: of 4 data)" in said


def test_what_is_no_likelihood_is_said_to_be_none(tmp_path, capsys):
    short_run(tmp_path, "likelihood=grey_bernoulli")
    assert "p(x|z) is not a likelihood" in capsys.readouterr().out


def test_a_run_of_which_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="none of the combinations can work"):
        short_run(tmp_path, "likelihood=bernoulli,guide=per_datum")
