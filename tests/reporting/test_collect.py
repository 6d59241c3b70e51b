import json
import os

import pytest

from dss.errors import DssError
from dss.reporting.analysis import analyse
from dss.reporting.collect import SHOWN_EXAMPLES, collect, find_runs
from dss.training.config import TrainerConfig
from tests.conftest import write_jsonl
from tests.reporting.fabricate import STEPS, write_predictions, write_run


def test_runs_are_found_in_folders_and_counted_once(tmp_path):
    for seed in (10, 9):
        write_run(tmp_path / "deep" / "er", "finetune", 50, seed=seed)
    (tmp_path / "empty").mkdir()
    one = tmp_path / "deep" / "er" / "toy-finetune-16-1000-9"
    names = [run.name for run in find_runs([str(tmp_path), str(one)])]
    assert names == ["toy-finetune-16-1000-9", "toy-finetune-16-1000-10"]


def test_folders_without_runs_raise_a_user_error(tmp_path):
    with pytest.raises(DssError, match=r"no run found: no folder with a config\.gin"):
        collect([str(tmp_path)])
    with pytest.raises(DssError, match="nowhere: no such folder"):
        collect([str(tmp_path / "nowhere")])


def test_the_status_of_a_run(tmp_path):
    write_run(tmp_path, "finetune", 50, seed=0)
    write_run(tmp_path, "finetune", None, seed=1, steps=STEPS // 2, outcome=None)
    write_run(
        tmp_path, "finetune", None, seed=2, steps=STEPS // 2, outcome="failed: the loss is nan"
    )
    write_run(tmp_path, "finetune", None, seed=3, outcome=None, metrics=False)
    write_run(tmp_path, "finetune", 50, seed=4, mixture=None)
    write_run(tmp_path / "imported", "finetune", None, mixture=None)
    collected = collect([str(tmp_path)])
    runs = [run for run in collected.runs if "imported" not in run.name]
    ((left_out, why),) = collected.problems
    assert "imported" in left_out
    assert "that was not evaluated" in why
    assert [run.status for run in runs] == [
        "done",
        "unfinished, step 20 of 40",
        "failed at step 20 of 40: the loss is nan",
        "not started",
        "imported, not trained",
    ]
    assert [run.is_done for run in runs] == [True, False, False, False, False]
    assert [run.seconds for run in runs[:2]] == [(75.0, True), (0, False)]


def test_the_evaluation_of_the_best_validation_step_is_reported(tmp_path):
    run = write_run(tmp_path, "finetune", None)
    for step, right in ((STEPS // 2, 90), (STEPS, 60)):  # validation is best at the end
        write_predictions(run, "toy_finetune", step, [1.0] * right + [0.0] * (100 - right))
    write_predictions(run, "toy_step_by_step_rules", STEPS, [1.0] * 100)  # of another mixture
    (found,) = collect([str(tmp_path)]).runs
    assert found.evaluation("test").value == 0.6
    assert found.evaluation("valid") is None


def test_the_best_step_is_that_of_the_selected_metric_and_of_equal_ones_the_first(tmp_path):
    lines = [
        {"step": 10, "valid/accuracy": 0.5, "valid/macro_f1": 0.1, "valid/loss": 3.0},
        {"step": 20, "valid/accuracy": 0.5, "valid/macro_f1": 0.3, "valid/loss": 2.0},
        {"step": 25, "train/loss": 1.0},
        {"step": 30, "valid/accuracy": 0.4, "valid/macro_f1": 0.2, "valid/loss": 1.0},
    ]
    for select_by, best in (("accuracy", 10), ("macro_f1", 20), ("loss", 30)):
        trainer = TrainerConfig(train_steps=STEPS, select_by=select_by)
        run = write_run(tmp_path / select_by, "finetune", None, trainer=trainer)
        write_jsonl(run / "metrics.jsonl", lines)
        (found,) = collect([str(tmp_path / select_by)]).runs
        assert found.best_step == best


def test_runs_of_a_sweep_without_a_directory_are_problems(tmp_path):
    run = write_run(tmp_path / "sweep", "finetune", 50)
    lines = [
        {"run": run.name, "status": "done", "error": None},
        {"run": "later", "status": "missing", "error": None},
        {"run": "broken", "status": "failed", "error": "train.jsonl:3: not JSON"},
    ]
    write_jsonl(tmp_path / "sweep" / "sweep.jsonl", lines)
    write_jsonl(tmp_path / "sweep" / "sweep-0-of-2.jsonl", lines[1:2])
    assert collect([str(tmp_path)]).problems == [
        (str(tmp_path / "sweep" / "later"), "a run of a sweep, not started"),
        (str(tmp_path / "sweep" / "broken"), "failed: train.jsonl:3: not JSON"),
    ]
    (tmp_path / "sweep" / "sweep.jsonl").write_text("{\n")
    ((_, why),) = [p for p in collect([str(tmp_path / "sweep")]).problems if "later" not in p[0]]
    assert why.startswith("the sweep's status cannot be read")


def test_unreadable_files_are_problems_and_the_rest_is_read(tmp_path):
    write_run(tmp_path, "finetune", 50, seed=0)
    broken = write_run(tmp_path, "finetune", 50, seed=1)
    (broken / "config.gin").write_text("Experiment.alpha = 7\n")
    bad = write_run(tmp_path, "finetune", None, seed=2) / "predictions"
    bad.mkdir()
    contents = {
        "a": "",
        "b": '{"id": "1"}\n',
        "c": "not json\n",
        "d": '{"id": "1", "score": 0.5}\n',
        "e": '{"id": "1", "score": true}\n{"id": "2", "score": "1"}\n',
    }
    for name, text in contents.items():
        (bad / f"{name}-test-1.jsonl").write_text(text)
    (bad / "d-test-1.json").write_text('{"metric": "accuracy"}')
    (bad / "no step.jsonl").write_text("{}\n")
    found = collect([str(tmp_path)])
    assert [run.experiment.seed for run in found.runs] == [0, 2]
    assert found.runs[1].evaluations == []
    whys = [why for _, why in found.problems]
    assert len(whys) == 7
    assert "ALPHA must be in [0, 1]" in whys[0]
    assert "empty" in whys[1]
    assert "no id or no score" in whys[2]
    assert "not JSON" in whys[3]


def test_a_run_without_a_student_or_with_a_pipe_is_a_problem(tmp_path):
    kept, *broken = [write_run(tmp_path, "finetune", 50, seed=seed) for seed in range(5)]
    (broken[0] / "config.gin").write_text("")
    (broken[1] / "metrics.jsonl").unlink()
    os.mkfifo(broken[1] / "metrics.jsonl")
    (broken[2] / "metrics.jsonl").write_text('{"step": "one"}\n')
    (broken[3] / "sessions.jsonl").write_text("[" * 100_000 + "\n")
    os.mkfifo(tmp_path / "sweep.jsonl")
    found = collect([str(tmp_path)])
    assert [run.name for run in found.runs] == [str(kept)]
    whys = dict(found.problems)
    for folder, why in zip(
        [*broken, tmp_path],
        [
            "has no student",
            "a named pipe",
            "must have a step, and numbers only",
            "recursion",
            "a named pipe",
        ],
        strict=True,
    ):
        assert why in whys[str(folder)]


def test_large_evaluations_keep_all_scores_and_some_texts(tmp_path):
    run = write_run(tmp_path, "finetune", None)
    write_predictions(run, "toy_finetune", STEPS, [1.0, 0.0] * 1000)
    (found,) = collect([str(tmp_path)]).runs
    evaluation = found.evaluation("test")
    assert len(evaluation.scores) == 2000
    assert SHOWN_EXAMPLES / 2 < len(evaluation.shown) <= SHOWN_EXAMPLES
    assert evaluation.value == 0.5


@pytest.mark.parametrize(
    ("mixture", "wanted"),
    [
        ("cqa_finetune", ("cqa", "finetuning", None)),
        ("cqa_step_by_step_palm", ("cqa", "step-by-step", "palm")),
        (
            "my_set_step_by_step_unlabeled_gpt_neox",
            ("my_set", "step-by-step, unlabeled", "gpt_neox"),
        ),
        ("cqa_distill_palm", ("cqa", "distillation", "palm")),
        ("cqa_label_gold", ("cqa", "finetuning", None)),
        ("cqa_something_new", ("cqa_something_new", "unknown", None)),
    ],
)
def test_dataset_method_and_teacher_are_parsed_from_the_mixtures_name(tmp_path, mixture, wanted):
    run = write_run(tmp_path, "finetune", None, mixture=mixture)
    text = (run / "config.gin").read_text()
    (run / "config.gin").write_text(text.replace("'/data/toy'", "None"))  # of the released data
    (run / "sessions.jsonl").unlink()
    (found,) = collect([str(tmp_path)]).runs
    assert (found.dataset, found.method, found.teacher) == wanted
    assert (found.examples, found.seconds, found.machine) == (None, None, None)


def test_the_dataset_recorded_in_a_session_comes_first(tmp_path):
    write_run(tmp_path, "distill_x", None, dataset="my_finetune_set")
    (found,) = collect([str(tmp_path)]).runs
    assert (found.dataset, found.method, found.teacher) == ("my_finetune_set", "distillation", "x")
    assert json.loads(json.dumps(found.data))["examples"] == 1000


def test_examples_that_changed_between_evaluations_are_excluded(tmp_path):
    runs = [write_run(tmp_path, method, 50) for method in ("finetune", "step_by_step_rules")]
    (path,) = (runs[1] / "predictions").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [line | ({"target": "no"} if i < 3 else {}) for i, line in enumerate(lines)])
    collected = collect([str(tmp_path)])
    ((run, why),) = collected.problems
    assert run == str(runs[1])
    assert why.startswith("3 of its 100 test examples have another input or target")
    assert f"of the same id in {runs[0]}" in why
    (comparison,) = analyse(collected)[0].comparisons
    assert comparison.examples == 97
