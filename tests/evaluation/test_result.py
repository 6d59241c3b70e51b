import json

import pytest
from etils import epath

from dss.batches.statistics import measure_split
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary, round_trip
from dss.evaluation.evaluator import Answer, evaluation_set
from dss.evaluation.result import Evaluation
from dss.evaluation.significance import mcnemar
from dss.evaluation.teachers import read_teachers
from dss.mixtures.methods import named_mixture
from tests.conftest import write_jsonl


def _evaluate(mixture, split, answers, rationales=None) -> Evaluation:
    examples, teachers = evaluation_set(mixture, split), read_teachers(mixture, split)
    return Evaluation.of(mixture, split, 7, examples, answers, teachers, rationales)


def test_teachers_have_the_same_accuracy_as_in_dss_inspect(data_root):
    for name, split in (("svamp", "test"), ("cqa", "valid"), ("anli1", "test")):
        mixture = named_mixture(f"{name}_finetune")
        examples = evaluation_set(mixture, split)
        found = _evaluate(mixture, split, [Answer(e.target) for e in examples])
        wanted = measure_split(Dataset.released(name), split, ["palm"]).teachers["palm"]
        teacher = found.teachers["palm"]
        assert list(found.teachers) == ["palm"]
        assert (sum(teacher.scored.verdicts), len(teacher.scored.verdicts)) == (
            wanted.correct,
            wanted.judged,
        )
        wrong = wanted.judged - wanted.correct
        assert teacher.p_value == mcnemar([1] * wrong, [0] * wrong), "the student has all right"


def test_a_teacher_is_scored_on_the_examples_that_it_answered(tmp_path):
    rows = [{"id": str(i), "input": f"q{i}", "label": "ab"[i % 2]} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [*rows, {"id": "6", "input": "q6"}])
    outputs = [
        {"id": "0", "rationale": "r", "label": "a"},
        {"id": "1", "rationale": "r", "label": "a"},
        {"id": "2", "status": "refused"},
        {"id": "6", "rationale": "r", "label": "a"},  # there is no gold label
    ]
    write_jsonl(tmp_path / "test.t.jsonl", outputs)
    mine = Dataset.from_files(tmp_path, name="mine")
    found = _evaluate(named_mixture("mine_finetune", [mine]), "test", [Answer(a) for a in "aaaabb"])
    assert found.teachers["t"].scored.verdicts == (1, 0, 0)
    assert found.teachers["t"].p_value == mcnemar([1, 0, 1], [1, 0, 0])
    assert found.confusion is None, "the labels are an open set"
    assert [(c.label, c.support, c.predicted, c.correct) for c in found.classes.by_class] == [
        ("a", 3, 4, 2),
        ("b", 3, 2, 1),
    ]
    assert found.calibration is None, "nothing was chosen"


def test_a_teacher_is_not_scored_against_its_own_labels(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": "0", "input": "q"}, {"id": "1", "input": "r"}])
    write_jsonl(tmp_path / "train.t.jsonl", [{"id": i, "label": "a"} for i in "01"])
    write_jsonl(tmp_path / "valid.jsonl", [{"id": "0", "input": "q"}])
    mine = Dataset.from_files(tmp_path, name="mine")
    mixture = named_mixture("mine_distill_t", [mine])
    assert _evaluate(mixture, "train", [Answer("a"), Answer("b")]).teachers == {}


def test_predictions_and_metrics_are_saved(toy, tmp_path):
    mixture = named_mixture("toy_step_by_step_rules", [toy])
    examples = evaluation_set(mixture, "test")
    confidences = [0.9, 0.8, 0.7, 0.6] * 2  # of yes; correct unless 3 divides the number
    answers = [Answer("yes", {"yes": p, "no": 1 - p}) for p in confidences]
    rationales = [f"{i} is {i % 3} mod 3, so yes" for i in range(8)]
    found = _evaluate(mixture, "test", answers, rationales)
    path = found.save(epath.Path(tmp_path / "predictions"))
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "id": e.id,
            "input": e.text,
            "target": e.target,
            "prediction": "yes",
            "score": float(e.target == "yes"),
            "probabilities": answer.probabilities,
            "rationale": rationale,
            "teachers": {"rules": {"label": e.target, "rationale": f"{i} is {i % 3} mod 3"}},
        }
        for i, (e, answer, rationale) in enumerate(zip(examples, answers, rationales, strict=True))
    ]
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary == json.loads(json.dumps(found.summary()))
    assert summary["value"] == 5 / 8
    assert summary["teachers"]["rules"]["value"] == 1
    assert summary["classes"] == json.loads(json.dumps(found.classes.summary()))
    assert summary["classes"]["macro_f1"] == pytest.approx((10 / 13 + 0) / 2)
    assert summary["classes"]["balanced_accuracy"] == 0.5
    assert summary["confusion"] == {"labels": ["yes", "no"], "counts": [[5, 0, 0], [3, 0, 0]]}
    assert sum(b["examples"] for b in summary["calibration"]["bins"]) == 8
    quality = summary["rationales"]
    assert quality["rouge_l"] == pytest.approx(5 * 2 / (7 + 5))
    assert (quality["concluding"], quality["predicted"], quality["right"]) == (8, 8, 5)


def test_equations_and_rationales_have_no_classes(data_root, toy):
    svamp = named_mixture("svamp_finetune")
    targets = [Answer(e.target) for e in evaluation_set(svamp, "test")]
    for found in (
        _evaluate(svamp, "test", targets),
        _evaluate(named_mixture("toy_rationale_rules", [toy]), "test", [Answer("r")] * 8),
    ):
        assert found.classes is None
        assert found.summary()["classes"] is None


def test_a_label_as_the_vocabulary_decodes_it_is_its_class(tmp_path, vocab_path):
    vocabulary, labels = load_vocabulary(str(vocab_path)), ("m²", "litre")
    assert round_trip(vocabulary, "m²") == "m2"
    rows = [{"id": str(i), "input": f"q{i}", "label": labels[i % 2]} for i in range(4)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    mine = Dataset.from_files(tmp_path, name="mine", labels=labels)
    mixture = named_mixture("mine_finetune", [mine])
    examples, answers = (
        evaluation_set(mixture, "test"),
        [Answer(a) for a in ("m2", "m2", "", " m²")],
    )
    found = Evaluation.of(mixture, "test", 7, examples, answers, {}, vocabulary=vocabulary)
    assert found.confusion.counts == ((1, 0, 1), (2, 0, 0))
    assert [(c.predicted, c.correct) for c in found.classes.by_class] == [(3, 1), (0, 0)]
