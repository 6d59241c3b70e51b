"""The C library's memory, kept for the next step."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, instead of giving it back to the system.

    On a CPU a training step asks for all its intermediate results at once, gigabytes, and frees
    them at its end. Given back, every page of them must be taken and cleared anew by the next
    step. Call it before JAX has started its threads; it does nothing where the C library is not
    glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)  # never
            mallopt(ARENA_MAX, 1)
