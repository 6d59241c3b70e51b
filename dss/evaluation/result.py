"""Evaluation of a student on a split: predictions, metrics, and the files they are saved to."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dss.data.vocabulary import Vocabulary
from dss.evaluation.calibration import Calibration
from dss.evaluation.classes import ClassMetrics
from dss.evaluation.confusion import Confusion
from dss.evaluation.evaluator import (
    Answer,
    EvaluationExample,
    Scored,
    has_classes,
    predicted_labels,
)
from dss.evaluation.rationales import RationaleQuality
from dss.evaluation.teachers import TeacherOutputs, TeacherScore, score_teacher
from dss.mixtures.methods import Mixture
from dss.paths import write_whole

__all__ = ["Evaluation", "candidate_probabilities"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A student's predictions for a split, with all metrics.

    Attributes:
      mixture: name of the mixture that the student was trained on.
      split: "train", "valid" or "test".
      step: training step of the checkpoint.
      scored: scores of the predictions.
      examples: the N examples.
      answers: the student's N predictions.
      teachers: scores of the teachers on the same examples, by teacher.
      classes: scores by class, such as macro F1; None unless labels are compared as text or of a
        closed set.
      confusion: confusion matrix; None unless the dataset has a closed set of labels.
      calibration: calibration of the label probabilities; None if all text was generated.
      rationales: the student's N rationales; None if not requested.
      quality: quality of the rationales; None if not requested.
      outputs: outputs of the teachers for the split, by teacher.
      temperature: temperature of the label probabilities; 1 if the run is not calibrated.
    """

    mixture: str
    split: str
    step: int
    scored: Scored
    examples: tuple[EvaluationExample, ...]
    answers: tuple[Answer, ...]
    teachers: Mapping[str, TeacherScore]
    classes: ClassMetrics | None
    confusion: Confusion | None
    calibration: Calibration | None
    rationales: tuple[str, ...] | None = None
    quality: RationaleQuality | None = None
    outputs: Mapping[str, TeacherOutputs] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0

    @property
    def predictions(self) -> tuple[str, ...]:
        """The predicted texts."""
        return tuple(answer.text for answer in self.answers)

    @classmethod
    def of(
        cls,
        mixture: Mixture,
        split: str,
        step: int,
        examples: Sequence[EvaluationExample],
        answers: Sequence[Answer],
        teachers: Mapping[str, TeacherOutputs],
        rationales: Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
        temperature: float = 1.0,
    ) -> "Evaluation":
        """Returns the evaluation of a student's predictions.

        Args:
          mixture: the mixture that the student was trained on.
          split: the split that the examples belong to.
          step: training step of the checkpoint.
          examples: the N examples.
          answers: the student's N predictions.
          teachers: outputs of the teachers for the split, by teacher.
          rationales: the student's N rationales, for examples whose targets are labels.
          vocabulary: the student's vocabulary; see `Scored.of`.
          temperature: temperature of the label probabilities.
        """
        dataset, texts = mixture.dataset, [answer.text for answer in answers]
        scored = Scored.of(mixture, examples, texts, vocabulary)
        scores = {t: score_teacher(mixture, examples, scored, o) for t, o in teachers.items()}
        classes = confusion = quality = None
        if has_classes(mixture):
            closed, targets = dataset.labels.closed, [e.target for e in examples]
            predicted = predicted_labels(mixture, examples, texts, scored, vocabulary)
            classes = ClassMetrics.of(closed, targets, predicted)
            confusion = Confusion.of(closed, targets, predicted) if closed else None
        if rationales is not None:
            teacher = next(task.teacher for task in mixture.tasks if task.kind != "label")
            outputs = teachers.get(teacher or "", {})
            references = {i: o.rationale for i, o in outputs.items() if o.has_rationale}
            quality = RationaleQuality.of(dataset, examples, texts, rationales, references)
        return cls(
            mixture=mixture.name,
            split=split,
            step=step,
            scored=scored,
            examples=tuple(examples),
            answers=tuple(answers),
            teachers={t: score for t, score in scores.items() if score is not None},
            classes=classes,
            confusion=confusion,
            calibration=_calibrate(mixture, examples, answers),
            rationales=None if rationales is None else tuple(rationales),
            quality=quality,
            outputs=teachers,
            temperature=temperature,
        )

    def save(self, folder: epath.Path) -> epath.Path:
        """Writes predictions (JSON lines) and summary (JSON); returns the path of the former."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.mixture}-{self.split}-{self.step}.jsonl"
        lines = []
        rows = zip(self.examples, self.answers, self.scored.verdicts, strict=True)
        for i, (example, answer, verdict) in enumerate(rows):
            line: dict[str, Any] = {
                "id": example.id,
                "input": example.text,
                "target": example.target,
                "prediction": answer.text,
                "score": verdict,
            }
            if answer.probabilities:
                line["probabilities"] = answer.probabilities
            if self.rationales is not None:
                line["rationale"] = self.rationales[i]
            by_teacher = {t: outputs.get(example.id) for t, outputs in self.outputs.items()}
            if any(by_teacher.values()):
                line["teachers"] = {
                    teacher: {"label": output.label, "rationale": output.rationale}
                    for teacher, output in by_teacher.items()
                    if output
                }
            lines.append(line)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        write_whole(path.with_suffix(".json"), json.dumps(self.summary()) + "\n")
        return path

    def summary(self) -> dict[str, Any]:
        """Returns the metrics as JSON-serializable values; None for what was not measured."""

        def fields(value: Any) -> dict[str, Any] | None:
            return None if value is None else dataclasses.asdict(value)

        return {
            "mixture": self.mixture,
            "split": self.split,
            "step": self.step,
            **_summary(self.scored),
            "teachers": {
                name: {**_summary(teacher.scored), "p_value": teacher.p_value}
                for name, teacher in self.teachers.items()
            },
            "classes": None if self.classes is None else self.classes.summary(),
            "confusion": fields(self.confusion),
            "calibration": fields(self.calibration),
            "temperature": self.temperature,
            "rationales": fields(self.quality),
        }


def _summary(scored: Scored) -> dict[str, Any]:
    return {
        "metric": scored.metric,
        "value": scored.value,
        "interval": scored.interval,
        "examples": len(scored.verdicts),
    }


def candidate_probabilities(
    mixture: Mixture, examples: Sequence[EvaluationExample], answers: Sequence[Answer]
) -> tuple[list[list[float]], list[list[bool]]]:
    """Returns each example's probability of each candidate, and whether the candidate is correct.

    Examples whose text was generated are left out.

    Args:
      mixture: the student's mixture.
      examples: the N examples with their targets.
      answers: the N predictions.
    """
    chosen = [(e, a) for e, a in zip(examples, answers, strict=True) if a.probabilities]
    is_right = mixture.dataset.labels.is_right
    return (
        [list(answer.probabilities.values()) for _, answer in chosen],
        [[is_right(c, example.target) for c in answer.probabilities] for example, answer in chosen],
    )


def _calibrate(
    mixture: Mixture, examples: Sequence[EvaluationExample], answers: Sequence[Answer]
) -> Calibration | None:
    probabilities, correct = candidate_probabilities(mixture, examples, answers)
    return Calibration.of(probabilities, correct) if probabilities else None
