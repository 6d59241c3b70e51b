"""Tasks and mixtures: which text a student reads, and which it learns to write.

    <dataset>_label_gold                  predict: x -> gold label
    <dataset>_label_<teacher>             predict: x -> the teacher's label
    <dataset>_rationale_<teacher>         explain: x -> rationale
    <dataset>_rationale_then_label_<teacher>  predict: x -> rationale, then gold label

    <dataset>_finetune                    standard finetuning: label_gold
    <dataset>_distill_<teacher>           standard distillation: label_<teacher>
    <dataset>_step_by_step_<teacher>      label_gold at rate alpha, rationale at 1 - alpha
    <dataset>_step_by_step_unlabeled_<teacher>  label_<teacher> at alpha, rationale at 1 - alpha
    <dataset>_single_target_<teacher>     rationale_then_label (Hsieh et al., 2023, section 4.4)

A task's name is also that of the mixture of it alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dss.data.examples import Example, TeacherOutput
from dss.data.labels import Labels
from dss.data.rationales import ALL_RATIONALES, NONE, Choice, RationaleConfig, choose_rationales
from dss.data.registry import Dataset, dataset_names, get_dataset
from dss.data.vocabulary import Vocabulary
from dss.errors import UserError, unknown_name

__all__ = [
    "CONCLUSION",
    "EXPLAIN",
    "PREDICT",
    "Mixture",
    "Task",
    "TaskRows",
    "TextRow",
    "extract_label",
    "extract_rationale",
    "get_mixture",
    "mixture_names",
    "with_teacher",
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
      dataset: its name.
      kind: what the target is.
      teacher: who wrote the rationale or, for a label, the label; None for the gold label.
      mark: where the views of an example have one input, and so the decoder is told the task: how
        many ids past the vocabulary the one lies that its output starts from; 0 for T5's own
        start.
    """

    dataset: str
    kind: Kind
    teacher: str | None
    mark: int = 0

    @property
    def name(self) -> str:
        """The task's name."""
        return f"{self.dataset}_{self.kind}_{self.teacher or 'gold'}"

    @property
    def prefix(self) -> str:
        """What stands before the input."""
        return EXPLAIN if self.kind == "rationale" and not self.mark else PREDICT

    def start_id(self, vocabulary: Vocabulary) -> int:
        """Returns the id that the decoder starts from; T5's sentinels lie past the vocabulary."""
        return vocabulary.size + self.mark - 1 if self.mark else 0

    def has(self, split: str) -> bool:
        """Returns whether the files that the task needs for a split are there."""
        return get_dataset(self.dataset).has(split, self.teacher)

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
        dataset = get_dataset(self.dataset)
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


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks over one dataset's examples, and their rates.

    Attributes:
      name: its name.
      tasks: the first one is the one that predicts.
      rates: what each task's mean loss weighs, or how often it is sampled; they sum to 1.
    """

    name: str
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]

    @property
    def dataset(self) -> Dataset:
        """The dataset of its tasks."""
        return get_dataset(self.tasks[0].dataset)

    @property
    def short_names(self) -> tuple[str, ...]:
        """The tasks' kinds, for naming metrics."""
        return tuple(task.kind for task in self.tasks)

    def start_ids(self, vocabulary: Vocabulary) -> tuple[int, ...] | None:
        """Returns what each task's outputs start from, where the views of an example have one
        input; None where each has its own.
        """
        if not any(task.mark for task in self.tasks):
            return None
        return tuple(task.start_id(vocabulary) for task in self.tasks)

    def available(self, split: str) -> "Mixture":
        """Returns the mixture of those tasks that have files for a split, at the same rates.

        A validation set without rationales still shows the label's loss.

        Raises:
          UserError: not one task has.
        """
        kept = [k for k, task in enumerate(self.tasks) if task.has(split)]
        if not kept:
            self.tasks[0].rows(split)  # says which file is missing
        tasks, rates = zip(*((self.tasks[k], self.rates[k]) for k in kept), strict=True)
        return Mixture(self.name, tasks, rates)


def _mixtures(dataset: Dataset, teachers: Sequence[str]) -> dict[str, tuple[Task, ...]]:
    def task(kind: Kind, teacher: str | None) -> Task:
        return Task(dataset.name, kind, teacher)

    gold = task("label", None)
    out: dict[str, tuple[Task, ...]] = {"finetune": (gold,), "label_gold": (gold,)}
    for teacher in teachers:
        label, rationale = task("label", teacher), task("rationale", teacher)
        single = task("rationale_then_label", teacher)
        out |= {
            f"distill_{teacher}": (label,),
            f"step_by_step_{teacher}": (gold, rationale),
            f"step_by_step_unlabeled_{teacher}": (label, rationale),
            f"single_target_{teacher}": (single,),
            f"label_{teacher}": (label,),
            f"rationale_{teacher}": (rationale,),
            f"rationale_then_label_{teacher}": (single,),
        }
    return {f"{dataset.name}_{name}": tasks for name, tasks in out.items()}


def _teachers(dataset: Dataset, name: str) -> Sequence[str]:
    """Returns the teachers that have files or, where none has, the one that a name implies.

    So a run predicts where its data are not, and training says which file is missing.
    """
    if dataset.source.teachers or name in _mixtures(dataset, []):
        return dataset.source.teachers
    forms = [form for form in _mixtures(dataset, [""]) if form.endswith("_")]
    fitting = [form for form in forms if name.startswith(form) and name != form]
    return [name.removeprefix(max(fitting, key=len))] if fitting else []


def mixture_names(dataset: str | None = None) -> list[str]:
    """Returns the names of all mixtures, or of one dataset's."""
    datasets = map(get_dataset, dataset_names() if dataset is None else [dataset])
    return [name for d in datasets for name in _mixtures(d, d.source.teachers)]


def with_teacher(name: str, teacher: str) -> str:
    """Returns the name of the same mixture with another teacher's outputs.

    Raises:
      UserError: the mixture has no teacher.
    """
    for task in get_mixture(name).tasks:
        if task.teacher is not None:
            return name.removesuffix(task.teacher) + teacher
    raise UserError(f"mixture {name!r} has no teacher that TEACHER {teacher!r} could replace")


def get_mixture(name: str, alpha: float = 0.5, *, one_input: bool = False) -> Mixture:
    """Returns the mixture of a name.

    Args:
      name: see above.
      alpha: rate of the label task in a mixture of two, in [0, 1].
      one_input: all tasks read `predict: x`, and the decoder is told which one it is.

    Raises:
      UserError: there is no such mixture, or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"ALPHA is {alpha}; it is the label task's rate, between 0 and 1")
    for dataset in map(get_dataset, dataset_names()):
        if name.startswith(f"{dataset.name}_"):
            tasks = _mixtures(dataset, _teachers(dataset, name)).get(name)
            if tasks:
                if one_input:
                    tasks = tuple(dataclasses.replace(t, mark=k) for k, t in enumerate(tasks))
                return Mixture(name, tasks, (1.0,) if len(tasks) == 1 else (alpha, 1 - alpha))
    raise unknown_name("mixture", name, mixture_names())
