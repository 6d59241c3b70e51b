import json
import math
import re

import pytest

from dss.evaluation.significance import mcnemar, wilson_interval
from dss.reporting.analysis import Cell, Teacher, analyse
from dss.reporting.collect import collect
from dss.reporting.figures import draw_figures
from dss.reporting.words import main_result, tiles
from dss.training.config import TrainerConfig
from tests.reporting.fabricate import STEPS, verdicts, write_predictions, write_run

SBS = "step_by_step_rules"


def _group(folder):
    (group,) = analyse(collect([str(folder)]))
    return group


@pytest.fixture
def swept(tmp_path):
    """Accuracy with all data: finetuning 70%, step-by-step 85%; with less data 50, 65 and 80%."""
    for seed in (0, 1):
        for examples, finetuned, distilled in ((125, 40, 50), (250, 50, 65), (500, 60, 80)):
            write_run(tmp_path, "finetune", finetuned, examples=examples, seed=seed)
            write_run(tmp_path, SBS, distilled, examples=examples, seed=seed)
        write_run(tmp_path, "finetune", 70, seed=seed)
        write_run(tmp_path, SBS, 85, seed=seed)
    return tmp_path


def test_repeats_are_a_cell_with_their_mean(swept):
    group = _group(swept)
    assert group.method_order == ["finetuning", "step-by-step"]
    cells = {(c.method, c.examples): c for c in group.cells}
    assert len(cells) == 8
    cell = cells["step-by-step", 500]
    assert (cell.mean, len(cell.runs)) == (0.8, 2)
    assert cell.interval == pytest.approx(wilson_interval(80, 100), abs=1e-3), "seeds agree"
    assert group.majority == 0.5
    assert group.teachers == (Teacher("rules", 0.9, (0.8, 0.95), 100, 100, None),)


def test_the_examples_needed_are_interpolated(swept):
    group = _group(swept)
    data, teacher = group.data_reaches
    assert isinstance(data.target, Cell)
    assert data.reached is not None
    assert (data.value, data.reached.examples, data.previous.examples) == (0.7, 500, 250)
    assert data.estimate == pytest.approx(250 * 2 ** (5 / 15))
    assert data.comparison.difference == pytest.approx(0.1)
    assert teacher.reached is None
    assert (teacher.value, teacher.best.mean, teacher.estimate) == (0.9, 0.85, None)
    result = main_result(group)
    assert result.headline == (
        "Step-by-step needs about 310 (31%) to match finetuning on all 1,000 examples."
    )
    assert "Interpolated between the measured 250 (65.0%) and 500 (80.0%)" in result.basis
    assert "+10.0 points" in result.basis
    assert "two seeds" in result.caveats[0]


def test_the_first_point_or_no_point_may_reach_the_target(swept, tmp_path_factory):
    for examples in (125, 250, 500, 1000):
        write_run(swept, "finetune", 45, examples=examples, width=32)
        write_run(swept, SBS, 60, examples=examples, width=32)
    headline = main_result(_group(swept)).headline
    assert headline.startswith(
        "Finetuning on all 1,000 examples is not significantly better than the most"
    )
    other = tmp_path_factory.mktemp("runs")
    write_run(other, "finetune", 80)
    write_run(other, SBS, 85, examples=250)
    headline = main_result(_group(other)).headline
    assert headline == (
        "Step-by-step matches finetuning on all 1,000 examples with 250 or fewer (25%)."
    )
    part = tmp_path_factory.mktemp("runs")
    write_run(part, "finetune", 80, examples=500)
    write_run(part, SBS, 85, examples=250)
    headline = main_result(_group(part)).headline
    assert headline == "Step-by-step matches finetuning on 500 examples with 250 or fewer (50%)."
    worse = tmp_path_factory.mktemp("runs")
    write_run(worse, "finetune", 80)
    write_run(worse, SBS, 75)
    result = main_result(_group(worse))
    assert result.headline == "Step-by-step did not match finetuning on all 1,000 examples."
    assert "The best accuracy of step-by-step is 75.0%" in result.basis


def test_smaller_students_are_compared_with_finetuning_of_the_largest(tmp_path):
    for width, finetuned, distilled in ((8, 50, 60), (16, 60, 80), (32, 75, 85)):
        write_run(tmp_path, "finetune", finetuned, width=width)
        write_run(tmp_path, SBS, distilled, width=width)
    group = _group(tmp_path)
    size, _ = group.size_reaches
    small, middle, _ = [c for c in group.cells if c.method == "step-by-step"]
    assert (size.target.student, size.reached) == (group.student_order[-1], middle)
    share = (75 - 60) / (80 - 60)
    ends = math.log(small.parameters), math.log(middle.parameters)
    assert math.log(size.estimate) == pytest.approx(ends[0] + share * (ends[1] - ends[0]))


def test_only_finished_runs_count_and_each_seed_once(tmp_path):
    write_run(tmp_path / "a", "finetune", 60)
    write_run(tmp_path / "b", "finetune", 80)  # the same again
    write_run(tmp_path, "finetune", 10, seed=1, steps=STEPS // 2)
    write_run(tmp_path, "finetune", 10, seed=2, outcome="failed: no more memory")
    write_run(tmp_path, "finetune", None, seed=3)
    group = _group(tmp_path)
    (cell,) = group.cells
    assert (cell.mean, len(cell.runs), len(group.runs)) == (0.6, 1, 5)
    assert main_result(group).headline == "Nothing to compare yet."


def test_methods_are_compared_on_common_examples(tmp_path):
    run = write_run(tmp_path, "finetune", None)
    write_predictions(run, "toy_finetune", STEPS, verdicts(50)[40:])  # ids test-0 to test-59
    write_run(tmp_path, SBS, 30)
    (comparison,) = _group(tmp_path).comparisons
    assert comparison.examples == 60
    assert comparison.difference == pytest.approx((30 - 10) / 60)
    ((seed, p),) = comparison.p_values
    assert (seed, p) == (0, mcnemar([1] * 20 + [0], [0] * 20 + [0]))


def test_runs_that_differ_in_more_than_the_seed_are_separate_methods(tmp_path):
    write_run(tmp_path / "a", "finetune", 60)
    write_run(tmp_path / "b", SBS, 60, alpha=0.3)
    write_run(tmp_path / "c", SBS, 80, alpha=0.7)
    write_run(tmp_path / "d", SBS, 80, alpha=0.7, seed=1, microbatches=2)
    group = _group(tmp_path)
    assert [(c.method, len(c.runs)) for c in group.cells] == [
        ("finetuning", 1),
        ("step-by-step (alpha 0.3)", 1),
        ("step-by-step (alpha 0.7)", 2),
    ]


def test_steps_of_nearly_the_same_compute_are_one_method(tmp_path):
    for examples, more in ((250, 1240), (500, 1251)):
        for steps in (STEPS, more):
            trainer = TrainerConfig(train_steps=steps, eval_period=20, log_period=10)
            folder = tmp_path / str(steps)
            write_run(folder, "finetune", 60, examples=examples, trainer=trainer)
    names = set(_group(tmp_path).methods.values())
    assert names == {"finetuning (40 steps)", "finetuning (about 1,240 steps)"}


def test_hyperparameters_that_vary_with_size_make_no_separate_methods(tmp_path):
    for width, rate in ((16, 0.1), (32, 0.2)):
        write_run(
            tmp_path, SBS, 60, width=width, dropout_rate=rate, initial_checkpoint=f"hf:{width}"
        )
    group = _group(tmp_path)
    assert set(group.methods.values()) == {"step-by-step"}
    assert len(group.student_order) == 2


def test_students_of_one_size_are_named_by_their_initial_checkpoint(tmp_path):
    write_run(tmp_path / "a", SBS, 60)
    write_run(tmp_path / "b", SBS, 80, initial_checkpoint="hf:google/flan-t5-small")
    names = _group(tmp_path).student_order
    assert [name.partition(" ")[2] for name in names] == ["from flan-t5-small", "from scratch"]


def test_teachers_are_named_where_there_are_several(tmp_path):
    write_run(tmp_path, SBS, 60)
    write_run(tmp_path, "step_by_step_palm", 60)
    write_run(tmp_path, "finetune", 60)
    assert _group(tmp_path).method_order == [
        "finetuning",
        "step-by-step (palm)",
        "step-by-step (rules)",
    ]


def test_methods_on_the_same_data_have_the_same_examples(tmp_path):
    for method, right in (("finetune", 80), (SBS, 85)):
        write_run(tmp_path, method, right, examples=187, total=187, unlabelled=11)
    group = _group(tmp_path)
    assert [c.examples for c in group.cells] == [187, 187]
    assert main_result(group).headline == (
        "Step-by-step matches finetuning on all 187 examples with 187 or fewer (100%)."
    )


def test_no_percentage_for_more_examples_than_finetuning_had(tmp_path):
    write_run(tmp_path, "finetune", 80, examples=500)
    write_run(tmp_path, SBS, 85, examples=1000)
    headline = main_result(_group(tmp_path)).headline
    assert headline == "Step-by-step matches finetuning on 500 examples with 1,000 or fewer."


@pytest.mark.parametrize(("answered", "compared"), [(5, False), (89, False), (90, True)])
def test_teachers_that_answered_nearly_all_examples_are_compared(tmp_path, answered, compared):
    write_run(tmp_path, "finetune", 80)
    run = write_run(tmp_path, SBS, 85)
    (summary,) = (run / "predictions").glob("*.json")
    content = json.loads(summary.read_text())
    content["teachers"]["rules"] |= {"value": 1.0, "examples": answered, "interval": [0.6, 1.0]}
    content["teachers"] = {"palm": content["teachers"].pop("rules")}
    summary.write_text(json.dumps(content))
    group = _group(tmp_path)
    names = {r.target.name for r in group.data_reaches if isinstance(r.target, Teacher)}
    assert names == ({"palm", "rules"} if compared else {"rules"})
    notes = {tile.label: tile.note for tile in tiles(group)}
    assert notes["teacher rules"] == "95% CI: 80.0% to 95.0%, on 100 test examples"
    shown = f"95% CI: 60.0% to 100.0%, on {answered} of 100 test examples"
    assert notes["teacher palm"] == shown + ("" if compared else ": too few to compare with")
    (figure, *_) = draw_figures(group)
    assert ("teacher palm" in figure.svg) == compared


def test_each_dataset_is_a_group(tmp_path):
    write_run(tmp_path, "finetune", 60, dataset="b")
    write_run(tmp_path, "finetune", 60, dataset="a")
    groups = analyse(collect([str(tmp_path)]))
    assert [(g.dataset, len(g.cells)) for g in groups] == [("a", 1), ("b", 1)]


def test_a_student_of_rationales_has_no_accuracy(tmp_path):
    run = write_run(tmp_path, "rationale_rules", None)
    path = write_predictions(run, "toy_rationale_rules", STEPS, [0.3, 0.7])
    path.with_suffix(".json").write_text('{"metric": "rouge_l"}')
    group = _group(tmp_path)
    assert (group.cells, len(group.runs)) == ((), 1)


def test_a_run_from_before_methods_is_a_repeat_of_a_newer_one(tmp_path):
    write_run(tmp_path, "finetune", 70, seed=0)
    config = write_run(tmp_path, "finetune", 70, seed=1) / "config.gin"
    text = config.read_text()
    for field, value in (("mixture", None), ("dataset", "toy"), ("method", "finetune")):
        text = re.sub(rf"(Experiment.{field}) = .*", rf"\1 = {value!r}", text)
    config.write_text(text)
    (cell,) = _group(tmp_path).cells
    assert (cell.method, len(cell.runs)) == ("finetuning", 2)
