"""Checks on files from strangers, made before a reader allocates or builds what a file claims.

A short file may claim a long array. A packed file may unpack to a thousand times its size. A pickle
may name a function, which the unpickler then calls. The readers of data, checkpoints and run
folders share these checks.
"""

import json
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON_BYTES = 2**24  # the most bytes of a JSON file; those of a run have some thousands
_FREE, _RATIO = 2**27, 100  # any file may unpack to so many bytes, or to so many times its size
_STEPS = 2**20  # the most steps of a pickle, which needs about 30 for each tensor


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger, is damaged or holds no object.
    """
    try:
        size = os.path.getsize(path)
        if size > JSON_BYTES:
            raise ValueError(f"its size must be at most {JSON_BYTES:,} bytes, not {size:,}")
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it must hold an object in braces")
    except (ValueError, RecursionError) as error:  # UTF-8 and JSON errors are ValueErrors
        raise ValueError(f"{path} is damaged: {error}") from error
    return content


def check_unpacked(unpacked: int, packed: int) -> None:
    """Refuses data that would take far more bytes in memory than its file takes on the disk.

    Raises:
        ValueError: more than 128 MiB, and more than 100 times the size of the file.

    >>> check_unpacked(unpacked=2**40, packed=1000)
    Traceback (most recent call last):
    ValueError: its data must take at most 134,217,728 bytes, or 100 times those of the file
    (1,000), when unpacked, not 1,099,511,627,776: store it less packed if you trust it
    """
    if unpacked > max(_FREE, _RATIO * packed):
        raise ValueError(
            f"its data must take at most {_FREE:,} bytes, or {_RATIO} times those of the file "
            f"({packed:,}), when unpacked, not {unpacked:,}: store it less packed if you trust it"
        )


def check_pickle(
    content: bytes, allows: Callable[[str], bool] = lambda name: True, protocol: int = 5
) -> None:
    """Checks the steps of a pickle without unpickling it.

    It may contain only names for which `allows("module name")` is true, only steps of `protocol` or
    an earlier one, a bounded number of steps, and memo numbers no larger than its length. `allows`
    sees only the names that pickles of protocols before 4 store.

    Raises:
        ValueError: the pickle breaks one of these rules.

    >>> import os, pickle
    >>> check_pickle(pickle.dumps(os.getcwd, protocol=2), lambda name: False)
    Traceback (most recent call last):
    ValueError: it names 'posix getcwd', which no file of this kind needs
    """
    steps: Any = pickletools.genops(content)  # the code tells if its argument is text or a number
    for step, (code, argument, _) in enumerate(steps):
        if step >= _STEPS:
            raise ValueError(f"it must have at most {_STEPS:,} steps")
        if code.proto > protocol:
            raise ValueError(f"it must be of protocol {protocol} or earlier, not {code.proto}")
        if code.name in ("GLOBAL", "INST") and not allows(argument):
            raise ValueError(f"it names {argument!r}, which no file of this kind needs")
        if code.name.endswith("PUT") and argument > len(content):
            raise ValueError(f"it numbers an object {argument:,}, but it has fewer")


class Named:
    """The stand-in for an object that a pickle names: it holds only the arguments and the state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
