import numpy as np
import pytest
import seqio
import tensorflow as tf

from dss.integrations.seqio_features import StepByStepFeatureConverter
from dss.integrations.seqio_tasks import get_vocabulary, register_seqio
from dss.mixtures.tasks import EXPLAIN, PREDICT

PREFIXES = [[7, 3], [8, 3]]  # "predict :", "explain :"
LENGTHS = {"inputs": 10, "targets": 7}


def convert(rows, **options):
    """Returns the features of (inputs, targets) rows."""
    features = {"inputs": tf.int32, "targets": tf.int32}
    spec = {name: tf.TensorSpec([None], dtype) for name, dtype in features.items()}
    ds = tf.data.Dataset.from_generator(
        lambda: ({"inputs": i, "targets": t} for i, t in rows), output_signature=spec
    )
    converter = StepByStepFeatureConverter(prefixes=PREFIXES, **options)
    return [
        {name: array.tolist() for name, array in row.items()}
        for row in converter(ds, LENGTHS).as_numpy_iterator()
    ]


def test_packed_targets_have_their_tasks():
    (row,) = convert([([7, 3, 5, 1], [9, 1]), ([8, 3, 6, 1], [4, 5, 1])])
    assert row["decoder_target_tokens"] == [9, 1, 4, 5, 1, 0, 0]
    assert row["decoder_task_ids"] == [1, 1, 2, 2, 2, 0, 0]
    assert row["decoder_segment_ids"] == [1, 1, 2, 2, 2, 0, 0]
    assert row["encoder_input_tokens"] == [7, 3, 5, 1, 8, 3, 6, 1, 0, 0]


def test_unpacked_targets_have_their_tasks():
    rows = convert([([8, 3, 6, 1], [4, 1]), ([7, 3, 5, 1], [9, 1])], pack=False)
    assert [row["decoder_task_ids"] for row in rows] == [[2, 2, 0, 0, 0, 0, 0], [1, 1] + [0] * 5]
    assert "decoder_segment_ids" not in rows[0]


@pytest.mark.parametrize("inputs", [[5, 3, 6, 1], [7, 1], [7]])
def test_an_input_of_no_task_is_refused(inputs):
    with pytest.raises(tf.errors.InvalidArgumentError, match="without the prefix of any task"):
        convert([(inputs, [4, 1])])


def test_a_mixture_packs_every_row_with_its_task(toy, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    register_seqio(toy)
    vocabulary = get_vocabulary()
    prefixes = [vocabulary.encode(prefix.rstrip()) for prefix in (PREDICT, EXPLAIN)]
    ds = seqio.get_dataset(
        "toy_step_by_step_rules",
        {"inputs": 64, "targets": 32},
        StepByStepFeatureConverter(prefixes=prefixes),
        num_epochs=1,
    )
    seen = {1: set(), 2: set()}
    for row in ds.as_numpy_iterator():
        for segment in range(1, row["decoder_segment_ids"].max() + 1):
            in_segment = row["decoder_segment_ids"] == segment
            (task,) = np.unique(row["decoder_task_ids"][in_segment])
            seen[task].add(vocabulary.decode(row["decoder_target_tokens"][in_segment].tolist()))
    assert {text.removesuffix("</s>") for text in seen[1]} == {"yes", "no"}
    assert all(" mod 3" in text for text in seen[2])
