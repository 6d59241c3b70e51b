"""What a vocabulary makes of labels and inputs: what it cannot write, and cannot tell apart."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from dss.data.metrics import is_readable
from dss.data.store import TokenStore
from dss.data.tasks import Mixture
from dss.data.vocabulary import UNK, Vocabulary, round_trip
from dss.errors import UserError

__all__ = ["check_distinct", "describe_labels", "describe_look_alikes"]

SHOWN = 3  # labels named in a line


def check_distinct(vocabulary: Vocabulary, labels: Sequence[str]) -> None:
    """Checks that a vocabulary tells all labels of a closed set apart.

    Raises:
      UserError: if two labels are the same tokens, so that no student could choose between them.
    """
    seen: dict[tuple[int, ...], str] = {}
    for label in labels:
        other = seen.setdefault(tuple(vocabulary.encode(label)), label)
        if other != label:
            raise UserError(
                f"labels {other!r} and {label!r} are the same tokens in this vocabulary, so no "
                "student can tell them apart; rename one, or use a vocabulary with their "
                "characters, such as that of mT5 or ByT5"
            )


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


def describe_labels(
    mixture: Mixture,
    vocabulary: Vocabulary,
    store: TokenStore,
    *,
    fraction: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Returns lines about labels that look alike, and about what of labels and inputs the
    vocabulary cannot write; often none.

    Args:
      mixture: the mixture that is trained on.
      vocabulary: the student's vocabulary.
      store: the mixture's training tokens.
      fraction: the part of the training examples that is used; see `Dataset.examples`.
      seed: the seed of the subsample.
    """
    lines = []
    examples = []
    if mixture.tasks[0].kind != "rationale":
        examples = mixture.dataset.examples("train", fraction=fraction, seed=seed)
    lines += describe_look_alikes(e.label for e in examples if e.label is not None)
    distinct = sorted({e.label.strip() for e in examples if e.label is not None})
    metric = mixture.dataset.metric
    unread = [label for label in distinct if not is_readable(metric, label)]
    if unread:
        shown = ", ".join(map(repr, unread[:SHOWN])) + (", ..." if len(unread) > SHOWN else "")
        lines.append(
            f"the metric {metric!r} cannot read {len(unread)} of {len(distinct)} different labels: "
            f"{shown}; each is right against the same text alone"
        )
    changed = [(a, b) for a in distinct if (b := round_trip(vocabulary, a)) != a]
    if changed:
        shown = ", ".join(f"{a!r} (written as {b!r})" for a, b in changed[:SHOWN])
        more = ", ..." if len(changed) > SHOWN else ""
        lines.append(
            f"the vocabulary cannot write {len(changed)} of {len(distinct)} different labels: "
            f"{shown}{more}; predictions are compared with what it writes"
        )
    inputs = [task.inputs.tokens for task in store.tasks]
    total = sum(map(len, inputs))
    unknown = sum(int(np.count_nonzero(tokens == UNK)) for tokens in inputs)
    if unknown:
        lines.append(
            f"the vocabulary has no token for {unknown:,} of {total:,} input tokens "
            f"({unknown / total:.2%}); characters such as {{ < ~ and those of most scripts "
            "are not in T5's"
        )
    return lines
