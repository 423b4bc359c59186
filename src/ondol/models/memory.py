"""Keep memory that was freed, rather than give it back to the system and fault it in again page by page."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_memory() -> bool:
    """Have glibc serve large blocks from its heap and never trim it; whether it now does.

    By default each tensor above 32 MiB is mapped on its own and unmapped when freed: a training step then spends a third of its
    time in page faults (bench/). Costs nothing but that the process stays at its peak. Off: ONDOL_KEEP_MEMORY=0.
    """
    if sys.platform != "linux" or os.environ.get("ONDOL_KEEP_MEMORY", "1") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_TOP_PAD, 64 << 20)])
