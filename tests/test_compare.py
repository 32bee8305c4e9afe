"""Runs side by side: what `compare` prints, and which runs it refuses to compare."""

import json
import re

import pytest
from matplotlib.image import imread

from pvae import compare, run
from pvae.evaluate import Estimate


def made(folder, elbo=-100.0, *, dataset=(), numbers=None, **arguments):
    """Writes the two files of a finished run into a new folder, and returns its path."""
    folder.mkdir()
    config = {
        "arguments": {"likelihood": "bernoulli", "seed": 0, "out": str(folder), **arguments},
        "dataset": {"name": "digits", "sha256": "0" * 64, "observed": "dynamic", **dict(dataset)},
        "seed": 0,
        "data_seed": arguments.get("data_seed", 0),
        "versions": {"torch": "2.8.0"},
    }
    run.write_json(folder / "config.json", config)
    if numbers is None:
        numbers = {
            "elbo": {"label": "ELBO", "mean": elbo, "se": 0.25, "images": 179},
            "active_units": {"label": "active units", "mean": 3.0, "se": None, "images": 179},
        }
    run.write_json(folder / "results.json", {"numbers": numbers})
    return str(folder)


def compared(tmp_path, *runs):
    compare.main([*runs, "--out", str(tmp_path / "compare.png")])


def test_the_table_has_each_runs_numbers_and_what_differs(tmp_path, capsys):
    a = made(tmp_path / "a", -100.123, guide="normal", hidden=None)
    b = made(tmp_path / "b", -98.5, guide="iaf", hidden=400, quiet=True)
    compared(tmp_path, a, b)
    said = capsys.readouterr().out
    assert "digits test set, dynamically binarised (one fixed draw); nats; mean" in said
    numbers, differing = re.split("what differs", said)
    assert [line.split() for line in numbers.splitlines() if line.startswith(f"  {a} ")] == [
        [a, "-100.12", "±", "0.25", "3"]
    ]
    rows = [line.split() for line in differing.splitlines() if line.strip()]
    # the arguments --out and --quiet, and equal arguments, are not listed
    assert rows[:3] == [["guide", "hidden"], [a, "normal", "-"], [b, "iaf", "400"]]
    height, width, _ = imread(tmp_path / "compare.png").shape
    assert min(height, width) > 200
    assert "warning" not in said


def test_dollar_signs_of_names_are_no_formulas(tmp_path):
    a, b = (made(tmp_path / name, dataset={"name": "$_{$"}) for name in ("a", "$b_{$"))
    compared(tmp_path, a, b)
    assert (tmp_path / "compare.png").exists()


def test_each_number_is_drawn_where_it_is():
    numbers = {
        "a": {"elbo": Estimate(-100.0, 0.5), "rate": Estimate(20.0, float("nan"))},
        "b": {"elbo": Estimate(-90.0, 0.25)},
    }
    elbo, rate = compare.picture(numbers, "title").axes
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in elbo.lines[:2]]
    assert drawn == [(-100, 0), (-90, 1)]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in elbo.collections]
    assert bars == [[-101, -99], [-90.5, -89.5]]  # two standard errors to each side
    assert [text.get_text() for text in elbo.get_yticklabels()] == ["a", "b"]
    assert rate.lines[0].get_xdata()[0] == 20
    assert not rate.collections


def test_runs_with_the_same_arguments_say_so_and_other_data_seeds_warn(tmp_path, capsys):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    compared(tmp_path, a, b)
    assert "their arguments, seeds and versions are the same" in capsys.readouterr().out
    for name, seeds in (("c", {"data_seed": 1}), ("d", {"numpy_seed": 777})):
        compared(tmp_path, a, made(tmp_path / name, **seeds))
        assert "warning: their data seeds differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dataset": {"sha256": "1" * 64}}, r"the data must be the same .*a has digits \(0000"),
        ({"dataset": {"observed": "static"}}, "observed must be .*b has statically binarised"),
        ({"standardize": True}, "observed must be .*b has .*, standardised"),
        ({"likelihood": "categorical"}, r"p\(x\|z\) must be .*a has binary, .*b has levels"),
        ({"likelihood": "grey_bernoulli"}, "b has continuous, not a likelihood"),
    ],
)
def test_numbers_that_do_not_compare_are_refused(tmp_path, other, message):
    a, b = made(tmp_path / "a"), made(tmp_path / "b", **other)
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, a, b)
    assert not (tmp_path / "compare.png").exists()


def test_a_pair_that_a_program_composed_is_compared_as_it_is(tmp_path, capsys):
    compared(tmp_path, made(tmp_path / "a"), made(tmp_path / "b", likelihood=None))
    assert "likelihood" in capsys.readouterr().out


def test_what_is_no_finished_run_is_refused(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    with pytest.raises(ValueError, match="nowhere is not the folder of a run"):
        compared(tmp_path, a, "nowhere")
    results = tmp_path / "b" / "results.json"
    for text in ('{"numbers": [', '{"numbers": {"elbo": {"mean": "x", "se": 1}}}', "{}"):
        results.write_text(text)
        with pytest.raises(ValueError, match=r"results.json holds no results of a run"):
            compared(tmp_path, a, b)
    results.unlink()
    with pytest.raises(ValueError, match="b is not a finished run: it has no results"):
        compared(tmp_path, a, b)
    made(tmp_path / "b" / "part")
    with pytest.raises(ValueError, match=r"b holds several runs: name them, such as .*part"):
        compared(tmp_path, a, b)


@pytest.mark.parametrize("runs", [["a"], ["a", "a"], ["a", "b/../a/"]])
def test_two_runs_or_more_each_once(runs, capsys):
    with pytest.raises(SystemExit):
        compare.arguments(runs)
    assert "runs must be two folders or more, each once" in capsys.readouterr().err


def test_a_run_of_version_0_1_stands_beside_others(tmp_path, capsys):
    a, old = made(tmp_path / "a"), made(tmp_path / "old")
    results = {"test_elbo": -90.5, "test_elbo_se": 0.5, "test_kl": 20.0}
    (tmp_path / "old" / "results.json").write_text(json.dumps(results))
    compared(tmp_path, a, old)
    assert re.search(r"old +-90.50 ± 0.50", capsys.readouterr().out)
