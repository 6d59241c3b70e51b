"""The configuration of an experiment."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dss.config.students import named_student
from dss.data.datasets import Dataset, JsonlSource, name_of
from dss.data.labels import Labels
from dss.data.rationales import RationaleConfig
from dss.data.released import ReleasedSource
from dss.errors import ConfigError
from dss.fields import check_at_least, check_rate, check_types
from dss.parallel.config import MeshConfig
from dss.student.config import DecodingConfig, T5Config
from dss.training.config import OptimizerConfig, TrainerConfig

__all__ = ["DataConfig", "Experiment"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The location of the data, and how batches are made of them."""

    root: str | None = None  # folder of the released datasets
    dataset_path: str | None = None  # the user's JSON lines: a folder or a file
    labels: tuple[str, ...] = ()  # closed label set of the user's dataset
    metric: str = "text"  # metric of the user's dataset: "text" or "equation"
    feature_lengths: Mapping[str, int] = dataclasses.field(  # longest input and target, tokens
        default_factory=lambda: {"inputs": 1024, "targets": 256}
    )
    fraction: float = 1.0  # fraction of the training examples, in (0, 1]
    keep_unparsed: bool = False  # whether to train on empty targets where parsing failed
    batches: Literal["paired", "sampled"] = "paired"  # all tasks of an example; or tasks by rate
    packed: bool = True  # whether sequences are packed; else each is padded in a row of its own
    one_encoder_pass: bool = False  # whether tasks share an input, selected by a decoder start id

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):  # as on a command line: billing,bug
            object.__setattr__(self, "labels", tuple(self.labels.split(",")))
        check_types(self)
        object.__setattr__(self, "labels", Labels(tuple(self.labels)).closed)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"TRAIN_FRACTION must be in (0, 1], got {self.fraction}")
        lengths = self.feature_lengths
        if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
            raise ConfigError(
                "TASK_FEATURE_LENGTHS must be {'inputs': N, 'targets': N} of at least 2 tokens, "
                f"got {dict(lengths)}"
            )
        if self.one_encoder_pass and self.batches != "paired":
            raise ConfigError(
                "DataConfig.one_encoder_pass needs DataConfig.batches='paired': with 'sampled', "
                "the tasks of an example are not in the same batch"
            )

    @property
    def inputs_length(self) -> int:
        """The maximum input length in tokens, including EOS."""
        return self.feature_lengths["inputs"]

    @property
    def targets_length(self) -> int:
        """The maximum target length in tokens, including EOS."""
        return self.feature_lengths["targets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """The configuration of a run, set by gin files or in Python.

    In Python, `dataset` may be a `Dataset`, whose files, labels and metric are copied to `data`;
    and `student` may be the name of a student, such as "small", or of a checkpoint, such as
    "hf:google/flan-t5-small", which is moved to `initial_checkpoint`.
    """

    dataset: Dataset | str | None = None  # None: that of data.dataset_path
    method: str | None = None  # a method of dss.mixtures.methods; None for an imported checkpoint
    mixture: str | None = None  # the name of a mixture or task, instead of dataset and method
    teacher: str | None = None  # teacher of labels and rationales; None: the mixture's or only one
    run_dir: str | None = None  # the run directory
    student: T5Config | str | None = None  # None: the initial checkpoint's shape
    initial_checkpoint: str | None = None  # hf:PATH, t5x:PATH, a hub id, a run; None: from scratch
    vocabulary: str | None = None  # a SentencePiece file or "bytes"; None: the checkpoint's
    dropout_rate: float = 0.1  # in [0, 1)
    dtype: Literal["float32", "bfloat16"] | None = None  # compute dtype; None: the student's
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 needs dtype bfloat16
    remat: Literal["none", "full", "dots"] | None = None  # rematerialization; None: the student's
    alpha: float = 0.5  # the label task's rate; the rationale's is 1 - alpha
    alpha_end: float | None = None  # alpha at the last step, reached linearly; None: constant
    batch_size: int = 64  # examples (paired) or sequences (sampled) per step
    microbatches: int = 1  # parts of a batch computed in turn, with accumulated gradients
    seed: int = 0  # seed of parameters, order, subsample and dropout
    label_smoothing: float = 0.0  # in [0, 1)
    z_loss: float = 0.0  # weight of (log Z)^2
    eval_examples: int | None = None  # validation examples decoded per evaluation; None: all
    data: DataConfig = DataConfig()
    rationales: RationaleConfig = RationaleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    mesh: MeshConfig = MeshConfig()
    decoding: DecodingConfig = DecodingConfig()

    def __post_init__(self) -> None:
        self._set_dataset()
        self._set_student()
        check_types(self)
        if self.mixture is not None and self.method is not None:
            raise ConfigError(
                f"MIXTURE_OR_TASK_NAME is {self.mixture!r} and METHOD is {self.method!r}; give one"
            )
        check_at_least(self, 1, "batch_size", "microbatches", "eval_examples")
        check_at_least(self, 0, "seed", "z_loss")
        check_rate(self, "dropout_rate", "label_smoothing")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"ALPHA must be in [0, 1], got {self.alpha}")
        if self.alpha_end is not None and not 0 <= self.alpha_end <= 1:
            raise ConfigError(f"ALPHA_END must be in [0, 1], got {self.alpha_end}")
        if self.alpha_end is not None and self.data.batches != "paired":
            raise ConfigError(
                "ALPHA_END needs DataConfig.batches='paired': with 'sampled', the sampling rate is "
                "ALPHA at all steps"
            )

    def _set_dataset(self) -> None:
        """Replaces a dataset object by its name, and copies its files and labels to `data`."""
        dataset = self.dataset
        if not isinstance(dataset, Dataset):
            return
        paths: dict[str, Any] = {}
        source = dataset.source
        if isinstance(source, JsonlSource):
            if dataset.name != (name := name_of(source.path)):
                raise ConfigError(
                    f"dataset {dataset.name!r}: a run calls it {name!r} by its files; omit the name"
                )
            paths = {"dataset_path": str(source.path)}
        elif isinstance(source, ReleasedSource) and source.root is not None:
            paths = {"root": str(source.root)}
        if isinstance(source, JsonlSource):  # labels and metric of `data` stay where it has none
            labels = dataset.labels
            paths["labels"] = labels.closed or self.data.labels
            paths["metric"] = labels.metric if labels.metric != "text" else self.data.metric
        data = dataclasses.replace(self.data, **paths)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "dataset", dataset.name)

    def _set_student(self) -> None:
        """Replaces a student's name by its configuration, or moves it to `initial_checkpoint`."""
        if not isinstance(self.student, str):
            return
        if ":" in self.student or "/" in self.student:
            if self.initial_checkpoint is not None:
                raise ConfigError(
                    f"two initial checkpoints: student {self.student!r} and initial_checkpoint "
                    f"{self.initial_checkpoint!r}; give one"
                )
            object.__setattr__(self, "initial_checkpoint", self.student)
            object.__setattr__(self, "student", None)
        else:
            object.__setattr__(self, "student", named_student(self.student))

    @property
    def dataset_name(self) -> str | None:
        """The name of the dataset; None for the name of the folder or file `data.dataset_path`."""
        assert not isinstance(self.dataset, Dataset)
        return self.dataset

    @property
    def config(self) -> T5Config | None:
        """The student's configuration; None if the initial checkpoint determines it."""
        assert not isinstance(self.student, str)
        return self.student

    @property
    def mixture_name(self) -> str | None:
        """The name of the mixture of a resolved experiment; None for an imported checkpoint."""
        if self.method is None:
            return self.mixture
        parts = (self.dataset_name, self.method, self.teacher)
        return "_".join(part for part in parts if part)

    @property
    def has_task(self) -> bool:
        """Whether the experiment has a mixture or a method; that of an imported checkpoint may
        have neither.
        """
        return self.mixture is not None or self.method is not None

    def resolve_student(self, student: T5Config) -> T5Config:
        """Returns a student with the experiment's dropout rate, dtype and rematerialization."""
        return dataclasses.replace(
            student,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype or student.dtype,
            remat=self.remat or student.remat,
        )
