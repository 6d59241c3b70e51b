"""Metrics of predictions: "text" and "equation" for labels, ROUGE-L for rationales."""

from collections.abc import Callable, Sequence

from dss.data.equations import EquationError, evaluate

__all__ = [
    "METRICS",
    "equation_accuracy",
    "equation_equal",
    "is_readable",
    "rouge_l",
    "rouge_l_mean",
    "text_accuracy",
    "text_equal",
]


def text_equal(prediction: str, label: str) -> bool:
    """Returns whether two texts are equal, apart from surrounding whitespace."""
    return prediction.strip() == label.strip()


def equation_equal(prediction: str, label: str) -> bool:
    """Returns whether two texts are arithmetic of equal value, or equal texts.

    >>> equation_equal("(45 * 10)", "( 10.0 * 45.0 )")
    True
    >>> equation_equal("__import__('os')", "( 1.0 + 1.0 )")
    False
    """
    if prediction.strip() and text_equal(prediction, label):
        return True
    try:
        return evaluate(prediction) == evaluate(label)
    except EquationError:
        return False


def is_readable(metric: str, label: str) -> bool:
    """Returns whether a metric can parse a label: the equation metric needs arithmetic."""
    if metric != "equation":
        return True
    try:
        evaluate(label)
    except EquationError:
        return False
    return True


METRICS: dict[str, Callable[[str, str], bool]] = {"text": text_equal, "equation": equation_equal}


def rouge_l(prediction: str, reference: str) -> float:
    """Returns the ROUGE-L F-measure of two texts, in [0, 1] (Lin, 2004)."""
    from rouge_score import rouge_scorer  # imported here because it loads nltk

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return scorer.score(reference, prediction)["rougeL"].fmeasure


def _mean_percent(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: 100 * sum(values) / len(values)}


def text_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy in percent by `text_equal`, as a SeqIO metric."""
    correct = [text_equal(p, t) for t, p in zip(targets, predictions, strict=True)]
    return _mean_percent("accuracy", correct)


def equation_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy in percent by `equation_equal`, as a SeqIO metric."""
    correct = [equation_equal(p, t) for t, p in zip(targets, predictions, strict=True)]
    return _mean_percent("accuracy", correct)


def rouge_l_mean(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean ROUGE-L F-measure in percent, as a SeqIO metric."""
    scores = [rouge_l(p, t) for t, p in zip(targets, predictions, strict=True)]
    return _mean_percent("rouge_l", scores)
