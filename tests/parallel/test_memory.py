import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")

FAULTS = """
import resource
import numpy as np
from dss.parallel.memory import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(3):
    np.ones(64 << 20, np.uint8)  # and freed
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""

WAITING = """
from dss.parallel.memory import keep_freed_memory

keep_freed_memory()
import jax
import jax.numpy as jnp

x, w = jnp.ones((8192, 32)), jnp.ones((32, 8192))
step = jax.jit(lambda x: jnp.tanh(x @ w) @ w.T).lower(x).compile()
print(sum(not step(x).is_ready() for _ in range(8)))
"""

TRIMMED = """
import pathlib
import numpy as np
from dss.parallel.memory import keep_freed_memory, trim_freed_memory

def pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

keep_freed_memory()
before = pages()
np.ones(64 << 20, np.uint8)  # and freed
assert pages() - before > 16000
trim_freed_memory()
print(pages() - before)
"""

KEPT = """
import pathlib
import threading
import numpy as np
from dss.parallel.memory import return_freed_memory

def resident_pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

def work():
    for size in (20 << 20, 16 << 20):  # freeing 20 MiB raises glibc's mmap threshold
        blocks = [np.ones(size, np.uint8) for _ in range(2)]
        barrier.wait()
        del blocks

return_freed_memory()
before, barrier = resident_pages(), threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident_pages() - before)
"""


def printed(program: str) -> int:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_reused_without_page_faults():
    assert printed(FAULTS) < 100  # of 16,384 pages


def test_cpu_steps_are_dispatched_synchronously():
    """Otherwise a step would allocate memory before the previous one has freed its own."""
    assert printed(WAITING) == 0


def test_kept_memory_can_be_returned():
    assert printed(TRIMMED) < 1024


def test_freed_memory_of_any_thread_is_returned():
    assert printed(KEPT) < 1024  # of 32,768 pages
