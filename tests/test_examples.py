"""Every example, briefly, in a process of its own, on the embedded data."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pvae

EXAMPLES = Path(pvae.__file__).parent.parent / "examples"
FILES = {
    "best.pt",
    "checkpoint.pt",
    "config.json",
    "curves.png",
    "interpolations.png",
    "latents.png",
    "metrics.csv",
    "progress",
    "reconstructions.png",
    "results.json",
    "samples.png",
}
SMALL = ["--dataset", "digits", "--net", "mlp", "--hidden", "32", "--latent-dim", "2", "-n", "2"]


def command(folder, *argv):
    return [sys.executable, EXAMPLES / "mnist_svi.py", "--out", folder, *argv]


def run(argv, tmp_path, **environment):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    env.pop("PVAE_DATA", None)
    return subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_example_is_short():
    assert len((EXAMPLES / "mnist_svi.py").read_text().splitlines()) <= 120


def test_what_a_run_leaves(tmp_path):
    done = run(command(tmp_path / "r", *SMALL), tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == FILES | {"manifold.png"}
    numbers = results(tmp_path / "r")
    assert set(numbers) == {
        "test_elbo",
        "test_reconstruction",
        "test_kl",
        "bits_per_dimension",
        "iwae_500",
        "iwae_500_se",
        "active_units",
        "seconds",
    }
    elbo = numbers["test_reconstruction"] - numbers["test_kl"]
    assert numbers["test_elbo"] == pytest.approx(elbo, abs=1e-3)
    assert numbers["test_elbo"] < numbers["iwae_500"]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["dataset"]["name"] == "digits"
    assert len(config["dataset"]["sha256"]) == 64
    assert config["arguments"]["latent_dim"] == 2
    assert config["seed"] == 0
    with open(tmp_path / "r" / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "test set, 179 images, dynamically binarised" in done.stdout
    # readable when piped: no carriage returns, no escape codes
    assert "\r" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert pvae.load(tmp_path / "r").sample(2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    "argv",
    [
        ["--likelihood", "gaussian_pixelwise", "--dequantize", "--guide", "normal_log_scale"],
        ["--likelihood", "continuous_bernoulli", "--objective", "trace_mean_field_elbo"],
        ["--objective", "iwae", "--num-particles", "3", "--binarize", "static", "--beta", "2"],
    ],
)
@pytest.mark.slow
def test_swaps_from_the_command_line(tmp_path, argv):
    small = [*SMALL[:-3], "4", "-n", "1", "-b", "512", "--quiet"]
    done = run(command(tmp_path / "r", *small, *argv), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "traversals.png").exists()
    assert "epoch " not in done.stdout.replace("best epoch", "")


@pytest.mark.slow
def test_a_killed_run_is_resumed_as_if_uninterrupted(tmp_path):
    small = [*SMALL[:-1], "40", "-b", "200"]
    whole = run(command(tmp_path / "whole", *small), tmp_path)
    assert whole.returncode == 0, whole.stderr

    killed = subprocess.Popen(
        command(tmp_path / "killed", *small), stdout=subprocess.DEVNULL, cwd=tmp_path
    )
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = run([*command("")[:2], "--resume", "killed"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    a, b = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert {k: v for k, v in a.items() if k != "seconds"} == {
        k: v for k, v in b.items() if k != "seconds"
    }


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "r", *SMALL[:-1], "4000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'r'}" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "minst"], "mnist"),
        (["--dataset", "digits", "--device", "mps"], "--device mps is not available here"),
        (["--net", "cnn"], "choose from"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_wrong_input_is_a_plain_error(tmp_path, argv, message):
    done = run(command(tmp_path / "r", *argv), tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    done = run(command(tmp_path / "r", *SMALL), tmp_path)
    assert done.returncode == 1
    assert "holds files already" in done.stderr
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["thesis.txt"]
