"""The memory of the process: lets the C allocator keep freed memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MOST = 2**31 - 1  # bytes; mallopt takes an int, so a block of 2 GiB still goes back


def keep_freed_memory() -> bool:
    """Asks glibc to keep freed blocks, instead of returning their pages; returns whether it does.

    By default glibc returns every big block to the system, and each training step on a CPU has to
    fault its pages in again. The setting is one of the whole process, so a program must call this
    function; an import never does. It does nothing where the C library is not glibc.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, _MOST))
