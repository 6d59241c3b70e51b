import pytest

from dss.evaluation.classes import ClassMetrics, ClassScore


def test_scores_by_class_agree_with_those_worked_out_by_hand():
    # c is never predicted, d has no examples, e has neither; z is outside the set.
    targets = ["a", "a", "a", "a", "b", "b", "c", " b"]
    predictions = ["a", "a ", "b", "z", "b", "d", "a", "b"]
    metrics = ClassMetrics.of(("a", "b", "c", "d", "e"), targets, predictions)
    assert metrics.by_class == (
        ClassScore("a", support=4, predicted=3, correct=2),
        ClassScore("b", support=3, predicted=3, correct=2),
        ClassScore("c", support=1, predicted=0, correct=0),
        ClassScore("d", support=0, predicted=1, correct=0),
        ClassScore("e", support=0, predicted=0, correct=0),
    )
    assert [c.precision for c in metrics.by_class] == [2 / 3, 2 / 3, 0, 0, 0]
    assert [c.recall for c in metrics.by_class] == [2 / 4, 2 / 3, 0, 0, 0]
    assert [c.f1 for c in metrics.by_class] == [4 / 7, 4 / 6, 0, 0, 0]
    assert metrics.macro_f1 == pytest.approx((4 / 7 + 2 / 3 + 0 + 0) / 4), "e is left out"
    assert metrics.weighted_f1 == pytest.approx((4 * 4 / 7 + 3 * 2 / 3) / 8)
    assert metrics.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3 + 0) / 3), "without d and e"
    assert (metrics.majority.label, metrics.majority_accuracy) == ("a", 4 / 8)


def test_correct_predictions_of_equally_frequent_classes_have_equal_means():
    metrics = ClassMetrics.of((), ["x", "y"], ["x", "y"])
    means = metrics.macro_f1, metrics.weighted_f1, metrics.balanced_accuracy
    assert means == (1, 1, 1)
    assert (metrics.majority.label, metrics.majority_accuracy) == ("x", 0.5), "the first on a tie"


def test_targets_are_the_classes_of_an_open_set():
    metrics = ClassMetrics.of((), ["b", "a", "b"], ["c", "a", "a"])
    assert [c.label for c in metrics.by_class] == ["a", "b"]
    assert [c.predicted for c in metrics.by_class] == [2, 0]
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match="no predictions"):
        ClassMetrics.of(("a",), [], [])


def test_the_summary_has_every_mean_and_every_class():
    summary = ClassMetrics.of(("no", "yes"), ["no", "yes", "yes"], ["no", "no", "yes"]).summary()
    by_class = summary.pop("by_class")
    assert summary == {
        "macro_f1": pytest.approx(2 / 3),
        "weighted_f1": pytest.approx(2 / 3),
        "balanced_accuracy": 0.75,
        "majority": {"label": "yes", "accuracy": pytest.approx(2 / 3)},
    }
    f1 = pytest.approx(2 / 3)
    assert by_class == [
        {"label": "no", "precision": 0.5, "recall": 1.0, "f1": f1, "support": 1},
        {"label": "yes", "precision": 1.0, "recall": 0.5, "f1": f1, "support": 2},
    ]
