"""The tasks and mixtures as SeqIO objects, for every tool that takes them by name.

The rows, the ids of their tokens and the metrics are those of `dss train`. When a task is first
read, the environment variable DSS_DATA_ROOT gives the released data, and DSS_VOCABULARY the
vocabulary, a SentencePiece file or "bytes"; without it T5's vocabulary on Google Cloud.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dss.data.datasets import Dataset
from dss.data.metrics import equation_accuracy, rouge_l_mean, text_accuracy
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

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # SeqIO's names of ours
EXTRA_IDS = 100  # T5's sentinels
METRIC_FNS = {"text": text_accuracy, "equation": equation_accuracy}


class _AsDss:
    """Encodes and decodes as `dss train` does: a `</s>` in a text is the EOS id, and what is
    between two of them is encoded on its own.
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


class _SentencePiece(_AsDss, seqio.SentencePieceVocabulary):
    pass


class _Bytes(_AsDss, seqio.ByteVocabulary):
    pass


def vocabulary_source(source: str | None = None) -> str:
    """Returns a vocabulary's SentencePiece file or "bytes"; what None means, the module says."""
    return source or os.environ.get("DSS_VOCABULARY", T5_VOCABULARY)


@functools.lru_cache(maxsize=4)
def _vocabulary(source: str) -> seqio.Vocabulary:
    return _Bytes() if source == BYTES else _SentencePiece(source, extra_ids=EXTRA_IDS)


def get_vocabulary(source: str | None = None) -> seqio.Vocabulary:
    """Returns the SeqIO vocabulary of a SentencePiece file or of "bytes"; see the module."""
    return _vocabulary(vocabulary_source(source))


class _Source(seqio.FunctionDataSource):
    """A task's rows. Its splits are those whose files are there when it is asked."""

    def __init__(self, task: Task):
        self.task = task
        super().__init__(self._rows, splits=tuple(SPLITS))

    @property
    def splits(self) -> Sequence[str]:
        """The splits that there are; where there is none, all, so that reading says what lacks."""
        return [s for s, ours in SPLITS.items() if self.task.has(ours)] or list(SPLITS)

    def num_input_examples(self, split: str) -> int | None:
        """Returns how many rows a split has; None where its files are not there."""
        ours = SPLITS[split]
        return len(self.task.rows(ours)) if self.task.has(ours) else None

    def _rows(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # the rows are few; SeqIO shuffles them later
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


def register_seqio(
    dataset: Dataset, *, alpha: float | None = None, vocabulary: str | None = None
) -> list[str]:
    """Registers every task and mixture of a dataset.

    Those that are registered stay, unless they are of other files, or another alpha or vocabulary
    is given than theirs.

    Args:
      dataset: the dataset.
      alpha: rate of the label task in the mixtures of two; None: as registered, or 0.5.
      vocabulary: of inputs and targets; None: as registered, or see `vocabulary_source`.

    Returns:
      Their names.

    Raises:
      UserError: if one name is that of two mixtures, by the names of the teachers.
    """
    names = mixture_names(dataset)
    mixtures = [named_mixture(n, [dataset], 0.5 if alpha is None else alpha) for n in names]
    renewed = set()
    for task in {task.name: task for mixture in mixtures for task in mixture.tasks}.values():
        if task.name in seqio.TaskRegistry.names():
            found = seqio.TaskRegistry.get(task.name)
            known = found.output_features["inputs"].vocabulary
            same = isinstance(found.source, _Source) and found.source.task == task
            if same and (vocabulary is None or known == get_vocabulary(vocabulary)):
                continue
            seqio.TaskRegistry.remove(task.name)
        _add_task(task, get_vocabulary(vocabulary))
        renewed.add(task.name)
    for mixture in mixtures:
        is_new = alpha is not None or any(task.name in renewed for task in mixture.tasks)
        if is_new and mixture.name in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.remove(mixture.name)
        known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
        if mixture.name not in known:
            rates = [(t.name, r) for t, r in zip(mixture.tasks, mixture.rates, strict=True)]
            seqio.MixtureRegistry.add(mixture.name, rates)
    return names
