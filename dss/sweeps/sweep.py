"""What a sweep runs: methods x students x fractions of the training examples x seeds.

Every run is a run directory of its own in the sweep's MODEL_DIR, trained by an ordinary `dss train`
and tested by an ordinary `dss eval`. Runs of one fraction and seed have the same examples, whatever
their method and student; of one seed, a smaller fraction's examples are among a larger one's.
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
from dss.errors import UserError, unknown_name
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
    """What a sweep varies. gin fills it in; see gin/runs/sweep.gin."""

    methods: tuple[str, ...] = ()  # see `SweepMethod.parse`
    students: tuple[str, ...] = ()  # see `Student.parse`
    fractions: tuple[float, ...] = (1.0,)  # of the training examples, each in (0, 1]
    seeds: tuple[int, ...] = (0,)  # of parameters, order, subsample and dropout
    split: str = "test"  # that every run is evaluated on

    def __post_init__(self):
        check_types(self)
        for name in ("methods", "students", "fractions", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name.upper()} is empty; runs/sweep.gin shows what it can hold")
            twice = [value for i, value in enumerate(values) if value in values[:i]]
            if twice:
                raise ValueError(f"{name.upper()} has {twice[0]!r} twice")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"FRACTIONS must be in (0, 1], got {fraction}")
        if min(self.seeds) < 0:
            raise ValueError(f"SEEDS must be at least 0, got {min(self.seeds)}")
        if self.split not in SPLITS:
            raise ValueError(f"SPLIT must be one of {', '.join(SPLITS)}, got {self.split!r}")


gin.external_configurable(SweepConfig, "SweepConfig")


def _file_name(text: str) -> str:
    """Returns a text as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("_.-")


@dataclasses.dataclass(frozen=True)
class SweepMethod:
    """A way to train.

    Attributes:
      name: the name in folders and tables.
      method: the name of a method, with or without a teacher's after it; None where a gin file
        sets the method.
      files: gin files that are read after the sweep's.
      steps: the factor of TRAIN_STEPS.
      compute: another method, whose total of input and target tokens this one is trained on.
    """

    name: str
    method: str | None
    files: tuple[str, ...] = ()
    steps: float = 1.0
    compute: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SweepMethod":
        """Returns the method of a text: a method or gin files joined by `+`, and `*STEPS`.

        STEPS is a factor of TRAIN_STEPS, or a method whose compute is to be reached.

        >>> SweepMethod.parse("finetune*3.5")
        SweepMethod(name='finetune_x3.5', method='finetune', files=(), steps=3.5, compute=None)
        >>> SweepMethod.parse("finetune*step_by_step").name
        'finetune_as_step_by_step'
        >>> SweepMethod.parse("step_by_step+mine/long.gin").name
        'step_by_step_long'

        Raises:
          UserError: it is none.
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
            raise UserError(
                f"method {text!r}: give a method's name, then +FILE.gin and "
                "*STEPS if you like, such as 'step_by_step', 'step_by_step+mine.gin', "
                "'finetune*3.5' or 'finetune*step_by_step'"
            )
        names = [*methods, *(epath.Path(file).stem for file in files)]
        longer = f"_as_{compute}" if compute else f"_x{factor}" if star else ""
        name = _file_name("_".join(names)) + longer
        return cls(name, methods[0] if methods else None, files, steps, compute)


@dataclasses.dataclass(frozen=True)
class Student:
    """A student to begin with.

    Attributes:
      name: in folders and tables.
      file: the gin file of its shape; it begins from scratch.
      checkpoint: what it begins from.
    """

    name: str
    file: str | None
    checkpoint: str | None

    @classmethod
    def parse(cls, text: str) -> "Student":
        """Returns the student of a text: a name in students/, a gin file or a checkpoint.

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
      method: its name.
      student: its name.
      examples: that it trains on.
      experiment: all that decides it.
      split: that it is evaluated on.
      student_file: the gin file of its student, if it is one of dss.
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
        """The name of its folder."""
        return self.folder.name

    @property
    def result(self) -> epath.Path:
        """Where the evaluation's summary is; it is there when the run is done."""
        return self.folder / "predictions" / f"{self.split}.json"

    @property
    def commands(self) -> tuple[list[str], list[str]]:
        """The arguments of `dss` that train and evaluate it, complete without the sweep's files."""
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
      folder: MODEL_DIR, which holds the run directories.
      runs: in an order in which all methods are at a point before the next one begins.
      part: (i, n) if it is the i-th of n parts, counted from 0.
    """

    folder: epath.Path
    runs: tuple[SweepRun, ...]
    part: tuple[int, int] | None = None

    def take(self, i: int, n: int) -> "Sweep":
        """Returns the i-th of n parts, counted from 0: each run is in one of them.

        Methods and students, which cost differently, are spread over the parts.
        """
        alike = sorted(self.runs, key=lambda run: (run.method, run.student))
        mine = {run.name for run in alike[i::n]}
        return Sweep(self.folder, tuple(run for run in self.runs if run.name in mine), (i, n))


def plan_sweep(
    files: Sequence[str], flags: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Sweep:
    """Returns the sweep of gin files and flags; whatever can be wrong with them is found here.

    Args:
      files: `--gin_file`; `dss.config.gin_files.parse_gin` says where they are looked for.
      flags: `NAME=VALUE` of `--gin.NAME=VALUE`.
      search_paths: more folders.

    Raises:
      UserError: an unknown name, a value out of range, data that are not there, a run directory
        that holds another experiment.
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
    same: dict[str, str] = {}
    for seed in config.seeds:
        for fraction in map(float, config.fractions):
            for (method, student), base in bases.items():
                run = _run(config, method, student, base, fraction, seed, sizes[fraction])
                if run.name in runs:
                    raise UserError(f"two runs of the sweep would be {run.name}; rename a file")
                runs[run.name] = run
                twin = same.setdefault(_identity(run.experiment), run.name)
                if twin != run.name:
                    raise UserError(
                        f"{twin} and {run.name} are the same run: what should differ is set by a "
                        "--gin_file or --gin flag for all"
                    )
    for run in runs.values():
        before = load_run(run.folder) if (run.folder / CONFIG_FILE).is_file() else None
        if before and (before.has_checkpoint or run.result.is_file()):  # else nothing would be lost
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
    """Returns what the runs of a method and a student have in common, checked.

    The dataset's file is read first, so that the sweep's files may override it; the method's files
    are read last.
    """
    own = [student.file] if student.file else []
    read = [*own, *files, *method.files]
    first = parse_gin(read, flags, search_paths, beside=[SweepConfig])
    if method.method is not None and first.dataset_name is not None:
        read = [*_dataset_file(first.dataset_name), *read]
        first = parse_gin(read, flags, search_paths, beside=[SweepConfig])
    base = dataclasses.replace(
        _with_method(first, method.method),
        initial_checkpoint=student.checkpoint or first.initial_checkpoint,
    )
    run_folder(base)
    for macro, value, lists in (
        ("TRAIN_FRACTION", base.data.fraction != 1, "FRACTIONS"),
        ("RANDOM_SEED", base.seed != 0, "SEEDS"),
    ):
        if value:
            raise UserError(f"{macro} is set; a sweep has {lists} in its place")
    _, vocabulary = describe_initial(base)
    factor = method.steps
    if method.compute is not None:
        factor = _tokens(_with_method(first, method.compute), vocabulary) / _tokens(
            base, vocabulary
        )
    steps = round(base.trainer.train_steps * factor)
    trainer = dataclasses.replace(base.trainer, train_steps=max(1, steps))
    return dataclasses.replace(base, trainer=trainer)


def _dataset_file(dataset: str) -> list[str]:
    """Returns the gin file that dss has for a dataset, if it has one."""
    file = f"datasets/{dataset}.gin"
    return [file] if (gin_root() / file).is_file() else []


def _with_method(base: Experiment, name: str | None) -> Experiment:
    """Returns an experiment with a sweep's method, resolved.

    Args:
      base: the experiment; without a name, its own method counts.
      name: the name of a method, with or without a teacher's after it.

    Raises:
      UserError: if there is no such method or dataset, or no one teacher.
    """
    if name is None:
        if not base.has_task:
            raise UserError("a method of gin files alone must set METHOD")
        return resolve(base)
    dataset = open_dataset(base)
    if name in [*Method]:
        method, teacher = Method(name), base.teacher
    elif (found := read_name(name, dataset.source.teachers)) is not None:
        method, teacher = found
    else:
        known = [x.removeprefix(f"{dataset.name}_") for x in mixture_names(dataset)]
        raise unknown_name("method", name, [*Method, *known])
    return resolve(dataclasses.replace(base, mixture=None, method=method.value, teacher=teacher))


def _tokens(experiment: Experiment, vocabulary: str) -> int:
    """Returns how many tokens an epoch of an experiment reads and writes."""
    store = training_store(dataclasses.replace(experiment, vocabulary=vocabulary))
    return sum(int(t.inputs.offsets[-1] + t.targets.offsets[-1]) for t in store.tasks)


def _check_data(config: SweepConfig, bases: Sequence[Experiment]) -> dict[float, int]:
    """Returns the number of training examples of each fraction; raises what the data lack."""
    seed, sizes = config.seeds[0], {}
    mixtures = {mixture.name: mixture for mixture in map(open_mixture, bases)}
    for number, mixture in enumerate(mixtures.values()):
        for task in mixture.tasks:
            mixture.dataset.files("train", task.teacher)
        evaluation_set(mixture, config.split)
        if number == 0:  # the examples are the same whatever the method
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
