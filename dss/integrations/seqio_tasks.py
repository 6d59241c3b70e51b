"""Registers tasks and mixtures with SeqIO, for tools that use them by name.

Examples, token ids and metrics are those of `dss train`. The environment variable DSS_DATA_ROOT is
the folder of the released data, and DSS_VOCABULARY the default vocabulary: a SentencePiece file or
"bytes"; if unset, T5's vocabulary on Google Cloud. Both are resolved when a task is first read.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dss.data.datasets import Dataset
from dss.data.metrics import equation_accuracy, rouge_l_mean, text_accuracy
from dss.data.released import ReleasedSource
from dss.data.vocabulary import (
    BYTES,
    EOS,
    EOS_TEXT,
    T5_VOCABULARY,
    Vocabulary,
    load_vocabulary,
)
from dss.errors import missing_package
from dss.mixtures.methods import mixture_names, named_mixture
from dss.mixtures.tasks import Task, extract_label

try:
    import seqio
    import tensorflow as tf
except ModuleNotFoundError as error:
    raise missing_package("the SeqIO integration", error.name, "seqio") from None

__all__ = ["SPLITS", "get_vocabulary", "register_seqio", "vocabulary_source"]

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # SeqIO's name -> dss's
EXTRA_IDS = 100  # T5's sentinels
METRIC_FNS = {"text": text_accuracy, "equation": equation_accuracy}


class _DssEncoding:
    """Encodes and decodes as `dss train` does.

    A `</s>` in a text is the EOS id, and the parts between them are encoded separately.
    """

    @property
    def _dss(self) -> Vocabulary:
        return load_vocabulary(getattr(self, "sentencepiece_model_file", BYTES))

    def _encode(self, s: str) -> Sequence[int]:
        return self._dss.encode(s)

    def decode(self, ids: Iterable[int]) -> str:
        return self._dss.decode(np.asarray(ids).tolist())

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        encode = super()._encode_tf  # type: ignore[misc]
        ids = tf.map_fn(
            lambda part: tf.concat([encode(part), [EOS]], axis=0),
            tf.strings.split(s, EOS_TEXT),
            fn_output_signature=tf.RaggedTensorSpec([None], tf.int32),
        )
        return ids.flat_values[:-1]


class _SentencePiece(_DssEncoding, seqio.SentencePieceVocabulary):
    pass


class _Bytes(_DssEncoding, seqio.ByteVocabulary):
    pass


def vocabulary_source(source: str | None = None) -> str:
    """Returns the SentencePiece file, or "bytes", of a vocabulary; by default DSS_VOCABULARY's."""
    return source or os.environ.get("DSS_VOCABULARY", T5_VOCABULARY)


@functools.lru_cache(maxsize=4)
def _vocabulary(source: str) -> seqio.Vocabulary:
    return _Bytes() if source == BYTES else _SentencePiece(source, extra_ids=EXTRA_IDS)


def get_vocabulary(source: str | None = None) -> seqio.Vocabulary:
    """Returns the SeqIO vocabulary of a source, see `vocabulary_source`."""
    return _vocabulary(vocabulary_source(source))


class _Source(seqio.FunctionDataSource):
    """A task's rows, in the splits whose files exist when `splits` is read."""

    def __init__(self, task: Task):
        self.task = task
        super().__init__(self._rows, splits=tuple(SPLITS))

    @property
    def splits(self) -> Sequence[str]:
        """Splits whose files exist; all if none do, so that reading one names the missing file."""
        existing = [name for name, split in SPLITS.items() if self.task.has(split)]
        return existing or list(SPLITS)

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of rows of a split; None if its files do not exist."""
        dss_split = SPLITS[split]
        return len(self.task.rows(dss_split)) if self.task.has(dss_split) else None

    def _rows(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # rows are in memory; SeqIO shuffles them later
        rows = self.task.rows(SPLITS[split])
        columns = {n: [getattr(row, n) for row in rows] for n in ("id", "inputs", "targets")}
        texts = {name: tf.constant(column, tf.string) for name, column in columns.items()}
        return tf.data.Dataset.from_tensor_slices(texts)


def _metric(task: Task) -> Callable:
    return rouge_l_mean if task.kind == "rationale" else METRIC_FNS[task.dataset.labels.metric]


def _label_of(text: str, **_: object) -> str:
    return extract_label(text)


def _add_task(task: Task, vocabulary: seqio.Vocabulary) -> None:
    seqio.TaskRegistry.add(
        task.name,
        source=_Source(task),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=True),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        postprocess_fn=_label_of if task.kind == "rationale_then_label" else None,
        metric_fns=[_metric(task)],
    )


def _has_files_of(registered: seqio.Task, task: Task) -> bool:
    """Returns whether a registered task reads the files of a task.

    A released dataset without a root has whatever files the registered one has.
    """
    if not isinstance(registered.source, _Source):
        return False
    source, other = task.dataset.source, registered.source.task
    if isinstance(source, ReleasedSource) and source.root is None:
        return isinstance(other.dataset.source, ReleasedSource)
    return other == task


def register_seqio(
    dataset: Dataset, *, alpha: float | None = None, vocabulary: str | None = None
) -> list[str]:
    """Registers all tasks and mixtures of a dataset.

    A registered one is replaced only if its files are others, or if another alpha or vocabulary is
    given.

    Args:
      dataset: the dataset.
      alpha: rate of the label task in mixtures of two tasks; None keeps the registered rate, or
        0.5.
      vocabulary: vocabulary of inputs and targets; None keeps the registered one, or see
        `vocabulary_source`.

    Returns:
      The names of the mixtures.

    Raises:
      DssError: if the teachers' names give two mixtures the same name.
    """
    names = mixture_names(dataset)
    mixtures = [named_mixture(n, [dataset], 0.5 if alpha is None else alpha) for n in names]
    added = set()
    for task in {task.name: task for mixture in mixtures for task in mixture.tasks}.values():
        if task.name in seqio.TaskRegistry.names():
            registered = seqio.TaskRegistry.get(task.name)
            current = registered.output_features["inputs"].vocabulary
            wanted = current if vocabulary is None else get_vocabulary(vocabulary)
            if _has_files_of(registered, task) and current == wanted:
                continue
            seqio.TaskRegistry.remove(task.name)
        else:
            wanted = get_vocabulary(vocabulary)
        _add_task(task, wanted)
        added.add(task.name)
    for mixture in mixtures:
        is_new = alpha is not None or any(task.name in added for task in mixture.tasks)
        rates = mixture.rates
        if is_new and mixture.name in seqio.MixtureRegistry.names():
            if alpha is None:
                registered = seqio.MixtureRegistry.get(mixture.name)
                rates = tuple(float(registered.get_rate(task)) for task in registered.tasks)
            seqio.MixtureRegistry.remove(mixture.name)
        registered_names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
        if mixture.name not in registered_names:
            pairs = [(t.name, r) for t, r in zip(mixture.tasks, rates, strict=True)]
            seqio.MixtureRegistry.add(mixture.name, pairs)
    return names
