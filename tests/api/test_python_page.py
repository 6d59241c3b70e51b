"""Runs the code of docs/python.md, and checks the results in its comments."""

import re

import numpy as np
import pytest

import dss
from dss.testing import FakeEndpoint, chat_reply, last_question
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

LABEL_OF = {"charged": "billing", "closes": "bug", "licence": "question"}


def teach(body):
    question = last_question(body)
    label = next(label for word, label in LABEL_OF.items() if word in question)
    return chat_reply(f"It is about {label}.\nLabel: {label}")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Returns the variables of the page after running all of its code."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    variables: dict = {}
    with pytest.MonkeyPatch.context() as patch, FakeEndpoint(teach) as endpoint:
        patch.chdir(tmp_path_factory.mktemp("python"))
        patch.setenv("OPENAI_BASE_URL", endpoint.url)
        patch.setenv("OPENAI_API_KEY", "key")
        exec(compile(code, "python.md", "exec"), variables)
        variables["requests"] = endpoint.count
        yield variables


def test_every_example_is_annotated_once(names):
    assert names["requests"] == 30
    assert names["annotation"].counts == {"ok": 30}
    assert names["annotation"].teacher == "gpt_4o_mini"
    assert names["annotation"].stopped is None


def test_a_student_predicts_a_label_with_probabilities(names):
    prediction = names["prediction"]
    assert prediction.label in names["tickets"].labels.closed
    assert set(prediction.probabilities) == set(names["tickets"].labels.closed)
    assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert prediction.label == max(prediction.probabilities, key=prediction.probabilities.get)
    assert not prediction.truncated
    assert not prediction.abstained
    highest = max(prediction.probabilities.values())
    for threshold, abstained in ((highest + 1e-3, True), (highest - 1e-3, False)):
        (again,) = names["student"].predict(
            "I was charged 40 times for one month.", threshold=threshold
        )
        assert (again.label, again.abstained) == (prediction.label, abstained)


def test_an_evaluation_scores_every_example(names):
    evaluation = names["evaluation"]
    assert evaluation.scored.metric == "accuracy"
    assert len(evaluation.predictions) == 12
    verdicts = [
        p == e.target for p, e in zip(evaluation.predictions, evaluation.examples, strict=True)
    ]
    assert evaluation.scored.value == pytest.approx(np.mean(verdicts))


def test_an_export_has_the_predictions_of_its_run(names):
    text = "Can I use one licence on 40 laptops?"
    (exported,) = dss.load(names["folder"]).predict(text)
    (original,) = names["student"].predict(text, rationales=True)
    assert exported.label == original.label
    assert exported.probabilities == pytest.approx(original.probabilities, abs=1e-5)
    assert original.rationale == names["student"].explain(text)[0]


def test_predictions_of_long_inputs_are_marked_truncated(names):
    length = names["student"].experiment.data.inputs_length
    assert [p.truncated for p in names["student"].predict(["x" * length, "x"])] == [True, False]
