import importlib.util
import subprocess
import sys

import jax
import pytest

from dss.errors import DssError
from dss.parallel import processes


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine; returns the options of each call of `jax.distributed.initialize`."""
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)

    def machine(*, tpu: bool, libtpu: bool, error: Exception | None = None) -> list[dict]:
        calls = []

        def initialize(**options):
            calls.append(options)
            if error is not None:
                raise error

        monkeypatch.setattr(processes, "has_tpu", lambda: tpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        return calls

    return machine


TIMEOUTS = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}


def test_on_a_tpu_pod_jax_finds_the_processes_itself(machine):
    calls = machine(tpu=True, libtpu=True)
    processes.join_processes()
    assert calls == [TIMEOUTS]


@pytest.mark.parametrize(("tpu", "libtpu"), [(True, False), (False, True)])
def test_without_a_tpu_and_libtpu_there_is_a_single_process(machine, tpu, libtpu):
    calls = machine(tpu=tpu, libtpu=libtpu)
    processes.join_processes()
    assert not calls


def test_environment_variables_override_the_pod(machine, monkeypatch):
    calls = machine(tpu=True, libtpu=True)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    processes.join_processes()
    address = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert calls == [address | TIMEOUTS]


def test_unreachable_processes_of_a_pod_are_a_user_error(machine):
    machine(tpu=True, libtpu=True, error=RuntimeError("Failed to recognize coordinator\nmore"))
    with pytest.raises(DssError, match="join the other processes: Failed to recognize coordinat"):
        processes.join_processes()


def test_a_tpu_outside_of_a_pod_is_a_single_process():
    code = """
import importlib.util, jax
from dss.parallel import processes
processes.has_tpu = lambda: True
importlib.util.find_spec = lambda name: True
processes.join_processes()
print(jax.process_count(), jax.distributed.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1 False\n", done.stderr
