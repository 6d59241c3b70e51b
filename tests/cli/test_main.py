import errno
import json
import subprocess
import sys

import pytest
from etils.epath import gpath

from dss.cli import main as cli
from dss.cli.checks import check_flags
from dss.cli.decode_progress import DecodeProgress
from dss.cli.progress import Lines
from dss.cli.train_progress import TrainProgress
from dss.errors import DssError


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_does_not_import_jax(command, capsys):
    code = (
        "import sys; from dss.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'jax', 'numpy', 'tensorflow', 'rich'} & set(sys.modules)"
    )
    args = [command, "--help"] if command else ["--help"]
    subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "--gin_file=students/tny.gin"), "did you mean 'students/tiny.gin'"),
        (("train", "--gin.TRAIN_STEPS=0"), "train_steps must be at least 1, got 0"),
        (("train", "--gin.TrainerConfig.select_by=f1"), "one of 'accuracy', 'macro_f1', "),
        (("train", "--gin.NoSuch.field=1"), "No configurable matching 'NoSuch'"),
        (("train", "--gin.BATCH_SIZE"), "give it as --gin.NAME=VALUE"),
        (("train", "--gin.MODEL_DIR=x"), "no method: give"),
        (
            ("train", "--gin.MODEL_DIR=x", "--gin.MIXTURE_OR_TASK_NAME=svamp_finetunee"),
            "unknown mixture 'svamp_finetunee'; did you mean 'svamp_finetune'",
        ),
        (("train", "--gin.DATA_ROOT=/nowhere"), "DATA_ROOT /nowhere: no such folder"),
        (("inspect", "svamp_finetune", "--gin.DATASET_PATH=/no.jsonl"), "no such file or folder"),
        (("eval", "/nowhere"), "no run directory"),
        (("predict", "/nowhere"), "no run directory"),
        (("import", "hf:/nowhere", "x"), "no such folder"),
        (("export", "/nowhere", "--to=hf", "x"), "no run directory"),
        (("train", "--gin.DATA_ROOT=/dev/null"), "DATA_ROOT /dev/null: no such folder"),
        (("plan",), "no student: give --student"),
        (("plan", "--student=smal"), "did you mean 'students/small.gin'"),
        (
            ("plan", "--student=small", "--accelerator=v6"),
            "unknown accelerator 'v6'; known: v4, v5p, h100, h200, cpu",
        ),
        (("plan", "--student=small", "--mesh=data=8x"), "give it as data=N,model=N"),
        (("plan", "--student=small", "--mesh=model=4"), "num_heads of size 6 cannot be sharded"),
        (("plan", "--student=small", "--tokens=48"), "give it as INPUT,TARGET"),
        (("plan", "--student=small", "--mfu=40"), "a fraction of the peak"),
        (("plan", "--student=small", "--mfu=nan"), "a fraction of the peak"),
        (("plan", "--student=small", "--accelerator=tpu"), "known: v4, v5p, h100, h200, cpu"),
        (("plan", "--student=small", "--mesh="), "give it as data=N,model=N"),
        (("plan", "--student=small", "--mesh=data=2,data=3"), "give it as data=N,model=N"),
        (("plan", "--student=small", "--mesh=data=2,"), "give it as data=N,model=N"),
        (("plan", "--student=small", "--mesh=data=100000"), "at most 1,024 are simulated"),
        (("plan", "--student=small", "--gin.MeshConfig.data=1025"), "at most 1,024 are simulated"),
        (("plan", "--student=small", "--tokens="), "mean lengths of 2 to 100,000"),
        (("plan", "--student=small", "--tokens=inf,17"), "mean lengths of 2 to 100,000"),
        (("plan", "--student=small", "--tokens=48,nan"), "mean lengths of 2 to 100,000"),
        (("plan", "--student=small", "--tokens=48,1e9"), "mean lengths of 2 to 100,000"),
        (("plan", "--student=small", "--json=/nowhere/x"), "cannot be written"),
        (("plan", "--student=small", "--json=/dev"), "cannot be written"),
        (("plan", "--student=small", "--json="), "cannot be written"),
        (
            ("plan", "--student=small", "--gin.Experiment.remat=half"),
            "Experiment.remat must be one of 'none', 'full', 'dots', None, got 'half'",
        ),
        (("eval", "/dev/null/run"), "/dev/null/run: no run directory"),
    ],
)
def test_user_errors_are_one_line_and_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert printed.startswith(f"dss {args[0]}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_without_gcsfs_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # it reads buckets, too
    assert cli.main(["eval", "gs://bucket/run"]) == 2
    error = "dss eval: a gs:// path needs gcsfs (not installed): pip install 'dss[gcs]'\n"
    assert capsys.readouterr().err == error


REFUSED_AT_ONCE = {
    "quickstart --seeds=0": "give at least 1",
    "quickstart --output=file": "--output file: a file",
    "data none.csv --input=x": "none.csv: no such file",
    "data file --json=none/report.json": "--json=none/report.json: cannot be written",
    "annotate --teacher=m --prompt=cqa --input=none.jsonl": "none.jsonl: no such file",
    "inspect svamp_finetune --gin.DATASET_PATH='none'": "DATASET_PATH none: no such file or folder",
    "plan --student=smal": "did you mean 'students/small.gin'",
    "plan --json=none/plan.json": "--json=none/plan.json: cannot be written",
    "train --gin_file=recipes/none.gin": "unknown gin file 'recipes/none.gin'",
    "train --gin.VOCABULARY=none": "none: no such vocabulary file",
    "train --gin.DATA_ROOT=file": "DATA_ROOT file: no such folder",
    "train --gin.INITIAL_CHECKPOINT_PATH=t5x:none": "none: no such folder",
    "eval none": "none: no run directory",
    "eval full": "full: no run directory",
    "eval run --json=run": "--json=run: cannot be written",
    "eval run --data_root=none": "DATA_ROOT none: no such folder",
    "sweep --gin_file=none.gin": "unknown gin file 'none.gin'",
    "predict none": "none: no run directory",
    "predict run --input=none.jsonl": "none.jsonl: no such file",
    "predict run --input=full": "full: a folder; give a file",
    "predict run --output=full": "--output=full: cannot be written",
    "predict run --input=file --output=./file": "file: input and output are the same file",
    "predict run --threshold=1.5": "--threshold=1.5: give a probability greater than 0 and less",
    "predict open --threshold=0.8": "declare the labels with --gin.DATASET_LABELS",
    "predict open --probabilities --generate": "--generate: generated labels have no probabilities",
    "eval open --calibrate": "an open set of labels has no probabilities",
    "serve none": "none: no run and no export",
    "serve run --port=70000": "--port 70000: give one from 0 to 65535",
    "report run none": "none: no such folder",
    "report run -o full": "full: a folder",
    "report run --teacher-size=x": "give a teacher and its parameters",
    "import hf:./none new": "./none: no such folder",
    "import hf:run full": "full: not empty; import into a new folder",
    "import hf:run new --vocabulary=none": "none: no such vocabulary file",
    "export none new --to=hf": "none: no run directory",
    "export run full --to=hf": "full: not empty; export into a new folder",
}


def test_a_resumed_run_needs_no_initial_checkpoint(tmp_path):
    flags = [f"MODEL_DIR={tmp_path}", "INITIAL_CHECKPOINT_PATH=t5x:none"]
    check_flags(flags)
    with pytest.raises(DssError, match="none: no such folder"):
        check_flags(flags, trains=True)
    (tmp_path / "config.gin").touch()
    check_flags(flags, trains=True)


def test_invalid_paths_are_refused_before_jax_is_imported(tmp_path):
    assert {args.split()[0] for args in REFUSED_AT_ONCE} == set(cli.COMMANDS)
    for name in ("run/config.gin", "full/file", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "config.gin").write_text(
        "Experiment.method = 'finetune'\nExperiment.data = @DataConfig()\n"
        "DataConfig.dataset_path = 'tickets'\n"
    )
    code = (
        "import contextlib, io, json, sys\n"
        "from dss.cli.main import main\n"
        "for args, message in json.load(sys.stdin).items():\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as stderr:\n"
        "        assert main(args.split()) == 2\n"
        "    printed = stderr.getvalue()\n"
        "    assert message in printed and printed.count('\\n') == 1, (args, printed)\n"
        "    assert not {'jax', 'tensorflow'} & set(sys.modules), args\n"
    )
    given = json.dumps(REFUSED_AT_ONCE)
    process = [sys.executable, "-c", code]
    done = subprocess.run(process, cwd=tmp_path, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "x", "--nope"], "dss: unrecognized arguments: --nope; see dss --help"),
        (["plan", "--mfu=x"], "dss plan: argument --mfu: invalid float value: 'x'; see dss plan"),
        (["inspect", "--examples=x"], "dss inspect: argument --examples: invalid int value: 'x'"),
        (["nope"], "dss: argument COMMAND: invalid choice: 'nope'"),
        ([], "dss: the following arguments are required: COMMAND; see dss --help"),
        (["report", "x", "--gin.A=('b', 'c')"], "dss: unrecognized arguments: --gin.A=('b', 'c')"),
    ],
)
def test_malformed_options_are_one_line_and_status_2(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(args)
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_a_log_file_has_the_output_of_a_running_command(tmp_path):
    code = (
        "import os, sys; from dss.cli import main, inspect_command\n"
        "inspect_command.run = lambda args: (print('begun'), os._exit(0))\n"
        "main.main(['inspect'])"
    )
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "begun\n"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_line(monkeypatch, capsys, wrapped):
    def run(_):
        error = OSError(errno.ENOSPC, "No space left on device", "some/file")
        if wrapped:  # as tensorstore reports it
            raise ValueError("RESOURCE_EXHAUSTED: write failed") from error
        raise error

    monkeypatch.setattr("dss.cli.inspect_command.run", run)
    assert cli.main(["inspect"]) == 2
    printed = capsys.readouterr().err
    assert "some/file: no space left on device" in printed
    assert printed.count("\n") == 1


def test_progress_lines_have_loss_accuracy_throughput_and_time_left(capsys):
    progress = TrainProgress(Lines("step", total=100), examples_per_step=10)
    values = {"train/loss": 1.5, "examples_per_second": 20.0}
    progress.evaluated(50, {"valid/loss": 2.0, "valid/label_loss": 1.0, "valid/accuracy": 0.25})
    progress.update(60, values)
    progress.finished(data_wait=0.0123)
    out = capsys.readouterr().out
    assert "step 50/100  valid accuracy 25.0%  valid loss 2.0000  label_loss 1.0000" in out
    line = "step 60/100  loss 1.5000  valid accuracy 25.0%  20.0 examples/s  20 s left"
    assert line in out
    assert "waiting for batches: 1.2% of step time" in out
    progress.evaluated(70, {"valid/loss": 2.0, "valid/accuracy": 0.25, "valid/macro_f1": 0.125})
    assert "valid accuracy 25.0%  macro_f1 12.5%  valid loss 2.0000" in capsys.readouterr().out


def test_decoding_shows_its_rate_without_compiling_on_standard_error(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = DecodeProgress()
    progress.expect(total=40)
    for shape, seconds in (("short", 100), ("short", 5), ("long", 100), ("long", 5)):
        progress.began(shape)
        now += seconds
        progress.ended(10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "loading the student",
        "compiling",
        "prediction 10/40",
        "prediction 30/40  2.0 predictions/s  5 s left",
        "prediction 40/40  2.0 predictions/s  0 s left",
    ]


def test_an_os_error_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dss.cli.inspect_command.run", lambda _: (tmp_path / "file" / "x").mkdir())
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == f"dss inspect: {tmp_path}/file/x: not a directory\n"


def test_inspect_lists_mixtures_and_shows_one(small_root, capsys, monkeypatch):
    root = f"--gin.DATA_ROOT={small_root}"
    assert cli.main(["inspect", root]) == 0
    assert "cqa_step_by_step_palm\n" in capsys.readouterr().out
    flags = [root, "--gin.VOCABULARY=bytes", "--gin.TRAIN_STEPS=8"]
    assert cli.main(["inspect", "cqa_step_by_step_palm", *flags]) == 0
    out = capsys.readouterr().out
    for wanted in (
        "cqa_rationale_palm",
        "20 ok",
        "100.00%",
        "packed batches of 64 examples",
        "packing density over",
        "explain: q",
    ):
        assert wanted in out, wanted


def test_inspect_counts_the_rationales_that_are_left_out(small_root, capsys):
    flags = [f"--gin.DATA_ROOT={small_root}", "--gin_file=variants/right_rationales.gin"]
    assert cli.main(["inspect", "esnli_step_by_step_palm", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in ("trained 20 7", "with a wrong label 0 13", "total 20 20"):
        assert row.split() in lines
    assert cli.main(["inspect", "esnli_step_by_step_palm", flags[0]]) == 0
    assert "with a wrong label" not in capsys.readouterr().out
    flags[1] = "--gin_file=variants/several_rationales.gin"
    assert cli.main(["inspect", "esnli_step_by_step_palm", *flags]) == 2
    assert (
        "needs several samples per example, but teacher palm was sampled once"
        in capsys.readouterr().err
    )
