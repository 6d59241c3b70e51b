"""Opens the dataset and the mixture of a configuration."""

import dataclasses

from etils import epath

from dss.config.experiment import DataConfig, Experiment
from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.errors import ConfigError, unknown_name
from dss.mixtures.methods import Method, Mixture, make_mixture, named_mixture

__all__ = ["open_dataset", "open_datasets", "open_mixture", "resolve"]


def open_datasets(
    data: DataConfig, name: str | None = None, *, must_exist: bool = True
) -> dict[str, Dataset]:
    """Returns the available datasets by name: the user's first, then the released ones.

    Args:
      data: the configuration of the data.
      name: the name of the dataset; that of an export is used as it is, since an export has
        no path.
      must_exist: whether data files must exist; False for prediction, which reads none.

    Raises:
      ConfigError: if the data do not exist.
    """
    root = data.root
    if root is not None and must_exist and not epath.Path(root).expanduser().is_dir():
        raise ConfigError(f"DATA_ROOT {root}: no such folder")
    datasets, path = [], data.dataset_path
    if path is None and not must_exist and name not in RELEASED:
        path = f"/dev/null/{name}"  # an export keeps only the name and the labels of its dataset
    if path is not None:
        datasets.append(
            Dataset.from_files(
                path,
                labels=data.labels,
                metric=data.metric,
                must_exist=must_exist,
            )
        )
    datasets += [Dataset.released(released, root) for released in RELEASED]
    return {dataset.name: dataset for dataset in datasets}


def open_dataset(experiment: Experiment, *, must_exist: bool = True) -> Dataset:
    """Returns the dataset of an experiment with DATASET or DATASET_PATH.

    Args:
      experiment: the experiment.
      must_exist: whether data files must exist; False for prediction, which reads none.

    Raises:
      ConfigError: if the experiment has no dataset, its name is unknown, or its files do not exist.
    """
    known = open_datasets(experiment.data, experiment.dataset_name, must_exist=must_exist)
    name = experiment.dataset_name
    if name is None and experiment.data.dataset_path is None:
        raise ConfigError("no dataset: give `Experiment.dataset`, or `DataConfig.dataset_path`")
    path = experiment.data.dataset_path
    if name in RELEASED and path is not None:
        raise ConfigError(
            f"Experiment.dataset is {name!r} and DataConfig.dataset_path is {path!r}; give one"
        )
    if name is not None and name not in known:
        error = unknown_name("dataset", name, known)
        raise ConfigError(f"{error}; for your own data give `DataConfig.dataset_path`")
    return next(iter(known.values())) if name is None else known[name]


def open_mixture(experiment: Experiment, *, must_exist: bool = True) -> Mixture:
    """Returns the mixture of an experiment.

    Args:
      experiment: the experiment, with a mixture, or a method and a dataset.
      must_exist: whether data files must exist; False for prediction, which reads none.

    Raises:
      ConfigError: if the experiment has neither, a name is unknown, or the data do not exist.
    """
    one_input = experiment.data.one_encoder_pass
    if experiment.mixture is None:
        if experiment.method is None:
            raise ConfigError(
                "no method: give `Experiment.method` with `Experiment.dataset` or "
                "`DataConfig.dataset_path`, or `Experiment.mixture`"
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
    if mixture.teacher is not None and experiment.teacher not in (None, mixture.teacher):
        raise ConfigError(
            f"TEACHER is {experiment.teacher!r}, but mixture {mixture.name!r} is of another "
            "teacher; give METHOD and TEACHER in place of the mixture"
        )
    return mixture


def _teacher(experiment: Experiment, dataset: Dataset, method: Method) -> str | None:
    """Returns the experiment's teacher or, if it has none, the only teacher of the dataset."""
    teachers = dataset.source.teachers
    if not method.needs_teacher:
        return None
    if experiment.teacher is None:
        return teachers[0] if len(teachers) == 1 else None
    if teachers and experiment.teacher not in teachers:
        raise unknown_name("teacher", experiment.teacher, teachers, ConfigError)
    return experiment.teacher


def resolve(experiment: Experiment) -> Experiment:
    """Returns an experiment with dataset, method, teacher, labels and metric set.

    A mixture's name is replaced by its dataset, method and teacher.

    Raises:
      ConfigError: see `open_mixture`.
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
