"""`python -m dss.cli.child COMMAND ...`: a `dss` command that ends when its parent process ends."""

import os
import signal
import sys
import threading

from dss.cli.main import main

__all__: list[str] = []


def _end_with_parent() -> None:
    """Waits until standard input is closed, which also happens if the parent is killed."""
    os.read(sys.stdin.fileno(), 1)  # sys.stdin.read would hold a lock when the process exits
    os.kill(os.getpid(), signal.SIGTERM)  # training saves a checkpoint and exits


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    raise SystemExit(main())
