import codecs
import math
import os
import shutil

import pytest
from etils import epath

from dss.config.data import open_dataset, resolve
from dss.config.experiment import DataConfig, Experiment
from dss.config.gin_files import parse_gin
from dss.data.datasets import Dataset
from dss.data.labels import Labels
from dss.data.splits import hold_out, subsample
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from tests.conftest import write_jsonl


def test_jsonl_examples_and_journal_are_joined_by_id(toy):
    assert len(toy.examples("train")) == 40
    assert toy.source.teachers == ("rules",)
    assert toy.outputs("train", "rules")["train-5"].rationale == "5 is 2 mod 3"
    assert Dataset.from_files(toy.source.path, labels=("yes", "no")) == toy


def test_one_file_is_train_with_a_tenth_held_out(tmp_path):
    rows = [{"input": f"x{i}", "label": "a"} for i in range(20)]
    dataset = Dataset.from_files(write_jsonl(tmp_path / "mine.jsonl", rows), name="mine")
    train, valid = dataset.examples("train"), dataset.examples("valid")
    assert (len(train), len(valid)) == (18, 2)
    assert not {e.id for e in train} & {e.id for e in valid}
    with pytest.raises(DssError, match="no such file"):
        dataset.examples("test")


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(
        DssError, match=r"cqa_train.json: no such file; .*`DataConfig.root` .*DSS_DATA_ROOT"
    ):
        Dataset.released("cqa", tmp_path).examples("train")
    with pytest.raises(DssError, match=r"train.t.jsonl: no such file; .*create it"):
        Dataset.from_files(
            write_jsonl(tmp_path / "train.jsonl", [{"input": "x"}]), name="mine"
        ).outputs("train", "t")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DssError, match=r"train\.jsonl: a named pipe"):
        Dataset.from_files(tmp_path, name="piped").examples("train")
    os.mkfifo(tmp_path / "spiece.model")
    with pytest.raises(DssError, match=r"spiece\.model: a named pipe"):
        load_vocabulary(tmp_path / "spiece.model")


@pytest.fixture
def declared(tmp_path):
    """Returns a function that writes the dataset.json of a folder with one example."""
    write_jsonl(tmp_path / "tickets" / "train.jsonl", [{"input": "x", "label": "bug"}])

    def write(text: str):
        (tmp_path / "tickets" / "dataset.json").write_text(text, encoding="utf-8")
        return tmp_path / "tickets"

    return write


def test_a_folder_declares_its_labels_and_its_metric(declared):
    folder = declared('\ufeff{"labels": ["bug", " billing "], "metric": "equation"}')
    for path in (folder, folder / "train.jsonl"):
        dataset = Dataset.from_files(path, name="tickets")
        assert dataset.labels == Labels(("bug", "billing"), "equation")
        assert dataset.source.labels == dataset.labels
    labels = ("billing", "bug")
    assert Dataset.from_files(folder, name="tickets", labels=labels).labels.closed == labels
    folder = declared('{"metric": "text"}')
    assert Dataset.from_files(folder, name="tickets", labels=("bug",)).labels == Labels(("bug",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": ["bug"]}', "its labels are bug, but the configuration has bug, fee; remove"),
        ('{"metric": "text"}', "its metric is text, but the configuration has equation; remove"),
        ("[]", "must be a JSON object with 'labels', 'metric' or both, and no other"),
        (
            '{"label": ["bug"]}',
            "must be a JSON object with 'labels', 'metric' or both, and no other",
        ),
        ('{"labels": "bug, fee"}', "'labels' must be a list of strings"),
        ('{"labels": ["bug", 1]}', "'labels' must be a list of strings"),
        ('{"labels": ["bug", "bug "]}', "duplicate label 'bug'"),
        ('{"metric": ["text"]}', "'metric' must be one of text, equation"),
        ('{"labels": ', "not JSON"),
    ],
)
def test_an_invalid_dataset_json_is_an_error(declared, text, message):
    folder = declared(text)
    with pytest.raises(DssError) as error:
        Dataset.from_files(folder, name="tickets", labels=("bug", "fee"), metric="equation")
    assert str(error.value).startswith(f"{folder / 'dataset.json'}: {message}")


def test_a_run_keeps_the_labels_that_its_folder_declared(declared):
    folder = declared('{"labels": ["bug", "fee"]}')
    data = DataConfig(dataset_path=str(folder))
    experiment = resolve(Experiment(mixture="tickets_finetune", data=data))
    assert experiment.data.labels == ("bug", "fee")
    assert (experiment.dataset, experiment.method) == ("tickets", "finetune")
    assert resolve(experiment) == experiment
    # A student predicts the labels of its training, even if the folder declares others now.
    declared('{"labels": ["bug"]}')
    assert open_dataset(experiment, must_exist=False).labels.closed == ("bug", "fee")
    with pytest.raises(DssError, match="its labels are bug, but the configuration has bug, fee"):
        open_dataset(experiment)
    open_set = Experiment(data=DataConfig(dataset_path=str(folder)))
    assert open_dataset(open_set, must_exist=False).labels.closed == ()


def test_labels_are_kept_as_they_are_read():
    """So that a run resumes whose labels came from a list, or with spaces."""
    assert DataConfig(labels=["a", " b"]).labels == DataConfig(labels="a, b").labels == ("a", "b")


def test_subsets_are_nested():
    rows = [set(subsample(100, f, seed=3).tolist()) for f in (1.0, 0.5, 0.25)]
    assert rows[0] > rows[1] > rows[2]
    train, valid = hold_out(subsample(100, 0.5, seed=3))
    assert (len(train), len(valid)) == (45, 5)


@pytest.mark.parametrize("n", [10, 15, 25, 1000, 9741])
def test_subsets_are_nested_whatever_the_fractions_round_to(n):
    fractions = (0.1, 0.125, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
    rows = [set(subsample(n, f, seed=1).tolist()) for f in fractions]
    for fraction, smaller, larger in zip(fractions, rows, rows[1:], strict=False):
        assert smaller <= larger
        assert len(smaller) == n - math.ceil((1 - fraction) * n)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train.jsonl:2: not JSON"),
        ("[1]", r"train.jsonl:2: a JSON array, not JSON lines"),
        ('{"label": "a"}', r"train.jsonl:2: 'input' is missing"),
        ('{"input": ["x"]}', r"train.jsonl:2: 'input' is a list"),
        ('{"id": "one", "input": "x"}', r"train.jsonl:2: duplicate id 'one'"),
        (
            '{"input": "x", "label": NaN}',
            r"train.jsonl:2: not JSON that can be read: NaN is not allowed; .*null",
        ),
        ('{"input": "a cut \\ud83d"}', r"train.jsonl:2: 'input' holds half of a surrogate pair"),
        ("[" * 100_000, r"train.jsonl:2: not JSON that can be read"),
        ('{"input": ' + "9" * 5000 + "}", r"train.jsonl:2: not JSON that can be read"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_text('{"id": "one", "input": "x"}\n' + line + "\n")
    with pytest.raises(DssError, match=message):
        Dataset.from_files(tmp_path, name="bad").examples("train")


def test_a_label_outside_the_closed_set_is_an_error(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"input": "x", "label": "maybe"}])
    with pytest.raises(DssError, match=r"train.jsonl:1: label 'maybe' is not one of yes, no"):
        Dataset.from_files(tmp_path, name="bad", labels=("yes", "no")).examples("train")


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DssError, match="no examples for the test split"):
        Dataset.from_files(tmp_path, name="empty").examples("test")


def test_unknown_status_and_later_lines_of_a_journal(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "input": "x"}])
    journal = [{"id": "a", "status": "error"}, {"id": "a", "rationale": "r", "label": "l"}]
    write_jsonl(tmp_path / "train.t.jsonl", journal)
    dataset = Dataset.from_files(tmp_path, name="mine")
    assert dataset.outputs("train", "t")["a"].status == "ok"
    write_jsonl(tmp_path / "train.t.jsonl", [{"id": "a", "status": "fine"}])
    with pytest.raises(DssError, match=r"train.t.jsonl:1: status 'fine'"):
        dataset.outputs("train", "t")


def test_a_teachers_name_is_converted_for_task_names(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "input": "x"}])
    write_jsonl(tmp_path / "train.gpt-4o.jsonl", [{"id": "a", "rationale": "r", "label": "l"}])
    dataset = Dataset.from_files(tmp_path, name="mine")
    assert dataset.source.teachers == ("gpt_4o",)
    assert dataset.outputs("train", "gpt_4o")["a"].rationale == "r"


def test_null_in_a_journal_is_a_missing_value(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "input": "x", "label": None}])
    journal = [{"id": "a", "rationale": None, "label": None, "status": "refused"}]
    write_jsonl(tmp_path / "train.t.jsonl", journal)
    dataset = Dataset.from_files(tmp_path, name="mine")
    assert dataset.outputs("train", "t")["a"].rationale == ""


def test_bad_names_and_paths(tmp_path):
    with pytest.raises(DssError, match="letters, digits"):
        Dataset.from_files(tmp_path, name="my data")
    with pytest.raises(DssError, match="released dataset"):
        Dataset.from_files(tmp_path, name="cqa")
    with pytest.raises(DssError, match="no such file or folder"):
        Dataset.from_files(tmp_path / "nowhere", name="mine")
    with pytest.raises(DssError, match=r"unknown metric 'equatoin'; did you mean 'equation'"):
        Dataset.from_files(tmp_path, name="mine", metric="equatoin")
    with pytest.raises(DssError, match=r"unknown dataset 'cqaa'; did you mean 'cqa'"):
        Dataset.released("cqaa")


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    rows = [{"id": "a", "input": "x", "label": "b"}, {"id": "b", "input": "y", "label": "a"}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    write_jsonl(tmp_path / "valid.jsonl", rows)
    assert [e.id for e in Dataset.from_files(tmp_path, name="marked").examples("train")] == [
        "a",
        "b",
    ]
    (tmp_path / "x.gin").write_bytes(codecs.BOM_UTF8 + b"# c\nBATCH_SIZE = 3\n")
    assert parse_gin([str(tmp_path / "x.gin")]).batch_size == 3


def test_missing_texts_of_a_teacher_are_not_replaced_by_anothers(small_root, tmp_path):
    root = shutil.copytree(small_root, tmp_path / "root")
    shutil.rmtree(root / "gpt-neox" / "anli1")
    dataset = Dataset.released("anli1", epath.Path(root))
    assert dataset.outputs("train", "palm")
    with pytest.raises(DssError, match=r"gpt-neox/anli1/train\.json: no such file"):
        dataset.outputs("train", "gpt_neox")
