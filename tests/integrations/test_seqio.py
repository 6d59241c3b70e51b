"""SeqIO tasks have the examples, tokens and metrics of `dss train`."""

import shutil

import numpy as np
import pytest
import seqio

from dss.data.datasets import Dataset
from dss.data.metrics import rouge_l_mean
from dss.data.vocabulary import encode_example, load_vocabulary
from dss.errors import DssError
from dss.evaluation.evaluator import Scored, evaluation_set
from dss.integrations.seqio_tasks import get_vocabulary, register_seqio
from dss.mixtures.methods import named_mixture
from dss.mixtures.tasks import extract_label

pytestmark = pytest.mark.slow


def test_tokens_equal_those_of_dss(shared, data_root, vocab_path, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", str(vocab_path))
    import dss.tasks.anli1
    import dss.tasks.svamp

    assert "svamp_step_by_step_palm" in dss.tasks.svamp.NAMES
    assert "anli1_finetune" in dss.tasks.anli1.NAMES
    vocabulary = load_vocabulary(vocab_path)
    lengths = {"inputs": 64, "targets": 20}  # short, so that some are truncated
    for name, split, ours in (
        ("svamp_rationale_palm", "train", "train"),
        ("anli1_rationale_palm", "validation", "valid"),
        ("anli1_label_gold", "test", "test"),
    ):
        found = seqio.get_mixture_or_task(name).get_dataset(lengths, split, shuffle=False)
        rows = named_mixture(name).tasks[0].rows(ours)
        for theirs, row in zip(found.as_numpy_iterator(), rows, strict=True):
            assert theirs["inputs"].tolist() == encode_example(vocabulary, row.inputs, 64)
            assert theirs["targets"].tolist() == encode_example(vocabulary, row.targets, 20)
    mixture = seqio.get_mixture_or_task("svamp_step_by_step_palm")
    assert [rate for _, rate in sorted(mixture._task_to_rate.items())] == [0.5, 0.5]
    assert next(mixture.get_dataset(lengths, "train", seed=0).as_numpy_iterator())


def test_metrics_and_labels_of_a_users_dataset(toy, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    names = register_seqio(toy)
    assert names == register_seqio(toy)
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


def test_registering_again_replaces_only_given_values(toy, vocab_path, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")

    def registered():
        mixture = seqio.get_mixture_or_task("toy_step_by_step_rules")
        rates = dict(mixture._task_to_rate.items())
        return rates["toy_label_gold"], mixture.output_features["inputs"].vocabulary.vocab_size

    register_seqio(toy, alpha=0.5, vocabulary="bytes")
    assert registered() == (0.5, 259)
    register_seqio(toy, alpha=0.9)
    assert registered() == (0.9, 259)
    register_seqio(toy)
    assert registered() == (0.9, 259)
    register_seqio(toy, vocabulary=str(vocab_path), alpha=0.9)
    assert registered() == (0.9, 32100)
    register_seqio(toy, alpha=0.5, vocabulary="bytes")


def test_examples_are_counted(toy, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    register_seqio(toy)
    mixture = seqio.get_mixture_or_task("toy_step_by_step_rules")
    assert mixture.num_input_examples("train") == 80
    assert seqio.mixing_rate_num_examples(seqio.get_mixture_or_task("toy_label_gold")) == 40


def _written(vocabulary, answers: list[str], length: int = 64) -> np.ndarray:
    """Returns generated tokens, [N, length]: right and wrong answers, odd ids, some without EOS."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary.size + 50, size=(len(answers), length))
    for i, answer in enumerate(answers):
        if i % 5 < 3:  # tokens after EOS are ignored
            wanted = encode_example(vocabulary, answer, length)
            tokens[i, : len(wanted)] = wanted
        if i % 5 == 1:
            tokens[i, 0] = vocabulary.size + 7  # a sentinel, which has no text
        if i % 5 == 2:
            tokens[i, 1] = 2  # the unknown id, which has no text
    return tokens


def _evaluate(name: str, split: str, tokens: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns SeqIO's metrics of each task whose tokens are given, given in an odd order."""
    evaluator = seqio.Evaluator(
        name, seqio.EncDecFeatureConverter(pack=False), eval_split=split, seed=None
    )
    sizes = {len(ids): ids for ids in tokens.values()}

    def predict(dataset, model_feature_shapes=None):
        indices = [int(i) for i, features in dataset.as_numpy_iterator() if features is not None]
        return [(i, sizes[len(indices)][i]) for i in reversed(indices)]

    found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return found.result()


def test_the_evaluator_scores_equations_and_rationales_as_dss_does(
    data_root, vocab_path, monkeypatch
):
    monkeypatch.setenv("DSS_VOCABULARY", str(vocab_path))
    import dss.tasks.svamp  # noqa: F401

    vocabulary = load_vocabulary(vocab_path)
    mixture = named_mixture("svamp_step_by_step_palm")
    rows = {task.name: task.rows("test") for task in mixture.tasks}
    assert len({len(r) for r in rows.values()}) == 2, (
        "tasks are distinguished by their number of rows"
    )
    tokens = {n: _written(vocabulary, [row.targets for row in r]) for n, r in rows.items()}
    texts = {n: [vocabulary.decode(ids.tolist()) for ids in t] for n, t in tokens.items()}

    found = _evaluate(mixture.name, "test", tokens)
    label, rationale = (found[task.name] for task in mixture.tasks)
    scored = Scored.of(mixture, evaluation_set(mixture, "test"), texts["svamp_label_gold"])
    assert label == {"accuracy": pytest.approx(100 * scored.value)}
    assert 20 < label["accuracy"] < 80
    name = "svamp_rationale_palm"
    assert rationale == rouge_l_mean([row.targets for row in rows[name]], texts[name])
    explaining = named_mixture(name)
    scored = Scored.of(explaining, evaluation_set(explaining, "test"), texts[name])
    assert rationale["rouge_l"] == pytest.approx(100 * scored.value)
    assert 20 < rationale["rouge_l"] < 90


def test_the_evaluator_scores_labels_and_single_targets_as_dss_does(toy, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    register_seqio(toy)
    vocabulary = load_vocabulary("bytes")
    for name, end in (("toy_finetune", ""), ("toy_single_target_rules", "so. So the answer is ")):
        mixture = named_mixture(name, [toy])
        answers = [end + ("yes" if i % 2 else "no") for i in range(8)]
        tokens = _written(vocabulary, answers)
        texts = [extract_label(vocabulary.decode(ids.tolist())) for ids in tokens]
        found = _evaluate(name, "validation", {name: tokens})
        scored = Scored.of(mixture, evaluation_set(mixture, "valid"), texts)
        assert found == {mixture.tasks[0].name: {"accuracy": 100 * scored.value}}
        assert 0 < scored.value < 1


def test_a_task_has_the_splits_whose_files_exist(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    folder = tmp_path / "part"
    shutil.copytree(toy_folder, folder)
    (folder / "test.rules.jsonl").unlink()
    (folder / "valid.rules.jsonl").write_text("")
    register_seqio(Dataset.from_files(folder, name="part"))
    mixture = seqio.get_mixture_or_task("part_step_by_step_rules")
    assert [list(task.splits) for task in mixture.tasks] == [
        ["train", "validation", "test"],
        ["train", "validation"],
    ]
    tokens = _written(load_vocabulary("bytes"), ["yes"] * 8)
    assert list(_evaluate(mixture.name, "test", {"": tokens})) == ["part_label_gold"]
    rationales = seqio.get_mixture_or_task("part_rationale_rules")
    assert not list(rationales.get_dataset({"inputs": 8, "targets": 8}, "validation"))
    shutil.rmtree(folder)
    with pytest.raises(DssError, match="no such file; dataset 'part' needs it for train"):
        rationales.get_dataset({"inputs": 8, "targets": 8}, "train")


def test_registering_again_without_a_root_keeps_files_rates_and_vocabulary(small_root):
    rooted = Dataset.released("asdiv", small_root)
    register_seqio(rooted, alpha=0.3, vocabulary="bytes")
    register_seqio(Dataset.released("asdiv"))
    task = seqio.TaskRegistry.get("asdiv_label_gold")
    assert len(task.source.task.rows("train")) == 18
    mixture = seqio.MixtureRegistry.get("asdiv_step_by_step_palm")
    assert [float(mixture.get_rate(t)) for t in mixture.tasks] == [0.3, 0.7]
    moved = Dataset.released("asdiv", small_root.parent)
    register_seqio(moved)
    task = seqio.TaskRegistry.get("asdiv_label_gold")
    assert task.source.task.dataset == moved
    assert task.output_features["inputs"].vocabulary == get_vocabulary("bytes")
    mixture = seqio.MixtureRegistry.get("asdiv_step_by_step_palm")
    assert [float(mixture.get_rate(t)) for t in mixture.tasks] == [0.3, 0.7]
