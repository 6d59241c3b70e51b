"""Runs `dss annotate` and kills the process with SIGKILL at a given write; see test_annotate.py.

python annotate_killed.py WRITE NUMBER before|after ARGUMENT...
"""

import os
import signal
import sys
from pathlib import Path

from dss.cli.main import main
from dss.teacher import job
from dss.teacher.journal import Journal

WRITES = {
    "describe": (Journal, "describe"),
    "add": (Journal, "add"),
    "write_jsonl": (job, "write_jsonl"),
    "fsync": (os, "fsync"),
    "replace": (Path, "replace"),
    "set_export": (Journal, "set_export"),
}


def kill_at(write: str, number: int, when: str) -> None:
    owner, name = WRITES[write]
    function, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == number and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killing)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.exit(main(sys.argv[4:]))
