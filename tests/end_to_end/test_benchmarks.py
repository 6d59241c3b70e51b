"""The promises, as the commands that show them."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.end_to_end.reference import record


def run(script, *args):
    command = [sys.executable, ROOT / "benchmarks" / script, *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_benchmarks_keep_libtpu_quiet_on_a_machine_without_a_tpu(monkeypatch, capsys):
    scripts = [p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "jax" in p.read_text()]
    others = ("largest", "variants")  # a module of two of them; one whose processes prepare JAX
    scripts = [path for path in scripts if path.stem not in others]
    assert {"decode", "fidelity", "train_step"} < {path.stem for path in scripts}
    monkeypatch.setattr("dss.parallel.devices.has_tpu", lambda: False)
    for path in scripts:
        monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(path), run_name="__main__")
        assert os.environ.get("TPU_WORKER_HOSTNAMES") == "localhost", path.name


def test_the_released_data_parse_row_for_row(shared):
    done = run(
        "parse_released.py",
        *("--data-root", shared / "data" / "datasets"),
        *("--expected", shared / "fixtures" / "released_teacher_outputs.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok\n") == 8
    for accuracy in ("77.23%", "74.00%", "65.60%", "72.99%"):
        assert accuracy in done.stdout


def test_the_network_is_t5xs(shared):
    done = run("network_parity.py", "--fixture", shared / "fixtures" / "t5x_tiny_v1_1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok\n") == 8


@pytest.mark.parametrize(
    "options",
    [
        ["--packed"],
        ["--packed", "--devices=8", "--microbatches=2"],
        *(
            pytest.param(options, marks=pytest.mark.exhaustive)
            for options in (
                ["--unpacked"],
                ["--packed", "--devices=8"],
                ["--unpacked", "--microbatches=2"],
            )
        ),
    ],
    ids=" ".join,
)
def test_every_step_is_the_references(shared, vocab_path, options):
    done = run(
        "fidelity.py",
        *("--reference", shared / "fixtures" / "reference_cqa"),
        *("--data-root", shared / "data" / "datasets"),
        *("--vocab", vocab_path),
        *options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "greedy outputs equal 4 of 4" in done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("dataset", "split", "kind", "label_type", "alpha"),
    [
        ("svamp", "train", "1.0", "llm", 0.3),
        ("esnli", "valid", "1.1", "gt", 0.5),
        ("anli1", "test", "1.0", "gt", 0.7),
    ],
)
def test_fidelity_holds_for_other_datasets_and_kinds_of_t5(
    data_root, vocab_path, tmp_path, dataset, split, kind, label_type, alpha
):
    record(
        tmp_path,
        dataset=dataset,
        split=split,
        kind=kind,
        label_type=label_type,
        alpha=alpha,
        vocabulary=vocab_path,
    )
    replay = (
        "fidelity.py",
        *("--reference", tmp_path),
        *("--data-root", data_root),
        *("--vocab", vocab_path),
    )
    done = run(*replay)
    assert done.returncode == 0, done.stdout + done.stderr
    trajectory = tmp_path / "trajectory.json"
    wrong = json.loads(trajectory.read_text())
    wrong["log"][-1]["rationale_loss"] *= 1.001
    trajectory.write_text(json.dumps(wrong))
    done = run(*replay)
    assert done.returncode == 1
    assert re.search(r"rationale_loss +1.0e-03 +above", done.stdout), done.stdout


def test_annotating_asks_once_and_writes_every_line(tmp_path):
    """The figures themselves are for 100,000 examples on a quiet machine."""
    done = run("annotate.py", "--examples=1000", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["requests"] == figures["lines"] == 1000
    assert figures["peak_mb"] < 300


@pytest.mark.exhaustive
def test_the_training_step_is_timed_against_pytorchs(tmp_path):
    """That every side runs and is counted; the figures are for a quiet machine."""
    names = ["dss packed", "dss one pass", "dss unpacked", "PyTorch f32", "PyTorch bf16"]
    done = run(
        *("train_step.py", "--random", "--student=tiny", "--batch=4", "--steps=1"),
        *("--sides", *names, "--json", tmp_path / "figures.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    sides = figures["sides"]
    assert list(sides) == names
    assert all(side["seconds"] > 0 and side["peak_gb"] > 0 for side in sides.values())
    assert min(sides["dss packed"]["fill"]) > max(sides["dss unpacked"]["fill"])
    speeds = [sides[side]["examples_per_second"] for side in ("dss packed", "PyTorch f32")]
    assert figures["ratio_vs_pytorch_f32"] == pytest.approx(speeds[0] / speeds[1], abs=0.01)


@pytest.mark.exhaustive
def test_variants_are_held_against_the_baseline_seed_by_seed_and_not_done_twice(tmp_path):
    """That they run and are counted; the figures are for many more steps."""
    command = (
        *("variants.py", "--task=noisy", "--seeds=2", "--steps=2", "--processes=2"),
        *("--variants", "right_rationales", "--folder", tmp_path, "--json", tmp_path / "f.json"),
    )
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["rows"]) == ["baseline", "right_rationales"]
    for name, row in figures["rows"].items():
        outcomes = (tmp_path / "outcomes").glob(f"noisy-{name}-*.json")
        of_seeds = [json.loads(path.read_text())["verdicts"] for path in outcomes]
        by_example = np.mean(of_seeds, axis=0)
        assert row["accuracy"] == pytest.approx(by_example.mean())
        # After two steps every example may have the same mean; an interval is a point then alone.
        low, high = row["interval"]
        assert (low < row["accuracy"] < high) == bool(np.ptp(by_example))
        assert len(row["of_seeds"]) == 2
        assert 0 < row["label_loss"] < 10
    row = figures["rows"]["right_rationales"]
    assert row["over_seeds"][0] <= row["difference"] <= row["over_seeds"][1]
    assert len(list((tmp_path / "outcomes").glob("*.json"))) == 4
    (tmp_path / "outcomes" / "noisy-baseline-1.json").unlink()
    again = run(*command)
    assert "[1/1] noisy-baseline-1" in again.stdout
    assert json.loads((tmp_path / "f.json").read_text())["rows"] == figures["rows"]


@pytest.mark.parametrize("task", ["cqa", "svamp"])
def test_variants_find_the_gin_files_of_a_real_task(task):
    module = runpy.run_path(str(ROOT / "benchmarks" / "variants.py"))
    args = argparse.Namespace(task=task, data_root="d", vocab="bytes", batch=32, steps=10)
    experiment = module["_base"](args, seed=1)
    assert (experiment.dataset, experiment.method, experiment.seed) == (task, "step_by_step", 1)


@pytest.mark.parametrize(("batch", "groups"), [(64, 1), (36, 1), (64, 4)])
def test_packing_fills_both_sides_of_all_four_datasets(
    data_root, vocab_path, tmp_path, batch, groups
):
    done = run(
        *("packing.py", "--data-root", data_root, "--vocab", vocab_path, "--steps=40"),
        *(f"--batch={batch}", f"--groups={groups}", "--json", tmp_path / "figures.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["datasets"]
    assert list(found) == ["cqa", "svamp", "esnli", "anli1"]
    for row in found.values():
        assert row["exact"]
        assert min(row["fill"]) >= 0.9
        assert len(row["shapes"]) <= 3


@pytest.mark.exhaustive
def test_what_a_user_waits_for_is_timed(tmp_path):
    done = run("start_up.py", "--repeats=1", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["first_step_seconds"] > figures["help_seconds"] > 0
    assert set(figures["compile_seconds"]) == {"small", "xxl"}


@pytest.mark.exhaustive
def test_importing_a_checkpoint_takes_little_besides_it(tmp_path):
    """All parameters are 4.7 times the largest tensor."""
    done = run("import_checkpoint.py", "--student=small", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["format"], row["devices"], row["what"]) for row in rows] == [
        (form, devices, what)
        for form in ("hf", "t5x")
        for devices in (1, 8)
        for what in ("read", "save")
    ]
    assert all(row["parameters"] > 4.5 * row["largest"] for row in rows)
    assert all(row["besides"] < 2.5 * row["largest"] for row in rows)


@pytest.mark.exhaustive
def test_a_step_takes_the_memory_that_was_planned(tmp_path):
    """Within 10%, where programs and threads weigh little: small has 77M parameters."""
    rows = ["16 examples", "2x1 devices, fsdp, Adafactor, 2 microbatches, 16"]
    done = run("plan.py", "--rows", *rows, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["row"] for row in figures] == rows
    assert all(abs(row["off"]) <= 0.1 and row["measured"] > 5e8 for row in figures)


@pytest.mark.exhaustive
def test_a_step_is_timed_on_every_mesh(tmp_path):
    file = tmp_path / "figures.json"
    sizes = ("--student=tiny", "--batch=16", "--devices=2", "--repeats=1")
    done = run("mesh_step.py", *sizes, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    meshes = [("data_parallel", "1x1"), ("data_parallel", "2x1"), ("fsdp", "2x1")]
    assert [(row["layout"], row["mesh"]) for row in rows] == meshes
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["mesh"] for row in rows if row["sent"] == 0] == ["1x1"]


@pytest.mark.exhaustive
def test_points_of_scaling_are_plans_and_go_to_more_chips(tmp_path):
    """That all are there and agree; the figures are for larger students."""
    done = run(
        *("scaling.py", "--students=tiny", "--devices=1,2", "--json", tmp_path / "figures.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    points = {(p["layout"], p["data"], p["model"]): p for p in figures["points"]}
    assert list(points) == [
        ("data_parallel", 8, 1),
        ("fsdp", 8, 1),
        ("tensor_parallel", 2, 4),
        ("two_d", 2, 4),
        ("fsdp", 1, 1),
        ("fsdp", 2, 1),
    ]
    sent = {key: sum(e["sent"] for e in p["exchanges"]) for key, p in points.items()}
    assert sent["fsdp", 1, 1] == 0
    assert sent["fsdp", 2, 1] / (1 / 2) == pytest.approx(sent["fsdp", 8, 1] / (7 / 8), rel=0.02)
    # Where a point is planned for is among the chips of the second table.
    (eight,) = (
        row
        for row in figures["computed"]
        if (row["layout"], row["accelerator"], row["chips"]) == ("two_d", "h100", 8)
    )
    point = points["two_d", 2, 4]
    for what in ("computing_seconds", "sending_seconds"):
        assert eight[what] == pytest.approx(point[what])
