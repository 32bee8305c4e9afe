"""The folder of a run: no two runs share one; it holds the run's configuration and results."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pvae.files import write_atomically
from pvae.untrusted import read_json


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a mapping as readable JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on.

    >>> sorted(versions())
    ['numpy', 'pvae', 'pyro-ppl', 'python', 'torch', 'torchvision']
    """
    packages = ("numpy", "pvae", "pyro-ppl", "torch", "torchvision")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def processor(device: torch.device) -> str:
    """The maker's name of the processor of a device.

    >>> processor(torch.device("cpu")) != ""
    True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        # makers give one name to several generations; family and model tell them apart
        found = [
            re.search(rf"^{key}\s*: (.+)", text, re.MULTILINE)
            for key in ("model name", "cpu family", "model")
        ]
        if all(found):
            name, family, model = (match[1] for match in found if match)
            return f"{name} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def surroundings(device: torch.device) -> dict[str, Any]:
    """What rounds a run's numbers: the processor, the number of torch's threads, the versions.

    >>> list(surroundings(torch.device("cpu")))
    ['processor', 'threads', 'versions']
    """
    return {
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


# the only files that a run leaves if it was refused before it trained
_BEFORE_TRAINING = {".lock", "config.json"}


def new_folder(out: str | os.PathLike[str] | None, name: str) -> Path:
    """A new, empty, writable folder: `out`, or the first free of `runs/name`, `runs/name-2`, ...

    The folder of a run that was refused before it trained counts as empty.

    Raises:
        ValueError: `out` holds files already.
        OSError: the folder cannot be made or written to.
    """
    if out is None:
        return _first_free(Path("runs") / name)
    folder = Path(out)
    if folder.is_dir() and {path.name for path in folder.iterdir()} - _BEFORE_TRAINING:
        raise ValueError(
            f"--out {folder} holds files already, which a new run would overwrite: choose another "
            f"folder (examples that take --resume go on with a run of theirs by --resume {folder})"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written to: {error}") from error
    return folder


def _first_free(folder: Path) -> Path:
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            free.mkdir(parents=True)  # fails if it exists, so two runs at once get two folders
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(f"{free} cannot be made: {error}; name a folder by --out") from error
        return free
    raise AssertionError("there is always a next number")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` of a run folder.

    Raises:
        ValueError: the folder is not the folder of a run, or the file is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    config = read_json(path)
    arguments, dataset = (config.get(name) for name in ("arguments", "dataset"))
    if not (
        isinstance(arguments, dict)
        and isinstance(dataset, dict)
        and isinstance(config.get("versions", {}), dict)
    ):
        raise ValueError(
            f"{path} is damaged: arguments, dataset and versions must be objects in braces"
        )
    texts = {name: dataset.get(name) for name in ("name", "sha256", "observed")}
    texts |= {name: arguments.get(name) or "" for name in ("dataset", "data_root")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{path} is damaged: {name} must be a text, not {reprlib.repr(value)}")
    if not _are_texts(config.get("commands", [])):
        raise ValueError(f"{path} is damaged: commands must be a list of texts")
    split = arguments.get("split") or []
    if not isinstance(split, list) or not all(type(share) is float for share in split):
        raise ValueError(f"{path} is damaged: split must be fractions, not {reprlib.repr(split)}")
    seeds = {
        "seed": config.get("seed"),
        "data_seed": config.get("data_seed", config.get("seed")),  # version 0.1 had one seed
        "numpy_seed": arguments.get("numpy_seed") or 0,
    }
    for name, seed in seeds.items():
        if type(seed) is not int or seed < 0:
            raise ValueError(
                f"{path} is damaged: {name} must be a whole number of at least 0, not "
                f"{reprlib.repr(seed)}"
            )
    return config


def check_alone(folder: str | os.PathLike[str]) -> None:
    """Refuses the folder of a study whose several runs each have a folder inside it.

    Raises:
        ValueError: the folder holds several runs; the message names one of them.

    >>> check_alone(".")
    """
    if parts := sorted(Path(folder).glob("*/results.json")):
        raise ValueError(f"{folder} holds several runs: name them, such as {parts[0].parent}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
