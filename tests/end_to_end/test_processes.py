"""Runs of several real processes, and what happens to processes: signals, disks, clocks."""

import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import (
    JUMPING_CLOCK_MAIN,
    ONE_OF_SEVERAL_MAIN,
    SLOW_MAIN,
    assert_same_run,
    assert_same_training,
    finish,
    finish_together,
    is_saving,
    metrics_lines,
    start,
    start_together,
    wait_for,
)

TOGETHER = 2


@pytest.fixture(scope="module")
def train_together(train):
    """Starts a run of several processes."""

    def train_together(
        run: Path, *flags: str, code: str = ONE_OF_SEVERAL_MAIN
    ) -> list[subprocess.Popen]:
        return start_together(TOGETHER, lambda env: train(run, *flags, env=env, code=code))

    return train_together


@pytest.fixture(scope="module")
def both(train_together, tmp_path_factory) -> Path:
    """A run of several processes that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "together"
    leader, *others = [finish(process) for process in train_together(run)]
    assert "step 60 done" in leader
    assert all("step" not in other for other in others)
    return run


def sessions(run: Path) -> list[dict]:
    """Returns what the sessions of a run began with."""
    lines = map(json.loads, (run / "sessions.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "begin"]


def last_saved(run: Path) -> int:
    """Returns the last step that has a checkpoint; 0 if none has."""
    steps = (run / "checkpoints").glob("*")
    return max((int(path.name) for path in steps if path.name.isdecimal()), default=0)


def kill_at(moment: Callable[[], bool], processes: list[subprocess.Popen], victim: int) -> None:
    """Kills one of several processes while all are halted at a moment, which cannot pass so."""
    halted = False
    while not halted:
        wait_for(moment, processes[victim])
        assert processes[victim].poll() is None, "it was over before it was killed"
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        halted = moment()
        if halted:
            processes[victim].kill()
        for process in processes:
            process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("victim", "moments"),
    [
        (0, ["in a later save"]),
        pytest.param(0, ["in a step", "in a later save"], marks=pytest.mark.exhaustive),
        pytest.param(1, ["in a step", "in a later save"], marks=pytest.mark.exhaustive),
    ],
    ids=["leader, once", "leader", "other"],
)
def test_one_of_several_killed_after_a_checkpoint_ends_all_and_costs_nothing(
    train_together, both, tmp_path, victim, moments
):
    run = tmp_path / "killed"

    def in_a_step() -> bool:
        return last_saved(run) > 0 and not is_saving(run)

    def in_a_later_save() -> bool:
        return last_saved(run) > began[-1] and is_saving(run)

    began = [0]
    halt = {"in a step": in_a_step, "in a later save": in_a_later_save}
    for moment in moments:
        processes = train_together(run, code=SLOW_MAIN)
        kill_at(halt[moment], processes, victim)
        said = [process.communicate(timeout=300)[1] for process in processes]
        began.append(last_saved(run))
        survivor = said[1 - victim]
        assert "Traceback" not in survivor, survivor
        if victim == 0:  # JAX ends a process whose leader has gone, in its own words and at once
            assert processes[1].returncode != 0
            assert "restart all processes" in survivor or "another task died" in survivor
        else:
            assert processes[0].returncode == 2, survivor
            assert "restart all processes" in survivor
            assert survivor.count("\n") == 1, survivor
    assert "step 60 done" in finish_together(train_together(run))
    assert all(earlier < later for earlier, later in itertools.pairwise(began))
    assert [session["step"] for session in sessions(run)] == began
    assert_same_run(run, both)


@pytest.mark.parametrize(
    "receivers",
    [
        pytest.param((0,), marks=pytest.mark.exhaustive),
        (1,),
        pytest.param((0, 1), marks=pytest.mark.exhaustive),
    ],
    ids=["leader", "other", "all"],
)
def test_a_preempted_process_stops_all_at_one_saved_step(train_together, both, tmp_path, receivers):
    run = tmp_path / "preempted"
    processes = train_together(run, code=SLOW_MAIN)
    wait_for(lambda: metrics_lines(run) >= 2, processes[0])
    for i in receivers:
        processes[i].send_signal(signal.SIGTERM)
    leader = finish_together(processes, 128 + signal.SIGTERM)
    saved = int(leader.split("SIGTERM: saved at step ")[1].split(";")[0])
    assert (run / "checkpoints" / str(saved)).is_dir()
    assert "step 60 done" in finish_together(train_together(run))
    assert_same_training(run, both)


@pytest.mark.parametrize(
    "rules",
    ["", pytest.param("('embed', 'data'),", marks=pytest.mark.exhaustive)],
    ids=["data_parallel", "fsdp"],
)
def test_what_one_process_cannot_read_is_set_aside_by_all(train_together, both, tmp_path, rules):
    run = tmp_path / "run"  # not a word that is looked for
    shutil.copytree(both, run)
    parts = list((run / "checkpoints" / "60").rglob("ocdbt.process_1/d/*"))
    assert parts
    for file in parts:
        os.truncate(file, 0)
    processes = train_together(run, f"--gin.MeshConfig.rules=({rules})")
    leader, other = [finish(process) for process in processes]
    assert "quarantined as 60.damaged, and training resumes from step 50" in leader
    assert "damaged" not in other
    if not rules:
        assert_same_training(run, both)


def test_several_processes_evaluate_and_predict_as_one(both, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"input": "is 3 good"}\n')
    for verb, said in (("eval", "toy_step_by_step_rules test, step"), ("predict", '"label":')):
        options = ("--input", tmp_path / "in.jsonl") if verb == "predict" else ()
        processes = start_together(
            TOGETHER, lambda env, verb=verb, options=options: start(verb, both, *options, env=env)
        )
        leader, other = [finish(process) for process in processes]
        assert said in leader
        assert said not in other


@pytest.mark.exhaustive
def test_each_process_reads_its_part_of_an_initial_checkpoint(train, shared, tmp_path):
    checkpoint = shared / "fixtures" / "t5x_tiny_v1_1" / "legacy" / "checkpoint_0"
    sizes = {"vocab_size": 1152, "d_model": 32, "d_ff": 48, "num_heads": 4}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 3}
    flags = [f"--gin.T5Config.{name}={size}" for name, size in sizes.items()]
    flags += [f"--gin.INITIAL_CHECKPOINT_PATH=t5x:{checkpoint}", "--gin.TRAIN_STEPS=4"]
    flags += ["--gin.MeshConfig.rules=(('embed', 'data'),)", "--gin.EVAL_PERIOD=4"]
    flags += ["--gin.DROPOUT_RATE=0.0"]  # masks depend on where a token lies in a batch
    finish(train(tmp_path / "alone", *flags))
    finish_together(
        start_together(TOGETHER, lambda env: train(tmp_path / "together", *flags, env=env))
    )
    losses = []
    for run in ("alone", "together"):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        losses.append([row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_processes_with_other_arguments_are_refused_before_the_first_step(train, tmp_path):
    alphas = iter((0.5, 0.9))
    processes = start_together(
        TOGETHER, lambda env: train(tmp_path / "run", f"--gin.ALPHA={next(alphas)}", env=env)
    )
    leader, other = [finish(process, 2) for process in processes]
    assert "the same arguments and data: another process has other values" in leader
    assert "the same arguments and data: process 0 has alpha = 0.5 and this one 0.9\n" in other
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_find_each_other_say_what_is_missing(train, tmp_path):
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    said = finish(train(tmp_path / "run", env=env), 2)
    assert said.endswith("set JAX_NUM_PROCESSES and JAX_PROCESS_ID to numbers too\n")
    env |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}
    assert "JAX_PROCESS_ID=2 must be in 0 to" in finish(train(tmp_path / "run", env=env), 2)
    env |= {"JAX_COORDINATOR_ADDRESS": "here", "JAX_PROCESS_ID": "1"}
    assert "give it as HOST:PORT of process 0" in finish(train(tmp_path / "run", env=env), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_slurms_variables_are_enough(train, both, tmp_path):
    """Two tasks of a step on this machine, as `srun --ntasks=2 dss train ...` would start them."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    run = tmp_path / "slurm"
    tasks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    processes = [train(run, env=os.environ | step | task) for task in tasks]
    assert "step 60 done" in finish_together(processes)
    assert_same_training(run, both)


@pytest.mark.exhaustive
def test_a_clock_that_jumps_changes_nothing(train, undisturbed, tmp_path):
    run = tmp_path / "jumping"
    process = train(run, code=JUMPING_CLOCK_MAIN)
    wait_for(lambda: metrics_lines(run) >= 20, process)
    process.kill()
    process.communicate()
    assert "step 60 done" in finish(train(run, code=JUMPING_CLOCK_MAIN))
    assert_same_run(run, undisturbed)


@pytest.mark.exhaustive
def test_clocks_that_jump_in_several_processes_change_nothing(train_together, both, tmp_path):
    run = tmp_path / "jumping"
    assert "step 60 done" in finish_together(train_together(run, code=JUMPING_CLOCK_MAIN))
    assert_same_run(run, both)


def test_a_run_goes_on_on_another_mesh_and_number_of_processes(train, train_together, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    # Dropout's masks depend on where a token lies in a batch.
    flags = ("--gin.DROPOUT_RATE=0.0", "--gin.TRAIN_STEPS=30")
    finish(train(alone, *flags))
    processes = train_together(run, *flags, code=SLOW_MAIN)
    wait_for(lambda: metrics_lines(run) >= 7, processes[0])
    processes[0].send_signal(signal.SIGTERM)
    finish_together(processes, 128 + signal.SIGTERM)
    saved = last_saved(run)
    mesh = ("data=4", "model=2", "rules=(('embed', 'data'), ('heads', 'model'))")
    flags += tuple(f"--gin.MeshConfig.{value}" for value in mesh)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    assert "step 30 done" in finish(train(run, *flags, env=env))
    assert 10 < saved < 30
    assert [(s["step"], s["processes"], s["devices"]) for s in sessions(run)] == [
        (0, 2, 2),
        (saved, 1, 8),
    ]
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (run, alone)]
    for got, wanted in zip(*lines, strict=True):
        assert json.loads(got) == pytest.approx(json.loads(wanted), rel=1e-5)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 900 kB; `remount` makes it larger."""
    mount = tmp_path / "small"
    mount.mkdir()

    def remount(size: str, *options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs"]
        return subprocess.run([*command, str(mount)], capture_output=True).returncode

    if remount("900k"):
        pytest.skip("a small file system can only be mounted by root")
    yield mount, lambda size: remount(size, "remount")
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_while_saving_costs_nothing_once_there_is_room(
    train, undisturbed, small_disk
):
    mount, remount = small_disk
    run = mount / "run"
    _, err = (process := train(run)).communicate(timeout=300)
    assert process.returncode == 2, err
    assert "no space left on device" in err
    assert err.count("\n") == 1, err
    assert remount("30m") == 0
    assert "step 60 done" in finish(train(run, "--resume=must"))
    assert_same_training(run, undisturbed)


@pytest.mark.exhaustive
def test_a_full_disk_ends_all_of_several_processes(train_together, both, small_disk):
    mount, remount = small_disk
    run = mount / "run"
    said = [process.communicate(timeout=300)[1] for process in train_together(run)]
    assert any("no space left on device" in err for err in said), said
    assert remount("30m") == 0
    assert "step 60 done" in finish_together(train_together(run))
    assert_same_training(run, both)
