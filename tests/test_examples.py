"""Short runs of the main example on the digits: in this process, or in one that is stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, example

import pvae
from pvae import cli

mnist_svi = example("mnist_svi")
FILES = {
    "best.pt",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    ".lock",
    "config.json",
    "curves.png",
    "interpolations.png",
    "latents.png",
    "metrics.csv",
    "progress",
    "reconstructions.png",
    "report.html",
    "results.json",
    "samples.png",
}
SMALL = ["--dataset", "digits", "--net", "mlp", "--hidden", "32", "--latent-dim", "2", "-n", "2"]


def start(*argv):
    """Starts the main example in a process that a test can stop, with the threads of this one."""
    return subprocess.Popen(
        [sys.executable, EXAMPLES / "mnist_svi.py", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def run(folder, *argv):
    mnist_svi.main(["--out", str(folder), *argv])


def refused(capsys, *argv):
    """Runs the main example, which must be refused; returns exit status and error text."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.run_main(partial(mnist_svi.main, argv))
    signal.signal(signal.SIGTERM, before)
    return f"{stop.value.code} {capsys.readouterr().err}"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_example_is_short():
    assert len((EXAMPLES / "mnist_svi.py").read_text().splitlines()) <= 80


def test_what_a_run_leaves(tmp_path, capsys):
    run(tmp_path / "r", *SMALL)
    said = capsys.readouterr()
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == FILES | {"manifold.png"}
    found = results(tmp_path / "r")
    assert set(found) == {"numbers", "best_epoch", "epochs", "seconds", "seconds_per_epoch"}
    mean = {key: row["mean"] for key, row in found["numbers"].items()}
    assert set(mean) == {
        "elbo",
        "distortion",
        "rate",
        "bits_per_dimension",
        "iwae_100",
        "iwae_elbo",
        "active_units",
    }
    assert mean["elbo"] == pytest.approx(-mean["distortion"] - mean["rate"], abs=1e-3)
    assert mean["iwae_elbo"] < mean["iwae_100"]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["dataset"]["name"] == "digits"
    assert len(config["dataset"]["sha256"]) == 64
    assert config["arguments"]["latent_dims"] == [2]
    assert config["seed"] == config["data_seed"] == 0
    assert len(config["commands"]) == 1
    with open(tmp_path / "r" / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "digits test set, dynamically binarised" in said.out
    # piped output is readable: no carriage returns, no escape codes
    assert "\r" not in said.out + said.err
    assert "\x1b" not in said.out + said.err
    assert pvae.load(tmp_path / "r").sample(2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("options", [[], ["--conditional", "--latent-dim", "2"]])
@pytest.mark.parametrize("images", [10, 19])
def test_a_small_data_set_runs_to_the_end(tmp_path, images, options):
    """Of so few images, one is for validation and one for the test."""
    x = np.random.default_rng(0).integers(256, size=(images, 10, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=x, labels=np.arange(images) % 2)
    small = ["--dataset", str(tmp_path / "few.npz"), "--net", "mlp", "-n", "1", "-b", "8"]
    run(tmp_path / "r", *small, *options, "--quiet")
    assert results(tmp_path / "r")["numbers"]["elbo"]["images"] == 1
    assert (tmp_path / "r" / "latents.png").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--likelihood", "gaussian_pixelwise", "--dequantize", "--guide", "normal_log_scale"],
        ["--likelihood", "continuous_bernoulli", "--objective", "trace_mean_field_elbo"],
        ["--objective", "iwae", "--num-particles", "3", "--binarize", "static", "--beta", "2"],
    ],
)
@pytest.mark.slow
def test_swaps_from_the_command_line(tmp_path, capsys, argv):
    small = [*SMALL[:-3], "4", "-n", "1", "-b", "512", "--quiet"]
    run(tmp_path / "r", *small, *argv)
    assert (tmp_path / "r" / "traversals.png").exists()
    assert "epoch " not in capsys.readouterr().out.replace("best epoch", "")


@pytest.mark.slow
def test_a_killed_run_is_resumed_as_if_uninterrupted(tmp_path):
    small = [*SMALL[:-1], "8", "-b", "200"]
    run(tmp_path / "whole", *small)

    out = ["--out", tmp_path / "killed"]
    killed = start(*out, *small)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = start("--resume", tmp_path / "killed")
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    a, b = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert {k: v for k, v in a.items() if not k.startswith("seconds")} == {
        k: v for k, v in b.items() if not k.startswith("seconds")
    }


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    process = start("--out", tmp_path / "r", *SMALL[:-1], "4000")
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--resume {tmp_path / 'r'}" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "minst"], "mnist"),
        (["--dataset", "digits", "--device", "mps"], "--device must be one that is here"),
        (["--net", "cnn"], "choose from"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--dataset", "./x.npy", "--conditional"], "--conditional needs labels, and x.npy has"),
    ],
)
def test_wrong_input_is_a_plain_error(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((20, 8, 8), np.uint8))
    said = refused(capsys, "--out", str(tmp_path / "r"), *argv)
    assert message in said
    assert said.startswith(("error: ", "2 "))
    assert "Traceback" not in said


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    said = refused(capsys, "--out", str(tmp_path / "r"), *SMALL)
    assert "holds files already" in said
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["thesis.txt"]
