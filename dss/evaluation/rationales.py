"""How good rationales are: like the teacher's, and of one mind with the label."""

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
    """Returns the label that a rationale concludes; None where it concludes none.

    It is what follows "So the answer is" or, of the possible labels, the one that is named last,
    after these words if they are there; teachers' rationales are stored without them.

    >>> conclusion("Beavers need wood. So the answer is (d) wooded area.", ["wood", "wooded area"])
    'wooded area'
    >>> conclusion("It is no dam. Of the choices only a wooded area fits", ["dam", "wooded area"])
    'wooded area'
    >>> conclusion("Beavers build dams", ["dam", "wooded area"])

    Args:
      rationale: a text.
      choices: the possible labels; empty where any text is.
    """
    text = extract_label(rationale)
    # Of two that end at the same place the longer one is meant: "area" and "wooded area".
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
    """Rationales of a student, judged.

    Attributes:
      examples: how many rationales.
      referenced: about how many of the examples the teacher wrote one too.
      rouge_l: mean ROUGE-L against the teacher's, in [0, 1]; None where it wrote none.
      concluding: how many conclude a label, see `conclusion`.
      predicted: how many conclude the label that the student predicts.
      right: how many conclude the right label.
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
        """Returns the quality of some rationales.

        Args:
          dataset: says when a label is another.
          examples: N of them; the targets are labels.
          predictions: the student's labels, N.
          rationales: its rationales, N.
          references: the teacher's, by the example's id.
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
