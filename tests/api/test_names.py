"""The public names, without training."""

import asyncio
import subprocess
import sys

import pytest

import dss
from dss.testing import FakeEndpoint, chat_reply
from tests.conftest import tiny_config, write_jsonl
from tests.teacher.conftest import PROMPT, label_of, numbers_file


def test_every_public_name_exists_and_is_documented():
    assert dss.__all__ == sorted(dss.__all__)
    assert {*dss.__all__} <= {*dir(dss)}
    for name in dss.__all__:
        assert getattr(dss, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'tain'"):
        _ = dss.tain


def test_constructing_an_experiment_does_not_import_jax():
    code = (
        "import sys, dss; dss.Experiment(dataset='cqa', method='finetune', student='small');"
        "print([m for m in ('jax', 'tensorflow', 'flax', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_an_experiment_accepts_a_dataset_and_the_name_of_a_student(toy):
    experiment = dss.Experiment(dataset=toy, method="finetune", student="small")
    assert (experiment.dataset, experiment.data.labels) == ("toy", ("yes", "no"))
    assert experiment.data.dataset_path == str(toy.source.path)
    assert experiment.student.d_model == 512
    released = dss.Dataset.released("cqa", "somewhere")
    experiment = dss.Experiment(dataset=released, student="hf:google/flan-t5-small")
    assert (experiment.dataset, experiment.data.root) == ("cqa", "somewhere")
    assert experiment.initial_checkpoint == "hf:google/flan-t5-small"
    assert experiment.student is None
    with pytest.raises(ValueError, match="two initial checkpoints"):
        dss.Experiment(student="hf:a/b", initial_checkpoint="hf:c/d")
    with pytest.raises(dss.DssError, match="unknown student 'smal'; did you mean 'small'"):
        dss.Experiment(student="smal")
    given = dss.Experiment(student=tiny_config())
    assert given.student == given.config == tiny_config()


def test_annotate_works_inside_an_event_loop(tmp_path, monkeypatch):
    """As in a notebook."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (tmp_path / "prompt.yaml").write_text(PROMPT)
    numbers = dss.Dataset.from_files(numbers_file(tmp_path, 6))

    def teach(body):
        number = int(body["messages"][-1]["content"].split()[1])
        return chat_reply(f" So it is.\nLabel: {label_of(number)}")

    with FakeEndpoint(teach) as endpoint:

        async def cell():
            return [
                dss.annotate(
                    numbers,
                    model="my-llm",
                    prompt=str(tmp_path / "prompt.yaml"),
                    base_url=endpoint.url,
                )
                for _ in range(2)
            ]

        first, again = asyncio.run(cell())
        assert endpoint.count == 6
    assert first.counts == again.counts == {"ok": 6}
    assert (first.teacher, first.path.name) == ("my_llm", "numbers.my-llm.jsonl")
    assert numbers.source.teachers == ("my_llm",)
    with pytest.raises(dss.DssError, match="no prompt: give the name"):
        dss.annotate(numbers, model="m")
    with pytest.raises(dss.DssError, match="no file for valid: it is a tenth of train"):
        dss.annotate(numbers, model="m", prompt="classification", split="valid")


def test_load_names_a_source_without_a_student(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"input": "x"}])
    with pytest.raises(dss.DssError, match=str(tmp_path)):
        dss.load(tmp_path)


def test_wrong_arguments_are_one_line(toy, tmp_path):
    for call, message in (
        (lambda: dss.train(None, tmp_path), "experiment: give a dss.Experiment, not NoneType"),
        (lambda: dss.annotate("tickets", model="m"), "dataset: give dss.Dataset.from_files"),
        (lambda: dss.load(tmp_path), "no run, export or checkpoint"),
        (lambda: dss.load("runs/nowhere"), "no such folder, and the hub did not send it"),
    ):
        with pytest.raises(dss.DssError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    student = dss.Student(None)
    for inputs in ({"input": "x"}, [{"input": "x"}], 3, b"x"):
        with pytest.raises(dss.DssError, match="give a text or a list of texts"):
            student.predict(inputs)
    with pytest.raises(dss.DssError, match="`threshold=80`: give a probability"):
        student.predict("x", threshold=80)
