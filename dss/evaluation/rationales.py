"""Rationale quality: ROUGE-L against the teacher's, and consistency with the label."""

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence

from dss.data.datasets import Dataset
from dss.data.metrics import rouge_l
from dss.evaluation.evaluator import EvaluationExample
from dss.mixtures.tasks import CONCLUSION, extract_label

__all__ = ["RationaleQuality", "conclusion"]


def conclusion(rationale: str, choices: Sequence[str] = ()) -> str | None:
    """Returns the label that a rationale concludes with; None if it concludes with none.

    With `choices`, that is the choice named last, after "So the answer is" if the rationale has
    these words (released rationales are stored without them). If no choice is named, it is the text
    after these words.

    >>> conclusion("Beavers need wood. So the answer is (d) wooded area.", ["wood", "wooded area"])
    'wooded area'
    >>> conclusion("It is no dam. Of the choices only a wooded area fits", ["dam", "wooded area"])
    'wooded area'
    >>> conclusion("Beavers build dams", ["dam", "wooded area"])

    Args:
      rationale: text of the rationale.
      choices: the possible labels; empty if any text may be a label.
    """
    text = extract_label(rationale)
    # Of two matches with the same end the longer one is the label: "wooded area", not "area".
    named = [
        (match.end(), len(choice), choice)
        for choice in choices
        for match in re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE)
    ]
    if named:
        return max(named)[-1]
    return text.removesuffix(".") if CONCLUSION in rationale and text else None


@dataclasses.dataclass(frozen=True)
class RationaleQuality:
    """Quality of a student's rationales.

    Attributes:
      examples: number of rationales.
      referenced: number of rationales with a teacher's rationale for the same example.
      rouge_l: mean ROUGE-L against the teacher's rationales, in [0, 1]; None without any of these.
      concluding: number of rationales that conclude with a label; see `conclusion`.
      predicted: number of rationales that conclude with the student's predicted label.
      right: number of rationales that conclude with the correct label.
    """

    examples: int
    referenced: int
    rouge_l: float | None
    concluding: int
    predicted: int
    right: int

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        examples: Sequence[EvaluationExample],
        predictions: Sequence[str],
        rationales: Sequence[str],
        references: Mapping[str, str],
    ) -> "RationaleQuality":
        """Returns the quality of a student's rationales.

        Args:
          dataset: the dataset, for its possible labels and their comparison.
          examples: the N examples, with labels as targets.
          predictions: the student's N predicted labels.
          rationales: the student's N rationales.
          references: the teacher's rationales, by example id.
        """
        scores, predicted, right, concluding = [], 0, 0, 0
        rows = zip(examples, predictions, rationales, strict=True)
        for example, prediction, rationale in rows:
            if example.id in references:
                scores.append(rouge_l(rationale, references[example.id]))
            label = conclusion(rationale, dataset.choices(example.text))
            if label is not None:
                concluding += 1
                predicted += dataset.labels.is_right(label, prediction)
                right += dataset.labels.is_right(label, example.target)
        mean = statistics.fmean(scores) if scores else None
        return cls(len(examples), len(scores), mean, concluding, predicted, right)
