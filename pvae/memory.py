"""The memory of the process: whether the C allocator keeps what is freed, and the peak so far."""

import ctypes
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MOST = 2**31 - 1  # bytes; mallopt takes an int, so a block of 2 GiB still goes back


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed blocks instead of returning their pages; says whether it does.

    By default glibc returns every big block to the system, and each training step on a CPU faults
    its pages in again. A setting of the whole process, so it is made by an explicit call, never
    by an import. Does nothing where the C library is not glibc.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, _MOST))


def peak() -> float:
    """The most memory that the process has had in use, in MiB (a GPU's not counted).

    >>> peak() > 10
    True
    """
    if sys.platform.startswith("linux"):
        # not getrusage's: that of a child process starts at its parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    import resource  # where there is one

    in_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return in_bytes / 2**20
