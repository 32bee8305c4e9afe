"""Compares runs that are killed at random moments and resumed with an uninterrupted run.

Each run trains a small net on the digits. SIGKILL ends it one to three times: in the first seconds,
somewhere in an epoch, or in the middle of a write. Each time `--resume` continues it. The run must
end with the same bits as the uninterrupted run: the weights, `best.pt`, `metrics.csv` and
`results.json`, except the columns of time.
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
    """Starts a run in a separate process, whose output is kept."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    out = subprocess.PIPE
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def finish(arguments: Sequence[str]) -> None:
    """Executes a run to its end.

    Raises:
        RuntimeError: the run failed.
    """
    process = start(arguments)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{output.decode()[-2000:]}")


def kill(arguments: Sequence[str], folder: Path, moment: str, draw: random.Random) -> bool:
    """Starts a run and kills it at a moment; returns whether it was still running."""
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
        if moment == "write":  # the temporary file exists only while it is written
            while process.poll() is None and not any(folder.glob(".checkpoint.pt.*")):
                pass
    at_work = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return at_work


def run(arguments: Sequence[str], folder: Path, moments: Sequence[str], seed: int) -> int:
    """Kills a run at each of these moments, resumes it each time, and lets it finish at the end.

    Returns how often the run was still running when it was killed.
    """
    draw, killed = random.Random(seed), 0
    for moment in moments:
        killed += kill(begun_or_new(arguments, folder), folder, moment, draw)
    finish(begun_or_new(arguments, folder))
    return killed


def begun_or_new(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments that continue a run, or start it again if it was killed before it trained."""
    if (folder / "config.json").exists():
        return ["--resume", str(folder), "--quiet"]
    shutil.rmtree(folder, ignore_errors=True)
    return [*arguments, "--quiet", "--out", str(folder)]


def differences(a: Path, b: Path) -> list[str]:
    """The names of what differs between two run folders, bit for bit, except times."""
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
    """All values of a checkpoint by name, except times."""
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
    """Kills and resumes `args.runs` runs of an engine, and prints how each of them ended."""
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
