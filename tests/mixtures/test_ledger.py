"""The ledger: each row has one fate, and the counts add up to the rows of the file."""

import json

import pytest

from dss.batches.store import open_store
from dss.config.gin_files import parse_gin
from dss.data.datasets import Dataset
from dss.data.examples import hash_input, stream_examples
from dss.data.rationales import DISPUTED, LONG, NONE, SHORT, WRONG, RationaleConfig
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.ledger import LEFT_OUT, USED
from dss.mixtures.methods import named_mixture
from tests.conftest import write_jsonl
from tests.end_to_end.runs import call

ANSWER = {"rationale": "it is so", "label": "a", "raw": "x"}
# Each row's label, the teacher's output, and the row's fate in the label and the rationale task.
ROWS = {
    "plain": ("a", ANSWER, "trained", "trained"),
    "long " + "x" * 80: ("a", ANSWER, "truncated", "truncated"),
    "odd": ("f{x}", ANSWER, "unwritable", WRONG),
    "unlabelled": (None, ANSWER, "no label", WRONG),
    "blank": (" ", ANSWER, "no label", WRONG),
    " ": ("a", ANSWER, "empty input", "empty input"),
    "never asked": ("a", None, "trained", "missing"),
    "unread": ("a", {"raw": "Okay, let me see"}, "trained", "unparsed"),
    "declined": ("a", {"status": "refused"}, "trained", "refused"),
    "failed": ("a", {"status": "error"}, "trained", "error"),
    "changed": ("a", ANSWER | {"input_hash": hash_input("before")}, "trained", "stale"),
    "label only": ("a", {"label": "a"}, "trained", NONE),
    "disputed": ("a", ANSWER | {"vote": 0.2}, "trained", DISPUTED),
    "wrong": ("a", ANSWER | {"label": "b"}, "trained", WRONG),
    "short": ("a", ANSWER | {"rationale": "so"}, "trained", SHORT),
    "wordy": ("a", ANSWER | {"rationale": "it is so " * 3}, "trained", LONG),
}
CONFIG = RationaleConfig(min_agreement=0.5, right_only=True, min_words=2, max_words=5)


@pytest.fixture
def folder(tmp_path):
    """A folder with a row of every fate, two repeated inputs, and outputs for two missing rows."""
    examples = [{"id": k, "input": k, "label": row[0]} for k, row in ROWS.items()]
    examples.append({"id": "again", "input": "plain ", "label": "a"})
    examples.append({"id": "against", "input": "plain", "label": "b"})
    outputs = [{"id": k, "vote": 1.0} | row[1] for k, row in ROWS.items() if row[1]]
    outputs += [{"id": k, "vote": 1.0} | ANSWER for k in ("again", "against")]
    outputs += [{"id": "gone"} | ANSWER, {"id": "gone too"} | ANSWER]
    write_jsonl(tmp_path / "train.jsonl", examples)
    write_jsonl(tmp_path / "train.t.jsonl", outputs)
    write_jsonl(tmp_path / "valid.jsonl", [{"input": "v", "label": "a"}])
    return tmp_path


def counted(fates):
    return {fate: fates.count(fate) for fate in (*USED, *LEFT_OUT) if fate in fates}


def test_every_row_has_one_fate(folder, vocab_path, tmp_path, monkeypatch):
    monkeypatch.setenv("DSS_CACHE", str(tmp_path / "cache"))
    fates = Dataset.from_files(folder, name="fates")
    store = open_store(
        named_mixture("fates_step_by_step_t", [fates]),
        "train",
        load_vocabulary(vocab_path),
        inputs_length=32,
        targets_length=32,
        rationales=CONFIG,
    )
    label, rationale = (tokens.ledger for tokens in store.tasks)
    first = [row[2] for row in ROWS.values()]
    second = [row[3] for row in ROWS.values()]
    assert label.fates == counted([*first, "duplicate", "conflicting duplicate"])
    assert rationale.fates == counted([*second, "duplicate", WRONG])
    for ledger in (label, rationale):
        assert ledger.rows == sum(ledger.fates.values()) == len(ROWS) + 2
    assert (label.strays, rationale.strays) == (0, 2)
    assert list(rationale.stray_ids) == ["gone", "gone too"]
    assert str(rationale).endswith("and 2 outputs for no row ('gone', 'gone too')")


def test_rows_held_out_and_outside_the_fraction_are_counted(tmp_path):
    rows = [{"input": f"x {i}", "label": "a"} for i in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    held = Dataset.from_files(tmp_path, name="held")
    mixture = named_mixture("held_finetune", [held])
    for split, trained in (("train", 18), ("valid", 2)):
        (tokens,) = open_store(
            mixture,
            split,
            load_vocabulary("bytes"),
            inputs_length=32,
            targets_length=32,
            fraction=0.5,
        ).tasks
        fates = {
            "trained": trained,
            "in another split": 20 - trained,
            "not in TRAIN_FRACTION": 20,
        }
        assert tokens.ledger.fates == fates


def test_a_teachers_label_outside_the_closed_set_is_not_trained_on(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": i, "input": f"x {i}"} for i in range(3)])
    outputs = [{"id": i, "label": label} for i, label in enumerate(("yes", "maybe", "no"))]
    write_jsonl(tmp_path / "train.t.jsonl", outputs)
    write_jsonl(tmp_path / "valid.jsonl", [{"input": "v", "label": "yes"}])
    closed = Dataset.from_files(tmp_path, name="closed", labels=("yes", "no"))
    (task,) = named_mixture("closed_distill_t", [closed]).tasks
    read = task.read("train")
    assert [row.targets for row in read.rows] == ["yes", "no"]
    assert read.left_out == {"1": "label outside the set"}


def test_inspect_shows_the_ledger_and_outputs_without_a_row(folder, vocab_path, capsys):
    flags = [f"--gin.DATASET_PATH={folder}", "--gin.RationaleConfig.right_only=True"]
    flags.append("--gin.TRAIN_STEPS=8")
    name = folder.name.replace("-", "_")
    mixture = f"{name}_step_by_step_t"
    for vocabulary in ((), (f"--gin.VOCABULARY={vocab_path}",)):
        said = call("inspect", mixture, *flags, *vocabulary)
        lines = [line.split() for line in said.splitlines()]
        assert ["no", "label", "2", "0"] in lines
        assert ["stale", "0", "1"] in lines
        assert ["conflicting", "duplicate", "1", "0"] in lines
        assert ["total", "18", "18"] in lines
        assert "t has 2 outputs whose id no row has: 'gone', 'gone too'" in " ".join(said.split())


def test_outputs_of_moved_inputs_are_stale(tmp_path):
    """Without ids, rows are identified by their position; see also the test data `no_ids`."""
    inputs = [f"ticket {i}" for i in range(6)]
    outputs = [
        {
            "id": f"train-{i}",
            "rationale": f"for {text}",
            "label": "a",
            "input_hash": hash_input(text),
        }
        for i, text in enumerate(inputs)
    ]
    write_jsonl(tmp_path / "train.t.jsonl", outputs)
    for rows, joined in (
        (inputs, 6),
        (["new", *inputs], 0),
        (inputs[::-1], 0),
        (inputs[1:], 0),
        ([*inputs[:3], "changed", *inputs[4:]], 5),
    ):
        write_jsonl(tmp_path / "train.jsonl", [{"input": text, "label": "a"} for text in rows])
        write_jsonl(tmp_path / "valid.jsonl", [{"input": "v", "label": "a"}])
        moved = Dataset.from_files(tmp_path, name="moved")
        (task,) = named_mixture("moved_rationale_t", [moved]).tasks
        read = task.read("train")
        assert len(read.rows) == joined
        assert all(
            row.targets == f"for {row.inputs.removeprefix('explain: ')}" for row in read.rows
        )
        stale = [id_ for id_, reason in read.left_out.items() if reason == "stale"]
        assert len(stale) == min(len(rows), 6) - joined


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (1.0, "1"), (1.5, "1.5"), (-2.0, "-2")])
def test_whole_numbers_are_read_without_a_decimal_point(tmp_path, value, text):
    """pandas writes a column of whole numbers with a missing value as floats."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"id": value, "input": "x", "label": value}) + "\n")
    (example,) = stream_examples(path, "train")
    assert (example.id, example.label) == (text, text)


def test_the_error_names_ids_without_a_row(shared, tmp_path):
    folder = shared / "faults" / "data" / "ids_1_and_1.0"
    numbers = Dataset.from_files(folder, name="numbers")
    whole, padded = (
        named_mixture(f"numbers_rationale_{t}", [numbers]).tasks[0] for t in ("rules", "pad")
    )
    assert len(whole.rows("train")) == 5  # one of six is held out
    assert not padded.rows("train")
    with pytest.raises(
        DssError, match=r"no train rows; of 6 rows in the file: 5 missing, .*6 outputs for no row"
    ):
        open_store(
            named_mixture("numbers_step_by_step_pad", [numbers]),
            "train",
            load_vocabulary("bytes"),
            inputs_length=64,
            targets_length=64,
        )


def test_equal_inputs_are_in_one_split(tmp_path):
    rows = [{"input": f"x {i % 30}", "label": "a"} for i in range(60)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    dataset = Dataset.from_files(tmp_path, name="twice")
    train, valid = ({e.input for e in dataset.examples(split)} for split in ("train", "valid"))
    assert train | valid == {row["input"] for row in rows}
    assert not train & valid
    assert valid


@pytest.mark.parametrize("name", ["tickets.csv", "train.jsonl.gz", "train.parquet", "t.xlsx"])
def test_a_file_of_another_format_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DssError, match=r"not JSON lines; make a dataset of its columns with"):
        list(stream_examples(tmp_path / name, "train"))


def test_a_json_array_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text('[{"input": "x"}]')
    with pytest.raises(DssError, match=r"train\.jsonl:1: a JSON array, not JSON lines"):
        list(stream_examples(tmp_path / "train.jsonl", "train"))


def test_labels_can_be_separated_by_commas():
    for given, labels in (("billing, bug,", ("billing", "bug")), ("''", ())):
        assert parse_gin([], [f"DATASET_LABELS={given}"]).data.labels == labels


def test_blanks_around_labels_are_removed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"input": f"x {i}", "label": "yes "} for i in range(4)])
    dataset = Dataset.from_files(tmp_path, name="blanks", labels=("yes ", " no"))
    assert dataset.labels.closed == ("yes", "no")
    assert {e.label for e in dataset.examples("train")} == {"yes"}


def test_inspect_shows_the_ledger_of_a_task_without_rows(tmp_path, vocab_path):
    rows = [{"input": f"x {i}", "label": "a"} for i in range(4)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    outputs = [{"id": f"train-{i}", "status": "refused"} for i in range(4)]
    write_jsonl(tmp_path / "data" / "train.t.jsonl", outputs)
    flags = [f"--gin.DATASET_PATH={tmp_path / 'data'}", f"--gin.VOCABULARY={vocab_path}"]
    said = call("inspect", "data_step_by_step_t", *flags, status=2)
    assert ["refused", "0", "3"] in [line.split() for line in said.splitlines()]
    assert (
        "data_rationale_t: no train rows; of 4 rows in the file: 3 refused, 1 in another split"
        in said
    )


def test_inspect_skips_a_split_that_no_task_has(folder):
    name = folder.name.replace("-", "_")
    said = call("inspect", f"{name}_rationale_t", f"--gin.DATASET_PATH={folder}")
    assert "train: rows of the file" in said
    assert "valid: rows of the file" not in said  # the teacher has no outputs for it
