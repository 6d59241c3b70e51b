"""How the C library's allocator treats freed memory."""

import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory", "trim_freed_memory"]

# Parameters of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for reuse; also makes JAX's CPU dispatch synchronous.

    On a CPU, a training step allocates gigabytes of temporaries and frees them at its end. If they
    were returned to the system, the next step would fault in and clear every page again.

    With asynchronous dispatch, a step could allocate before the previous one has freed its memory,
    and the process would keep both. A single device also uses a single arena, because each thread
    would otherwise keep its own memory. Simulated devices run concurrently and keep one arena per
    thread: in a shared one they fragment each other's memory.

    Call this after the number of JAX's CPU devices is configured and before they are created. The
    C library is left as it is if it is not glibc.
    """
    import jax

    simulated = jax.config.values["jax_num_cpu_devices"]  # -1 if not configured
    arenas = {ARENA_MAX: 1} if simulated <= 1 else {}
    _mallopt({MMAP_MAX: 0, TRIM_THRESHOLD: -1} | arenas)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_freed_memory() -> None:
    """Makes the C library return freed memory to the system, whichever thread allocated it.

    For commands that read or write parameters once. By default each thread keeps its own freed
    memory, and glibc raises its mmap threshold when a large block is freed, so that up to 64 MiB
    stay allocated. Call this before JAX starts its threads.
    """
    _mallopt({MMAP_THRESHOLD: 128 << 10, ARENA_MAX: 1})


def trim_freed_memory() -> None:
    """Returns the memory that is free now to the system; memory freed later is treated as before.

    For allocations that outlive a training step: they would otherwise occupy the kept memory of the
    last step, the next step would have to allocate elsewhere, and the process would keep both.
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
