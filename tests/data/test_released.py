import json

import pytest

from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.errors import DssError
from tests.conftest import write_jsonl


@pytest.mark.parametrize(
    ("name", "text", "rationale", "label"),
    [
        ("cqa", "R. So the answer is (d) math problem.\n\nQ: x", "R.", "math problem"),
        ("cqa", "R. So the answer is unclear.", "R.", " "),
        ("cqa", "no conclusion", " ", " "),
        ("cqa", "R. So the answer is (a) x. So the answer is (b) y.", " ", " "),
        ("svamp", "R. The answer is (84 / 2).\n\nQ: x", "R.", "(84 / 2)"),
        ("svamp", "R. The answer is 42.", "R.", " "),
        ("esnli", "R.\nAnswer: neutral\n\nPremise: x", "R.", "neutral"),
        ("esnli", "R.", "R.", " "),
        ("anli1", "R. So the answer is contradiction.\n\nPremise: x", "R.", "contradiction"),
        ("anli1", "The answer is contradiction.", "", ""),
    ],
)
def test_palm_text_is_parsed_as_in_the_reference(name, text, rationale, label):
    assert RELEASED[name].parsers["palm"](text) == (rationale, label)


def test_gpt_neox_text_on_anli_has_two_conclusions():
    parse = RELEASED["anli1"].parsers["gpt_neox"]
    assert parse("  R. The answer is neutral.") == ("R.", "neutral")


@pytest.mark.parametrize("name", RELEASED)
def test_every_dataset_and_teacher_is_read(small_root, name):
    dataset = Dataset.released(name, small_root)
    for teacher in ("palm", "gpt_neox"):
        outputs = dataset.outputs("train", teacher)
        examples = dataset.examples("train")
        assert {output.status for output in outputs.values()} == {"ok"}
        assert all(example.id in outputs for example in examples)


def test_a_number_of_texts_unlike_that_of_rows_is_an_error(small_root, tmp_path):
    import shutil

    root = tmp_path / "root"
    shutil.copytree(small_root, root)
    (root / "svamp" / "llm" / "train_CoT_1.json").unlink()
    with pytest.raises(DssError, match=r"12 texts of palm, but 20 examples"):
        Dataset.released("svamp", root).outputs("train", "palm")
    (root / "svamp" / "svamp_train.json").write_text('{"input": "x"}\n')
    with pytest.raises(DssError, match=r"svamp_train.json:1: not a row of svamp"):
        Dataset.released("svamp", root).examples("train")
    (root / "svamp" / "llm" / "train_CoT_0.json").write_text("[1]")
    with pytest.raises(DssError, match="not a JSON list of strings"):
        Dataset.released("svamp", root).outputs("train", "palm")


def test_an_nli_row_without_a_gold_label_is_an_error(tmp_path):
    (tmp_path / "esnli").mkdir()
    rows = tmp_path / "esnli" / "esnli_test.json"
    rows.write_text('{"premise": "p", "hypothesis": "h", "label": -1}\n')
    with pytest.raises(DssError, match=r"esnli_test.json:1: not a row of esnli"):
        Dataset.released("esnli", tmp_path).examples("test")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("svamp", {"input": "x", "label": 5}),
        ("cqa", {"question": None, "choices": list("abcde"), "answer": "a"}),
        ("asdiv", {"Body": None, "Question": "q", "Answer": "1"}),
        ("esnli", {"premise": None, "hypothesis": "h", "label": 1}),
    ],
)
def test_a_row_without_its_texts_is_an_error(tmp_path, name, row):
    write_jsonl(tmp_path / name / f"{name}_test.json", [row])
    with pytest.raises(DssError, match=rf"{name}_test.json:1: not a row of {name}: .* not text"):
        Dataset.released(name, tmp_path).examples("test")


def test_splits_are_the_references(shared, data_root):
    recorded = json.loads((shared / "fixtures" / "reference_splits.json").read_text())
    assert len(recorded) == 12
    for key, wanted in recorded.items():
        name, fraction, seed = key.split("/")
        options = {"fraction": float(fraction.split("=")[1]), "seed": int(seed.split("=")[1])}
        for split in ("train", "valid"):
            examples = Dataset.released(name).examples(split, **options)
            assert [int(e.id.split("-")[1]) for e in examples] == wanted[split], key


def test_every_cqa_label_is_among_its_choices(data_root):
    dataset = Dataset.released("cqa")
    assert all(e.label in dataset.choices(e.input) for e in dataset.examples("test"))
