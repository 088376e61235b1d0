"""Memory that has been freed, given back to the system.

glibc keeps freed memory below its mmap threshold, which grows with what is freed, so that what one
block leaves in pieces adds up over the blocks of a model.
"""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Gives freed memory back where the C library is one that holds on to it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)
