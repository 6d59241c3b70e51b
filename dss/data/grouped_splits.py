"""Splits of a table: labels are as frequent in each, and similar inputs stay together."""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dss.errors import missing_package

__all__ = ["SIMILAR", "SPLITS", "draw_splits", "group_similar"]

SPLITS = ("train", "valid", "test")
SIMILAR = 0.85  # Jaccard similarity of shingles from which two inputs are near-duplicates
MOST_SIMILAR = 0.95  # threshold of the index; above, candidates are compared exactly
SHINGLE = 5  # characters
PERMUTATIONS = 64  # of MinHash (Broder, 1997)


def _normal(text: str) -> str:
    return " ".join(re.sub(r"\W+", " ", text.casefold()).split())


def group_similar(inputs: Sequence[str], similar: float) -> tuple[list[int], int]:
    """Returns the group of equal and similar inputs of each row, and how many rows are similar to
    another row without being equal to it.

    Equal apart from case and punctuation is equal. Similarity is that of Jaccard, of the texts'
    pieces of 5 characters, found by MinHash (Broder, 1997): a few similar texts may be missed.

    Args:
      inputs: the input of each row; those without text are in no one's group.
      similar: similarity from which two inputs are in one group, in (0, 1]; 1 for equal ones.

    Raises:
      MissingPackageError: if datasketch is not installed.
    """
    normal = [_normal(text) or " ".join(text.split()) for text in inputs]
    distinct = {text: number for number, text in enumerate(dict.fromkeys(t for t in normal if t))}
    group = list(range(len(distinct)))
    if similar < 1:
        for number, other in _similar_pairs([*distinct], similar):
            group[number] = other
    # Rows without text are alone.
    groups = [group[distinct[text]] if text else -1 - row for row, text in enumerate(normal)]
    members: dict[int, set[str]] = collections.defaultdict(set)
    for member, text in zip(groups, inputs, strict=True):
        members[member].add(text)
    return groups, sum(len(members[member]) > 1 for member in groups)


def _similar_pairs(texts: Sequence[str], similar: float) -> Iterator[tuple[int, int]]:
    """Yields the index of each text that is similar to an earlier one, and the index of that.

    Texts are compared with those that are similar to no earlier one, so groups are no chains.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise missing_package("finding near-duplicates", error.name, "tables") from None
    index = MinHashLSH(threshold=min(similar, MOST_SIMILAR), num_perm=PERMUTATIONS)
    shingles = [
        {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in texts
    ]
    for number, parts in enumerate(shingles):
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([part.encode() for part in parts])
        for other in index.query(signature):
            if len(parts & shingles[other]) >= similar * len(parts | shingles[other]):
                yield number, other
                break
        else:
            index.insert(number, signature)


def draw_splits(
    groups: Sequence[int],
    labels: Sequence[str | None],
    shares: Mapping[str, float],
    seed: int,
    label_column: str | None,
) -> list[str]:
    """Returns the split of each row: each label has the given shares, up to whole groups.

    Args:
      groups: the group of each row, which stays in one split.
      labels: the label of each row.
      shares: the fraction of the rows of "valid" and "test".
      seed: the seed of the draw.
      label_column: the column of the labels; with one, rows without a label go to "train".
    """
    rows_of: dict[int, list[int]] = collections.defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[group].append(row)
    strata: dict[str, list[list[int]]] = collections.defaultdict(list)
    out = ["train"] * len(groups)
    for rows in rows_of.values():
        found = collections.Counter(label for row in rows if (label := labels[row]) is not None)
        if found or label_column is None:
            strata[found.most_common(1)[0][0] if found else ""].append(rows)
    targets = {"train": 1 - sum(shares.values()), **shares}
    rng = np.random.default_rng(seed)
    for _, members in sorted(strata.items()):
        total, sizes = sum(map(len, members)), collections.Counter[str]()
        order = rng.permutation(len(members))
        for i in sorted(order, key=lambda i: -len(members[i])):  # large groups first: they fit
            split = max(targets, key=lambda s: targets[s] * total - sizes[s])
            sizes[split] += len(members[i])
            for row in members[i]:
                out[row] = split
    return out
