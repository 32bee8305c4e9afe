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
    """Writes a file so that at any moment, even in a crash, the old or the new file is complete.

    With `previous`, the old file is kept there once the new file is complete.

    Raises:
        OSError: the folder does not exist, cannot be written to, or the disk is full; the old
            file then stays unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/a.txt", lambda file: file.write(b"whole"))
    ...     Path(folder, "a.txt").read_bytes()
    b'whole'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    # in the folder of the target, as a rename is atomic only within one file system
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
    """Removes the temporary files of `write_atomically` that killed processes left in a folder or
    in its subfolders.

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
    """Writes the names of a folder's files to the disk, as a power cut may lose a mere rename."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
