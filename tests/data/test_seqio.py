"""The SeqIO tasks read what `dss train` reads; they need TensorFlow, which loads slowly."""

import numpy as np
import seqio

from dss.data import registry
from dss.data.tasks import get_mixture
from dss.data.vocabulary import encode_example, load_vocabulary


def test_tokens_are_those_of_the_token_store(shared, data_root, vocab_path, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", str(vocab_path))
    import tasks.anli1
    import tasks.svamp

    assert "svamp_step_by_step_palm" in tasks.svamp.NAMES
    assert "anli1_finetune" in tasks.anli1.NAMES
    vocabulary = load_vocabulary(vocab_path)
    lengths = {"inputs": 64, "targets": 20}  # short, so that some are cut
    for name, split, ours in (
        ("svamp_rationale_palm", "train", "train"),
        ("anli1_rationale_palm", "validation", "valid"),
        ("anli1_label_gold", "test", "test"),
    ):
        found = seqio.get_mixture_or_task(name).get_dataset(lengths, split, shuffle=False)
        rows = get_mixture(name).tasks[0].rows(ours)
        for theirs, row in zip(found.as_numpy_iterator(), rows, strict=True):
            assert theirs["inputs"].tolist() == encode_example(vocabulary, row.inputs, 64)
            assert theirs["targets"].tolist() == encode_example(vocabulary, row.targets, 20)
    mixture = seqio.get_mixture_or_task("svamp_step_by_step_palm")
    assert [rate for _, rate in sorted(mixture._task_to_rate.items())] == [0.5, 0.5]
    assert next(mixture.get_dataset(lengths, "train", seed=0).as_numpy_iterator())


def test_metrics_and_labels_of_a_users_dataset(toy, monkeypatch):
    from dss.data import seqio_tasks

    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    names = seqio_tasks.register_seqio("toy")
    assert names == seqio_tasks.register_seqio("toy")
    task = seqio.get_mixture_or_task("toy_label_gold")
    assert task.metric_fns[0](["yes", "no"], ["yes", "yes"]) == {"accuracy": 50.0}
    single = seqio.get_mixture_or_task("toy_rationale_then_label_rules")
    assert single.postprocess_fn("because. So the answer is no") == "no"
    rationale = seqio.get_mixture_or_task("toy_rationale_rules")
    assert rationale.metric_fns[0](["a b"], ["a b"]) == {"rouge_l": 100.0}
    row = next(
        task.get_dataset({"inputs": 64, "targets": 8}, "test", shuffle=False).as_numpy_iterator()
    )
    wanted = encode_example(load_vocabulary("bytes"), "predict: is 0 good", 64)
    np.testing.assert_array_equal(row["inputs"], wanted)


def test_the_tfds_builder_makes_a_versioned_dataset_with_statistics(
    small_root, toy_folder, tmp_path
):
    import tensorflow_datasets as tfds

    from dss.data.step_by_step import StepByStep

    for config, source, rows in (("esnli", small_root, 20), ("jsonl", toy_folder, 40)):
        builder = StepByStep(config=config, data_dir=tmp_path)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=source)
        )
        assert str(builder.info.version) == "1.0.0"
        assert builder.info.splits["train"].num_examples == rows
        statistics = builder.info.metadata["train"]
        assert statistics["labelled"] == rows
        for teacher in statistics["teachers"].values():
            assert teacher["statuses"] == {"ok": rows}
        read = list(tfds.as_numpy(builder.as_dataset("train")))
        assert all(len(row["outputs"]["rationale"]) for row in read)
    registry.set_data_root(None)
