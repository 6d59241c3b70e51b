"""The configuration of an experiment: all that decides a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dss.config.students import named_student
from dss.data.datasets import Dataset, JsonlSource
from dss.data.labels import ANY_LABEL, Labels
from dss.data.rationales import RationaleConfig
from dss.data.released import ReleasedSource
from dss.fields import check_at_least, check_share, check_types
from dss.parallel.config import MeshConfig
from dss.student.config import DecodingConfig, T5Config
from dss.training.config import OptimizerConfig, TrainerConfig

__all__ = ["DataConfig", "Experiment"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data are, and how they become batches."""

    root: str | None = None  # folder of the released datasets
    dataset_path: str | None = None  # a user's JSON lines: a folder or a file; its name is theirs
    labels: tuple[str, ...] = ()  # closed label set of the user's dataset
    metric: str = "text"  # of the user's dataset: "text" or "equation"
    feature_lengths: Mapping[str, int] = dataclasses.field(  # longest input and target, tokens
        default_factory=lambda: {"inputs": 1024, "targets": 256}
    )
    fraction: float = 1.0  # of the training examples, (0, 1]
    keep_unparsed: bool = False  # train on blanks where a teacher's text has no target
    batches: Literal["paired", "sampled"] = "paired"  # each example in all views; or by rate
    packed: bool = True  # sequences one after another; or a row each, padded
    one_encoder_pass: bool = (
        False  # an example's views have one input; the decoder is told the task
    )

    def __post_init__(self):
        if isinstance(self.labels, str):  # as on a command line: billing,bug
            object.__setattr__(self, "labels", tuple(self.labels.split(",")))
        check_types(self)
        object.__setattr__(self, "labels", Labels(tuple(self.labels)).closed)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"TRAIN_FRACTION must be in (0, 1], got {self.fraction}")
        lengths = self.feature_lengths
        if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
            raise ValueError(
                "TASK_FEATURE_LENGTHS must be {'inputs': N, 'targets': N} of at least 2 tokens, "
                f"got {dict(lengths)}"
            )
        if self.one_encoder_pass and self.batches != "paired":
            raise ValueError(
                "DataConfig.one_encoder_pass needs DataConfig.batches 'paired': sequences that are "
                "sampled share no input"
            )

    @property
    def inputs_length(self) -> int:
        """The longest input in tokens, EOS counted."""
        return self.feature_lengths["inputs"]

    @property
    def targets_length(self) -> int:
        """The longest target in tokens, EOS counted."""
        return self.feature_lengths["targets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides a run; gin files or Python set it.

    In Python, `dataset` may be a `Dataset`, whose files, labels and metric go into `data`; and
    `student` the name of a student, such as "small", or of a checkpoint, such as
    "hf:google/flan-t5-small", which goes into `initial_checkpoint`.
    """

    dataset: Dataset | str | None = None  # a released dataset, or a name for data.dataset_path
    method: str | None = None  # a method of dss.mixtures.methods; None for an imported checkpoint
    mixture: str | None = None  # a mixture or task by its name, in place of dataset and method
    teacher: str | None = None  # of rationales and labels; None: the mixture's, or the only one
    run_dir: str | None = None  # where the run is kept
    student: T5Config | str | None = None  # None: the initial checkpoint's shape
    initial_checkpoint: str | None = None  # hf:PATH, t5x:PATH, a hub id, a run; None: from scratch
    vocabulary: str | None = None  # a SentencePiece file or "bytes"; None: the checkpoint's
    dropout_rate: float = 0.1  # in [0, 1)
    dtype: Literal["float32", "bfloat16"] | None = None  # of the computation; None: the student's
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 needs dtype bfloat16
    remat: Literal["none", "full", "dots"] | None = None  # recomputed backward; None: the student's
    alpha: float = 0.5  # the label task's rate; the rationale's is 1 - alpha
    alpha_end: float | None = None  # its value at the last step, reached linearly; None: constant
    batch_size: int = 64  # examples (paired) or sequences (sampled) a step
    microbatches: int = 1  # parts of a batch that go through the device one after another
    seed: int = 0  # of parameters, order, subsample and dropout
    label_smoothing: float = 0.0  # in [0, 1)
    z_loss: float = 0.0  # weight of (log Z)^2
    eval_examples: int | None = None  # validation examples decoded at an evaluation; None: all
    data: DataConfig = DataConfig()
    rationales: RationaleConfig = RationaleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    mesh: MeshConfig = MeshConfig()
    decoding: DecodingConfig = DecodingConfig()

    def __post_init__(self):
        self._set_dataset()
        self._set_student()
        check_types(self)
        if self.mixture is not None and self.method is not None:
            raise ValueError("give MIXTURE_OR_TASK_NAME, or METHOD with DATASET, not both")
        check_at_least(self, 1, "batch_size", "microbatches", "eval_examples")
        check_at_least(self, 0, "seed", "z_loss")
        check_share(self, "dropout_rate", "label_smoothing")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"ALPHA must be in [0, 1], got {self.alpha}")
        if self.alpha_end is not None and not 0 <= self.alpha_end <= 1:
            raise ValueError(f"ALPHA_END must be in [0, 1], got {self.alpha_end}")
        if self.alpha_end is not None and self.data.batches != "paired":
            raise ValueError(
                "ALPHA_END needs DataConfig.batches 'paired': sequences that are sampled by rate "
                "keep to ALPHA"
            )

    def _set_dataset(self) -> None:
        """Replaces a dataset object by its name, and sets where its files are."""
        dataset = self.dataset
        if not isinstance(dataset, Dataset):
            return
        places: dict[str, Any] = {}
        source = dataset.source
        if isinstance(source, JsonlSource):
            places = {"dataset_path": str(source.path)}
        elif isinstance(source, ReleasedSource) and source.root is not None:
            places = {"root": str(source.root)}
        labels = dataset.labels if isinstance(source, JsonlSource) else ANY_LABEL
        data = dataclasses.replace(self.data, **places, labels=labels.closed, metric=labels.metric)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "dataset", dataset.name)

    def _set_student(self) -> None:
        """Replaces the name of a student by its configuration, or by its checkpoint."""
        if not isinstance(self.student, str):
            return
        if ":" in self.student or "/" in self.student:
            if self.initial_checkpoint is not None:
                raise ValueError(
                    f"give the checkpoint as student {self.student!r} or as initial_checkpoint "
                    f"{self.initial_checkpoint!r}, not both"
                )
            object.__setattr__(self, "initial_checkpoint", self.student)
            object.__setattr__(self, "student", None)
        else:
            object.__setattr__(self, "student", named_student(self.student))

    @property
    def dataset_name(self) -> str | None:
        """The name of the dataset; None for that of the folder or file of `data.dataset_path`."""
        assert not isinstance(self.dataset, Dataset)
        return self.dataset

    @property
    def config(self) -> T5Config | None:
        """The student's configuration; None where it is the initial checkpoint's."""
        assert not isinstance(self.student, str)
        return self.student

    @property
    def mixture_name(self) -> str | None:
        """The name of its mixture, once it is resolved; None for an imported checkpoint."""
        if self.method is None:
            return self.mixture
        parts = (self.dataset_name, self.method, self.teacher)
        return "_".join(part for part in parts if part)

    @property
    def has_task(self) -> bool:
        """Whether it names what a student learns; an imported checkpoint's does not."""
        return self.mixture is not None or self.method is not None

    def settle(self, student: T5Config) -> T5Config:
        """Returns a student with what the experiment says of its training."""
        return dataclasses.replace(
            student,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype or student.dtype,
            remat=self.remat or student.remat,
        )
