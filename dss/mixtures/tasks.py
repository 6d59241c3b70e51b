"""Tasks: the input and target text of each example.

<dataset>_label_gold                      predict: x -> gold label
<dataset>_label_<teacher>                 predict: x -> the teacher's label
<dataset>_rationale_<teacher>             explain: x -> rationale
<dataset>_rationale_then_label_<teacher>  predict: x -> rationale, then gold label
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dss.data.datasets import Dataset
from dss.data.examples import Example, TeacherOutput
from dss.data.labels import Labels
from dss.data.rationales import ALL_RATIONALES, NONE, Choice, RationaleConfig, choose_rationales
from dss.data.vocabulary import Vocabulary

__all__ = [
    "CONCLUSION",
    "EXPLAIN",
    "PREDICT",
    "Kind",
    "Task",
    "TaskRows",
    "TextRow",
    "extract_label",
    "extract_rationale",
]

Kind = Literal["label", "rationale", "rationale_then_label"]
PREDICT, EXPLAIN = "predict: ", "explain: "
CONCLUSION = "So the answer is"  # separates a rationale from its label
# Reasons to skip an example, besides the statuses of outputs and the reasons of rationales.
NO_LABEL, OUTSIDE = "no label", "label outside the set"
EMPTY_INPUT, MISSING = "empty input", "missing"


@dataclasses.dataclass(frozen=True)
class TextRow:
    """The input and target text of an example in one task."""

    id: str
    inputs: str
    targets: str


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The rows of a split in one task.

    Attributes:
      rows: the rows to train on or to score.
      left_out: the reason for each example without a row, by its id; see `dss.mixtures.ledger`.
    """

    rows: list[TextRow]
    left_out: dict[str, str]


def extract_rationale(text: str) -> str:
    """Returns the rationale of a text, without a label at its end.

    >>> extract_rationale("Beavers build with wood. So the answer is wooded area")
    'Beavers build with wood.'
    """
    before, conclusion, after = text.rpartition(CONCLUSION)
    return (before if conclusion else after).strip()


def extract_label(text: str) -> str:
    """Returns the label at the end of a rationale, or the whole text if there is no rationale.

    >>> extract_label("Beavers build with wood. So the answer is wooded area")
    'wooded area'
    """
    return text.rpartition(CONCLUSION)[2].strip()


@dataclasses.dataclass(frozen=True)
class Task:
    """An input prefix and a kind of target for the examples of a dataset.

    Attributes:
      dataset: the dataset of the examples.
      kind: the kind of the target.
      teacher: the teacher whose label (of a label task) or rationale is the target; None for gold
        labels.
      mark: the number of the decoder's start id past the vocabulary, from 1, if all tasks of an
        example share one input; 0 for T5's start id.
    """

    dataset: Dataset
    kind: Kind
    teacher: str | None
    mark: int = 0

    @property
    def name(self) -> str:
        """The name of the task."""
        return f"{self.dataset.name}_{self.kind}_{self.teacher or 'gold'}"

    @property
    def prefix(self) -> str:
        """The prefix of the input."""
        return EXPLAIN if self.kind == "rationale" and not self.mark else PREDICT

    def start_id(self, vocabulary: Vocabulary) -> int:
        """Returns the decoder's start id; past the vocabulary are ids for T5's sentinels."""
        return vocabulary.size + self.mark - 1 if self.mark else 0

    def has(self, split: str) -> bool:
        """Returns whether the files of the task for a split exist."""
        return self.dataset.has(split, self.teacher)

    def rows(self, split: str, **options: Any) -> list[TextRow]:
        """Returns the rows of a split; `options` are keyword arguments of `read`."""
        return self.read(split, **options).rows

    def read(
        self,
        split: str,
        *,
        fraction: float = 1.0,
        seed: int = 0,
        keep_unparsed: bool = False,
        rationales: RationaleConfig = ALL_RATIONALES,
    ) -> TaskRows:
        """Returns the task's rows of a split, in the order of the examples, and the reason for each
        example without a row.

        An example has one row, or one for each of several rationales; these are adjacent.

        Args:
          split: "train", "valid" or "test".
          fraction: the fraction of the training examples, in (0, 1].
          seed: the seed of the subsample.
          keep_unparsed: whether to keep rows whose target could not be parsed from the teacher's
            text, with the empty text that parsing left, as the reference implementation does.
          rationales: the selection of rationales in the training split; other splits use the
            (voted) rationale of each output.

        Raises:
          DataError: if a file is missing or malformed, or `rationales` needs samples that the
            teacher's outputs do not have.
        """
        dataset = self.dataset
        examples = dataset.examples(split, fraction=fraction, seed=seed)
        outputs = dataset.outputs(split, self.teacher) if self.teacher else {}
        chosen: Mapping[str, Choice] = {}
        if self.teacher and self.kind != "label":
            config = rationales if split == "train" else ALL_RATIONALES
            chosen = choose_rationales(config, examples, outputs, dataset.labels.is_right)
        rows, left_out = [], {}
        for example in examples:
            if not example.input.strip():
                left_out[example.id] = EMPTY_INPUT
                continue
            targets, reason = self._targets(
                example, outputs.get(example.id), chosen.get(example.id), dataset.labels
            )
            if keep_unparsed and reason and example.label is not None:
                targets = self._kept_unparsed(example.label, outputs.get(example.id)) or targets
            if targets:
                text = self.prefix + example.input
                rows += [TextRow(example.id, text, target) for target in targets]
            else:
                assert reason is not None
                left_out[example.id] = reason
        return TaskRows(rows, left_out)

    def _targets(
        self,
        example: Example,
        output: TeacherOutput | None,
        choice: Choice | None,
        labels: Labels,
    ) -> tuple[tuple[str, ...], str | None]:
        """Returns the targets of an example or, if it has none, the reason."""
        if self.kind == "rationale_then_label" and example.label is None:
            return (), NO_LABEL
        if self.teacher is None:
            return ((), NO_LABEL) if example.label is None else ((example.label,), None)
        if output is None:
            return (), MISSING
        if self.kind == "label":
            if not output.has_label:
                return (), output.status if output.status != "ok" else NO_LABEL
            assert output.label is not None
            if not labels.admit(output.label):
                return (), OUTSIDE
            return (output.label,), None
        assert choice is not None
        if not choice.rationales:
            failed = choice.reason == NONE and output.status != "ok"
            return (), output.status if failed else choice.reason
        return self._with_label(choice.rationales, example.label), None

    def _kept_unparsed(self, gold: str, output: TeacherOutput | None) -> tuple[str, ...]:
        if output is None or output.status == "stale":
            return ()
        if self.kind == "label":
            return (output.label or "",)
        return () if output.has_rationale else self._with_label((output.rationale,), gold)

    def _with_label(self, rationales: tuple[str, ...], gold: str | None) -> tuple[str, ...]:
        if self.kind == "rationale":
            return rationales
        return tuple(f"{rationale} {CONCLUSION} {gold}" for rationale in rationales)
