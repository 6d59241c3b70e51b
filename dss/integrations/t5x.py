"""A T5X plug-in: dss's tasks and loss under `t5x.train`, `t5x.eval` and `t5x.infer`.

`gin/t5x/` configures T5X with the functions of this module. They build T5X's objects from an
`Experiment`, so that the gin files of `dss train` work in both. Needs T5X; see docs/t5x.md.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dss.batches.batches import Batches
from dss.config.data import open_mixture, resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_name
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError, MissingPackageError
from dss.integrations.seqio_features import StepByStepFeatureConverter
from dss.integrations.seqio_tasks import get_vocabulary, register_seqio, vocabulary_source
from dss.interop.t5x_export import DATASET, DATASET_FILE
from dss.mixtures.methods import Mixture
from dss.paths import absolute
from dss.runs.data import training_batches, training_store
from dss.student.config import T5Config
from dss.training.loss import cross_entropy, task_sums, token_counts, token_weights
from dss.training.optimizer import make_optimizer, make_schedule

try:
    import seqio
    from clu import metrics as clu_metrics
    from clu.data import dataset_iterator
    from t5x import adafactor, models, optimizers
    from t5x.examples.t5 import network
except ImportError as error:
    raise MissingPackageError(
        f"dss.integrations.t5x needs T5X ({error}): pip install --no-deps "
        "git+https://github.com/google-research/t5x git+https://github.com/google/airio "
        "git+https://github.com/google-research/jestimator, and the packages in docs/t5x.md"
    ) from error

__all__ = [
    "StepByStepModel",
    "TrainIterator",
    "absolute_path",
    "feature_lengths",
    "get_dataset",
    "learning_rate",
    "mixture",
    "mixture_name",
    "model",
    "optimizer",
    "parameters_only",
    "task_name",
    "transformer",
    "vocabulary",
]

TOKEN_WEIGHTS = "decoder_token_weights"
FIXED = {"relative_buckets": 32, "relative_max_distance": 128, "layer_norm_epsilon": 1e-6}

# Fields of `Experiment` that T5X does not support or sets in another way, each with the reason in
# the error if it is not the default.
NOT_IN_TRAINING = {
    "alpha_end": "T5X's trainer has a constant ALPHA; leave variants/alpha_schedule.gin out",
    "microbatches": "in T5X set trainer.Trainer.num_microbatches",
    "grad_dtype": "T5X's gradients are float32",
    "remat": "T5X's network keeps every activation",
    "data.packed": "T5X's rows always hold packed sequences",
    "data.one_encoder_pass": (
        "T5X's decoder reads the input of its own sequence only; leave "
        "variants/one_encoder_pass.gin out"
    ),
    "eval_examples": "T5X evaluates all examples",
    "trainer.patience": "T5X trains all its steps",
    "trainer.select_by": "T5X keeps the latest checkpoints, not the best",
    "trainer.log_period": "in T5X set train.stats_period",
    "mesh.data": "in T5X set partitioning.PjitPartitioner; leave layouts/ out",
    "mesh.model": "in T5X set partitioning.PjitPartitioner; leave layouts/ out",
    "mesh.rules": "in T5X set partitioning.standard_logical_axis_rules",
}
NOT_IN_DECODING = {
    "decoding.num_beams": "in T5X set decode_fn of dss.integrations.t5x.model",
    "decoding.max_length": "T5X decodes up to the length of its targets",
    "decoding.rationale_length": "T5X decodes up to the length of its targets",
}


class StepByStepModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder with the loss of distilling step-by-step; see `dss.training.loss`.

    Its metrics are T5X's, and each task's loss and token accuracy, such as `label_loss`.

    Args:
      mixture: the tasks and their rates.
      module: the network.
      input_vocabulary: the vocabulary of the inputs.
      output_vocabulary: the vocabulary of the targets, usually the same.
      optimizer_def: T5X's optimizer.
      options: other options of `EncoderDecoderModel`: `decode_fn`, `label_smoothing`, `z_loss`,
        `default_decoder_params`.
    """

    def __init__(
        self,
        mixture: Mixture,
        module: Any,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        **options: Any,
    ):
        prefixes = [input_vocabulary.encode(task.prefix.rstrip()) for task in mixture.tasks]
        super().__init__(
            module,
            input_vocabulary,
            output_vocabulary,
            optimizer_def,
            feature_converter_cls=functools.partial(StepByStepFeatureConverter, prefixes=prefixes),
            **options,
        )
        self.mixture = mixture

    def loss_fn(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the loss of a batch, and T5X's metrics.

        Args:
          params: the network's parameters.
          batch: features of `StepByStepFeatureConverter`. `decoder_token_weights`, if present, are
            the weights of target tokens in the loss of the whole batch, which does not depend on
            microbatches; without them a task's tokens are counted in this (micro)batch.
          dropout_rng: the key of dropout; None for no dropout.
        """
        logits = self._compute_logits(params, batch, dropout_rng)
        targets, task_ids = batch["decoder_target_tokens"], batch["decoder_task_ids"]
        losses = cross_entropy(
            logits.astype(jnp.float32),
            targets,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
        )
        names, rates = self.mixture.short_names, self.mixture.rates
        counts = token_counts(task_ids, len(names))
        weights = batch.get(TOKEN_WEIGHTS)
        if weights is None:
            task_weights = token_weights(counts, rates)
            weights = jnp.concatenate([jnp.zeros(1), task_weights])[task_ids]
        loss = jnp.sum(weights * losses)
        metrics = self._compute_metrics(
            logits,
            targets,
            mask=(task_ids > 0).astype(jnp.float32),
            loss=loss,
            segment_ids={
                "encoder": batch.get("encoder_segment_ids", batch["encoder_input_tokens"] != 0),
                "decoder": batch.get("decoder_segment_ids", task_ids > 0),
            },
        )
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        for name, values in (("loss", losses), ("token_accuracy", correct)):
            sums = task_sums(values, task_ids, len(names))
            for k, task in enumerate(names):
                metrics[f"{task}_{name}"] = clu_metrics.Average(total=sums[k], count=counts[k])
        return loss, metrics


class TrainIterator(dataset_iterator.DatasetIterator):
    """The batches of `dss train`, in rows for T5X's network.

    A batch has `BATCH_SIZE` rows of whole sequences, and all steps have the same shape. In paired
    order a step has `BATCH_SIZE` examples, each with the sequences of all its tasks.

    Args:
      batches: the training batches, with one group per row.
      rates: the rate of each task; None for sequences sampled by rate.
      rows: the rows of this process.
      run_dir: the run directory, MODEL_DIR.
    """

    def __init__(
        self,
        batches: Batches,
        rates: tuple[float, ...] | None,
        rows: slice,
        run_dir: str | None = None,
    ):
        self._batches, self._rates, self._rows, self._run_dir = batches, rates, rows, run_dir
        self._step = 0
        self._slots = dict(zip(("encoder", "decoder"), batches.most_slots(), strict=True))

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._batches[self._step].as_dict()
        self._step += 1
        names = [name for name in batch if not name.endswith("_rows")]
        out = {name: self._padded(name, batch[name]) for name in names}
        for side in ("encoder", "decoder"):
            out[f"{side}_positions"] = _positions(out[f"{side}_segment_ids"])
        task_ids = out["decoder_task_ids"]
        out["decoder_loss_weights"] = (task_ids > 0).astype(np.int32)
        tasks = len(self._batches.store.tasks)
        counts = np.bincount(task_ids.ravel(), minlength=tasks + 1)[1:].astype(np.float32)
        weights = np.asarray(token_weights(jnp.asarray(counts), self._rates))
        out[TOKEN_WEIGHTS] = np.concatenate([[0], weights])[task_ids].astype(np.float32)
        return {name: array[self._rows] for name, array in out.items()}

    def _padded(self, name: str, array: np.ndarray) -> np.ndarray:
        missing = self._slots[name.partition("_")[0]] - array.shape[1]
        return np.pad(array, ((0, 0), (0, missing)))

    @property
    def element_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shape of each feature's rows in this process."""
        example = TrainIterator(self._batches, self._rates, self._rows)
        return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in next(example).items()}

    def reset(self) -> None:
        """Returns to the first step."""
        self._step = 0

    def save(self, filename: epath.PathLike) -> None:
        """Writes the number of steps taken."""
        epath.Path(filename).write_text(json.dumps({"step": self._step}))

    def restore(self, filename: epath.PathLike) -> None:
        """Resumes at the step that `save` wrote, if the file is in this run's folder.

        T5X also restores from a run's initial checkpoint, whose step is of another run's data. An
        export has one file for any number of processes.
        """
        path = absolute(filename)
        if self._run_dir is None or absolute(self._run_dir) not in path.parents:
            return
        if not path.exists():
            item = path.parent if path.parent.name == DATASET else path.parent.parent
            path = item / DATASET_FILE
        self._step = json.loads(path.read_text())["step"]


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """Returns the position of each slot in its segment, [rows, slots]; 0 for padding."""
    slots = np.arange(segment_ids.shape[1])
    is_first = np.diff(segment_ids, axis=1, prepend=0) != 0
    starts = np.maximum.accumulate(np.where(is_first, slots, 0), axis=1)
    return np.where(segment_ids > 0, slots - starts, 0).astype(np.int32)


def _refuse(experiment: Experiment, reasons: Mapping[str, str]) -> None:
    """Checks that fields which T5X would ignore have their defaults.

    Args:
      experiment: the experiment.
      reasons: the reason why T5X would ignore a field, by its name.

    Raises:
      DssError: if one of the fields is not the default.
    """
    for name, reason in reasons.items():
        value = operator.attrgetter(name)(experiment)
        if value != operator.attrgetter(name)(Experiment()):
            raise DssError(f"{gin_name(name)} is {value}; {reason}")


def absolute_path(path: str | Sequence[str] | None) -> str | list[str] | None:
    """Returns a path, or a list of paths, made absolute as T5X's checkpoints need it."""
    if path is None or isinstance(path, str):
        return path and str(absolute(path))
    return [str(absolute(each)) for each in path]


def mixture(experiment: Experiment) -> Mixture:
    """Returns an experiment's mixture.

    Raises:
      DssError: if there is no such mixture.
    """
    return open_mixture(experiment)


def mixture_name(experiment: Experiment, split: str = "train") -> str:
    """Registers an experiment's mixture with SeqIO; returns its name there.

    Args:
      experiment: the experiment.
      split: "train", "valid" or "test". If a task of the mixture has no data in the split, the name
        is that of the task that predicts.

    Raises:
      DssError: if there is no such mixture, or no data for the split.
    """
    registered = _registered_mixture(experiment)
    complete = len(registered.available(split).tasks) == len(registered.tasks)
    return registered.name if complete else registered.tasks[0].name


def task_name(experiment: Experiment) -> str:
    """Registers an experiment's mixture with SeqIO; returns the name of the task that predicts.

    Raises:
      DssError: if there is no such mixture.
    """
    return _registered_mixture(experiment).tasks[0].name


def _registered_mixture(experiment: Experiment) -> Mixture:
    opened = mixture(experiment)
    register_seqio(opened.dataset, alpha=experiment.alpha, vocabulary=experiment.vocabulary)
    return opened


def feature_lengths(experiment: Experiment, split: str = "valid") -> dict[str, int]:
    """Returns the tokens of a split's longest input and target, to which T5X pads.

    Args:
      experiment: the experiment, whose TASK_FEATURE_LENGTHS are the maximum.
      split: "train", "valid" or "test".

    Raises:
      DssError: if there is no such mixture, or no data for the split.
    """
    tasks = mixture(experiment).available(split).tasks
    encode = load_vocabulary(vocabulary_source(experiment.vocabulary)).encode
    lengths = {}
    for feature, limit in experiment.data.feature_lengths.items():
        texts = (getattr(row, feature) for task in tasks for row in task.rows(split))
        with_eos = (len(encode(text)) + 1 for text in texts)
        lengths[feature] = min(max(with_eos, default=limit), limit)
    return lengths


def vocabulary(experiment: Experiment) -> seqio.Vocabulary:
    """Returns an experiment's SeqIO vocabulary; see `dss.integrations.seqio_tasks`."""
    return get_vocabulary(experiment.vocabulary)


def model(experiment: Experiment, **options: Any) -> StepByStepModel:
    """Returns an experiment's T5X model.

    Args:
      experiment: the experiment.
      options: other options of `StepByStepModel`, such as `decode_fn`.

    Raises:
      DssError: if there is no mixture or student, T5X's network does not support the student, or a
        field is set that T5X would ignore.
    """
    _refuse(experiment, NOT_IN_DECODING)
    return StepByStepModel(
        mixture(experiment),
        transformer(experiment),
        vocabulary(experiment),
        vocabulary(experiment),
        optimizer(experiment),
        label_smoothing=experiment.label_smoothing,
        z_loss=experiment.z_loss,
        **options,
    )


def transformer(experiment: Experiment) -> network.Transformer:
    """Returns T5X's network for an experiment's student.

    Raises:
      DssError: if there is no student, or T5X's network does not support it.
    """
    student = experiment.config
    if student is None:
        raise DssError("no student: give `Experiment.student`, as by students/SIZE.gin")
    for name, value in FIXED.items():
        if getattr(student, name) != value:
            raise DssError(
                f"T5Config.{name} is {getattr(student, name)}; T5X's network supports only {value}"
            )
    if student.scaled_logits != student.tied_embeddings:
        raise DssError(
            "T5X's network scales the logits if the embeddings are tied, and only then: "
            f"T5Config.scaled_logits is {student.scaled_logits}, tied_embeddings is "
            f"{student.tied_embeddings}"
        )
    return network.Transformer(_network_config(experiment.resolve_student(student)))


def _network_config(student: T5Config) -> network.T5Config:
    return network.T5Config(
        vocab_size=student.vocab_size,
        dtype=student.dtype,
        emb_dim=student.d_model,
        num_heads=student.num_heads,
        num_encoder_layers=student.num_encoder_layers,
        num_decoder_layers=student.num_decoder_layers,
        head_dim=student.d_kv,
        mlp_dim=student.d_ff,
        mlp_activations=(student.activation, "linear") if student.gated else (student.activation,),
        dropout_rate=student.dropout_rate,
        logits_via_embedding=student.tied_embeddings,
    )


def optimizer(experiment: Experiment) -> Any:
    """Returns an experiment's optimizer for T5X.

    Adafactor is T5X's, with T5X's sharding of its statistics and the learning rate of
    `learning_rate`. AdamW is Optax's, which includes the schedule.
    """
    config = experiment.optimizer
    if config.name == "adafactor":
        return adafactor.Adafactor(
            decay_rate=config.decay_rate,
            global_norm_clip_threshold=config.clip_global_norm,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        )
    return optimizers.OptaxWrapper(make_optimizer(config, experiment.trainer.train_steps))


def learning_rate(experiment: Experiment) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate by step, for T5X's trainer."""
    schedule: optax.Schedule = make_schedule(experiment.optimizer, experiment.trainer.train_steps)
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def get_dataset(
    cfg: Any,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Any = None,
    *,
    experiment: Experiment,
) -> TrainIterator:
    """Returns the training batches of `dss train`, for `t5x.train`'s `get_dataset_fn`.

    Args:
      cfg: T5X's `DatasetConfig`, of which only the batch size is used.
      shard_id: index of this process's shard of the rows.
      num_shards: number of shards.
      feature_converter_cls: not used, since the batches have the model's features already.
      experiment: the experiment.

    Raises:
      DssError: if data are missing, or a field is set that T5X's trainer would ignore.
    """
    del feature_converter_cls
    _refuse(experiment, NOT_IN_TRAINING)
    experiment = dataclasses.replace(
        resolve(experiment),
        batch_size=cfg.batch_size,
        vocabulary=vocabulary_source(experiment.vocabulary),
    )
    opened, store = mixture(experiment), training_store(experiment)
    batches = training_batches(experiment, opened, store, cfg.batch_size)
    per_shard = cfg.batch_size // num_shards
    rates = opened.rates if experiment.data.batches == "paired" else None
    rows = slice(shard_id * per_shard, (shard_id + 1) * per_shard)
    return TrainIterator(batches, rates, rows, experiment.run_dir)


def parameters_only(state_dict: Any, target_state_dict: Any, *, is_resuming: bool = False) -> Any:
    """Returns a checkpoint's parameters only, or its whole state if a run resumes from it.

    For T5X's `RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch`: a run
    starts from any initial checkpoint at step 0 with a new optimizer state.
    """
    del target_state_dict
    return state_dict if is_resuming else {"target": state_dict["target"]}
