"""The plug-in for T5X: our tasks, loss and recipes under `t5x.train`, `t5x.eval` and `t5x.infer`.

`gin/t5x/` puts it together. What T5X asks for is made here from an `Experiment`, so that the gin
files of `dss train` (recipes, students, runs) say the same to both. Needs T5X; see docs/t5x.md.
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

from dss.batches.batches import Batch, Batches
from dss.config.data import open_mixture, resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_name
from dss.data.vocabulary import load_vocabulary
from dss.errors import MissingPackageError, UserError
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
        "git+https://github.com/google-research/jestimator, and what docs/t5x.md lists"
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

# What an experiment can ask for and T5X does not do, or is told in its own way: where it is set,
# it is refused with these words.
NOT_IN_TRAINING = {
    "alpha_end": "T5X's trainer keeps to ALPHA; leave variants/alpha_schedule.gin out",
    "microbatches": "T5X's own is trainer.Trainer.num_microbatches",
    "grad_dtype": "T5X's gradients are float32",
    "remat": "T5X's network keeps every activation",
    "data.packed": "T5X's rows hold packed sequences",
    "data.one_encoder_pass": (
        "T5X's decoder reads the input of its own sequence only; leave "
        "variants/one_encoder_pass.gin out"
    ),
    "eval_examples": "T5X evaluates all",
    "trainer.patience": "T5X trains all its steps",
    "trainer.log_period": "T5X's own is train.stats_period",
    "mesh.data": "T5X's own is partitioning.PjitPartitioner; leave layouts/ out",
    "mesh.model": "T5X's own is partitioning.PjitPartitioner; leave layouts/ out",
    "mesh.rules": "T5X's own are partitioning.standard_logical_axis_rules",
}
NOT_IN_DECODING = {
    "decoding.num_beams": "T5X's own is decode_fn of dss.integrations.t5x.model",
    "decoding.max_length": "T5X decodes up to the length of its targets",
    "decoding.rationale_length": "T5X decodes up to the length of its targets",
}


class StepByStepModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder with the loss of distilling step-by-step; see `dss.training.loss`.

    Its metrics have each task's loss and token accuracy, such as `label_loss`, besides T5X's own.

    Args:
      mixture: its tasks and their rates.
      module: the network.
      input_vocabulary: of the inputs.
      output_vocabulary: of the targets; the same as a rule.
      optimizer_def: T5X's optimizer.
      options: more of `EncoderDecoderModel`: `decode_fn`, `label_smoothing`, `z_loss`,
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
        """Returns the loss of a batch, and T5X's metrics of it.

        Args:
          params: the network's.
          batch: see `StepByStepFeatureConverter`. Where it has `decoder_token_weights`, what each
            target token weighs in the loss of the whole batch, those count, and the loss is the
            same in microbatches; otherwise a task's tokens are counted in the batch at hand.
          dropout_rng: None for no dropout.
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
            of_task = token_weights(counts, rates)
            weights = jnp.concatenate([jnp.zeros(1), of_task])[task_ids]
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
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        for name, values in (("loss", losses), ("token_accuracy", right)):
            sums = task_sums(values, task_ids, len(names))
            for k, task in enumerate(names):
                metrics[f"{task}_{name}"] = clu_metrics.Average(total=sums[k], count=counts[k])
        return loss, metrics


class TrainIterator(dataset_iterator.DatasetIterator):
    """The batches of `dss train`, in rows as T5X's network takes them.

    Every row holds whole sequences, as many rows as `BATCH_SIZE`; all steps have one shape. A step
    of a paired order has that many examples, each in all its views.

    Args:
      batches: the training batches, in as many groups as rows.
      rates: each task's, or None for sequences sampled by rate.
      rows: this process's.
      run_dir: the run's MODEL_DIR.
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
        largest = batches.shapes[-1]
        self._slots = {"encoder": largest.inputs, "decoder": largest.targets}

    def __next__(self) -> Batch:
        batch = self._batches[self._step]
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
        """Starts again at the first step."""
        self._step = 0

    def save(self, filename: epath.PathLike) -> None:
        """Writes how many steps were taken."""
        epath.Path(filename).write_text(json.dumps({"step": self._step}))

    def restore(self, filename: epath.PathLike) -> None:
        """Goes on from what `save` wrote, in this run's own folder.

        T5X asks for it of a run's initial checkpoint too, which says nothing of this run's data.
        An export has one file, whatever the number of processes that go on from it.
        """
        path = absolute(filename)
        if self._run_dir is None or absolute(self._run_dir) not in path.parents:
            return
        if not path.exists():
            item = path.parent if path.parent.name == DATASET else path.parent.parent
            path = item / DATASET_FILE
        self._step = json.loads(path.read_text())["step"]


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """Returns each slot's place in its segment, [rows, slots]; 0 for padding."""
    slots = np.arange(segment_ids.shape[1])
    opens = np.diff(segment_ids, axis=1, prepend=0) != 0
    starts = np.maximum.accumulate(np.where(opens, slots, 0), axis=1)
    return np.where(segment_ids > 0, slots - starts, 0).astype(np.int32)


def _refuse(experiment: Experiment, what: Mapping[str, str]) -> None:
    """Refuses what is set of an experiment and T5X would pass over.

    Args:
      experiment: the experiment.
      what: the fields, with the reason why each has no place here.

    Raises:
      UserError: if one of the fields is not as by default.
    """
    for name, why in what.items():
        value = operator.attrgetter(name)(experiment)
        if value != operator.attrgetter(name)(Experiment()):
            raise UserError(f"{gin_name(name)} is {value}; {why}")


def absolute_path(path: str | Sequence[str] | None) -> str | list[str] | None:
    """Returns a path, or each of several, that is the same in any working folder: T5X's checkpoints
    want such ones.
    """
    if path is None or isinstance(path, str):
        return path and str(absolute(path))
    return [str(absolute(each)) for each in path]


def mixture(experiment: Experiment) -> Mixture:
    """Returns an experiment's mixture.

    Raises:
      UserError: there is no such mixture.
    """
    return open_mixture(experiment)


def mixture_name(experiment: Experiment, split: str = "train") -> str:
    """Returns the SeqIO name of an experiment's mixture, having registered it.

    Args:
      experiment: names it.
      split: "train", "valid" or "test"; where not all of the mixture's tasks have data, the name is
        that of the task that predicts.

    Raises:
      UserError: there is no such mixture, or no data for the split.
    """
    found = mixture(experiment)
    register_seqio(found.dataset, alpha=experiment.alpha, vocabulary=experiment.vocabulary)
    whole = len(found.available(split).tasks) == len(found.tasks)
    return found.name if whole else found.tasks[0].name


def task_name(experiment: Experiment) -> str:
    """Returns the SeqIO name of the task that predicts, which a student is judged by.

    Raises:
      UserError: there is no such mixture.
    """
    found = mixture(experiment)
    register_seqio(found.dataset, alpha=experiment.alpha, vocabulary=experiment.vocabulary)
    return found.tasks[0].name


def feature_lengths(experiment: Experiment, split: str = "valid") -> dict[str, int]:
    """Returns the tokens of a split's longest input and target, for T5X to pad to.

    Args:
      experiment: its TASK_FEATURE_LENGTHS are the most that is returned.
      split: "train", "valid" or "test".

    Raises:
      UserError: there is no such mixture, or no data for the split.
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
    """Returns an experiment's vocabulary as SeqIO's; see `dss.integrations.seqio_tasks`."""
    return get_vocabulary(experiment.vocabulary)


def model(experiment: Experiment, **options: Any) -> StepByStepModel:
    """Returns the model of an experiment, with its loss.

    Args:
      experiment: the experiment.
      options: more of `StepByStepModel`, such as `decode_fn`.

    Raises:
      UserError: no mixture or student, or one that T5X's network cannot be.
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
      UserError: no student, or one that T5X's network cannot be.
    """
    student = experiment.config
    if student is None:
        raise UserError("no student: give --gin_file=students/SIZE.gin")
    for name, value in FIXED.items():
        if getattr(student, name) != value:
            raise UserError(
                f"T5Config.{name} is {getattr(student, name)}; T5X's network has {value}"
            )
    if student.scaled_logits != student.tied_embeddings:
        raise UserError(
            "T5X's network scales the logits where the embeddings are tied, and only there"
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
    """Returns T5X's form of an experiment's optimizer.

    Adafactor is T5X's own, with its statistics split as T5X splits them; the rate comes from
    `learning_rate`. AdamW is Optax's, which has the schedule in itself.
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
      cfg: T5X's `DatasetConfig`; its batch size counts.
      shard_id: which part of the rows this process has.
      num_shards: of how many.
      feature_converter_cls: not used: the batches are converted already.
      experiment: says everything else.

    Raises:
      UserError: the data are not there, or something is set that T5X's trainer does not do.
    """
    del feature_converter_cls
    _refuse(experiment, NOT_IN_TRAINING)
    experiment = dataclasses.replace(
        resolve(experiment),
        batch_size=cfg.batch_size,
        vocabulary=vocabulary_source(experiment.vocabulary),
    )
    found, store = mixture(experiment), training_store(experiment)
    batches = training_batches(experiment, found, store, cfg.batch_size)
    rows = cfg.batch_size // num_shards
    rates = found.rates if experiment.data.batches == "paired" else None
    part = slice(shard_id * rows, (shard_id + 1) * rows)
    return TrainIterator(batches, rates, part, experiment.run_dir)


def parameters_only(state_dict: Any, target_state_dict: Any, *, is_resuming: bool = False) -> Any:
    """Returns of a checkpoint its parameters; of one that a run resumes from, everything.

    So a run begins at step 0 with a fresh optimizer, whatever wrote its initial checkpoint; for
    T5X's `RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch`.
    """
    del target_state_dict
    return state_dict if is_resuming else {"target": state_dict["target"]}
