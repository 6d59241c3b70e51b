"""Whole runs through the command line, on a small student that reads bytes."""

import codecs
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess

import pandas
import pytest
from etils import epath

from dss.reporting.collect import collect
from dss.runs.directory import load_run
from dss.runs.session import read_sessions
from tests.conftest import write_jsonl
from tests.end_to_end.runs import (
    assert_same_run,
    assert_same_training,
    call,
    call_apart,
    finish,
    is_saving,
    metrics_lines,
    start,
    wait_for,
)


def test_killed_three_times_a_run_ends_as_one_that_was_not(train, undisturbed, tmp_path):
    run = tmp_path / "killed"

    def saved(step: int) -> bool:
        return (run / "checkpoints" / str(step)).exists()

    wanted = random.Random(0).randint(3, 8)
    moments = (
        lambda: metrics_lines(run) >= wanted,
        lambda: is_saving(run),
        lambda: saved(40),
    )
    for moment in moments:
        process = train(run)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
    assert "step 60 done" in finish(train(run))
    assert_same_run(run, undisturbed)


@pytest.mark.exhaustive
def test_a_killed_run_with_what_moves_from_step_to_step_ends_the_same(train, toy_folder, tmp_path):
    """Several rationales in turn, an alpha that moves, and views that share an input."""
    folder = tmp_path / "toy"
    shutil.copytree(toy_folder, folder)
    outputs = [json.loads(line) for line in (folder / "train.rules.jsonl").open()]
    for output in outputs:
        texts = [output["rationale"], f"so {output['rationale']}", "who knows"]
        output["samples"] = [{"rationale": t, "label": output["label"]} for t in texts]
    write_jsonl(folder / "train.rules.jsonl", outputs)
    names = ("several_rationales", "alpha_schedule", "one_encoder_pass")
    flags = [f"--gin_file=variants/{name}.gin" for name in names]
    flags.append(f"--gin.DATASET_PATH={folder}")
    runs = [tmp_path / name for name in ("whole", "killed")]
    finish(train(runs[0], *flags))
    process = train(runs[1], *flags)
    wait_for((runs[1] / "checkpoints" / "30").exists, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
    finish(train(runs[1], *flags))
    assert_same_training(runs[1], runs[0])
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    alphas = [line["train/alpha"] for line in lines if "train/alpha" in line]
    assert alphas == sorted(alphas)
    assert alphas[-1] == pytest.approx(0.9)
    asked = start("predict", runs[0], "--rationale", stdin=subprocess.PIPE)
    answer = json.loads(finish(asked, stdin="is 2 good").splitlines()[0])
    assert set(answer) == {"id", "input", "label", "rationale"}


def test_sigterm_saves_and_the_run_goes_on_from_there(train, undisturbed, tmp_path):
    run = tmp_path / "terminated"
    process = train(run)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size, process
    )
    process.send_signal(signal.SIGTERM)
    out = finish(process, 128 + signal.SIGTERM)
    assert "SIGTERM: saved at step" in out
    saved = int(out.split("saved at step ")[1].split(";")[0])
    assert saved in load_run(run).checkpoints().steps
    finish(train(run))
    assert_same_training(run, undisturbed)
    sessions = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert [(s.get("step"), s.get("outcome")) for s in sessions] == [
        (0, None),
        (None, f"stopped by SIGTERM at step {saved}"),
        (saved, None),
        (None, "done"),
    ]
    assert sessions[0]["data"]["examples"] == 40


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_damaged_newest_checkpoint_is_set_aside(train, undisturbed, tmp_path, part):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for file in (run / "checkpoints" / "60" / part).rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    said = finish(train(run))
    assert "checkpoint 60 cannot be read (" in said
    assert "quarantined as 60.damaged, and training resumes from step 50" in said
    assert (run / "checkpoints" / "60.damaged").is_dir()
    assert_same_training(run, undisturbed)


def test_resume_says_whether_there_may_be_a_run(train_command, undisturbed, tmp_path):
    said = call(*train_command(undisturbed, "--resume=never"), status=2)
    assert "has a run with checkpoints" in said
    said = call(*train_command(tmp_path / "new", "--resume=must"), status=2)
    assert "no run to resume" in said
    assert "step 60 done" in call(*train_command(undisturbed, "--resume=must"))


def test_a_loss_that_is_no_number_names_its_step_and_examples(train, tmp_path, toy_folder):
    run = tmp_path / "run"
    flags = ("--gin.LEARNING_RATE=1e18", "--gin.TrainerConfig.log_period=7")
    process = train(run, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert err.count("\n") == 1, err
    assert "the loss is nan; no checkpoint was saved yet" in err
    assert 1 < int(re.search(r"step (\d+): the loss", err).group(1)) <= 7
    named = err.strip().split("examples of that step: ")[1].split(", ")
    lines = (toy_folder / "train.jsonl").read_text().splitlines()
    assert len(named) == 8
    assert set(named) <= {json.loads(line)["id"] for line in lines}


def test_a_run_directory_is_whole(undisturbed, tmp_path):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.gin", "checkpoints", "metrics.jsonl", "speed.jsonl", "tensorboard"} <= names
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if "valid/accuracy" in line]
    assert [line["step"] for line in valid] == [10, 20, 30, 40, 50, 60]
    assert {"valid/loss", "valid/label_loss", "valid/rationale_loss"} <= valid[0].keys()
    moved = tmp_path / "elsewhere"
    shutil.copytree(undisturbed, moved)
    out = finish(
        start(
            "eval",
            moved,
            "--split=valid",
            "--rationales",
            "--json",
            tmp_path / "eval.json",
            cwd=tmp_path,
        )
    )
    assert "toy_step_by_step_rules valid" in out
    assert "teacher rules: accuracy 100.00% (95% CI: " in out
    for wanted in (
        "macro F1 ",
        "by label",
        "precision",
        "-> yes",
        "expected calibration error",
        "rationales: 8, ROUGE-L",
    ):
        assert wanted in out
    summary = json.loads((tmp_path / "eval.json").read_text())
    best = max(line["valid/accuracy"] for line in valid)
    assert summary["value"] == pytest.approx(best)
    assert summary["classes"]["majority"] == {"label": "yes", "accuracy": 5 / 8}
    (predictions,) = (moved / "predictions").glob("*.jsonl")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert {row["prediction"] for row in rows} <= {"yes", "no"}
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    assert all(isinstance(row["rationale"], str) for row in rows)
    assert summary["rationales"]["referenced"] == 8


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("toy_finetune", "generate no rationales"),
        ("toy_rationale_rules", "its predictions are rationales"),
    ],
)
def test_rationales_are_judged_beside_labels_only(undisturbed, mixture, message):
    said = call("eval", undisturbed, f"--mixture={mixture}", "--rationales", status=2)
    assert message in said
    assert said.count("\n") == 1


def test_predict_reads_standard_input_and_files(undisturbed, toy_folder, tmp_path):
    lines = b'is 3 good\n\n{"id": "x", "input": "is 4 good"}\n'
    alone = tmp_path / "alone"  # without its data
    shutil.copytree(undisturbed, alone)
    config = (alone / "config.gin").read_text()
    assert str(toy_folder) in config
    (alone / "config.gin").write_text(config.replace(str(toy_folder), "/nowhere/toy"))
    out, err = call_apart("predict", alone, "--rationale", stdin=codecs.BOM_UTF8 + lines)
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["input"] == "is 3 good"
    assert [row["id"] for row in rows] == ["input-0", "x"]
    assert all(row["label"] in ("yes", "no") and "rationale" in row for row in rows)
    assert "loading the student\ncompiling\nprediction 2" in err
    (tmp_path / "in.jsonl").write_text('{"input": "is 3 good"}\n')
    output = tmp_path / "out.jsonl"
    options = ("--input", tmp_path / "in.jsonl", "--output", output, "--num_beams=2", "--generate")
    assert call("predict", undisturbed, *options).endswith("prediction 1/1\n")
    assert json.loads(output.read_text())["input"] == "is 3 good"


def test_predict_writes_over_nothing_that_it_cannot_replace(undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("earlier\n")
    (tmp_path / "bad.jsonl").write_text('{"input": "x"}\n{"text": "x"}\n')
    for source, message in (("bad.jsonl", "'input' is missing"), ("none", "no such file")):
        options = ("--input", tmp_path / source, "--output", output)
        assert message in call("predict", undisturbed, *options, status=2).lower()
    same = ("--input", output, "--output", output)
    assert "are the same file" in call("predict", undisturbed, *same, status=2)
    assert output.read_text() == "earlier\n"
    for asked, message in ((b'{"text": "x"}', "standard input:1: 'input'"), (b"\xe9", "not UTF-8")):
        said = call("predict", undisturbed, "--output", output, stdin=asked, status=2)
        assert message in said


def test_predict_keeps_a_rows_fields_and_marks_what_was_cut(undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [{"input": "is 3 good", "label": "yes", "who": "Ann"}, {"input": "x" * 90}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    said = call("predict", undisturbed, f"--input={source}", f"--output={output}")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert found[0].keys() == {"id", "input", "who", "gold", "label"}
    assert (found[0]["who"], found[0]["gold"]) == ("Ann", "yes")
    assert [row.get("truncated") for row in found] == [None, True]
    assert "1 of 2 inputs (50.0%) are longer than 48 tokens and were truncated" in said
    # An output is not replaced by fewer lines.
    before = output.read_text()
    shorter = ("predict", undisturbed, f"--output={output}")
    said = call(*shorter, stdin=b"is 3 good", status=2)
    assert "not replaced: it has 2 lines, and the 1 predictions are in out.jsonl.partial" in said
    assert output.read_text() == before
    call(*shorter, "--replace", stdin=b"is 3 good")
    assert len(output.read_text().splitlines()) == 1
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_predict_reads_and_writes_tables(undisturbed, tmp_path):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('\ufeffnumber,first,second,label\n007,is 3,good,yes\n008,"is\n4",good,\n')
    options = ("predict", undisturbed, f"--input={source}", "--template={first} {second}")
    call(*options, f"--output={output}", "--probabilities")
    table = pandas.read_csv(output, dtype=str, keep_default_na=False)
    assert [*table] == [
        *("number", "first", "second", "label"),
        *("predicted_label", "probability yes", "probability no"),
    ]
    assert table.number.tolist() == ["007", "008"]
    assert table["first"].tolist() == ["is 3", "is\n4"]
    assert table.label.tolist() == ["yes", ""]
    lines = write_jsonl(tmp_path / "in.jsonl", [{"input": "is 3 good"}, {"input": "is\n4 good"}])
    out, _ = call_apart("predict", undisturbed, f"--input={lines}", "--probabilities")
    wanted = [json.loads(line) for line in out.splitlines()]
    assert table.predicted_label.tolist() == [row["label"] for row in wanted]
    assert table["probability yes"].astype(float).tolist() == [
        row["probabilities"]["yes"] for row in wanted
    ]
    taken = tmp_path / "taken.csv"
    taken.write_text("input,label,probabilities,probability no\nis 3 good,a,b,c\n")
    found = tmp_path / "found.csv"
    call("predict", undisturbed, f"--input={taken}", f"--output={found}", "--probabilities")
    (row,) = pandas.read_csv(found).to_dict("records")
    assert list(row.values())[:4] == ["is 3 good", "a", "b", "c"]
    assert [*row][4:] == ["predicted_label", "probability yes", "predicted_probability no"]
    # The whole input column is kept, and JSON lines become a table too.
    call("predict", undisturbed, f"--input={lines}", f"--output={tmp_path / 'out.xlsx'}")
    assert pandas.read_excel(tmp_path / "out.xlsx").input.tolist() == ["is 3 good", "is\n4 good"]
    (tmp_path / "short.csv").write_text("input\nis 5 good\n")
    short = ("predict", undisturbed, f"--input={tmp_path / 'short.csv'}", f"--output={output}")
    said = call(*short, status=2)
    assert "not replaced: it has 2 rows, the predictions 1; the predictions are in " in said
    assert json.loads((tmp_path / "out.csv.jsonl").read_text())["input"] == "is 5 good"
    (tmp_path / "empty.csv").write_text("who,input\nAnn,\n")
    blank = ("predict", undisturbed, f"--input={tmp_path / 'empty.csv'}")
    out, err = call_apart(*blank)
    assert json.loads(out)["empty"] is True
    assert "1 of 1 inputs are empty" in err
    call(*short, "--replace")
    assert [*pandas.read_csv(output)] == ["input", "label"]
    for given, message in (
        ((f"--input={source}",), "no columns: give --columns"),
        ((f"--input={source}", "--columns=third"), "unknown column 'third'"),
        (("--columns=first",), "--columns and --template are for a table"),
        (("--columns=first", "--template=x"), "--columns and --template exclude each other"),
        (("--output=x.xls",), "x.xls: the format of old Excel files"),
    ):
        assert message in call("predict", undisturbed, *given, stdin=b"x", status=2)


def test_predict_writes_calibrated_probabilities_and_abstains(undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    folder = tmp_path / "toy"
    labels = ["yes" if i % 3 else "no" for i in range(24)]
    rows = [{"input": f"is {i} good", "label": label} for i, label in enumerate(labels)]
    source = write_jsonl(folder / "valid.jsonl", rows)
    data = f"--dataset_path={folder}"

    def predict(*options) -> tuple[list, str]:
        out, err = call_apart("predict", run, f"--input={source}", "--probabilities", *options)
        return [json.loads(line) for line in out.splitlines()], err

    raw, err = predict()
    assert "abstained" not in err
    for row in raw:
        assert list(row) == ["id", "input", "gold", "label", "probabilities"]
        assert list(row["probabilities"]) == ["yes", "no"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=2e-6)
        assert row["probabilities"][row["label"]] == max(row["probabilities"].values())
    said = call("eval", run, "--calibrate", "--split=valid", data)
    assert "calibrated on 24 examples of valid: temperature " in said
    fitted = json.loads((run / "calibration.json").read_text())
    assert fitted["nll_after"] <= fitted["nll_before"]
    (summary,) = (run / "predictions").glob("*.json")
    evaluated = json.loads(summary.read_text())
    assert evaluated["temperature"] == fitted["temperature"]
    error = evaluated["calibration"]["expected_error"]
    assert error == pytest.approx(fitted["expected_error_after"])
    again = call("eval", run, "--calibrate", "--split=valid", data)
    assert json.loads((run / "calibration.json").read_text()) == fitted
    assert again.split("calibrated on")[1] == said.split("calibrated on")[1]

    highest = sorted(max(row["probabilities"].values()) for row in predict()[0])
    threshold = (highest[11] + highest[12]) / 2
    rows, err = predict(f"--threshold={threshold}")
    assert [row["label"] for row in rows] == [row["label"] for row in raw]
    expected = [max(row["probabilities"].values()) < threshold for row in rows]
    assert [row["abstained"] for row in rows] == expected
    said = f"abstained on {sum(expected)} of 24 inputs ({sum(expected) / 24:.1%})"
    assert err.splitlines()[-1].startswith(said)
    power = 1 / fitted["temperature"]
    for before, after in zip(raw, rows, strict=True):
        scaled = {label: p**power for label, p in before["probabilities"].items()}
        expected = {label: p / sum(scaled.values()) for label, p in scaled.items()}
        assert after["probabilities"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b'[{"input": "x"}]', "standard input:1: a JSON array; give one object"),
        (b"id,body,label\n1,x,a\n2,y,b\n", "standard input:1: the header of a table"),
        (gzip.compress(b"x"), "standard input: compressed; give JSON lines"),
        (b"id\tbody\n1\tx\n", "the header of a table"),
    ],
)
def test_what_is_no_line_of_input_is_refused(undisturbed, given, message):
    assert message in call("predict", undisturbed, stdin=given, status=2)


def test_a_text_on_standard_input_may_look_like_json(undisturbed):
    strange = codecs.BOM_UTF8 + b"\n\xc2\xa0\n" + b"[" * 9999 + b"\n[" + b"9" * 5000 + b"]"
    texts = [
        json.loads(s)["input"]
        for s in call_apart("predict", undisturbed, stdin=strange)[0].splitlines()
        if s[0] == "{"
    ]
    assert [len(text) for text in texts] == [9999, 5002]
    lines = b'"is 3 \\"good\\""\n[sic], he said\nwell, yes\n'
    out, _ = call_apart("predict", undisturbed, stdin=lines)
    texts = [json.loads(line)["input"] for line in out.splitlines()]
    assert texts == ['is 3 "good"', "[sic], he said", "well, yes"]


def test_a_full_disk_is_one_line(undisturbed):
    for options in (("predict", undisturbed, "--output"), ("eval", undisturbed, "--json")):
        process = start(*options, "/dev/full", stdin=subprocess.PIPE)
        out, err = process.communicate("is 3 good\n", timeout=200)
        assert process.returncode == 2, out + err
        assert "no space left on device" in err
        assert "Traceback" not in err


def test_what_does_not_fit_a_run_is_one_line(
    train_command, undisturbed, toy_folder, vocab_path, tmp_path
):
    def refused(*args) -> str:
        _, said = call_apart(*train_command(*args), status=2)
        assert said.count("\n") == 1, said
        return said

    wrong = {
        "--gin.T5Config.d_model=32": "a checkpoint of another size than the student: d_model 16",
        "--gin.ALPHA=0.9": "the run of another experiment: ALPHA was 0.5 and is 0.9",
        "--gin.T5Config.dtype=bfloat16": "T5Config.dtype was 'float32' and is 'bfloat16'",
        "--gin.LEARNING_RATE=0.5": "experiment: LEARNING_RATE was 0.01 and is 0.5; use",
        f"--gin.VOCABULARY={vocab_path}": "wrong vocabulary",
    }
    for flag, message in wrong.items():
        assert message in refused(undisturbed, flag)
    new, bad = tmp_path / "new", tmp_path / "toy"
    fresh = refused(new, f"--gin.VOCABULARY={vocab_path}")
    assert "wrong vocabulary: it has 32000 ids and the student 384 embeddings" in fresh
    shutil.copytree(toy_folder, bad)
    with (bad / "train.jsonl").open("a") as file:
        file.write('{"input": "x", "label": "maybe"}\n')
    assert "label 'maybe' is not one of yes, no" in refused(new, f"--gin.DATASET_PATH={bad}")
    (bad / "train.jsonl").write_text("")
    assert "no examples for the train split" in refused(new, f"--gin.DATASET_PATH={bad}")
    (bad / "train.rules.jsonl").unlink()
    assert "no such file" in refused(new, f"--gin.DATASET_PATH={bad}")


def test_a_run_whose_data_changed_does_not_go_on_as_if_they_had_not(
    train_command, undisturbed, toy_folder, tmp_path
):
    run, data = tmp_path / "run", tmp_path / "toy"
    shutil.copytree(undisturbed, run)
    shutil.copytree(toy_folder, data)
    command = train_command(run, f"--gin.DATASET_PATH={data}")
    call(*command)  # the same data in another place
    lines = [json.loads(line) for line in (data / "valid.jsonl").open()]
    write_jsonl(data / "valid.jsonl", [{**line, "label": "no"} for line in lines])
    with (data / "train.rules.jsonl").open("a") as file:
        file.write('{"id": "train-1", "rationale": "another", "label": "no"}\n')
    said = call(*command, status=2)
    assert "data files have changed since the last session: train train.rules.jsonl, v" in said
    call(*command, "--changed-data=accept")
    session = read_sessions(epath.Path(run))[-2]
    assert session["changed_data"] == ["train train.rules.jsonl", "valid valid.jsonl"]
    call(*command)  # recorded, so it is what the run reads now


def test_patience_ends_a_run_and_it_is_done(train_command, tmp_path):
    flags = ("--gin.TrainerConfig.patience=1", "--gin.LEARNING_RATE=1e-12", "--gin.TRAIN_STEPS=40")
    command = train_command(tmp_path / "run", *flags)
    said = call(*command)
    assert "40 steps of 8 are 8.0 epochs of 40 examples" in said
    assert "toy_label_gold: 40 rows: 40 trained" in said
    assert "step 20 done; best checkpoint: step 10" in said
    assert "step 20 done" in call(*command)
    (found,) = collect([str(tmp_path)]).runs
    assert found.is_done


def test_a_run_that_saved_nothing_can_begin_as_another(train_command, toy_folder, tmp_path):
    run, bad = tmp_path / "run", tmp_path / "toy"
    shutil.copytree(toy_folder, bad)
    (bad / "train.jsonl").write_text("")
    said = call(*train_command(run, f"--gin.DATASET_PATH={bad}"), status=2)
    assert "no examples" in said
    assert load_run(run).experiment.alpha == 0.5
    short = ("--gin.ALPHA=0.2", "--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=2")
    call(*train_command(run, *short))
    assert load_run(run).experiment.alpha == 0.2


def test_a_hugging_face_checkpoint_is_imported_trained_and_asked(
    shared, vocab_path, small_root, tmp_path
):
    model = shared / "fixtures" / "reference_cqa" / "model"
    imported = tmp_path / "imported"
    missing = call("import", f"hf:{model}", imported, status=2)
    assert "no vocabulary" in missing
    out = call("import", f"hf:{model}", imported, "--vocabulary", vocab_path)
    assert "2.1M parameters" in out
    assert "not empty" in call("import", f"hf:{model}", imported, status=2)
    run = tmp_path / "run"
    call(
        "train",
        *("--gin_file=datasets/svamp.gin", "--gin_file=methods/step_by_step.gin"),
        f"--gin.MODEL_DIR={run}",
        f"--gin.DATA_ROOT={small_root}",
        f"--gin.INITIAL_CHECKPOINT_PATH={imported}",
        *("--gin.TRAIN_STEPS=4", "--gin.BATCH_SIZE=8", "--gin.Experiment.eval_examples=8"),
    )
    assert "svamp_step_by_step_palm test" in call("eval", run)
    on_cqa = ("--mixture=cqa_finetune", f"--data_root={small_root}", "--split=valid")
    assert "cqa_finetune valid, step 0: accuracy" in call("eval", imported, *on_cqa)
    no_mixture = call("eval", imported, status=2)
    assert "no mixture" in no_mixture
