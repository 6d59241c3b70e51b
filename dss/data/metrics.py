"""Whether a prediction is right. A label task names its metric: "text" or "equation"."""

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
    """Returns whether both texts are the same, white space around them aside."""
    return prediction.strip() == label.strip()


def equation_equal(prediction: str, label: str) -> bool:
    """Returns whether both texts are arithmetic of the same value, or the same text.

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
    """Returns whether a metric can judge a label: the equation metric reads arithmetic only."""
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
    from rouge_score import rouge_scorer  # brings nltk

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return scorer.score(reference, prediction)["rougeL"].fmeasure


def _percent(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: 100 * sum(values) / len(values)}


def text_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """SeqIO metric: the accuracy in percent by `text_equal`."""
    return _percent(
        "accuracy", [text_equal(p, t) for t, p in zip(targets, predictions, strict=True)]
    )


def equation_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """SeqIO metric: the accuracy in percent by `equation_equal`."""
    verdicts = [equation_equal(p, t) for t, p in zip(targets, predictions, strict=True)]
    return _percent("accuracy", verdicts)


def rouge_l_mean(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """SeqIO metric: the mean ROUGE-L F-measure in percent."""
    return _percent("rouge_l", [rouge_l(p, t) for t, p in zip(targets, predictions, strict=True)])
