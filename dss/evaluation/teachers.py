"""Scores of teachers under the student's metric, on the same examples."""

import dataclasses
from collections.abc import Mapping, Sequence

from dss.data.examples import TeacherOutput
from dss.evaluation.evaluator import EvaluationExample, Scored
from dss.evaluation.significance import mcnemar
from dss.mixtures.methods import Mixture

__all__ = ["TeacherOutputs", "TeacherScore", "read_teachers", "score_teacher"]

TeacherOutputs = Mapping[str, TeacherOutput]  # by example id


@dataclasses.dataclass(frozen=True)
class TeacherScore:
    """Scores of a teacher's labels.

    Attributes:
      scored: scores on the examples with a gold label and an output of the teacher; an output
        without a label is incorrect.
      p_value: p-value of McNemar's exact test that student and teacher are equally accurate on
        these examples.
    """

    scored: Scored
    p_value: float


def read_teachers(mixture: Mixture, split: str) -> dict[str, TeacherOutputs]:
    """Returns the outputs for a split by teacher, except stale ones.

    Raises:
      DssError: if a file of outputs is malformed.
    """
    dataset = mixture.dataset
    return {
        teacher: {
            id_: output
            for id_, output in dataset.outputs(split, teacher).items()
            if output.status != "stale"
        }
        for teacher in dataset.source.teachers
        if dataset.has(split, teacher)
    }


def score_teacher(
    mixture: Mixture,
    examples: Sequence[EvaluationExample],
    student: Scored,
    outputs: TeacherOutputs,
) -> TeacherScore | None:
    """Returns a teacher's scores and their comparison with a student's.

    None if no example has both a gold label and an output of the teacher.

    Args:
      mixture: the student's mixture.
      examples: the examples that the student was evaluated on.
      student: the student's scores on these examples.
      outputs: the teacher's outputs, by example id.
    """
    indices = [i for i, example in enumerate(examples) if example.gold and example.id in outputs]
    if not indices:
        return None
    common = [examples[i] for i in indices]
    scored = Scored.of(mixture, common, [outputs[e.id].label or "" for e in common])
    return TeacherScore(scored, mcnemar([student.verdicts[i] for i in indices], scored.verdicts))
