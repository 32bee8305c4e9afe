"""Runs that are killed at random moments and resumed, against the run that nobody touched.

Each run trains a small net on the digits. SIGKILL ends it one to three times: in the first seconds,
somewhere in an epoch, or in the middle of a write. Then it goes on by `--resume`. What it leaves
must be that of the uninterrupted run, bit for bit: the weights, `best.pt`, `metrics.csv` and
`results.json`, but for the columns of time.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae import checkpoint, tables

SCRIPT = Path(__file__).parent.parent / "examples" / "mnist_svi.py"
SMALL = ["--dataset", "digits", "--net", "mlp", "--hidden", "32", "--latent-dim", "4"]
SMALL += ["-n", "6", "-b", "32", "--device", "cpu"]
SMALL += ["--checkpoint-minutes", "0.001"]
MOMENTS = ("first seconds", "training", "write")


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """A run in a process of its own, whose output is kept."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    out = subprocess.PIPE
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def finish(arguments: Sequence[str]) -> None:
    """A run to its end.

    Raises:
        RuntimeError: it failed.
    """
    process = start(arguments)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{output.decode()[-2000:]}")


def kill(arguments: Sequence[str], folder: Path, moment: str, draw: random.Random) -> bool:
    """Starts a run and kills it at a moment; whether it was still at work."""
    process = start(arguments)
    if moment == "first seconds":
        time.sleep(draw.uniform(0.5, 5))
    else:
        begun = [p.stat().st_mtime_ns for p in folder.glob("checkpoint.pt")]
        while process.poll() is None and begun == [
            p.stat().st_mtime_ns for p in folder.glob("checkpoint.pt")
        ]:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        if moment == "write":  # a temporary file is there only while it is written
            while process.poll() is None and not any(folder.glob(".checkpoint.pt.*")):
                pass
    at_work = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return at_work


def run(arguments: Sequence[str], folder: Path, moments: Sequence[str], seed: int) -> int:
    """A run that is killed at these moments and resumed each time; how often it was at work."""
    draw, killed = random.Random(seed), 0
    for moment in moments:
        killed += kill(begun_or_new(arguments, folder), folder, moment, draw)
    finish(begun_or_new(arguments, folder))
    return killed


def begun_or_new(arguments: Sequence[str], folder: Path) -> list[str]:
    """What goes on with a run; one killed before it had begun to train is started anew."""
    if (folder / "config.json").exists():
        return ["--resume", str(folder), "--quiet"]
    shutil.rmtree(folder, ignore_errors=True)
    return [*arguments, "--quiet", "--out", str(folder)]


def differences(a: Path, b: Path) -> list[str]:
    """What two run folders do not have in common, bit for bit, time apart."""
    found = []
    for name in ("checkpoint.pt", "best.pt"):
        one, other = (flat(checkpoint.read(folder / name)) for folder in (a, b))
        if one.keys() != other.keys():
            found.append(f"{name}: the names")
        found += [f"{name}: {k}" for k in one.keys() & other.keys() if not same(one[k], other[k])]
    for name, content in (("metrics.csv", metrics), ("results.json", results)):
        if content(a / name) != content(b / name):
            found.append(name)
    return found


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """All values of a checkpoint by name, but for those of time."""
    if isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {name: state}
    parts = [flat(item, f"{name}/{key}") for key, item in state.items() if key != "seconds"]
    return {key: value for part in parts for key, value in part.items()}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def metrics(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return [
            {k: v for k, v in row.items() if not k.startswith("seconds")}
            for row in csv.DictReader(file)
        ]


def results(path: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("seconds")}


def kills(args: argparse.Namespace) -> None:
    """Kills and resumes so many runs of an engine, and prints what came of each."""
    draw, rows = random.Random(args.seed), []
    arguments = [*SMALL, "--engine", args.engine]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        finish(begun_or_new(arguments, whole))
        for number in range(args.runs):
            moments = [draw.choice(MOMENTS) for _ in range(draw.randint(1, 3))]
            killed = Path(folder, str(number))
            times = run(arguments, killed, moments, args.seed + number)
            found = differences(whole, killed)
            rows.append([str(number + 1), ", ".join(moments), str(times), "; ".join(found) or "-"])
            print(*rows[-1], sep="  ", flush=True)
    print(tables.columns("SIGKILL", ["run", "moments", "kills", "differences"], rows))
    bad = sum(row[-1] != "-" for row in rows)
    times = sum(int(row[2]) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} runs, killed {times} times, end as the whole one does")
    if bad:
        sys.exit(1)
