import pytest

from dss.data.datasets import Dataset
from dss.evaluation.evaluator import EvaluationExample
from dss.evaluation.rationales import RationaleQuality, conclusion


@pytest.mark.parametrize(
    ("rationale", "choices", "label"),
    [
        ("No. So the answer is yes.", ("yes", "no"), "yes"),
        ("Yes, but no", ("yes", "no"), "no"),
        ("It is a Hot Dog", ("dog", "hot dog"), "hot dog"),
        ("Nobody knows", ("yes", "no"), None),
        ("Yes. So the answer is maybe", ("yes", "no"), "maybe"),
        ("So the answer is (2 + 3).", (), "(2 + 3)"),
        ("2 and 3 are 5", (), None),
        ("So the answer is", ("yes", "no"), None),
        ("costs $5 (a.b*c)", ("(a.b*c)", "$5"), "(a.b*c)"),
        ("", ("yes",), None),
    ],
)
def test_the_conclusion_of_a_rationale(rationale, choices, label):
    assert conclusion(rationale, choices) == label


def test_teachers_conclude_their_own_labels(data_root):
    """Most rationales of CQA that name a choice last name the teacher's own label."""
    cqa = Dataset.released("cqa")
    outputs = cqa.outputs("test", "palm")
    concluded, agreed = 0, 0
    for example in cqa.examples("test"):
        label = conclusion(outputs[example.id].rationale, cqa.choices(example.input))
        concluded += label is not None
        agreed += label is not None and cqa.labels.is_right(label, outputs[example.id].label or "")
    assert (concluded, agreed) == (906, 847)


def test_rationales_are_compared_with_the_teachers_and_with_labels(toy):
    targets = ["yes", "no", "yes", "no"]
    examples = [EvaluationExample(str(i), "is it good", t) for i, t in enumerate(targets)]
    rationales = ["it is, yes", "it is, yes", "no no no", "who can tell"]
    references = {"0": "it is, yes", "2": "other words altogether"}
    found = RationaleQuality.of(toy, examples, ["yes", "yes", "yes", "no"], rationales, references)
    assert found == RationaleQuality(
        examples=4, referenced=2, rouge_l=0.5, concluding=3, predicted=2, right=1
    )
    none = RationaleQuality.of(toy, examples[:1], ["yes"], ["?"], {})
    assert (none.rouge_l, none.concluding) == (None, 0)
