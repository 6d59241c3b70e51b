"""The labels of a dataset: how one is read, which there may be, and when one counts as another."""

import collections
import dataclasses
from collections.abc import Iterable

from dss.data.metrics import METRICS, is_readable
from dss.data.vocabulary import Vocabulary, round_trip
from dss.errors import UserError, unknown_name

__all__ = ["ANY_LABEL", "Labels", "describe_look_alikes", "read_label"]


def read_label(text: str | None) -> str | None:
    """Returns the label in a text: blanks around it are no part of it, and blanks alone are none.

    >>> read_label(" bug ")
    'bug'
    >>> read_label("  ") is None
    True
    """
    return (text or "").strip() or None


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the labels of a dataset may be, and when a prediction counts as one.

    Attributes:
      closed: the closed set, as `read_label` reads each; empty where any text may be a label.
      metric: decides whether a label counts as another; a name in `dss.data.metrics.METRICS`.
    """

    closed: tuple[str, ...] = ()
    metric: str = "text"

    def __post_init__(self):
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS)
        closed = tuple(label for text in self.closed if (label := read_label(text)))
        object.__setattr__(self, "closed", closed)

    def admit(self, label: str) -> bool:
        """Returns whether there may be such a label."""
        return not self.closed or label in self.closed

    def check(self, where: str, label: str) -> None:
        """Raises the user's error, with the place, where there may be no such label."""
        if not self.admit(label):
            near = [known for known in self.closed if known.casefold() == label.casefold()]
            hint = f"; {near[0]!r} is one: write it so" if near else ""
            raise UserError(f"{where}: label {label!r} is none of {', '.join(self.closed)}{hint}")

    def check_distinct(self, vocabulary: Vocabulary) -> None:
        """Checks that a vocabulary tells all labels of the closed set apart.

        Raises:
          UserError: if two labels are the same tokens, so that no student could choose between
            them.
        """
        seen: dict[tuple[int, ...], str] = {}
        for label in self.closed:
            other = seen.setdefault(tuple(vocabulary.encode(label)), label)
            if other != label:
                raise UserError(
                    f"labels {other!r} and {label!r} are the same tokens in this vocabulary, so no "
                    "student can tell them apart; rename one, or use a vocabulary with their "
                    "characters, such as that of mT5 or ByT5"
                )

    def is_readable(self, label: str) -> bool:
        """Returns whether the metric can judge a label by more than its text."""
        return is_readable(self.metric, label)

    def is_right(self, prediction: str, label: str, vocabulary: Vocabulary | None = None) -> bool:
        """Returns whether a predicted label counts as the given one.

        Args:
          prediction: the predicted label.
          label: the label that it is held against.
          vocabulary: of the student that predicted. What it makes of the label is right too, since
            the student can write nothing else.
        """
        equal = METRICS[self.metric]
        if equal(prediction, label):
            return True
        return vocabulary is not None and equal(prediction, round_trip(vocabulary, label))


ANY_LABEL = Labels()


def describe_look_alikes(labels: Iterable[str]) -> list[str]:
    """Returns a line for each group of labels that differ by case or blanks alone; often none.

    A student learns them as different labels, and an answer that has the other one's case is wrong.
    """
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for label in labels:
        groups[" ".join(label.casefold().split())][label] += 1
    return [
        "labels that differ by case or blanks alone: "
        + ", ".join(f"{label!r} ({count:,} rows)" for label, count in group.most_common())
        for group in groups.values()
        if len(group) > 1
    ]
