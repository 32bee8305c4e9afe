"""Keeps a run folder sound: a lock for one process at a time, and two checkpoints."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae import checkpoint

_locked: set[Path] = set()  # the folders that this process has locked, until it ends


def lock(folder: Path) -> None:
    """Locks a run folder against other processes until this process ends, also by a crash.

    On Windows, and on a file system without locks, it does nothing.

    Raises:
        ValueError: another process has locked the folder.
    """
    try:
        import fcntl
    except ImportError:
        return
    folder = folder.resolve()
    if folder in _locked:
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        # not flock: child processes that outlive a killed process would keep its lock
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise ValueError(
                f"{folder} is in use by another process, which trains there: wait for it, or stop "
                "it first"
            ) from None
    _locked.add(folder)


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes `checkpoint.pt`; the old one becomes `checkpoint.previous.pt` once the new one is
    complete.

    Raises:
        OSError: the file cannot be written, as on a full disk; both old files then stay unchanged.
    """
    newest = folder / "checkpoint.pt"
    checkpoint.write(newest, state, previous=_previous(newest))


def exists(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    newest = folder / "checkpoint.pt"
    return newest.exists() or _previous(newest).exists()


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; if it is damaged or missing, the one before it, and prints a warning.

    A damaged file is renamed to `checkpoint.damaged.pt`.

    Raises:
        FileNotFoundError, ValueError: neither checkpoint can be read.
    """
    previous = _previous(path)
    try:
        return checkpoint.read(path)
    except (FileNotFoundError, ValueError) as error:
        if not previous.exists():
            raise
        state = checkpoint.read(previous)
        print(f"warning: {error}; {previous}, the checkpoint before it, takes its place")
    if path.exists():  # else the next write would replace the good previous one by it
        os.replace(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))
    return state


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")
