"""Files that are written whole or not at all."""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    previous: Path | None = None,
) -> None:
    """Writes a file so that at any moment, a crash included, the old one or the new one is whole.

    With `previous`, the old file is kept there, once the new one is whole.

    Raises:
        OSError: the folder does not exist, cannot be written to, or the disk is full; the old
            file is then as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/a.txt", lambda file: file.write(b"whole"))
    ...     Path(folder, "a.txt").read_bytes()
    b'whole'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    # beside the target: a rename is atomic only within one file system
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed processes left of `write_atomically` in a folder and below it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     left = Path(folder, f".a.txt.{uuid4().hex}")
    ...     left.touch()
    ...     remove_leftovers(folder)
    ...     left.exists()
    False
    """
    for path in list(Path(folder).rglob(".*")):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Puts the names of files on the disk; a rename alone may be lost with the power."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
