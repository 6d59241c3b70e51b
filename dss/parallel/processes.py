"""Several processes that train as one: how they find each other, agree, and stop together.

Every process runs the same program on its own devices; only the leader, process 0, writes the
files of a run. Checkpoints are written by all.
"""

import importlib.util
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dss.errors import UserError
from dss.parallel.devices import has_tpu

__all__ = [
    "StopSignal",
    "all_agree",
    "has_others",
    "is_leader",
    "join_processes",
    "leaders_text",
    "wait_for_all",
]

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT = 30  # seconds without a sign of a process, after which the others end
SHUTDOWN = 60  # seconds that a process waits at its end for the others to end


def join_processes() -> None:
    """Makes this process one of those that its environment tells of; alone it does nothing.

    They are told of by JAX_COORDINATOR_ADDRESS (`host:port` of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; by Slurm, in a step of several tasks; or by a TPU pod. Call it before JAX is
    asked for its devices.

    Raises:
      UserError: the variables do not fit together, or the others cannot be reached.
    """
    options: dict[str, Any]
    if ADDRESS in os.environ:
        options = {"coordinator_address": os.environ[ADDRESS]} | _numbers()
        if ":" not in options["coordinator_address"]:
            raise UserError(f"{ADDRESS}={os.environ[ADDRESS]}: give it as HOST:PORT of process 0")
    elif _slurm_tasks() > 1:
        options = {"cluster_detection_method": "slurm"}
    elif has_tpu() and importlib.util.find_spec("libtpu"):  # else a chip of another kind
        options = {}
    else:
        return
    try:
        jax.distributed.initialize(
            **options, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN
        )
    except (RuntimeError, ValueError) as error:  # JAX's errors of the connection are RuntimeErrors
        if not options and "coordinator_address should be defined" in str(error):
            return  # a chip, but no pod
        first = str(error).strip().splitlines()[0]
        raise UserError(f"cannot join the other processes: {first}") from error


def _numbers() -> dict[str, int]:
    """Returns how many processes there are and which this is."""
    if _slurm_tasks() > 1 and COUNT not in os.environ:
        return {}  # JAX asks Slurm
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except (KeyError, ValueError):
        raise UserError(f"{ADDRESS} is set; set {COUNT} and {INDEX} to numbers too") from None
    if not 0 <= index < count:
        raise UserError(f"{INDEX}={index} must be in 0 to {COUNT} - 1 = {count - 1}")
    return {"num_processes": count, "process_id": index}


def _slurm_tasks() -> int:
    """Returns the tasks of the Slurm step that this process is one of; 1 outside of any."""
    in_step = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
    return int(os.environ.get("SLURM_NTASKS", 1)) if in_step else 1


def has_others() -> bool:
    """Returns whether JAX's variables or Slurm tell of other processes; JAX is asked nothing."""
    return ADDRESS in os.environ or _slurm_tasks() > 1


def is_leader() -> bool:
    """Returns whether this process writes the files of the run."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has come here; `what` is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(mine: bool) -> bool:
    """Returns whether `mine` is True in every process."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(np.array(mine)).all())


def leaders_text(text: str) -> str:
    """Returns the text that process 0 has."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
    mine = content if is_leader() else np.zeros(size, np.uint8)
    leaders = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    return leaders.astype(np.uint8).tobytes().decode()


class StopSignal:
    """Catches SIGTERM and SIGINT while it is open: the loop then saves and ends.

    Of several processes each may get it, or only one: JAX's coordinator tells the others, and all
    stop before the same step. A second SIGINT interrupts at once.

    Attributes:
      received: the signal; None so far. SIGTERM if another process got it.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._together = jax.process_count() > 1
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # Of several processes SIGTERM is JAX's to catch.
            for number in (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = number == signal.SIGINT
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        else:
            self.received = signal.Signals(number)

    def before(self, step: int) -> bool:
        """Returns whether to stop before a step; the same in all processes, asked at each step."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
