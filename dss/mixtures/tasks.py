"""Tasks: the text that a student reads, and the text that it learns to write.

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
CONCLUSION = "So the answer is"  # stands between a rationale and its label
# Why an example has no row, beside the statuses of outputs and the reasons of rationales.
NO_LABEL, OUTSIDE = "no label", "label outside the set"
EMPTY_INPUT, MISSING = "empty input", "missing"


@dataclasses.dataclass(frozen=True)
class TextRow:
    """An example as one task sees it."""

    id: str
    inputs: str
    targets: str


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """What a task reads of a split.

    Attributes:
      rows: the rows that train, or are scored.
      left_out: why an example has none, by its id: see `dss.mixtures.ledger`.
    """

    rows: list[TextRow]
    left_out: dict[str, str]


def extract_rationale(text: str) -> str:
    """Returns the rationale in a text that ends with a label; all of the text if it does not.

    >>> extract_rationale("Beavers build with wood. So the answer is wooded area")
    'Beavers build with wood.'
    """
    before, conclusion, after = text.rpartition(CONCLUSION)
    return (before if conclusion else after).strip()


def extract_label(text: str) -> str:
    """Returns the label in a rationale that ends with it; all of the text if it does not.

    >>> extract_label("Beavers build with wood. So the answer is wooded area")
    'wooded area'
    """
    return text.rpartition(CONCLUSION)[2].strip()


@dataclasses.dataclass(frozen=True)
class Task:
    """One view of a dataset's examples.

    Attributes:
      dataset: the dataset of the examples.
      kind: the kind of the target.
      teacher: the name of the teacher that wrote the rationale or, for a label, the label; None for
        the gold label.
      mark: the distance past the vocabulary of the id that the decoder starts from, where all views
        of an example share one input; 0 for T5's own start id.
    """

    dataset: Dataset
    kind: Kind
    teacher: str | None
    mark: int = 0

    @property
    def name(self) -> str:
        """The task's name."""
        return f"{self.dataset.name}_{self.kind}_{self.teacher or 'gold'}"

    @property
    def prefix(self) -> str:
        """What stands before the input."""
        return EXPLAIN if self.kind == "rationale" and not self.mark else PREDICT

    def start_id(self, vocabulary: Vocabulary) -> int:
        """Returns the id that the decoder starts from; T5's sentinels lie past the vocabulary."""
        return vocabulary.size + self.mark - 1 if self.mark else 0

    def has(self, split: str) -> bool:
        """Returns whether the files that the task needs for a split are there."""
        return self.dataset.has(split, self.teacher)

    def rows(self, split: str, **options: Any) -> list[TextRow]:
        """Returns the rows of `read`, whose arguments it takes."""
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
        """Returns the task's rows of a split, in the order of the examples, and what is left out.

        An example has at most one, but for several rationales, which follow each other.

        Args:
          split: "train", "valid" or "test".
          fraction: see `Dataset.examples`.
          seed: see `Dataset.examples`.
          keep_unparsed: also the rows whose target the teacher's text did not give, with the blank
            that parsing left, as the reference trains on them.
          rationales: which ones of the training split; other splits have the teacher's own choice.

        Raises:
          UserError: see `Dataset.examples` and `choose_rationales`.
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
        """Returns what an example is to be answered with and, where with nothing, why."""
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
            unread = choice.reason == NONE and output.status != "ok"
            return (), output.status if unread else choice.reason
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
