"""Teachers judged as students are: by the same metric on the same examples."""

import dataclasses
from collections.abc import Mapping, Sequence

from dss.data.examples import TeacherOutput
from dss.evaluation.evaluator import EvaluationExample, Scored
from dss.evaluation.significance import mcnemar
from dss.mixtures.methods import Mixture

__all__ = ["TeacherOutputs", "TeacherScore", "read_teachers", "score_teacher"]

TeacherOutputs = Mapping[str, TeacherOutput]  # by the example's id


@dataclasses.dataclass(frozen=True)
class TeacherScore:
    """A teacher's labels, judged.

    Attributes:
      scored: the verdicts on the examples with a gold label that the teacher wrote about; no label
        is a wrong one.
      p_value: of the student being as accurate as the teacher on these, by McNemar's exact test.
    """

    scored: Scored
    p_value: float


def read_teachers(mixture: Mixture, split: str) -> dict[str, TeacherOutputs]:
    """Returns what each teacher that has outputs for a split wrote, but for what is stale.

    Raises:
      UserError: a malformed file.
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
    """Returns a teacher's score beside a student's; None where nothing can be judged.

    Args:
      mixture: the student's.
      examples: that the student was judged on.
      student: its verdicts on them.
      outputs: the teacher's.
    """
    rows = [i for i, example in enumerate(examples) if example.gold and example.id in outputs]
    if not rows:
        return None
    judged = [examples[i] for i in rows]
    scored = Scored.of(mixture, judged, [outputs[e.id].label or "" for e in judged])
    return TeacherScore(scored, mcnemar([student.verdicts[i] for i in rows], scored.verdicts))
