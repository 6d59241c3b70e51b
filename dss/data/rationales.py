"""Which of a teacher's rationales a student trains on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dss.data.examples import Example, TeacherOutput
from dss.errors import UserError
from dss.fields import check_at_least, check_types

__all__ = ["ALL_RATIONALES", "REASONS", "Choice", "RationaleConfig", "choose_rationales"]

NONE, DISPUTED, WRONG, SHORT, LONG = REASONS = (
    "without a rationale",
    "with too little agreement",
    "with a wrong label",
    "too short",
    "too long",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RationaleConfig:
    """Which rationales of the training split are trained on; all of them unless it says otherwise.

    An example whose rationale is left out still trains its label.
    """

    right_only: bool = False  # only those whose own label is the gold one
    min_words: int = 0  # shorter ones are left out
    max_words: int | None = None  # longer ones are left out, not cut; None: no limit
    min_agreement: float = 0.0  # least share of the teacher's samples with the voted label, [0, 1]
    several: bool = False  # of several samples another one in each epoch, not the voted one alone

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 0, "min_words")
        check_at_least(self, max(self.min_words, 1), "max_words")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(
                f"RationaleConfig.min_agreement must be in [0, 1], got {self.min_agreement}"
            )


ALL_RATIONALES = RationaleConfig()


class Choice(NamedTuple):
    """The different rationales of an example to train on and, where there is none, why."""

    rationales: tuple[str, ...]
    reason: str | None = None  # one of `REASONS`


def choose_rationales(
    config: RationaleConfig,
    examples: Sequence[Example],
    outputs: Mapping[str, TeacherOutput],
    is_right: Callable[[str, str], bool],
) -> dict[str, Choice]:
    """Returns what to train on of a teacher's rationales, by the id of those examples that have any
    output.

    Args:
      config: which ones.
      examples: with their gold labels.
      outputs: the teacher's, by the example's id.
      is_right: whether a label counts as another; the dataset's metric.

    Raises:
      UserError: agreement or several samples are asked for, and nothing was asked several times.
    """
    found = [outputs[e.id] for e in examples if e.id in outputs]
    for name, wanted, there in (
        ("min_agreement", config.min_agreement > 0, any(o.agreement is not None for o in found)),
        ("several", config.several, any(o.samples for o in found)),
    ):
        if wanted and found and not there:
            raise UserError(
                f"RationaleConfig.{name} needs several samples an example, and {found[0].teacher} "
                "was asked once; `dss annotate --samples N --temperature T` asks again"
            )
    gold = {e.id: e.label for e in examples}
    return {o.id: _choose(config, o, gold[o.id], is_right) for o in found}


def _choose(
    config: RationaleConfig,
    output: TeacherOutput,
    gold: str | None,
    is_right: Callable[[str, str], bool],
) -> Choice:
    samples = output.samples if config.several and output.samples else (output,)
    label = gold if config.right_only else output.label
    judged = config.right_only or len(samples) > 1
    agreed = (output.agreement or 0.0) >= config.min_agreement

    def holds(sample: TeacherOutput) -> bool:
        return not judged or (label is not None and is_right(sample.label or "", label))

    def words(sample: TeacherOutput) -> int:
        return len(sample.rationale.split())

    tests: tuple[tuple[str, Callable[[TeacherOutput], bool]], ...] = (
        (NONE, lambda sample: sample.has_rationale),
        (DISPUTED, lambda sample: agreed),
        (WRONG, holds),
        (SHORT, lambda sample: words(sample) >= config.min_words),
        (LONG, lambda sample: config.max_words is None or words(sample) <= config.max_words),
    )
    for reason, passes in tests:
        samples = tuple(filter(passes, samples))
        if not samples:
            return Choice((), reason)
    return Choice(tuple(dict.fromkeys(sample.rationale for sample in samples)))
