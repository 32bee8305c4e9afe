"""The C allocator: whether memory freed by one training step is kept for the next."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


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
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(kept)
