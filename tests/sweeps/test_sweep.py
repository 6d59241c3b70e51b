import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from dss.cli import main as cli
from dss.cli.main import main
from dss.config.gin_files import gin_flags, parse_gin, save_config
from dss.data.datasets import Dataset
from dss.errors import DssError
from dss.paths import gin_root
from dss.runs.data import training_store
from dss.sweeps.runner import Outcome, SweepProgress, read_outcome, run_sweep
from dss.sweeps.sweep import SweepMethod, plan_sweep
from tests.conftest import ROOT

STUDENT = """
Experiment.student = @T5Config()
T5Config.vocab_size = 384
T5Config.d_model = 16
T5Config.d_kv = 8
T5Config.d_ff = 32
T5Config.num_heads = 2
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = {layers}
"""


@pytest.fixture
def settings(toy_folder, tmp_path, monkeypatch):
    """The flags of a sweep over the toy data: 2 methods x 2 students x 3 fractions x 2 seeds."""
    monkeypatch.chdir(tmp_path)
    for layers, name in enumerate(("one", "two"), start=1):
        (tmp_path / f"{name}.gin").write_text(STUDENT.format(layers=layers))
    return [
        f"DATASET_PATH={toy_folder}",
        "DATASET_LABELS=('yes', 'no')",
        "MODEL_DIR=sweep",
        "VOCABULARY=bytes",
        "STUDENTS=('one.gin', 'two.gin')",
        "FRACTIONS=(0.25, 0.5, 1.0)",
        "SEEDS=(0, 1)",
    ]


def plan(settings, *flags):
    return plan_sweep(["runs/sweep.gin"], [*settings, *flags])


def test_a_sweep_has_every_method_student_fraction_and_seed(settings):
    sweep = plan(settings, "METHODS=('finetune', 'finetune*2.5', 'step_by_step')", "TRAIN_STEPS=30")
    assert len(sweep.runs) == 3 * 2 * 3 * 2
    assert [run.name for run in sweep.runs[:6]] == [
        "finetune-one-0.25-s0",
        "finetune-two-0.25-s0",
        "finetune_x2.5-one-0.25-s0",
        "finetune_x2.5-two-0.25-s0",
        "step_by_step-one-0.25-s0",
        "step_by_step-two-0.25-s0",
    ]
    run = sweep.runs[-1]
    assert (run.name, run.examples) == ("step_by_step-two-1.0-s1", 40)
    experiment = run.experiment
    assert experiment.mixture_name == "toy_step_by_step_rules"
    assert experiment.run_dir == "sweep/step_by_step-two-1.0-s1"
    assert (experiment.seed, experiment.data.fraction) == (1, 1.0)
    assert experiment.student.num_decoder_layers == 2
    steps = {run.method: run.experiment.trainer.train_steps for run in sweep.runs}
    assert steps == {"finetune": 30, "finetune_x2.5": 75, "step_by_step": 30}


def test_methods_have_the_same_examples_and_fractions_are_nested(settings):
    methods = "METHODS=('finetune', 'step_by_step', 'distill', 'single_target')"
    seen: dict[tuple, set] = {}
    for run in plan(settings, methods, "STUDENTS=('one.gin',)").runs:
        ids = set(training_store(run.experiment).ids)
        key = (run.experiment.seed, run.experiment.data.fraction)
        assert seen.setdefault(key, ids) == ids
        assert len(ids) == run.examples
    for seed in (0, 1):
        assert seen[seed, 0.25] < seen[seed, 0.5] < seen[seed, 1.0]
    assert seen[0, 0.25] != seen[1, 0.25]
    assert seen[0, 1.0] == seen[1, 1.0]


def test_parts_partition_the_runs_and_each_has_every_method(settings):
    sweep = plan(settings)
    parts = [sweep.select_part(i, 5) for i in range(5)]
    names = [run.name for part in parts for run in part.runs]
    assert sorted(names) == sorted(run.name for run in sweep.runs)
    assert all({run.method for run in part.runs} == {"finetune", "step_by_step"} for part in parts)
    assert sweep.select_part(99, 100).runs == ()


def test_methods_with_gin_files_and_a_factor_of_steps(settings, tmp_path):
    (tmp_path / "more alpha.gin").write_text("ALPHA = 0.9\nTRAIN_STEPS = 40\n")
    (tmp_path / "whole.gin").write_text("MIXTURE_OR_TASK_NAME = 'toy_distill_rules'\n")
    methods = "METHODS=('step_by_step_rules+more alpha.gin*2', 'whole.gin')"
    first, second = plan(
        settings, methods, "STUDENTS=('one.gin',)", "FRACTIONS=(1,)", "SEEDS=(3,)"
    ).runs
    assert first.name == "step_by_step_rules_more_alpha_x2-one-1.0-s3"
    assert (first.experiment.alpha, first.experiment.trainer.train_steps) == (0.9, 80)
    assert first.experiment.mixture_name == "toy_step_by_step_rules"
    assert (second.method, second.experiment.mixture_name) == ("whole", "toy_distill_rules")
    assert second.experiment.alpha == 0.5


@pytest.mark.parametrize(
    "text", ["", "*2", "a+b", "a*", "a*0", "a*nan", "a*-1", "a*inf", "a+", "+"]
)
def test_the_error_for_a_malformed_method_shows_the_syntax(text):
    with pytest.raises(DssError, match=r"method '.*': give a method's name"):
        SweepMethod.parse(text)


def test_a_method_can_match_the_compute_of_another(settings):
    runs = plan(
        settings, "METHODS=('finetune*step_by_step', 'step_by_step')", "TRAIN_STEPS=50"
    ).runs
    longer = {run.experiment.trainer.train_steps for run in runs if run.method != "step_by_step"}
    pair = runs[-1].experiment
    assert (runs[0].method, pair.trainer.train_steps) == ("finetune_as_step_by_step", 50)
    tokens = [
        sum(task.inputs.lengths) + sum(task.targets.lengths) for task in training_store(pair).tasks
    ]
    assert longer == {round(50 * sum(tokens) / tokens[0])}


def test_a_student_can_be_a_checkpoint(settings, shared):
    source = shared / "fixtures" / "reference_cqa" / "model"
    only = ["FRACTIONS=(1,)", "SEEDS=(0,)", "METHODS=('finetune',)"]
    (run,) = plan(settings, *only, f"STUDENTS=('hf:{source}',)").runs
    assert (run.student, run.name) == ("model", "finetune-model-1.0-s0")
    train, _ = run.commands
    assert f"--gin.INITIAL_CHECKPOINT_PATH=hf:{source}" in train
    assert not any("T5Config" in word for word in train)
    with pytest.raises(DssError, match="a checkpoint of another size than the student"):
        plan(settings, *only, "STUDENTS=('one.gin',)", f"INITIAL_CHECKPOINT_PATH=hf:{source}")


def test_a_sweep_waits_for_a_run_of_another_process(settings):
    sweep = plan(settings, "STUDENTS=('one.gin',)", "FRACTIONS=(0.5,)").select_part(0, 4)
    (run,) = sweep.runs
    log = sweep.folder / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True)
    waited = []
    with open(log, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        class Recorder(SweepProgress):
            def waiting(self, run):
                waited.append(run.name)
                finish(run, right=4)
                fcntl.flock(other, fcntl.LOCK_UN)

            def started(self, number, run, log):
                pytest.fail("the other process has done it")

        (outcome,), _ = run_sweep(sweep, Recorder())
    assert waited == [run.name]
    assert outcome.status == "done"


def test_planning_a_sweep_initializes_no_accelerator(settings):
    flags = [f"--gin.{setting}" for setting in settings]
    code = "from dss.cli.main import main; raise SystemExit(main())"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "sweep",
            "--gin_file=runs/sweep.gin",
            *flags,
            "--print-commands",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none_such"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" && dss eval ") == 24


def test_files_and_flags_of_a_sweep_override_the_datasets_file(small_root, tmp_path):
    (tmp_path / "own.gin").write_text("BATCH_SIZE = 4\nALPHA = 0.25\n")
    flags = ["DATASET=cqa", f"DATA_ROOT={small_root}", "VOCABULARY=bytes", "MODEL_DIR=x"]
    sweep = plan_sweep(["runs/sweep.gin", str(tmp_path / "own.gin")], [*flags, "ALPHA=0.3"])
    run = next(run for run in sweep.runs if run.method == "step_by_step")
    assert run.experiment.mixture_name == "cqa_step_by_step_palm"
    assert (run.experiment.batch_size, run.experiment.alpha) == (4, 0.3)
    assert run.experiment.trainer.eval_period == 250
    longer = ["METHODS=('finetune*step_by_step',)", "FRACTIONS=(1,)", "SEEDS=(0,)"]
    (run,) = plan_sweep(["runs/sweep.gin"], [*flags, *longer]).runs
    assert run.experiment.mixture_name == "cqa_finetune"
    assert run.experiment.trainer.train_steps > 10000
    sweep = plan_sweep(["runs/sweep.gin"], [*flags, "TEACHER=gpt_neox"])
    assert {run.experiment.mixture_name for run in sweep.runs} == {
        "cqa_finetune",
        "cqa_step_by_step_gpt_neox",
    }


def test_the_shipped_sweep_is_documented_and_expands(small_root):
    text = (gin_root() / "runs" / "sweep.gin").read_text()
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("# ")][:2] == [
        "# Purpose",
        "# Score",
    ]
    assert "# Cost: " in text
    words = shlex.split(
        text.split("# Command:")[1].split("\n\n")[0].replace("#", "").replace("FOLDER", "$R")
    )
    assert words[:2] == ["dss", "sweep"]
    flags = [w.removeprefix("--gin.") for w in words if w.startswith("--gin.")]
    flags = [f.replace("$R", str(small_root)).replace("FILE", "bytes") for f in flags]
    assert len(plan_sweep(["runs/sweep.gin"], flags).runs) == 24


def test_the_commands_of_a_run_have_its_whole_configuration(settings, tmp_path, capsys):
    odd = tmp_path / 'it\'s a "sweep" $HOME'
    sweep = plan(settings, f"MODEL_DIR={odd}", "ALPHA=0.3", "MeshConfig.model=1")
    for run in sweep.runs[:3]:
        train, evaluate = run.commands
        files = [a.removeprefix("--gin_file=") for a in train if a.startswith("--gin_file=")]
        flags = [a.removeprefix("--gin.") for a in train if a.startswith("--gin.")]
        assert len(files) + len(flags) + 1 == len(train)
        assert parse_gin(files, flags) == run.experiment
        assert evaluate[1] == run.experiment.run_dir
    args = ["--gin_file=runs/sweep.gin", *(f"--gin.{s}" for s in [*settings, f"MODEL_DIR={odd}"])]
    assert main(["sweep", *args, "--print-commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    planned = plan(settings, f"MODEL_DIR={odd}").runs
    assert len(lines) == len(planned)
    for line, run in zip(lines, planned, strict=True):
        train, evaluate = run.commands
        assert shlex.split(line) == ["dss", *train, "&&", "dss", *evaluate]
    assert main(["sweep", *args, "--print-commands", "--shard=1/4"]) == 0
    part = capsys.readouterr().out.splitlines()
    assert len(part) == len(lines) // 4
    assert set(part) < set(lines)
    assert not odd.exists()


def test_gin_flags_has_only_the_changes_of_a_shipped_student():
    base = parse_gin(["students/tiny.gin"])
    wanted = parse_gin(["students/tiny.gin"], ["T5Config.vocab_size=384", "MODEL_DIR='1'"])
    assert gin_flags(wanted, base) == ["--gin.MODEL_DIR='1'", "--gin.T5Config.vocab_size=384"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("METHODS=()", "METHODS is empty"),
        ("STUDENTS=()", "STUDENTS is empty"),
        ("FRACTIONS=()", "FRACTIONS is empty"),
        ("SEEDS=()", "SEEDS is empty"),
        ("METHODS=('finetune', 'finetune')", "METHODS has 'finetune' twice"),
        ("METHODS=finetune", "SweepConfig.methods must be of type tuple"),
        ("METHODS=('fine_tune',)", "unknown method 'fine_tune'; did you mean 'finetune'"),
        ("METHODS=('finetune+no.gin',)", "unknown gin file 'no.gin'"),
        ("METHODS=('runs/adafactor.gin',)", "must set METHOD"),
        ("METHODS=('finetune', 'label_gold*0')", "method 'label_gold*0': give"),
        ("STUDENTS=('smal',)", "did you mean 'students/small.gin'"),
        ("STUDENTS=('hf:./nowhere',)", "nowhere: no such folder"),
        ("STUDENTS=('t5x:/nowhere',)", "/nowhere"),
        ("METHODS=('finetune*step',)", "unknown method 'step'; did you mean 'step_by_step'?"),
        ("FRACTIONS=(0.5, 1.5)", r"FRACTIONS must be in (0, 1], got 1.5"),
        ("FRACTIONS=(0,)", r"FRACTIONS must be in (0, 1], got 0"),
        ("FRACTIONS=(0.001,)", "no examples for the train split of 'toy'"),
        ("SEEDS=(-1,)", "SEEDS must be at least 0, got -1"),
        ("SEEDS=(0.5,)", "SweepConfig.seeds must be of type tuple"),
        ("SPLIT=tests", "SPLIT must be one of train, valid, test, got 'tests'"),
        ("TEACHER=palm", "unknown teacher 'palm'; known: rules"),
        ("DATASET=cqq", "unknown dataset 'cqq'; did you mean 'cqa'?"),
        ("DATASET_PATH=/nowhere", "/nowhere: no such file or folder"),
        (
            "DATASET_PATH=None",
            "no dataset: give --gin_file=datasets/NAME.gin, or --gin.DATASET_PATH",
        ),
        ("VOCABULARY=None", "no vocabulary: give"),
        ("VOCABULARY=/nowhere", "/nowhere"),
        ("T5Config.vocab_size=100", "bytes: wrong vocabulary"),
        ("T5Config.num_decoder_layers=3", "are the same run"),
        ("MODEL_DIR=None", "no run directory: give --gin.MODEL_DIR"),
        ("TRAIN_FRACTION=0.5", "TRAIN_FRACTION is set; a sweep has FRACTIONS in its place"),
        ("RANDOM_SEED=1", "RANDOM_SEED is set; a sweep has SEEDS in its place"),
        ("BATCH_SIZE=0", "batch_size must be at least 1"),
        ("FRACTION=(1,)", "unknown macro 'FRACTION'"),
    ],
)
def test_errors_of_a_sweep_are_found_before_training(settings, flag, message, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    flags = [f"--gin.{setting}" for setting in [*settings, flag]]
    assert main(["sweep", "--gin_file=runs/sweep.gin", *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("dss sweep: ")
    assert printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("part", ["4/4", "1", "-1/4", "a/b", "1/0"])
def test_a_part_is_one_of_n(part, capsys):
    assert main(["sweep", f"--shard={part}"]) == 2
    assert "I from 0 to N - 1" in capsys.readouterr().err


def test_missing_data_of_one_method_are_found_too(settings, toy_folder, tmp_path, capsys):
    copy = shutil.copytree(toy_folder, tmp_path / "toy")
    (copy / "train.rules.jsonl").unlink()
    with pytest.raises(DssError, match=r"train.rules.jsonl: no such file"):
        plan(settings, f"DATASET_PATH={copy}")
    shutil.copy(toy_folder / "train.rules.jsonl", copy / "train.other.jsonl")
    with pytest.raises(DssError, match=r"needs a teacher: give TEACHER; .* 'toy': other, rules"):
        plan(settings, f"DATASET_PATH={copy}", "METHODS=('distill',)")
    (copy / "test.jsonl").unlink()
    with pytest.raises(DssError, match=r"test.jsonl: no such file"):
        plan(settings, f"DATASET_PATH={copy}", "TEACHER=other")


def test_a_folder_with_runs_of_another_sweep_is_an_error(settings):
    sweep = plan(settings)
    sweep.runs[0].folder.mkdir(parents=True)
    save_config(sweep.runs[0].experiment, sweep.runs[0].folder)
    plan(settings, "ALPHA=0.4")  # without a checkpoint, nothing is lost
    (sweep.runs[0].folder / "checkpoints" / "10").mkdir(parents=True)
    plan(settings)
    with pytest.raises(
        DssError, match=r"finetune-one-0.25-s0: the run of another experiment: ALPHA"
    ):
        plan(settings, "ALPHA=0.4")


def test_a_sweep_with_several_processes_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    assert main(["sweep"]) == 2
    assert "--print-commands" in capsys.readouterr().err


def finish(run, right: int, total: int = 8) -> None:
    """Writes the files of `dss eval` for a run."""
    run.result.parent.mkdir(parents=True)
    scores = [1.0] * right + [0.0] * (total - right)
    lines = "".join(json.dumps({"score": score}) + "\n" for score in scores)
    mixture = run.experiment.mixture_name
    (run.result.parent / f"{mixture}-test-30.jsonl").write_text(lines)
    summary = {"mixture": mixture, "split": "test", "step": 30, "metric": "accuracy"}
    summary |= {"value": right / total, "interval": [0.1, 0.9], "examples": total}
    run.result.write_text(json.dumps(summary))


def test_finished_runs_are_shown_and_not_repeated(settings, capsys, monkeypatch):
    only = ["STUDENTS=('one.gin',)", "FRACTIONS=(0.5,)"]
    for i, run in enumerate(plan(settings, *only).runs):
        finish(run, right=4 + i)
    monkeypatch.setattr("dss.sweeps.runner.subprocess.Popen", None)  # nothing may be started
    flags = [f"--gin.{setting}" for setting in [*settings, *only]]
    assert cli.main(["sweep", "--gin_file=runs/sweep.gin", *flags]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 4 of them already done" in out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["one"]]
    assert [row[:5] for row in rows] == [
        ["finetune", "one", "20", "2/2", "62.5%"],  # 4 and 6 of 8
        ["step_by_step", "one", "20", "2/2", "75.0%"],  # 5 and 7 of 8
    ]
    with open("sweep/sweep.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["status"] for line in lines] == ["done"] * 4
    assert [line["value"] for line in lines] == [4 / 8, 5 / 8, 6 / 8, 7 / 8]
    assert {line["examples"] for line in lines} == {20}


@pytest.mark.parametrize("text", ["", "[]", '{"mixture": ', "[" * 100_000])
def test_a_run_with_an_invalid_result_is_missing(text, settings):
    run = plan(settings).runs[0]
    finish(run, right=4)
    assert read_outcome(run).status == "done"
    run.result.write_text(text)
    assert read_outcome(run).status == "missing"


def test_a_failed_run_is_reported_and_the_others_continue(settings, monkeypatch):
    sweep = plan(settings, "STUDENTS=('one.gin',)", "FRACTIONS=(0.5,)")
    ended: list[Outcome] = []

    class Recorder(SweepProgress):
        def ended(self, number, outcome, seconds, left):
            ended.append(outcome)
            assert seconds >= 0
            assert left >= 0

    def run(_, command, log):
        """Replaces a process: the second run fails with a message, the third is killed."""
        number = len(ended)
        log.write(b"step 1/2\ndss train: bad luck; try again\nafter that\n")
        log.flush()
        if number == 1:
            return 2
        if number == 2:
            return -9
        if command[0] == "eval":
            finish(sweep.runs[number], right=4)
        return 0

    monkeypatch.setattr("dss.sweeps.runner._Children.run", run)
    outcomes, stopped_by = run_sweep(sweep, Recorder())
    assert stopped_by is None
    assert [o.status for o in outcomes] == ["done", "failed", "failed", "done"]
    assert outcomes == ended
    assert outcomes[1].error == "dss train: bad luck; try again"
    assert outcomes[2].error == "dss train: ended by SIGKILL; out of memory?"
    assert outcomes[1].log.read_text().count("after that") == 1
    assert read_outcome(sweep.runs[1]).status == "missing"  # so the next sweep repeats it
    lines = [json.loads(line) for line in (sweep.folder / "sweep.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines][1] == "dss train: bad luck; try again"


def test_held_out_examples_are_not_counted(settings, toy_folder, tmp_path):
    copy = shutil.copytree(toy_folder, tmp_path / "toy")
    (copy / "valid.jsonl").unlink()
    runs = plan(settings, f"DATASET_PATH={copy}", "FRACTIONS=(0.5,)").runs
    assert runs[0].examples == len(Dataset.from_files(copy).examples("train", fraction=0.5)) == 18
