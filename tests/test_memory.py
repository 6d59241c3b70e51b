import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from dss.memory import keep_freed_memory

keep_freed_memory()
faults = []
for _ in range(3):
    np.ones(64 << 20, np.uint8)  # and freed
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_freed_memory_is_used_again_without_a_page_fault():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # of 16,384 pages
