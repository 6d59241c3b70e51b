"""The labels of a dataset: normalisation, the closed set, and comparison with predictions."""

import collections
import dataclasses
from collections.abc import Iterable

from dss.data.metrics import METRICS, is_readable
from dss.data.vocabulary import Vocabulary, round_trip
from dss.errors import DataError, unknown_name

__all__ = ["ANY_LABEL", "Labels", "describe_look_alikes", "fold", "read_label"]


def read_label(text: str | None) -> str | None:
    """Returns a label without surrounding whitespace; None if it is blank.

    >>> read_label(" bug ")
    'bug'
    >>> read_label("  ") is None
    True
    """
    return (text or "").strip() or None


@dataclasses.dataclass(frozen=True)
class Labels:
    """The allowed labels of a dataset, and the metric that compares predictions with them.

    Attributes:
      closed: the closed set, each label as `read_label` returns it; empty if any text is allowed.
      metric: the name of the metric, a key of `dss.data.metrics.METRICS`.
    """

    closed: tuple[str, ...] = ()
    metric: str = "text"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS, DataError)
        closed = tuple(label for text in self.closed if (label := read_label(text)))
        object.__setattr__(self, "closed", closed)

    def admit(self, label: str) -> bool:
        """Returns whether a label is allowed."""
        return not self.closed or label in self.closed

    def check(self, where: str, label: str) -> None:
        """Checks that a label is allowed.

        Args:
          where: the file and line, for messages.
          label: the label.

        Raises:
          DataError: if the label is outside the closed set.
        """
        if not self.admit(label):
            near = [known for known in self.closed if known.casefold() == label.casefold()]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{where}: label {label!r} is not one of {', '.join(self.closed)}{hint}"
            )

    def check_distinct(self, vocabulary: Vocabulary) -> None:
        """Checks that the labels of the closed set have different tokens.

        Raises:
          DataError: if two labels have the same tokens, so that a student cannot distinguish them.
        """
        seen: dict[tuple[int, ...], str] = {}
        for label in self.closed:
            other = seen.setdefault(tuple(vocabulary.encode(label)), label)
            if other != label:
                raise DataError(
                    f"labels {other!r} and {label!r} have the same tokens in this vocabulary, so a "
                    "student cannot distinguish them; rename one, or use a vocabulary with their "
                    "characters, such as mT5's or ByT5's"
                )

    def is_readable(self, label: str) -> bool:
        """Returns whether the metric can parse a label; see `dss.data.metrics.is_readable`."""
        return is_readable(self.metric, label)

    def is_right(self, prediction: str, label: str, vocabulary: Vocabulary | None = None) -> bool:
        """Returns whether a predicted label is correct.

        Args:
          prediction: the predicted label.
          label: the label that it is compared with.
          vocabulary: the student's vocabulary. A prediction of the label as the vocabulary decodes
            it is correct too, since the student cannot write anything else.
        """
        equal = METRICS[self.metric]
        if equal(prediction, label):
            return True
        return vocabulary is not None and equal(prediction, round_trip(vocabulary, label))


ANY_LABEL = Labels()


def fold(label: str) -> str:
    """Returns a label in lower case with single blanks; look-alikes have equal ones.

    >>> fold("Account  Access ")
    'account access'
    """
    return " ".join(label.casefold().split())


def describe_look_alikes(labels: Iterable[str]) -> list[str]:
    """Returns a line for each group of labels that differ only by case or whitespace.

    A student learns them as different labels, and a prediction in the other's case is wrong.
    """
    groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for label in labels:
        groups[fold(label)][label] += 1
    return [
        "labels that differ only by case or whitespace: "
        + ", ".join(f"{label!r} ({count:,} rows)" for label, count in group.most_common())
        for group in groups.values()
        if len(group) > 1
    ]
