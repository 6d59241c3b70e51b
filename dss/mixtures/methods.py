"""Methods and mixtures: the tasks that a student learns, and the rate of each.

    <dataset>_finetune                          gold labels
    <dataset>_distill_<teacher>                 the teacher's labels
    <dataset>_step_by_step_<teacher>            gold labels at rate alpha, rationales at 1 - alpha
    <dataset>_step_by_step_unlabeled_<teacher>  the teacher's labels at rate alpha, and rationales
    <dataset>_single_target_<teacher>           rationale, then gold label, as one target

The name of a task is the name of the mixture of that task alone, too.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.data.vocabulary import Vocabulary
from dss.errors import UserError, unknown_name
from dss.mixtures.tasks import Kind, Task

__all__ = ["Method", "Mixture", "make_mixture", "mixture_names", "named_mixture", "read_name"]


class Method(enum.StrEnum):
    """A way to train a student (Hsieh et al., 2023, sections 3 and 4.4)."""

    FINETUNE = "finetune"
    DISTILL = "distill"
    STEP_BY_STEP = "step_by_step"
    STEP_BY_STEP_UNLABELED = "step_by_step_unlabeled"
    SINGLE_TARGET = "single_target"
    RATIONALE = "rationale"

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Returns the method of a name.

        Raises:
          UserError: if there is no such method.
        """
        if name not in [*cls]:
            raise unknown_name("method", name, [method.value for method in cls])
        return cls(name)

    @property
    def display_name(self) -> str:
        """The method in words, for tables."""
        return TITLES[self]

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the tasks reads a teacher's outputs."""
        return self is not Method.FINETUNE

    def tasks(self, dataset: Dataset, teacher: str | None) -> tuple[Task, ...]:
        """Returns the tasks that a student learns; it predicts with the first.

        Args:
          dataset: the dataset of the examples.
          teacher: the name of the teacher; None where the method needs none.
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
TASKS: dict[Method, tuple[tuple[Kind, bool], ...]] = {  # kind, and whether it reads a teacher
    Method.FINETUNE: (("label", False),),
    Method.DISTILL: (("label", True),),
    Method.STEP_BY_STEP: (("label", False), ("rationale", True)),
    Method.STEP_BY_STEP_UNLABELED: (("label", True), ("rationale", True)),
    Method.SINGLE_TARGET: (("rationale_then_label", True),),
    Method.RATIONALE: (("rationale", True),),
}
# Names of mixtures, without dataset and teacher; those of single tasks come last.
FORMS = {
    **{method.value: method for method in Method},
    "label_gold": Method.FINETUNE,
    "label": Method.DISTILL,
    "rationale_then_label": Method.SINGLE_TARGET,
}
WITHOUT_TEACHER = ("finetune", "label_gold")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks over the examples of one dataset, and their rates.

    Attributes:
      name: the name of the mixture.
      dataset: the dataset of all tasks.
      method: the method that the tasks make up.
      tasks: the tasks; the first one predicts.
      rates: the weight of each task's mean loss, or its sampling rate; they sum to 1.
    """

    name: str
    dataset: Dataset
    method: Method
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]

    @property
    def short_names(self) -> tuple[str, ...]:
        """The kinds of the tasks, for naming metrics."""
        return tuple(task.kind for task in self.tasks)

    @property
    def teacher(self) -> str | None:
        """The name of the teacher; None where no task reads one."""
        return next((task.teacher for task in self.tasks if task.teacher is not None), None)

    def start_ids(self, vocabulary: Vocabulary) -> tuple[int, ...] | None:
        """Returns the decoder's start id of each task where all views of an example share one
        input; None where each view has its own.
        """
        if not any(task.mark for task in self.tasks):
            return None
        return tuple(task.start_id(vocabulary) for task in self.tasks)

    def available(self, split: str) -> "Mixture":
        """Returns the mixture of those tasks that have files for a split, at the same rates.

        A validation split without rationales still has the label's loss.

        Raises:
          UserError: if no task has.
        """
        kept = [k for k, task in enumerate(self.tasks) if task.has(split)]
        if not kept:
            self.tasks[0].rows(split)  # raises, with the missing file
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
      teacher: the name of the teacher; it is ignored where the method needs none.
      alpha: the rate of the label task in a mixture of two, in [0, 1].
      one_input: whether all tasks share the input `predict: x`, and the decoder's start id selects
        the task.
      name: the name of the mixture; None for the one made of dataset, method and teacher.

    Raises:
      UserError: if alpha is out of range, or the method needs a teacher and none is given.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"ALPHA is {alpha}; it is the label task's rate, between 0 and 1")
    if method.needs_teacher and teacher is None:
        known = ", ".join(dataset.source.teachers) or "none yet; `dss annotate` makes them"
        raise UserError(
            f"method {method.value!r} needs a teacher: give TEACHER; those with outputs for "
            f"{dataset.name!r}: {known}"
        )
    tasks = method.tasks(dataset, teacher)
    if one_input:
        tasks = tuple(dataclasses.replace(task, mark=k) for k, task in enumerate(tasks))
    rates = (1.0,) if len(tasks) == 1 else (alpha, 1 - alpha)
    parts = [dataset.name, method.value, *([teacher] if method.needs_teacher and teacher else [])]
    return Mixture(name or "_".join(parts), dataset, method, tasks, rates)


def read_name(rest: str, teachers: Sequence[str] = ()) -> tuple[Method, str | None] | None:
    """Returns the method and the teacher in a mixture's name; None if there is no method.

    >>> read_name("step_by_step_palm")
    (<Method.STEP_BY_STEP: 'step_by_step'>, 'palm')

    Args:
      rest: the name without the dataset's at its front.
      teachers: the teachers that have outputs. Where there are none, any teacher is taken, so that
        a student predicts where its data are not, and training names the missing file.

    Raises:
      UserError: if two teachers fit.
    """
    if rest in WITHOUT_TEACHER:
        return FORMS[rest], None
    found = {
        form: rest.removeprefix(f"{form}_")
        for form in FORMS
        if form not in WITHOUT_TEACHER and rest.startswith(f"{form}_") and rest != f"{form}_"
    }
    if teachers:
        found = {form: teacher for form, teacher in found.items() if teacher in teachers}
        if len(found) > 1:
            both = " or ".join(f"METHOD {FORMS[f]!s}, TEACHER {t}" for f, t in found.items())
            raise UserError(f"mixture ..._{rest} may be {both}; give these in its place")
    if not found:
        return None
    form = max(found, key=len)
    return FORMS[form], found[form]


def mixture_names(dataset: Dataset) -> list[str]:
    """Returns the names of all mixtures and tasks of a dataset."""
    names = [*WITHOUT_TEACHER]
    for teacher in dataset.source.teachers:
        names += [f"{form}_{teacher}" for form in FORMS if form not in WITHOUT_TEACHER]
    return [f"{dataset.name}_{name}" for name in names]


def named_mixture(
    name: str, datasets: Iterable[Dataset] = (), alpha: float = 0.5, *, one_input: bool = False
) -> Mixture:
    """Returns the mixture of a name.

    Args:
      name: the name, as this module lists them; that of a task is accepted.
      datasets: the datasets that it may be of, besides the released ones; these come first.
      alpha: see `make_mixture`.
      one_input: see `make_mixture`.

    Raises:
      UserError: if there is no such mixture, two teachers fit, or alpha is out of range.
    """
    datasets = [*datasets]
    own = {dataset.name for dataset in datasets}
    datasets += [Dataset.released(released) for released in RELEASED if released not in own]
    for dataset in datasets:
        if name.startswith(f"{dataset.name}_"):
            found = read_name(name.removeprefix(f"{dataset.name}_"), dataset.source.teachers)
            if found is not None:
                return make_mixture(dataset, *found, alpha, one_input=one_input, name=name)
    known = [mixture for dataset in datasets for mixture in mixture_names(dataset)]
    raise unknown_name("mixture", name, known)
