"""Files of strangers: bounds that hold before anything is made of what a file claims.

A short file may claim a long array, and a packed one unpack to a thousand times its size. A
pickle may name a function, and the machine then calls it. Here are the checks that the readers of
data, checkpoints and run folders share.
"""

import json
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON_BYTES = 2**24  # a run's JSON files have some thousands
_FREE, _RATIO = 2**27, 100  # bytes that may come of any file, and how many times its own size
_STEPS = 2**20  # of a pickle: 30 for each tensor


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
    except (ValueError, RecursionError) as error:  # a ValueError is of UTF-8 or of JSON too
        raise ValueError(f"{path} is damaged: {error}") from error
    return content


def check_unpacked(unpacked: int, packed: int) -> None:
    """Refuses data that would take far more memory than its file takes on disk, both in bytes.

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
    """Walks through a pickle without unpickling it: no name but those that `allows` takes, no
    later protocol, bounded steps and numbers of the memory that it asks for.

    `allows` is asked for names of the protocols before 4, as "module name".

    >>> import os, pickle
    >>> check_pickle(pickle.dumps(os.getcwd, protocol=2), lambda name: False)
    Traceback (most recent call last):
    ValueError: it names 'posix getcwd', which no file of this kind needs
    """
    steps: Any = pickletools.genops(content)  # an argument is a text or a number, by its code
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
    """What stands in a pickle for an object that it names: what it would be made of, not it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
