"""What keeps a run folder sound: one process at a time, no leftovers, two checkpoints."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae import checkpoint

_locked: set[Path] = set()  # by this process, until it ends


def lock(folder: Path) -> None:
    """Keeps other processes out of a run folder until this one ends, however it ends.

    A file system without locks, or Windows, keeps nobody out.

    Raises:
        ValueError: another process is at work in the folder.
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
        # not flock: children that a killed process leaves behind would hold that on
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
    """Writes `checkpoint.pt`; the one that was there becomes `checkpoint.previous.pt`, once the
    new one is whole.

    Raises:
        OSError: the disk is full, say; both checkpoints are then as they were.
    """
    newest = folder / "checkpoint.pt"
    checkpoint.write(newest, state, previous=_previous(newest))


def exists(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    newest = folder / "checkpoint.pt"
    return newest.exists() or _previous(newest).exists()


def read(path: Path) -> dict[str, Any]:
    """A checkpoint; where it is damaged or missing, the one before it, and a line that says so.

    Raises:
        FileNotFoundError, ValueError: neither can be read.
    """
    previous = _previous(path)
    try:
        return checkpoint.read(path)
    except (FileNotFoundError, ValueError) as error:
        if not previous.exists():
            raise
        state = checkpoint.read(previous)
        print(f"warning: {error}; {previous}, the checkpoint before it, takes its place")
    if path.exists():  # aside, or the next write would put it in the place of the good one
        os.replace(path, path.with_name(f"{path.stem}.damaged{path.suffix}"))
    return state


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")
