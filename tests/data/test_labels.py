import re

import pytest

from dss.batches.statistics import describe_labels
from dss.batches.store import open_store
from dss.cli.main import main
from dss.data.datasets import Dataset
from dss.data.examples import stream_examples
from dss.data.labels import Labels, describe_look_alikes
from dss.data.vocabulary import load_vocabulary, round_trip
from dss.errors import DssError
from dss.evaluation.evaluator import EvaluationExample, Scored
from dss.mixtures.methods import named_mixture
from tests.conftest import write_jsonl

LENGTHS = {"inputs_length": 64, "targets_length": 16}


@pytest.mark.parametrize(
    "pair",
    [("是", "否"), ("≤", "≥"), ("好评", "差评"), ("x<y", "x{y"), ("m2", "m²"), ("a b", "a  b")],
)
def test_labels_with_equal_tokens_are_named_in_the_error(pair, vocab_path):
    message = f"labels {pair[0]!r} and {pair[1]!r} have the same tokens"
    with pytest.raises(DssError, match=re.escape(message)):
        Labels(("yes", *pair)).check_distinct(load_vocabulary(vocab_path))
    Labels(("yes", *pair)).check_distinct(load_vocabulary("bytes"))


def test_labels_with_equal_tokens_are_an_error_before_training(vocab_path, tmp_path, capsys):
    rows = [{"id": str(i), "input": f"x{i}", "label": "是否"[i % 2]} for i in range(20)]
    write_jsonl(tmp_path / "zh" / "train.jsonl", rows)
    flags = [f"--gin.DATASET_PATH={tmp_path / 'zh'}", "--gin.DATASET_LABELS=('是', '否')"]
    flags += [f"--gin.VOCABULARY={vocab_path}", f"--gin.MODEL_DIR={tmp_path / 'run'}"]
    flags += ["--gin.MIXTURE_OR_TASK_NAME=zh_finetune", "--gin_file=students/tiny.gin"]
    for command in ("train", "inspect"):
        assert main([command, *flags]) == 2
        assert "labels '是' and '否' have the same tokens" in capsys.readouterr().err


@pytest.fixture
def braces(tmp_path):
    """A dataset whose labels and inputs have characters that T5's vocabulary lacks."""
    labels = ["f{x}", "g{y}", "yes"]
    rows = [{"id": str(i), "input": f"is {i} < 9", "label": labels[i % 3]} for i in range(12)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows)
    braces = Dataset.from_files(tmp_path, name="braces")
    return named_mixture("braces_finetune", [braces])


def test_labels_and_inputs_that_the_vocabulary_cannot_encode_are_counted(braces, vocab_path):
    vocabulary = load_vocabulary(vocab_path)
    assert round_trip(vocabulary, "f{x}") == "fx"
    store = open_store(braces, "train", vocabulary, **LENGTHS)
    labels, inputs = describe_labels(braces, vocabulary, store)
    assert "cannot represent 2 of 3 different labels: 'f{x}' (written as 'fx')" in labels
    total = len(store.tasks[0].inputs.tokens)
    assert f"no token for 12 of {total} input tokens" in inputs
    as_bytes = load_vocabulary("bytes")
    store = open_store(braces, "train", as_bytes, **LENGTHS)
    assert describe_labels(braces, as_bytes, store) == []


def test_a_prediction_is_compared_with_the_decoded_label(braces, vocab_path):
    examples = [EvaluationExample(str(i), "x", "f{x}") for i in range(3)]
    predictions = ["fx", "f{x}", "gy"]
    vocabulary = load_vocabulary(vocab_path)
    assert Scored.of(braces, examples, predictions, vocabulary).verdicts == (1.0, 1.0, 0.0)
    assert Scored.of(braces, examples, predictions).verdicts == (0.0, 1.0, 0.0)


def test_labels_that_look_alike_are_named():
    labels = [*["bug"] * 3, "Bug", "billing", "how to", "how  to"]
    assert describe_look_alikes(labels) == [
        "labels that differ only by case or whitespace: 'bug' (3 rows), 'Bug' (1 rows)",
        "labels that differ only by case or whitespace: 'how to' (1 rows), 'how  to' (1 rows)",
    ]


def test_a_label_in_another_case_gets_a_suggestion(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"input": "x", "label": "Bug "}])
    with pytest.raises(
        DssError, match=r"label 'Bug' is not one of billing, bug; did you mean 'bug'"
    ):
        list(stream_examples(path, "train", Labels(("billing", "bug"))))


def test_labels_that_their_metric_cannot_read_are_counted(tmp_path):
    labels = ("1,200", "(1 + 2)", "a dozen", "12 apples")
    rows = [{"input": f"x {i}", "label": label} for i, label in enumerate(labels)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows)
    sums = Dataset.from_files(tmp_path, name="sums", metric="equation")
    mixture, bytes_ = named_mixture("sums_finetune", [sums]), load_vocabulary("bytes")
    (line,) = describe_labels(mixture, bytes_, open_store(mixture, "train", bytes_, **LENGTHS))
    assert line == (
        "the metric 'equation' cannot read 2 of 4 different labels: '12 apples', 'a dozen'; a "
        "prediction matches such a label only with the same text"
    )


def test_labels_check_the_closed_set_and_compare_predictions(vocab_path):
    closed = Labels((" bug ", "billing", " "))
    assert closed.closed == ("bug", "billing")
    assert closed.admit("bug")
    assert not closed.admit("Bug")
    with pytest.raises(DssError, match=r"row 3: label 'Bug' is not one .*did you mean 'bug'"):
        closed.check("row 3", "Bug")
    assert Labels().admit("anything")
    sums = Labels(metric="equation")
    assert sums.is_right("2 + 2", "4")
    assert not sums.is_readable("four")
    # A label as T5's vocabulary decodes it is right only for students with that vocabulary.
    vocabulary = load_vocabulary(vocab_path)
    assert closed.is_right("fx", "f{x}", vocabulary)
    assert not closed.is_right("fx", "f{x}")
    with pytest.raises(DssError, match="did you mean 'equation'"):
        Labels(metric="equations")
