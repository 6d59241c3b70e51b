from dss.evaluation.confusion import Confusion


def test_predictions_are_counted_by_target_label():
    confusion = Confusion.of(
        ("a", "b", "c"),
        ["a", "a", "a", " b", "b", "nobody's"],
        ["a", "b ", "z", "b", "a", "a"],
    )
    assert confusion.counts == ((1, 1, 0, 1), (1, 1, 0, 0), (0, 0, 0, 0))
    assert confusion.examples == (3, 2, 0)
    assert confusion.right == (1, 1, 0)
    assert confusion.accuracies == (1 / 3, 1 / 2, None)
