"""Multi-process training: starting processes, agreeing on values, and stopping together.

Every process runs the same program on its own devices. All processes write checkpoints; only the
leader, process 0, writes the other files of a run.
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

from dss.errors import DssError
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
HEARTBEAT = 30  # seconds without a heartbeat of a process, after which the others exit
SHUTDOWN = 60  # seconds that a finished process waits for the others


def join_processes() -> None:
    """Joins the other processes of a multi-process run; does nothing in a single-process run.

    A multi-process run is configured by JAX_COORDINATOR_ADDRESS (`host:port` of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, by a Slurm step of several tasks, or by a TPU pod. Call
    this before JAX creates its devices.

    Raises:
      DssError: if the environment variables are inconsistent, or process 0 cannot be reached.
    """
    options: dict[str, Any]
    if ADDRESS in os.environ:
        options = {"coordinator_address": os.environ[ADDRESS]} | _count_and_index()
        if ":" not in options["coordinator_address"]:
            raise DssError(f"{ADDRESS}={os.environ[ADDRESS]}: must be HOST:PORT of process 0")
    elif _slurm_tasks() > 1:
        options = {"cluster_detection_method": "slurm"}
    elif has_tpu() and importlib.util.find_spec("libtpu"):  # without libtpu: another accelerator
        options = {}
    else:
        return
    try:
        jax.distributed.initialize(
            **options, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN
        )
    except (RuntimeError, ValueError) as error:  # connection errors are RuntimeErrors
        if not options and "coordinator_address should be defined" in str(error):
            return  # a TPU outside a pod
        first = str(error).strip().splitlines()[0]
        raise DssError(f"cannot join the other processes: {first}") from error


def _count_and_index() -> dict[str, int]:
    """Returns the number of processes and the index of this one, as JAX's options."""
    if _slurm_tasks() > 1 and COUNT not in os.environ:
        return {}  # JAX reads them from Slurm
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except (KeyError, ValueError):
        raise DssError(f"{ADDRESS} is set: also set {COUNT} and {INDEX} to integers") from None
    if not 0 <= index < count:
        raise DssError(f"{INDEX}={index}: must be from 0 to {COUNT} - 1 = {count - 1}")
    return {"num_processes": count, "process_id": index}


def _slurm_tasks() -> int:
    """Returns the number of tasks of this process's Slurm step; 1 outside a step."""
    in_step = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
    return int(os.environ.get("SLURM_NTASKS", 1)) if in_step else 1


def has_others() -> bool:
    """Returns whether the environment configures several processes; does not use JAX."""
    return ADDRESS in os.environ or _slurm_tasks() > 1


def is_leader() -> bool:
    """Returns whether this process writes the files of the run."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(value: bool) -> bool:
    """Returns whether `value` is True in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def leaders_text(text: str) -> str:
    """Returns the `text` of process 0, in all processes."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content))))
    mine = content if is_leader() else np.zeros(size, np.uint8)
    leaders = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    return leaders.astype(np.uint8).tobytes().decode()


class StopSignal:
    """Context manager that catches SIGTERM and SIGINT, so that the loop can save and stop.

    In a multi-process run, one process that receives a signal is enough: JAX's coordinator notifies
    the others, and all stop before the same step. A second SIGINT raises KeyboardInterrupt. The run
    is saved in `dss.runs.train`; `dss train` exits with 128 + the signal's number.

    Attributes:
      received: the signal received; SIGTERM if another process received it; None before.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._multi_process = jax.process_count() > 1
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # In a multi-process run JAX itself handles SIGTERM.
            numbers = [signal.SIGINT] if self._multi_process else [signal.SIGTERM, signal.SIGINT]
            for number in numbers:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = number == signal.SIGINT
        if self._multi_process:
            signal.raise_signal(signal.SIGTERM)
        else:
            self.received = signal.Signals(number)

    def before(self, step: int) -> bool:
        """Returns whether to stop before a step. All processes call it before every step."""
        if self._multi_process and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
