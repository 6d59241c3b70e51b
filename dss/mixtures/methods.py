"""Methods and mixtures: the tasks that a student is trained on, and the rate of each.

    <dataset>_finetune                          gold labels
    <dataset>_distill_<teacher>                 the teacher's labels
    <dataset>_step_by_step_<teacher>            gold labels at rate alpha, rationales at 1 - alpha
    <dataset>_step_by_step_unlabeled_<teacher>  the teacher's labels at rate alpha, and rationales
    <dataset>_single_target_<teacher>           rationale, then gold label, as one target

The name of a task is also the name of the mixture with that task only.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.data.vocabulary import Vocabulary
from dss.errors import DataError, unknown_name
from dss.mixtures.tasks import Kind, Task

__all__ = ["Method", "Mixture", "make_mixture", "mixture_names", "named_mixture", "read_name"]


class Method(enum.StrEnum):
    """A training method (Hsieh et al., 2023, sections 3 and 4.4)."""

    FINETUNE = "finetune"
    DISTILL = "distill"
    STEP_BY_STEP = "step_by_step"
    STEP_BY_STEP_UNLABELED = "step_by_step_unlabeled"
    SINGLE_TARGET = "single_target"
    RATIONALE = "rationale"

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Returns the method with a name.

        Raises:
          DataError: if there is no such method.
        """
        if name not in [*cls]:
            raise unknown_name("method", name, [method.value for method in cls], DataError)
        return cls(name)

    @property
    def display_name(self) -> str:
        """The name of the method for tables."""
        return TITLES[self]

    @property
    def needs_teacher(self) -> bool:
        """Whether a task uses a teacher's outputs."""
        return self is not Method.FINETUNE

    def tasks(self, dataset: Dataset, teacher: str | None) -> tuple[Task, ...]:
        """Returns the tasks of the method; the first one is used for prediction.

        Args:
          dataset: the dataset of the examples.
          teacher: the name of the teacher; None if the method needs none.
        """
        return tuple(
            Task(dataset, kind, teacher if by_teacher else None) for kind, by_teacher in TASKS[self]
        )


TITLES = {
    Method.FINETUNE: "finetuning",
    Method.DISTILL: "distillation",
    Method.STEP_BY_STEP: "step-by-step",
    Method.STEP_BY_STEP_UNLABELED: "step-by-step, unlabeled",
    Method.SINGLE_TARGET: "single target",
    Method.RATIONALE: "rationales only",
}
# The kind of each task, and whether it uses the teacher; a mixture has one teacher. A new method
# also needs a title, gin/methods/NAME.gin and a sentence in METHODS of dss/export/model_card.py.
TASKS: dict[Method, tuple[tuple[Kind, bool], ...]] = {
    Method.FINETUNE: (("label", False),),
    Method.DISTILL: (("label", True),),
    Method.STEP_BY_STEP: (("label", False), ("rationale", True)),
    Method.STEP_BY_STEP_UNLABELED: (("label", True), ("rationale", True)),
    Method.SINGLE_TARGET: (("rationale_then_label", True),),
    Method.RATIONALE: (("rationale", True),),
}
# The method of each mixture name without dataset and teacher; names of single tasks come last.
FORMS = {
    **{method.value: method for method in Method},
    "label_gold": Method.FINETUNE,
    "label": Method.DISTILL,
    "rationale_then_label": Method.SINGLE_TARGET,
}
WITHOUT_TEACHER = ("finetune", "label_gold")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The tasks of a method on one dataset, with their rates.

    Attributes:
      name: the name of the mixture.
      dataset: the dataset of all tasks.
      method: the method of the tasks.
      tasks: the tasks; the first one is used for prediction.
      rates: the weight of each task's mean loss, or its sampling rate; they sum to 1.
    """

    name: str
    dataset: Dataset
    method: Method
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]

    @property
    def short_names(self) -> tuple[str, ...]:
        """The kinds of the tasks, for the names of metrics."""
        return tuple(task.kind for task in self.tasks)

    @property
    def teacher(self) -> str | None:
        """The name of the teacher; None if no task uses one."""
        return next((task.teacher for task in self.tasks if task.teacher is not None), None)

    def start_ids(self, vocabulary: Vocabulary) -> tuple[int, ...] | None:
        """Returns the decoder's start id of each task if the tasks of an example share one input;
        None if each task has an input of its own.
        """
        if not any(task.mark for task in self.tasks):
            return None
        return tuple(task.start_id(vocabulary) for task in self.tasks)

    def available(self, split: str) -> "Mixture":
        """Returns the mixture with only the tasks that have files for a split, at the same rates.

        A validation split without rationales still has a label loss.

        Raises:
          DataError: if no task has files for the split.
        """
        kept = [k for k, task in enumerate(self.tasks) if task.has(split)]
        if not kept:
            self.tasks[0].rows(split)  # raises an error that names the missing file
        tasks, rates = zip(*((self.tasks[k], self.rates[k]) for k in kept), strict=True)
        return dataclasses.replace(self, tasks=tasks, rates=rates)


def make_mixture(
    dataset: Dataset,
    method: Method,
    teacher: str | None = None,
    alpha: float = 0.5,
    *,
    one_input: bool = False,
    name: str | None = None,
) -> Mixture:
    """Returns the mixture of a dataset, a method and a teacher.

    Args:
      dataset: the dataset of the examples.
      method: the method to train with.
      teacher: the name of the teacher; ignored if the method needs none.
      alpha: the rate of the label task in a mixture of two tasks, in [0, 1].
      one_input: whether all tasks share the input `predict: x`, and the decoder's start id selects
        the task.
      name: the name of the mixture; None for the name made of dataset, method and teacher.

    Raises:
      DataError: if alpha is out of range, or the method needs a teacher and none is given.
    """
    if not 0 <= alpha <= 1:
        raise DataError(f"ALPHA is {alpha}; the label task's rate must be between 0 and 1")
    if method.needs_teacher and teacher is None:
        known = ", ".join(dataset.source.teachers) or "none yet; `dss annotate` makes them"
        raise DataError(
            f"method {method.value!r} needs a teacher: give TEACHER; teachers with outputs for "
            f"{dataset.name!r}: {known}"
        )
    tasks = method.tasks(dataset, teacher)
    if one_input:
        tasks = tuple(dataclasses.replace(task, mark=k) for k, task in enumerate(tasks))
    rates = (1.0,) if len(tasks) == 1 else (alpha, 1 - alpha)
    parts = [dataset.name, method.value, *([teacher] if method.needs_teacher and teacher else [])]
    return Mixture(name or "_".join(parts), dataset, method, tasks, rates)


def read_name(rest: str, teachers: Sequence[str] = ()) -> tuple[Method, str | None] | None:
    """Returns the method and the teacher of a mixture's name; None if it names no method.

    >>> read_name("step_by_step_palm")
    (<Method.STEP_BY_STEP: 'step_by_step'>, 'palm')

    Args:
      rest: the name without the dataset's name at its start.
      teachers: the teachers with outputs. If empty, any teacher is accepted: prediction works
        without the data, and training names the missing file.

    Raises:
      DataError: if the name can be read with two teachers.
    """
    if rest in WITHOUT_TEACHER:
        return FORMS[rest], None
    matches = {
        form: rest.removeprefix(f"{form}_")
        for form in FORMS
        if form not in WITHOUT_TEACHER and rest.startswith(f"{form}_") and rest != f"{form}_"
    }
    if teachers:
        matches = {form: teacher for form, teacher in matches.items() if teacher in teachers}
        if len(matches) > 1:
            both = " or ".join(f"METHOD {FORMS[f]!s}, TEACHER {t}" for f, t in matches.items())
            raise DataError(f"mixture ..._{rest} may be {both}; give METHOD and TEACHER instead")
    if not matches:
        return None
    form = max(matches, key=len)
    return FORMS[form], matches[form]


def mixture_names(dataset: Dataset) -> list[str]:
    """Returns the names of all mixtures and tasks of a dataset."""
    names = [*WITHOUT_TEACHER]
    for teacher in dataset.source.teachers:
        names += [f"{form}_{teacher}" for form in FORMS if form not in WITHOUT_TEACHER]
    return [f"{dataset.name}_{name}" for name in names]


def named_mixture(
    name: str, datasets: Iterable[Dataset] = (), alpha: float = 0.5, *, one_input: bool = False
) -> Mixture:
    """Returns the mixture with a name.

    Args:
      name: the name of a mixture or task, in a form listed at the top of this module.
      datasets: the datasets to search before the released ones.
      alpha: the rate of the label task in a mixture of two tasks, in [0, 1].
      one_input: whether all tasks share one input, as for `make_mixture`.

    Raises:
      DataError: if there is no such mixture, its name can be read with two teachers, or alpha is
        out of range.
    """
    datasets = [*datasets]
    given = {dataset.name for dataset in datasets}
    datasets += [Dataset.released(released) for released in RELEASED if released not in given]
    for dataset in datasets:
        if name.startswith(f"{dataset.name}_"):
            parts = read_name(name.removeprefix(f"{dataset.name}_"), dataset.source.teachers)
            if parts is not None:
                return make_mixture(dataset, *parts, alpha, one_input=one_input, name=name)
    known = [mixture for dataset in datasets for mixture in mixture_names(dataset)]
    raise unknown_name("mixture", name, known, DataError)
