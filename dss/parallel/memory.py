"""What the C library does with freed memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory", "trim_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, instead of giving it back to the system.

    On a CPU a training step asks for all its intermediate results at once, gigabytes, and frees
    them at its end. Given back, every page of them must be taken and cleared anew by the next
    step. Programs run one after the other then, on the thread that calls them: a step that asked
    before the last one has freed would have memory of its own, which is kept too. And so would
    each thread, where one device has them all; several simulated devices work at once, and find
    no room between each other's memory. Call it when JAX knows its devices and has not made them;
    for the C library it does nothing where that is not glibc.
    """
    import jax

    simulated = jax.config.values["jax_num_cpu_devices"]  # -1 where nothing was said
    arenas = {ARENA_MAX: 1} if simulated <= 1 else {}
    _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: -1} | arenas)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_freed_memory() -> None:
    """Has the C library give back what is freed, whichever thread had it.

    For what reads and writes parameters, once. Each thread would else keep what it has freed, and
    glibc, which maps less and less once something large was freed, up to 64 MiB of it. Call it
    before JAX has started its threads.
    """
    _mallopt({MMAP_THRESHOLD: 128 << 10, ARENA_MAX: 1})


def trim_freed_memory() -> None:
    """Has the C library give back what is free now, and keep or give back what will be as before.

    For what takes memory while steps go on: it would lie where the last step's was, the next step
    would find no room there, and the process would keep both.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _mallopt(values: dict[int, int]) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            for parameter, value in values.items():
                mallopt(parameter, value)
