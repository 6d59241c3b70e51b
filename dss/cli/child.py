"""`python -m dss.cli.child VERB ...`: a `dss` command that ends with the process that began it."""

import os
import signal
import sys
import threading

from dss.cli.main import main

__all__: list[str] = []


def _end_with_parent() -> None:
    """Waits for the other end of standard input to be closed, which a killed process does too."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin's own, whose lock would be held at our end
    os.kill(os.getpid(), signal.SIGTERM)  # training saves first


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    raise SystemExit(main())
