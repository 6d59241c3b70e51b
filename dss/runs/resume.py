"""Opening the run of an experiment: a new one, or one begun before that is the same."""

import dataclasses
import json
from typing import Any, Literal

from dss.config.data import resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_name
from dss.data.vocabulary import load_vocabulary
from dss.errors import UserError
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
]


Resume = Literal["never", "auto", "must"]


def open_run(experiment: Experiment, resume: Resume) -> tuple[Run, Any | None]:
    """Returns the run, new or begun before, and a new one's parameters if it has some already.

    Raises:
      UserError: the run directory is another experiment's, or not as `resume` wants it.
    """
    folder = run_folder(experiment)
    run = load_run(folder) if (folder / CONFIG_FILE).is_file() else None
    if run is None or not run.has_checkpoint:  # whatever it was, nothing of it would be lost
        if resume == "must":
            raise UserError(f"{folder}: no run to resume: it has no checkpoint")
        return create_run(experiment)
    if resume == "never":
        raise UserError(
            f"{folder}: holds a run with checkpoints; use a new MODEL_DIR, or resume this one"
        )
    if not run.experiment.has_task:
        raise UserError(f"{folder}: holds an imported checkpoint; train in another MODEL_DIR")
    check_same(run, experiment)
    # Where the data lie and the mesh may change.
    settled = dataclasses.replace(run.experiment, data=experiment.data, mesh=experiment.mesh)
    return save_run(folder, settled), None


def _differences(prefix: str, before: Any, now: Any, may_change: tuple[str, ...]) -> list[str]:
    """Returns a phrase for each field that differs, of nested configurations too."""
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
    """Raises the user's error where a run is not of the experiment that would continue it."""
    before = run.experiment
    if before.mixture is not None:  # written before runs kept dataset and method
        named = resolve(dataclasses.replace(before, data=now.data))
        before = dataclasses.replace(
            before,
            mixture=None,
            dataset=named.dataset,
            method=named.method,
            teacher=named.teacher,
        )
    now = resolve(now)
    check_size(str(run.folder), run.config, now.config)
    settled = ("run_dir", "student", "vocabulary", "data", "mesh")
    differs = _differences("", before, now, settled)
    if now.config is not None:
        wanted = now.settle(now.config)
        differs += [
            f"{gin_name(f'student.{name}')} was {getattr(run.config, name)!r} and is "
            f"{getattr(wanted, name)!r}"
            for name in ("dtype", "remat")
            if getattr(run.config, name) != getattr(wanted, name)
        ]
    if now.vocabulary is not None:
        vocabularies = load_vocabulary(run.vocabulary_source), load_vocabulary(now.vocabulary)
        if vocabularies[0].fingerprint != vocabularies[1].fingerprint:
            raise UserError(f"{now.vocabulary}: wrong vocabulary: {run.folder} began with another")
    data = now.data
    if set(data.labels) == set(before.data.labels):  # their order is the run's
        data = dataclasses.replace(data, labels=before.data.labels)
    differs += _differences("data.", before.data, data, ("root", "dataset_path"))
    if differs:
        raise UserError(
            f"{run.folder}: the run of another experiment: {'; '.join(differs)}; "
            "use a new MODEL_DIR"
        )


# Where things lie may differ from machine to machine.
PLACES = ("run_dir", "vocabulary", "initial_checkpoint", "data.root", "data.dataset_path")


def check_processes_agree(mine: dict[str, str]) -> None:
    """Raises the user's error in every process where one was given other arguments or data."""
    mine = {name: value for name, value in mine.items() if name not in PLACES}
    leaders = json.loads(leaders_text(json.dumps(mine)))
    differs = [
        f"{name} = {leaders.get(name)} and this one {mine.get(name)}"
        for name in leaders | mine
        if leaders.get(name) != mine.get(name)
    ]
    if all_agree(not differs):
        return
    what = f"process 0 has {'; '.join(differs)}" if differs else "another process has other values"
    raise UserError(f"the processes of a run need the same arguments and data: {what}")


def describe_values(name: str, value: Any) -> dict[str, str]:
    """Returns each value of nested configurations as it is written, by its name."""
    if not dataclasses.is_dataclass(value):
        return {name: repr(value)}
    out: dict[str, str] = {}
    for field in dataclasses.fields(value):
        out |= describe_values(f"{name}.{field.name}".strip("."), getattr(value, field.name))
    return out


def changed_since(run: Run, files: dict[str, str], *, accept: bool) -> list[str]:
    """Returns the names of the files that have changed since a run began or went on.

    Raises:
      UserError: some have, and they are not accepted.
    """
    changed = changed_files(run.folder, files) if run.has_checkpoint else []
    if changed and not accept:
        raise UserError(
            f"{run.folder}: its data have changed since: {', '.join(changed)}; use a new "
            "MODEL_DIR, or go on with what is there now with --changed-data=accept"
        )
    return changed
