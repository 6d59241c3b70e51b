"""The dataset and the mixture that a configuration names."""

import dataclasses

from etils import epath

from dss.config.experiment import DataConfig, Experiment
from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.errors import UserError, unknown_name
from dss.mixtures.methods import Method, Mixture, make_mixture, named_mixture

__all__ = ["open_dataset", "open_datasets", "open_mixture", "resolve"]


def open_datasets(
    data: DataConfig, name: str | None = None, *, must_exist: bool = True
) -> dict[str, Dataset]:
    """Returns the datasets that a configuration can name, by their names; the user's own first.

    Args:
      data: the configuration of the data.
      name: the name of the user's own dataset; None for that of its folder or file.
      must_exist: False for predicting, which reads no data.

    Raises:
      UserError: if the data are not where the configuration points to.
    """
    root = data.root
    if root is not None and must_exist and not epath.Path(root).expanduser().is_dir():
        raise UserError(f"DATA_ROOT {root}: no such folder")
    own, path = [], data.dataset_path
    if path is None and not must_exist and name not in RELEASED:
        path = name  # of an export, which keeps the name and the labels of its data alone
    if path is not None:
        own.append(
            Dataset.from_files(
                path,
                name=None if name in RELEASED else name,
                labels=data.labels,
                metric=data.metric,
                must_exist=must_exist,
            )
        )
    return {d.name: d for d in (*own, *(Dataset.released(name, root) for name in RELEASED))}


def open_dataset(experiment: Experiment, *, must_exist: bool = True) -> Dataset:
    """Returns the dataset of an experiment that names no mixture.

    Args:
      experiment: the experiment.
      must_exist: False for predicting, which reads no data.

    Raises:
      UserError: if there is none, or no files are where the configuration points to.
    """
    known = open_datasets(experiment.data, experiment.dataset_name, must_exist=must_exist)
    name = experiment.dataset_name
    if name is None and experiment.data.dataset_path is None:
        raise UserError("no dataset: give DATASET, or DATASET_PATH for your own")
    if name is not None and name not in known:
        raise unknown_name("dataset", name, known)
    return next(iter(known.values())) if name is None else known[name]


def open_mixture(experiment: Experiment, *, must_exist: bool = True) -> Mixture:
    """Returns the mixture of an experiment.

    Args:
      experiment: the experiment; it names a mixture, or a method and a dataset.
      must_exist: False for predicting, which reads no data.

    Raises:
      UserError: if it names none, there is no such mixture, or its data are not there.
    """
    one_input = experiment.data.one_encoder_pass
    if experiment.mixture is None:
        if experiment.method is None:
            raise UserError(
                "no method: give --gin_file=methods/NAME.gin with --gin_file=datasets/NAME.gin, "
                "METHOD with DATASET or DATASET_PATH, or MIXTURE_OR_TASK_NAME"
            )
        dataset = open_dataset(experiment, must_exist=must_exist)
        method = Method.parse(experiment.method)
        return make_mixture(
            dataset,
            method,
            _teacher(experiment, dataset, method),
            experiment.alpha,
            one_input=one_input,
        )
    datasets = open_datasets(experiment.data, experiment.dataset_name, must_exist=must_exist)
    mixture = named_mixture(
        experiment.mixture, datasets.values(), experiment.alpha, one_input=one_input
    )
    if experiment.teacher is None:
        return mixture
    if mixture.teacher is None:
        raise UserError(
            f"mixture {mixture.name!r} has no teacher that TEACHER {experiment.teacher!r} could "
            "replace"
        )
    return named_mixture(
        mixture.name.removesuffix(mixture.teacher) + experiment.teacher,
        datasets.values(),
        experiment.alpha,
        one_input=one_input,
    )


def _teacher(experiment: Experiment, dataset: Dataset, method: Method) -> str | None:
    """Returns the teacher that an experiment names or, where it names none, the only one."""
    teachers = dataset.source.teachers
    if not method.needs_teacher:
        return None
    if experiment.teacher is None:
        return teachers[0] if len(teachers) == 1 else None
    if teachers and experiment.teacher not in teachers:
        raise unknown_name("teacher", experiment.teacher, teachers)
    return experiment.teacher


def resolve(experiment: Experiment) -> Experiment:
    """Returns an experiment with what its data decide: dataset, method, teacher, labels and metric.

    Raises:
      UserError: see `open_mixture`.
    """
    mixture = open_mixture(experiment)
    dataset, data = mixture.dataset, experiment.data
    if data.dataset_path is not None and dataset.name not in RELEASED:
        labels = dataset.labels
        data = dataclasses.replace(data, labels=labels.closed, metric=labels.metric)
    return dataclasses.replace(
        experiment,
        data=data,
        mixture=None,
        dataset=dataset.name,
        method=mixture.method.value,
        teacher=mixture.teacher,
    )
