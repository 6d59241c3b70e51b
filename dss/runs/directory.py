"""Run directories: a student with its configuration, vocabulary and checkpoints.

A run directory is self-contained, except for the data:

config.gin            the complete configuration
vocabulary.model      the SentencePiece model (not for bytes)
checkpoints/          Orbax checkpoints: the latest two and the best
metrics.jsonl         losses, gradient norms and accuracy
speed.jsonl           throughput
sessions.jsonl        the start and the end of each session
tensorboard/          metrics and throughput for TensorBoard
predictions/          predictions of `dss eval`
calibration.json      the temperature of label probabilities, of `dss eval --calibrate`
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from dss.config.data import open_mixture
from dss.config.experiment import Experiment
from dss.config.gin_files import load_config, save_config
from dss.data.vocabulary import BYTES, load_vocabulary
from dss.errors import DssError
from dss.evaluation.calibration import TemperatureScaling
from dss.evaluation.evaluator import (
    DecodingProgress,
    Predictor,
)
from dss.mixtures.methods import Mixture
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, param_shardings
from dss.parallel.processes import is_leader, wait_for_all
from dss.paths import CONFIG_FILE, absolute, check_no_pipes
from dss.student.config import T5Config
from dss.student.network import abstract_params, logical_axes
from dss.training.checkpoints import Checkpoints, abstract_like

__all__ = [
    "CALIBRATION_FILE",
    "CHECKPOINTS",
    "VOCABULARY_FILE",
    "Run",
    "is_run",
    "load_run",
    "run_folder",
    "save_run",
    "student_shardings",
]

VOCABULARY_FILE = "vocabulary.model"
CHECKPOINTS = "checkpoints"
CALIBRATION_FILE = "calibration.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and its configuration."""

    folder: epath.Path
    experiment: Experiment

    @property
    def config(self) -> T5Config:
        """The student's configuration."""
        assert self.experiment.config is not None
        return self.experiment.config

    @property
    def vocabulary_source(self) -> str:
        """The run's vocabulary: a path or "bytes"."""
        source = self.experiment.vocabulary
        return BYTES if source == BYTES else str(self.folder / VOCABULARY_FILE)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has a checkpoint."""
        folder = self.folder / CHECKPOINTS
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    def mixture(self, *, must_exist: bool = True) -> Mixture:
        """Returns the mixture that the student was trained on.

        Args:
          must_exist: whether data files must exist; False for prediction, which reads none.

        Raises:
          DssError: if the run has no mixture, the mixture is unknown, or its data do not exist.
        """
        if not self.experiment.has_task:
            raise DssError(
                f"{self.folder}: no mixture; give `mixture`, the task that the student predicts"
            )
        return open_mixture(self.experiment, must_exist=must_exist)

    def checkpoints(self) -> Checkpoints:
        """Returns the run's checkpoints, read-only."""
        return Checkpoints(self.folder / CHECKPOINTS, read_only=True)

    def predictor(
        self, checkpoint: str = "best", progress: DecodingProgress | None = None
    ) -> tuple[Predictor, int]:
        """Returns a predictor with the parameters of a checkpoint, and the checkpoint's step.

        Its probabilities have the temperature of `calibration.json`; see `temperature`.

        Args:
          checkpoint: "best", "latest" or a step.
          progress: the callbacks for decoded batches; None for none.

        Raises:
          DssError: if there is no such checkpoint, or its shape is not the student's.
        """
        mesh = make_mesh(self.experiment.mesh)
        shardings = student_shardings(self.config, mesh, self.experiment.mesh)
        checkpoints = self.checkpoints()
        step = checkpoints.find(checkpoint)
        abstract = abstract_like(abstract_params(self.config), shardings)
        params = checkpoints.restore_params(step, abstract)
        checkpoints.close()
        vocabulary = load_vocabulary(self.vocabulary_source)
        decoding, progress = self.experiment.decoding, progress or DecodingProgress()
        predictor = Predictor(
            config=self.config,
            params=params,
            mesh=mesh,
            vocabulary=vocabulary,
            decoding=decoding,
            progress=progress,
            temperature=self.temperature(step),
        )
        return predictor, step

    def temperature(self, step: int) -> float:
        """Returns the temperature of label probabilities: 1 unless the run is calibrated.

        A calibration of another checkpoint, or for another dataset, is not applied.

        Args:
          step: step of the checkpoint.

        Raises:
          DataError: if `calibration.json` is malformed.
        """
        path = self.folder / CALIBRATION_FILE
        if not self.experiment.has_task or not path.is_file():
            return 1.0
        scaling = TemperatureScaling.read(path)
        dataset = self.mixture(must_exist=False).dataset.name
        return scaling.temperature if (scaling.step, scaling.dataset) == (step, dataset) else 1.0


def student_shardings(config: T5Config, mesh: Mesh, mesh_config: MeshConfig) -> Any:
    """Returns the shardings of a student's parameters on a mesh."""
    shapes = abstract_params(config)
    return param_shardings(mesh, mesh_config, logical_axes(config), shapes)


def load_run(folder: str | epath.Path, flags: Sequence[str] = ()) -> Run:
    """Opens a run directory.

    Args:
      folder: the run directory.
      flags: `NAME=VALUE` of gin values to override.

    Raises:
      DssError: if it is not a run directory, its configuration has no student, or a file is a
        named pipe.
    """
    folder = epath.Path(folder).expanduser()
    check_no_pipes(folder, below=False)
    experiment = load_config(folder, flags)
    if experiment.config is None:
        raise DssError(f"{folder}: no run directory: its {CONFIG_FILE} has no student")
    return Run(folder, experiment)


def save_run(folder: epath.Path, experiment: Experiment) -> Run:
    """Writes the configuration of a run directory, with absolute paths of the data.

    With several processes, process 0 writes and the others wait.

    Raises:
      DssError: if a process does not see the file that process 0 has written.
    """
    paths = {n: getattr(experiment.data, n) for n in ("root", "dataset_path")}
    resolved: dict[str, Any] = {n: str(absolute(p)) for n, p in paths.items() if p is not None}
    data = dataclasses.replace(experiment.data, **resolved)
    experiment = dataclasses.replace(experiment, data=data)
    if is_leader():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(experiment, folder)
    wait_for_all(CONFIG_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise DssError(
            f"{folder}: process 0 has written its {CONFIG_FILE}, but process {jax.process_index()} "
            "cannot find it; MODEL_DIR must be a folder that all processes share"
        )
    return Run(folder, experiment)


def run_folder(experiment: Experiment) -> epath.Path:
    """Returns the run directory of an experiment.

    Raises:
      DssError: if the experiment has none.
    """
    if experiment.run_dir is None:
        raise DssError("no run directory: give `Experiment.run_dir`")
    return epath.Path(experiment.run_dir).expanduser()


def is_run(source: str) -> bool:
    """Returns whether a path is a run directory."""
    if source.startswith(("hf:", "t5x:")):
        return False
    return (epath.Path(source).expanduser() / CONFIG_FILE).is_file()
