"""The swap table: what its arguments mean, and one short run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pvae

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import swap  # noqa: E402


def test_a_combination_is_the_first_one_but_for_what_it_names():
    assert swap.combination("") == swap.BASE
    changed = swap.combination("guide=iaf,beta=2")
    assert changed == {**swap.BASE, "guide": "iaf", "beta": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iaf", "NAME=VALUE of likelihood, guide, prior, objective, beta"),
        ("guide=gauss", "guide must be one of normal, .* not 'gauss'"),
        ("beta=-1", "beta=-1: beta is a number of at least 0"),
        ("beta=two", "beta=two: beta is a number of at least 0"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        swap.combination(text)


def test_numbers_on_different_data_are_not_set_side_by_side():
    with pytest.raises(ValueError, match=r"different data \(binary, levels\)"):
        swap.common_data([swap.BASE, swap.combination("likelihood=categorical")])


@pytest.mark.slow
def test_a_short_run(tmp_path):
    argv = ["--dataset", "digits", "-n", "1", "--hidden", "16", "--latent-dim", "2"]
    swaps = ["--combinations", "guide=iaf", "objective=free_bits,guide=iaf"]
    run = subprocess.run(
        [sys.executable, EXAMPLES / "swap.py", *argv, *swaps, "--out", tmp_path / "r"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # the second cannot work and says so; the others are there
    assert "objective=free_bits,guide=iaf is refused: free bits needs" in run.stdout
    numbers = json.loads((tmp_path / "r" / "results.json").read_text())
    assert list(numbers) == ["the first", "guide=iaf"]
    assert (tmp_path / "r" / "swap.png").stat().st_size > 10_000
