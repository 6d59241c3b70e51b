import dataclasses
import json
import sqlite3

import pyarrow.parquet as pq
import pytest

from dss.data.datasets import Dataset
from dss.data.examples import read_teacher_outputs
from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.teacher.job import file_job
from dss.teacher.journal import Journal
from dss.teacher.outputs import Sample, vote
from dss.teacher.prompt import load_prompt
from dss.testing import FakeEndpoint, chat_reply
from tests.conftest import write_jsonl
from tests.teacher.conftest import label_of
from tests.teacher.test_annotate import lines_of, right


def sample(label, status=None, rationale="why"):
    status = status or ("ok" if label else "unparsed")
    return Sample(status=status, rationale=rationale, label=label, raw=f"raw {label}")


def test_a_vote_groups_labels_that_are_equal_by_the_metric():
    prompt = load_prompt("svamp")
    samples = [sample("(2 + 3)"), sample("(5 - 5)"), sample("(3 + 2)"), sample(None)]
    assert vote(prompt, samples) == (samples[0], 0.5)


def test_a_vote_prefers_the_earlier_label_and_a_sample_with_a_rationale():
    prompt = load_prompt("free_form")
    samples = [sample("a", "unparsed", ""), sample("b"), sample("a")]
    assert vote(prompt, samples) == (samples[2], 2 / 3)
    assert vote(prompt, [sample("b"), sample("a")]) == (sample("b"), 0.5)


def test_a_vote_without_a_label_prefers_an_unparsed_sample():
    prompt = load_prompt("free_form")
    samples = [sample(None, "error", ""), sample(None, "unparsed"), sample(None, "refused", "")]
    assert vote(prompt, samples) == (samples[1], 0.0)


def test_training_reads_the_exported_lines(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    outputs = read_teacher_outputs(job.file("jsonl"), "m")
    assert [output.id for output in outputs] == [f"n{i}" for i in range(20)]
    numbers = Dataset.from_files(job.source, name="numbers", labels=("even", "odd"))
    rows = named_mixture("numbers_step_by_step_m", [numbers]).tasks[1].rows("train")
    assert {row.targets for row in rows} <= {f"It is {i}." for i in range(20)}
    assert len(rows) == 18


def test_reparsing_with_another_pattern_sends_no_request(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
        prompt = job.folder / "other.yaml"
        text = (job.folder / "prompt.yaml").read_text()
        pattern = "(?P<rationale>.*?)\\s*(?:Label"
        assert pattern in text
        prompt.write_text(text.replace(pattern, f"(?:It is )?{pattern}"))
        other = file_job(job.source, str(prompt), job.writer.teacher, output=None, name=None)
        journal = Journal(other.journal_path)
        assert other.export(journal) == {"ok": 20}
        assert other.export(journal) is None
        journal.close()
        assert lines_of(other)[3]["rationale"] == "3."
        assert numbers.ask(other).sent == 0
    assert endpoint.count == 20


def test_a_changed_exemplar_makes_new_requests_and_keeps_earlier_answers(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
        changed = numbers.job(endpoint.url)
        text = (job.folder / "prompt.yaml").read_text().replace("Two is twice", "Two is 2 times")
        (job.folder / "prompt.yaml").write_text(text)
        changed = file_job(
            job.source,
            str(job.folder / "prompt.yaml"),
            job.writer.teacher,
            output=None,
            name=None,
        )
        assert numbers.ask(changed).sent == 20
        assert numbers.ask(job).sent == 0
    assert endpoint.count == 40


def test_parquet_contains_examples_and_outputs(numbers):
    def answer(body):
        return right(body, text="A ☃ {n}.\nLabel: {label}")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    journal = Journal(job.journal_path)
    job.export(journal, parquet=True)
    journal.close()
    rows = pq.read_table(job.file("parquet")).to_pylist()
    assert rows[3] | {"samples": []} == {
        "id": "n3",
        "input": "3",
        "gold": "odd",
        "rationale": "A ☃ 3.",
        "label": "odd",
        "status": "ok",
        "teacher": "m",
        "raw": "A ☃ 3.\nLabel: odd",
        "vote": 1.0,
        "samples": [],
    }
    assert len(rows) == 20
    assert not list(job.folder.glob("*.partial"))


def test_another_output_folder_is_a_complete_dataset(numbers, tmp_path):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        prompt = str(job.folder / "prompt.yaml")
        teacher = job.writer.teacher
        folder = tmp_path / "made" / "output"
        job = file_job(job.source, prompt, teacher, output=folder, name="the-teacher")
        numbers.ask(job)
    names = {path.name for path in folder.iterdir()}
    assert {"numbers.jsonl", "numbers.the-teacher.jsonl", "journal.sqlite"} <= names
    dataset = Dataset.from_files(folder / "numbers.jsonl", name="numbers")
    assert dataset.source.teachers == ("the_teacher",)
    assert len(dataset.outputs("train", "the_teacher")) == 20
    with pytest.raises(DssError, match="`name=a/b`"):
        file_job(job.source, prompt, teacher, output=folder, name="a/b")


@pytest.mark.parametrize("name", ["mine", "mine-valid", "train", "test"])
def test_examples_without_an_id_get_the_same_one_as_in_training(numbers, name):
    job = numbers.job()
    source = job.folder / "own" / f"{name}.jsonl"
    rows = [{"input": str(i), "label": label_of(i)} for i in range(20)]
    write_jsonl(source, rows)
    if name == "mine-valid":
        write_jsonl(source.with_name("mine.jsonl"), rows)
    with FakeEndpoint(right) as endpoint:
        teacher = dataclasses.replace(job.writer.teacher, base_url=endpoint.url)
        prompt = str(job.folder / "prompt.yaml")
        numbers.ask(file_job(source, prompt, teacher, output=None, name=None))
    split = {"mine": "train", "mine-valid": "valid"}.get(name, name)
    path = source.parent if split == name else source.parent / "mine.jsonl"
    dataset = Dataset.from_files(path, name="own_numbers")
    ids = {example.id for example in dataset.source.examples(split)}
    assert dataset.outputs(split, "m").keys() == ids


def test_an_unpaired_surrogate_from_the_endpoint_is_kept_and_exported(numbers):
    def answer(body):
        return chat_reply("\ud83d is half.\nLabel: odd")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    assert "is half." in lines_of(job)[0]["rationale"]
    with sqlite3.connect(job.journal_path) as connection:
        (response,) = connection.execute("SELECT response FROM attempts LIMIT 1").fetchone()
    assert "\\ud83d" in response
    assert len(read_teacher_outputs(job.file("jsonl"), "m")) == 20
    assert json.loads(response)["choices"]
