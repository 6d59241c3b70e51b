"""Opens the run of an experiment: creates a new one, or resumes one of the same experiment."""

import dataclasses
import json
from typing import Any, Literal

from dss.config.data import resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_name, load_config
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.parallel.processes import all_agree, leaders_text
from dss.paths import CONFIG_FILE
from dss.runs.directory import Run, load_run, run_folder, save_run
from dss.runs.session import (
    changed_files,
)
from dss.runs.start import check_size, create_run

__all__ = [
    "Resume",
    "changed_since",
    "check_processes_agree",
    "check_same",
    "describe_values",
    "open_run",
    "with_recorded_teacher",
]


Resume = Literal["never", "auto", "must"]


def open_run(experiment: Experiment, resume: Resume) -> tuple[Run, Any | None]:
    """Creates or resumes the run of an experiment.

    Args:
      experiment: the resolved experiment.
      resume: "auto" to resume a run if there is one, "must" to require one, "never" to fail on one.

    Returns:
      The run and, for a new run with an initial checkpoint, the parameters.

    Raises:
      DssError: if the run directory has a run of another experiment, or `resume` does not allow
        its state.
    """
    folder = run_folder(experiment)
    run = load_run(folder) if (folder / CONFIG_FILE).is_file() else None
    if run is None or not run.has_checkpoint:  # without a checkpoint, nothing is lost
        if resume == "must":
            raise DssError(f"{folder}: no run to resume: it has no checkpoint")
        return create_run(experiment)
    if resume == "never":
        raise DssError(
            f"{folder}: has a run with checkpoints; use another `Experiment.run_dir`, or resume "
            "this run with `resume=auto`"
        )
    if not run.experiment.has_task:
        raise DssError(
            f"{folder}: has an imported checkpoint; train in another `Experiment.run_dir`"
        )
    check_same(run, experiment)
    # The location of the data and the mesh may change.
    resumed = dataclasses.replace(run.experiment, data=experiment.data, mesh=experiment.mesh)
    return save_run(folder, resumed), None


def with_recorded_teacher(experiment: Experiment) -> Experiment:
    """Returns an experiment with the teacher of its run, where it names none.

    So the same command resumes after another teacher's outputs were added.
    """
    if None in (experiment.run_dir, experiment.method) or experiment.teacher is not None:
        return experiment
    path = run_folder(experiment) / CONFIG_FILE
    if not path.is_file():
        return experiment
    recorded = load_config(path.parent)
    if recorded.method != experiment.method:
        return experiment
    return dataclasses.replace(experiment, teacher=recorded.teacher)


def _differences(prefix: str, before: Any, now: Any, may_change: tuple[str, ...]) -> list[str]:
    """Returns a phrase for each field that differs, nested configurations included."""
    out = []
    for field in dataclasses.fields(before):
        a, b = getattr(before, field.name), getattr(now, field.name)
        if field.name in may_change or a == b:
            continue
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            out += _differences(f"{prefix}{field.name}.", a, b, ())
        else:
            out.append(f"{gin_name(prefix + field.name)} was {a!r} and is {b!r}")
    return out


def check_same(run: Run, now: Experiment) -> None:
    """Checks that a run is of the experiment that resumes it.

    Args:
      run: the run to resume.
      now: the experiment.

    Raises:
      DssError: if they differ in anything but the paths of the run and of its data, and the mesh.
    """
    before = run.experiment
    if before.mixture is not None:  # an older configuration, without dataset and method
        try:
            resolved = resolve(dataclasses.replace(before, data=now.data))
        except DssError as error:
            raise DssError(
                f"{run.folder}: the run of another experiment: its mixture {before.mixture!r} is "
                f"not of these data ({error}); use another `Experiment.run_dir`"
            ) from None
        before = dataclasses.replace(
            before,
            mixture=None,
            dataset=resolved.dataset,
            method=resolved.method,
            teacher=resolved.teacher,
        )
    now = resolve(now)
    check_size(str(run.folder), run.config, now.config)
    may_change = ("run_dir", "student", "vocabulary", "data", "mesh")
    differs = _differences("", before, now, may_change)
    if now.config is not None:
        student = now.resolve_student(now.config)
        differs += [
            f"{gin_name(f'student.{name}')} was {getattr(run.config, name)!r} and is "
            f"{getattr(student, name)!r}"
            for name in ("dtype", "remat")
            if getattr(run.config, name) != getattr(student, name)
        ]
    if now.vocabulary is not None:
        vocabularies = load_vocabulary(run.vocabulary_source), load_vocabulary(now.vocabulary)
        if vocabularies[0].fingerprint != vocabularies[1].fingerprint:
            raise DssError(f"{now.vocabulary}: wrong vocabulary: that of {run.folder} differs")
    data = now.data
    if set(data.labels) == set(before.data.labels):  # the order of labels does not matter
        data = dataclasses.replace(data, labels=before.data.labels)
    differs += _differences("data.", before.data, data, ("root", "dataset_path"))
    if differs:
        raise DssError(
            f"{run.folder}: the run of another experiment: {'; '.join(differs)}; "
            "use another `Experiment.run_dir`"
        )


# Paths, which may differ between the machines of a run; what a resumed run may change is less, see
# `check_same`.
PATHS = ("run_dir", "vocabulary", "initial_checkpoint", "data.root", "data.dataset_path")


def check_processes_agree(values: dict[str, str]) -> None:
    """Checks that all processes of a run have the same arguments and data.

    Args:
      values: the arguments and the hashes of data files of this process, by name.

    Raises:
      DssError: if they differ between processes; it is raised in every process.
    """
    values = {name: value for name, value in values.items() if name not in PATHS}
    leaders = json.loads(leaders_text(json.dumps(values)))
    differs = [
        f"{name} = {leaders.get(name)} and this one {values.get(name)}"
        for name in leaders | values
        if leaders.get(name) != values.get(name)
    ]
    if all_agree(not differs):
        return
    fault = f"process 0 has {'; '.join(differs)}" if differs else "another process has other values"
    raise DssError(f"the processes of a run need the same arguments and data: {fault}")


def describe_values(name: str, value: Any) -> dict[str, str]:
    """Returns the values of a configuration as text, by their names, nested ones included."""
    if not dataclasses.is_dataclass(value):
        return {name: repr(value)}
    out: dict[str, str] = {}
    for field in dataclasses.fields(value):
        out |= describe_values(f"{name}.{field.name}".strip("."), getattr(value, field.name))
    return out


def changed_since(run: Run, files: dict[str, str], *, accept: bool) -> list[str]:
    """Returns the names of the data files that have changed since the last session of a run.

    Args:
      run: the run.
      files: the current hashes, from `hash_files`.
      accept: whether changed files are accepted.

    Raises:
      DssError: if files have changed and `accept` is False.
    """
    changed = changed_files(run.folder, files) if run.has_checkpoint else []
    if changed and not accept:
        raise DssError(
            f"{run.folder}: data files have changed since the last session: {', '.join(changed)}; "
            "use another `Experiment.run_dir`, or resume with the changed files by "
            "`accept_changed_data`"
        )
    return changed
