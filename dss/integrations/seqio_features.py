"""SeqIO's encoder-decoder features, with the task of each target token added.

Two sequences, `predict: a` -> `x` and `explain: b` -> `y z`, packed (1 is EOS, 0 padding):

    encoder_input_tokens   predict : a 1 explain : b 1 0 0
    decoder_target_tokens  x 1 y z 1 0
    decoder_task_ids       1 1 2 2 2 0     1 + the target's task in the mixture

and SeqIO's own segment ids, positions and loss weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dss.errors import missing_package

try:
    import seqio
    import tensorflow as tf
except ModuleNotFoundError as error:
    raise missing_package("the SeqIO integration", error.name, "seqio") from None

__all__ = ["StepByStepFeatureConverter"]


class StepByStepFeatureConverter(seqio.EncDecFeatureConverter):
    """SeqIO's converter for encoder-decoders, with the task of each target token added.

    `decoder_task_ids`, packed like the targets, is 1 + the task's index in the mixture, or 0 for
    padding. The task of a sequence is the one whose prefix its input begins with, since that prefix
    distinguishes tasks for the student too.

    Args:
      prefixes: the token ids of each task's prefix.
      options: options of `seqio.EncDecFeatureConverter`.
    """

    MODEL_FEATURES = {  # noqa: RUF012  as SeqIO's converters declare theirs
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "decoder_task_ids": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }

    def __init__(self, *, prefixes: Sequence[Sequence[int]], **options: Any):
        super().__init__(**options)
        self._prefixes = prefixes

    def _with_task(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        inputs, targets = features["inputs"], features["targets"]
        task = tf.zeros([], tf.int32)
        for k, prefix in reversed(list(enumerate(self._prefixes))):
            head = inputs[: len(prefix)]
            has_prefix = tf.size(head) == len(prefix)
            has_prefix &= tf.reduce_all(head == tf.constant(prefix)[: tf.size(head)])
            task = tf.where(has_prefix, k + 1, task)
        tf.debugging.assert_positive(task, "an input without the prefix of any task")
        return {**features, "task_ids": task * tf.ones_like(targets)}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = {**task_feature_lengths, "task_ids": task_feature_lengths["targets"]}
        ds = self._pack_or_pad(ds.map(self._with_task), lengths)
        return ds.map(self._convert_example, num_parallel_calls=tf.data.AUTOTUNE)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        return {
            **super()._convert_example(features),
            "decoder_task_ids": features["task_ids"],
        }

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Returns the length of each feature of the model."""
        lengths = dict(super().get_model_feature_lengths(task_feature_lengths))
        return {**lengths, "decoder_task_ids": task_feature_lengths["targets"]}
