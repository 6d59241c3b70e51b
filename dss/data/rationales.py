"""Selects the teacher's rationales that a student trains on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dss.data.examples import Example, TeacherOutput
from dss.errors import ConfigError, DataError
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
    """Filters of the training split's rationales; by default all are trained on.

    An example whose rationale is left out still trains its label.
    """

    right_only: bool = False  # keep only rationales whose label is the gold one
    min_words: int = 0  # leave out shorter rationales
    max_words: int | None = None  # leave out longer rationales, without truncation; None: no limit
    min_agreement: float = 0.0  # least fraction of samples with the voted label, [0, 1]
    several: bool = False  # train on another sample in each epoch, not on the voted one alone

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 0, "min_words")
        check_at_least(self, max(self.min_words, 1), "max_words")
        if not 0 <= self.min_agreement <= 1:
            raise ConfigError(
                f"RationaleConfig.min_agreement must be in [0, 1], got {self.min_agreement}"
            )


ALL_RATIONALES = RationaleConfig()


class Choice(NamedTuple):
    """The distinct rationales of an example to train on, or the reason why there are none."""

    rationales: tuple[str, ...]
    reason: str | None = None  # one of `REASONS`


def choose_rationales(
    config: RationaleConfig,
    examples: Sequence[Example],
    outputs: Mapping[str, TeacherOutput],
    is_right: Callable[[str, str], bool],
) -> dict[str, Choice]:
    """Returns the rationales to train on, by id of the examples that have an output.

    Args:
      config: the filters.
      examples: the examples, with their gold labels.
      outputs: the teacher's outputs by example id.
      is_right: the dataset's comparison of a label with a gold label.

    Raises:
      DataError: if the filters need several samples and no example has them.
    """
    existing = [outputs[e.id] for e in examples if e.id in outputs]
    has_votes = any(o.agreement is not None for o in existing)
    for name, needed, available in (
        ("min_agreement", config.min_agreement > 0, has_votes),
        ("several", config.several, any(o.samples for o in existing)),
    ):
        if needed and existing and not available:
            raise DataError(
                f"RationaleConfig.{name} needs several samples per example, but teacher "
                f"{existing[0].teacher} was sampled once; annotate with several samples "
                "at a temperature above 0"
            )
    gold = {e.id: e.label for e in examples}
    return {o.id: _choose(config, o, gold[o.id], is_right) for o in existing}


def _choose(
    config: RationaleConfig,
    output: TeacherOutput,
    gold: str | None,
    is_right: Callable[[str, str], bool],
) -> Choice:
    samples = output.samples if config.several and output.samples else (output,)
    label = gold if config.right_only else output.label
    checks_label = config.right_only or len(samples) > 1
    agreed = (output.agreement or 0.0) >= config.min_agreement

    def has_right_label(sample: TeacherOutput) -> bool:
        return not checks_label or (label is not None and is_right(sample.label or "", label))

    def words(sample: TeacherOutput) -> int:
        return len(sample.rationale.split())

    tests: tuple[tuple[str, Callable[[TeacherOutput], bool]], ...] = (
        (NONE, lambda sample: sample.has_rationale),
        (DISPUTED, lambda sample: agreed),
        (WRONG, has_right_label),
        (SHORT, lambda sample: words(sample) >= config.min_words),
        (LONG, lambda sample: config.max_words is None or words(sample) <= config.max_words),
    )
    for reason, passes in tests:
        samples = tuple(filter(passes, samples))
        if not samples:
            return Choice((), reason)
    return Choice(tuple(dict.fromkeys(sample.rationale for sample in samples)))
