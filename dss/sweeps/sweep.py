"""The runs of a sweep: methods x students x fractions of the training examples x seeds.

Every run has a run directory in the sweep's MODEL_DIR, written by `dss train` and `dss eval`. Runs
with the same fraction and seed have the same examples; with the same seed, the examples of a
smaller fraction are a subset of those of a larger one.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from etils import epath

import gin
from dss.config.data import open_dataset, open_mixture, resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_flags, parse_beside, parse_gin
from dss.data.datasets import SPLITS
from dss.errors import ConfigError, DssError, unknown_name
from dss.evaluation.evaluator import evaluation_set
from dss.fields import check_types
from dss.mixtures.methods import Method, mixture_names, read_name
from dss.paths import CONFIG_FILE, gin_root
from dss.runs.data import training_store
from dss.runs.directory import load_run, run_folder
from dss.runs.resume import check_same
from dss.runs.start import describe_initial

__all__ = ["Student", "Sweep", "SweepConfig", "SweepMethod", "SweepRun", "plan_sweep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The configuration of a sweep, set by gin; see gin/runs/sweep.gin."""

    methods: tuple[str, ...] = ()  # methods in the syntax of `SweepMethod.parse`
    students: tuple[str, ...] = ()  # students in the syntax of `Student.parse`
    fractions: tuple[float, ...] = (1.0,)  # fractions of the training examples, in (0, 1]
    seeds: tuple[int, ...] = (0,)  # seeds of parameters, order, subsample and dropout
    split: str = "test"  # the evaluation split of every run

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("methods", "students", "fractions", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name.upper()} is empty; see runs/sweep.gin for examples")
            repeated = [value for i, value in enumerate(values) if value in values[:i]]
            if repeated:
                raise ConfigError(f"{name.upper()} has {repeated[0]!r} twice")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(f"FRACTIONS must be in (0, 1], got {fraction}")
        if min(self.seeds) < 0:
            raise ConfigError(f"SEEDS must be at least 0, got {min(self.seeds)}")
        if self.split not in SPLITS:
            raise ConfigError(f"SPLIT must be one of {', '.join(SPLITS)}, got {self.split!r}")


gin.external_configurable(SweepConfig, "SweepConfig")


def _file_name(text: str) -> str:
    """Returns a text with all characters replaced that are unsafe in a folder's name."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("_.-")


@dataclasses.dataclass(frozen=True)
class SweepMethod:
    """A training method of a sweep.

    Attributes:
      name: the name in folders and tables.
      method: the name of a method, optionally followed by a teacher's; None if a gin file sets the
        method.
      files: gin files to read after those of the sweep.
      steps: the factor of TRAIN_STEPS.
      compute: another method, whose total number of input and target tokens is matched.
    """

    name: str
    method: str | None
    files: tuple[str, ...] = ()
    steps: float = 1.0
    compute: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SweepMethod":
        """Parses a method: a method's name and gin files joined by `+`, optionally `*STEPS`.

        STEPS is a factor of TRAIN_STEPS, or the name of a method whose compute is matched.

        >>> SweepMethod.parse("finetune*3.5")
        SweepMethod(name='finetune_x3.5', method='finetune', files=(), steps=3.5, compute=None)
        >>> SweepMethod.parse("finetune*step_by_step").name
        'finetune_as_step_by_step'
        >>> SweepMethod.parse("step_by_step+mine/long.gin").name
        'step_by_step_long'

        Raises:
          DssError: if the syntax is wrong.
        """
        parts, star, factor = text.partition("*")
        files = tuple(part for part in parts.split("+") if part.endswith(".gin"))
        methods = [part for part in parts.split("+") if not part.endswith(".gin")]
        compute = factor if re.fullmatch(r"(?!nan|inf)[A-Za-z]\w*", factor, re.ASCII) else None
        try:
            steps = float(factor) if star and not compute else 1.0
        except ValueError:
            steps = math.nan
        if len(methods) > 1 or not all([*methods, *files]) or not 0 < steps < math.inf:
            raise DssError(
                f"method {text!r}: give a method's name, optionally with +FILE.gin and *STEPS, "
                "such as 'step_by_step', 'step_by_step+mine.gin', 'finetune*3.5' or "
                "'finetune*step_by_step'"
            )
        names = [*methods, *(epath.Path(file).stem for file in files)]
        longer = f"_as_{compute}" if compute else f"_x{factor}" if star else ""
        name = _file_name("_".join(names)) + longer
        return cls(name, methods[0] if methods else None, files, steps, compute)


@dataclasses.dataclass(frozen=True)
class Student:
    """A student of a sweep.

    Attributes:
      name: the name in folders and tables.
      file: the gin file of a randomly initialised student; None with a checkpoint.
      checkpoint: the initial checkpoint; None with a gin file.
    """

    name: str
    file: str | None
    checkpoint: str | None

    @classmethod
    def parse(cls, text: str) -> "Student":
        """Parses a student: a name in students/, a gin file or a checkpoint.

        >>> Student.parse("small")
        Student(name='small', file='students/small.gin', checkpoint=None)
        >>> Student.parse("hf:google/t5-v1_1-base")
        Student(name='t5-v1_1-base', file=None, checkpoint='hf:google/t5-v1_1-base')
        """
        if text.endswith(".gin"):
            return cls(_file_name(epath.Path(text).stem), text, None)
        if "/" in text or ":" in text:
            return cls(_file_name(re.split("[/:]", text.rstrip("/"))[-1]), None, text)
        return cls(_file_name(text), f"students/{text}.gin", None)


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
      method: the name of the method.
      student: the name of the student.
      examples: the number of training examples.
      experiment: the experiment.
      split: the evaluation split.
      student_file: the gin file of the student, if it is one of dss.
    """

    method: str
    student: str
    examples: int
    experiment: Experiment
    split: str
    student_file: str | None

    @property
    def folder(self) -> epath.Path:
        """The run directory."""
        return run_folder(self.experiment)

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.folder.name

    @property
    def result(self) -> epath.Path:
        """The summary file of the evaluation, which exists when the run is done."""
        return self.folder / "predictions" / f"{self.split}.json"

    @property
    def commands(self) -> tuple[list[str], list[str]]:
        """The arguments of the `dss` commands that train and evaluate the run, independent of the
        sweep's gin files.
        """
        files = [self.student_file] if self.student_file else []
        flags = gin_flags(self.experiment, parse_gin(files))
        folder = str(self.experiment.run_dir)
        return (
            ["train", *(f"--gin_file={file}" for file in files), *flags],
            ["eval", folder, f"--split={self.split}", f"--json={self.result}"],
        )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, or of a part of it.

    Attributes:
      folder: MODEL_DIR, the parent folder of the run directories.
      runs: the runs; all methods and students of a seed and fraction are adjacent.
      part: (i, n) for the i-th of n parts, counted from 0; None for a whole sweep.
    """

    folder: epath.Path
    runs: tuple[SweepRun, ...]
    part: tuple[int, int] | None = None

    def select_part(self, i: int, n: int) -> "Sweep":
        """Returns the i-th of n disjoint parts, counted from 0.

        Methods and students are spread over the parts, since their costs differ.
        """
        ordered = sorted(self.runs, key=lambda run: (run.method, run.student))
        names = {run.name for run in ordered[i::n]}
        return Sweep(self.folder, tuple(run for run in self.runs if run.name in names), (i, n))


def plan_sweep(
    files: Sequence[str], flags: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Sweep:
    """Returns the sweep of gin files and flags, with all its configurations and data checked.

    Args:
      files: gin files, in order, as for `dss.config.gin_files.parse_gin`.
      flags: `NAME=VALUE` of each `--gin.NAME=VALUE`.
      search_paths: more folders to search for gin files.

    Raises:
      DssError: if a name is unknown, a value is invalid, data are missing, two runs are the same,
        or a run directory has a run of another experiment.
    """
    config = parse_beside(SweepConfig, files, flags, search_paths)
    students = list(map(Student.parse, config.students))
    bases = {
        (method, student): _base(method, student, files, flags, search_paths)
        for method in map(SweepMethod.parse, config.methods)
        for student in students
    }
    sizes = _check_data(config, list(bases.values()))
    runs: dict[str, SweepRun] = {}
    names: dict[str, str] = {}  # by the experiment
    for seed in config.seeds:
        for fraction in map(float, config.fractions):
            for (method, student), base in bases.items():
                run = _run(config, method, student, base, fraction, seed, sizes[fraction])
                if run.name in runs:
                    raise DssError(
                        f"two runs of the sweep have the name {run.name}; rename a gin file"
                    )
                runs[run.name] = run
                twin = names.setdefault(_identity(run.experiment), run.name)
                if twin != run.name:
                    raise DssError(
                        f"{twin} and {run.name} are the same run: a gin file or flag of the "
                        "sweep overrides their difference"
                    )
    for run in runs.values():
        before = load_run(run.folder) if (run.folder / CONFIG_FILE).is_file() else None
        if before and (before.has_checkpoint or run.result.is_file()):  # otherwise nothing is lost
            check_same(before, run.experiment)
    return Sweep(run_folder(next(iter(bases.values()))), tuple(runs.values()))


def _identity(experiment: Experiment) -> str:
    return repr(dataclasses.replace(experiment, run_dir=None))


def _base(
    method: SweepMethod,
    student: Student,
    files: Sequence[str],
    flags: Sequence[str],
    search_paths: Sequence[str],
) -> Experiment:
    """Returns the experiment that the runs of a method and a student share, checked.

    The dataset's gin file is read first, so that the sweep's files override it; the method's files
    are read last.
    """
    student_files = [student.file] if student.file else []
    ordered = [*student_files, *files, *method.files]
    parsed = parse_gin(ordered, flags, search_paths, beside=[SweepConfig])
    if parsed.dataset_name is not None:
        ordered = [*_dataset_file(parsed.dataset_name), *ordered]
        parsed = parse_gin(ordered, flags, search_paths, beside=[SweepConfig])
    base = dataclasses.replace(
        _with_method(parsed, method.method),
        initial_checkpoint=student.checkpoint or parsed.initial_checkpoint,
    )
    run_folder(base)  # raises without a run directory
    for macro, is_set, replacement in (
        ("TRAIN_FRACTION", base.data.fraction != 1, "FRACTIONS"),
        ("RANDOM_SEED", base.seed != 0, "SEEDS"),
    ):
        if is_set:
            raise DssError(f"{macro} is set; a sweep has {replacement} in its place")
    _, vocabulary = describe_initial(base)
    factor = method.steps
    if method.compute is not None:
        factor = _tokens(_with_method(parsed, method.compute), vocabulary) / _tokens(
            base, vocabulary
        )
    steps = round(base.trainer.train_steps * factor)
    trainer = dataclasses.replace(base.trainer, train_steps=max(1, steps))
    return dataclasses.replace(base, trainer=trainer)


def _dataset_file(dataset: str) -> list[str]:
    """Returns the gin file of a dataset in gin/datasets, or an empty list."""
    file = f"datasets/{dataset}.gin"
    return [file] if (gin_root() / file).is_file() else []


def _with_method(base: Experiment, name: str | None) -> Experiment:
    """Returns an experiment with another method, resolved.

    Args:
      base: the experiment.
      name: the name of a method, optionally followed by a teacher's; None for the method of `base`.

    Raises:
      DssError: if there is no such method or dataset, or the teacher is ambiguous.
    """
    if name is None:
        if not base.has_task:
            raise DssError("no method: one of METHODS that is a gin file must set METHOD")
        return resolve(base)
    dataset = open_dataset(base)
    if name in [*Method]:
        method, teacher = Method(name), base.teacher
    elif (parts := read_name(name, dataset.source.teachers)) is not None:
        method, teacher = parts
    else:
        known = [x.removeprefix(f"{dataset.name}_") for x in mixture_names(dataset)]
        raise unknown_name("method", name, [*(m.value for m in Method), *known])
    return resolve(dataclasses.replace(base, mixture=None, method=method.value, teacher=teacher))


def _tokens(experiment: Experiment, vocabulary: str) -> int:
    """Returns the number of input and target tokens of an epoch."""
    store = training_store(dataclasses.replace(experiment, vocabulary=vocabulary))
    return sum(int(t.inputs.offsets[-1] + t.targets.offsets[-1]) for t in store.tasks)


def _check_data(config: SweepConfig, bases: Sequence[Experiment]) -> dict[float, int]:
    """Returns the number of training examples of each fraction.

    Raises:
      DssError: if a file is missing, or a split has no examples.
    """
    seed, sizes = config.seeds[0], {}
    mixtures = {mixture.name: mixture for mixture in map(open_mixture, bases)}
    for number, mixture in enumerate(mixtures.values()):
        for task in mixture.tasks:
            mixture.dataset.files("train", task.teacher)
        evaluation_set(mixture, config.split)
        if number == 0:  # all methods have the same examples
            for fraction in map(float, config.fractions):
                train = mixture.dataset.examples("train", fraction=fraction, seed=seed)
                mixture.dataset.examples("valid", fraction=fraction, seed=seed)
                sizes[fraction] = len(train)
    return sizes


def _run(
    config: SweepConfig,
    method: SweepMethod,
    student: Student,
    base: Experiment,
    fraction: float,
    seed: int,
    examples: int,
) -> SweepRun:
    name = f"{method.name}-{student.name}-{fraction}-s{seed}"
    experiment = dataclasses.replace(
        base,
        run_dir=f"{str(base.run_dir).rstrip('/')}/{name}",
        seed=seed,
        data=dataclasses.replace(base.data, fraction=fraction),
    )
    file = student.file if student.file and (gin_root() / student.file).is_file() else None
    return SweepRun(method.name, student.name, examples, experiment, config.split, file)
