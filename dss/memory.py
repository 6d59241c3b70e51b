"""What the C library does with freed memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, instead of giving it back to the system.

    On a CPU a training step asks for all its intermediate results at once, gigabytes, and frees
    them at its end. Given back, every page of them must be taken and cleared anew by the next
    step. Call it before JAX has started its threads; it does nothing where the C library is not
    glibc.
    """
    _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: -1, ARENA_MAX: 1})


def return_freed_memory() -> None:
    """Has the C library give back what is freed, whichever thread had it.

    For what reads and writes parameters, once. Each thread would else keep what it has freed, and
    glibc, which maps less and less once something large was freed, up to 64 MiB of it. Call it as
    `keep_freed_memory`.
    """
    _mallopt({MMAP_THRESHOLD: 128 << 10, ARENA_MAX: 1})


def _mallopt(values: dict[int, int]) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            for parameter, value in values.items():
                mallopt(parameter, value)
