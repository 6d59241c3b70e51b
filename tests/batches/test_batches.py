import jax
import numpy as np
import pytest

from dss.batches.batches import Batches, iterate
from dss.batches.order import Order, Sequences, paired_order, sampled_order, sequential_order
from dss.batches.packing import PackedShape, RowWidths
from dss.batches.store import Ragged, TaskTokens, TokenStore, open_store, tokenize
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.mixtures.tasks import TextRow

ROWS = ("encoder", "decoder", "cross")


class Letters:
    """A vocabulary of a=3, b=4, ..."""

    size, fingerprint = 30, "letters"

    def encode(self, text):
        return [ord(c) - ord("a") + 3 for c in text]


@pytest.fixture
def store() -> TokenStore:
    labels = [TextRow("1", "pa", "x"), TextRow("2", "pb", "y")]
    rationales = [TextRow("1", "ea", "zz")]  # example 2 has none
    return tokenize([labels, rationales], Letters(), inputs_length=8, targets_length=8)


def test_packed_batch(store):
    batches = Batches(store, sequential_order(store, 2), num_steps=1)
    batches.shapes = (PackedShape(11, 8, input_rows=2, target_rows=2, widths=RowWidths(6, 5, 9)),)
    batch = {name: array[0].tolist() for name, array in batches[0].as_dict().items()}
    assert batch == {
        "encoder_input_tokens": [18, 3, 1, 7, 3, 1, 18, 4, 1, 0, 0],
        "encoder_segment_ids": [1] * 3 + [2] * 3 + [3] * 3 + [0] * 2,
        "decoder_target_tokens": [26, 1, 28, 28, 1, 27, 1, 0],
        "decoder_input_tokens": [0, 26, 0, 28, 28, 0, 27, 0],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 3, 3, 0],
        "decoder_task_ids": [1, 1, 2, 2, 2, 1, 1, 0],
        "encoder_rows": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 11, 11, 11]],
        "decoder_rows": [[0, 1, 2, 3, 4], [5, 6, 8, 8, 8]],
        "cross_rows": [[0, 1, 2, 3, 4, 5, 11, 11, 11], [6, 7, 8] + [11] * 6],
    }
    assert batches[0].fill == (9 / 11, 7 / 8)


def test_packed_batch_with_one_encoder_pass():
    labels = [TextRow("1", "pa", "x"), TextRow("2", "pb", "y"), TextRow("3", "pc", "w")]
    rationales = [TextRow("1", "pa", "zz"), TextRow("3", "pc", "v")]
    store = tokenize([labels, rationales], Letters(), inputs_length=8, targets_length=8)
    batches = Batches(store, sequential_order(store, 3), num_steps=1, starts=(0, 29))
    batches.shapes = (PackedShape(10, 13, input_rows=2, target_rows=2, widths=RowWidths(6, 7, 9)),)
    batch = {name: array[0].tolist() for name, array in batches[0].as_dict().items()}
    assert batch == {
        "encoder_input_tokens": [18, 3, 1, 18, 4, 1, 18, 5, 1, 0],
        "encoder_segment_ids": [1] * 3 + [2] * 3 + [3] * 3 + [0],
        "decoder_target_tokens": [26, 1, 28, 28, 1, 27, 1, 25, 1, 24, 1, 0, 0],
        "decoder_input_tokens": [0, 26, 29, 28, 28, 0, 27, 0, 25, 29, 24, 0, 0],
        "decoder_segment_ids": [1, 1, 2, 2, 2, 3, 3, 5, 5, 6, 6, 0, 0],
        "decoder_task_ids": [1, 1, 2, 2, 2, 1, 1, 1, 1, 2, 2, 0, 0],
        "decoder_reads": [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0],
        "encoder_rows": [[0, 1, 2, 3, 4, 5], [6, 7, 8, 10, 10, 10]],
        "decoder_rows": [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 13, 13, 13]],
        "cross_rows": [[0, 1, 2, 3, 4, 5, 10, 10, 10], [6, 7, 8] + [10] * 6],
    }
    assert batches[0].fill == (9 / 10, 11 / 13)
    inputs, targets, reads = (array.tolist() for array in batches.lengths(0))
    assert (inputs, targets, reads) == ([3, 3, 3], [2, 3, 2, 2, 2], [0, 0, 1, 2, 2])


def test_a_step_without_a_sequence_is_an_empty_batch(store):
    nothing = np.zeros((3, 0), np.int64)
    batches = Batches(store, Order(lambda step: Sequences(*nothing), most=2), num_steps=1, groups=2)
    assert batches[0].fill == (0, 0)
    assert batches[0].encoder_rows.min() == batches.shapes[0].inputs  # no slot is read


def test_unpacked_rows_hold_one_sequence(store):
    batch = Batches(store, sequential_order(store, 2), num_steps=1, packed=False)[0]
    assert batch.encoder_input_tokens[:3].tolist() == [[18, 3, 1], [7, 3, 1], [18, 4, 1]]
    assert batch.encoder_segment_ids.max() == 1
    assert batch.decoder_task_ids[3:].sum() == 0


@pytest.fixture
def toy_store(toy):
    mixture = named_mixture("toy_step_by_step_rules", [toy])
    return open_store(
        mixture, "train", load_vocabulary("bytes"), inputs_length=64, targets_length=32
    )


def _texts(batch) -> set[tuple[int, ...]]:
    """Returns the input sequences of a batch, in no order."""
    out = set()
    for tokens, segments in zip(batch.encoder_input_tokens, batch.encoder_segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            out.add(tuple(tokens[segments == segment]))
    return out


def test_an_epoch_has_every_sequence_once_and_packing_changes_none(toy_store):
    order = paired_order(toy_store, 8, seed=1)
    packed = Batches(toy_store, order, num_steps=5)
    unpacked = Batches(toy_store, order, num_steps=5, packed=False)
    seen: set = set()
    for step in range(5):
        sequences = _texts(packed[step])
        assert sequences == _texts(unpacked[step])
        assert len(sequences) == 16
        assert not seen & sequences
        seen |= sequences
    assert len(seen) == 80


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_read_every_slot_once_and_cross_rows_its_inputs(toy_store, groups):
    batches = Batches(toy_store, paired_order(toy_store, 8, seed=1), num_steps=5, groups=groups)
    for step in range(5):
        arrays = batches[step].as_dict()
        for g in range(groups):
            found = {
                side: (arrays[f"{side}_rows"][g], np.append(arrays[f"{over}_segment_ids"][g], 0))
                for side, over in zip(ROWS, ("encoder", "decoder", "encoder"), strict=True)
            }
            for side in ("encoder", "decoder"):
                slots, segments = found[side]
                read = np.sort(slots[segments[slots] > 0])
                assert read.tolist() == np.flatnonzero(segments).tolist()
            decoder, cross = found["decoder"], found["cross"]
            for own, over in zip(decoder[1][decoder[0]], cross[0], strict=True):
                wanted = np.flatnonzero(np.isin(cross[1][:-1], own[own > 0]))
                assert sorted(over[over < len(cross[1]) - 1]) == wanted.tolist()


def test_a_batch_is_a_function_of_seed_and_step(toy_store):
    order = paired_order(toy_store, 8, seed=1)
    batches = Batches(toy_store, order, num_steps=12, groups=4)
    resumed = list(iterate(batches, start=9))
    assert len(resumed) == 3
    jax.tree.map(np.testing.assert_array_equal, resumed[0], batches[9])
    other = Batches(toy_store, paired_order(toy_store, 8, seed=2), num_steps=12)
    assert _texts(other[0]) != _texts(batches[0])
    assert {shape[0] for shape in resumed[0].shapes} == {4}
    assert len(batches.shapes) <= 3
    with pytest.raises(IndexError):
        batches[12]


def test_steps_of_an_epoch_have_nearly_equal_numbers_of_tokens():
    rng = np.random.default_rng(0)
    rows = [
        [TextRow(str(i), "p" * rng.integers(20, 90), "x" * rng.integers(1, 40)) for i in range(320)]
        for _ in range(2)
    ]
    store = tokenize(rows, Letters(), inputs_length=100, targets_length=100)
    order = paired_order(store, 10, seed=0)
    steps = [order(step) for step in range(64)]  # two epochs
    examples = [step.rows[step.tasks == 0] for step in steps]
    for epoch in (examples[:32], examples[32:]):
        assert np.sort(np.stack(epoch), axis=None).tolist() == list(range(320))
    assert (
        len({tuple(sorted(step)) for step in examples}) == 64
    )  # the second epoch has other batches
    tokens = np.stack([store.lengths(*step[:2]).sum(axis=0) for step in steps])
    assert (tokens.std(axis=0) < 0.03 * tokens.mean(axis=0)).all()
    resumed = paired_order(store, 10, seed=0)(37)
    np.testing.assert_array_equal(resumed.rows, steps[37].rows)


def test_epochs_that_end_within_a_step_have_every_example_once(toy_store):
    order = paired_order(toy_store, 7, seed=1)  # of 40 examples: epochs end within steps
    rows = np.concatenate([s.rows[s.tasks == 0] for s in map(order, range(40))])
    for epoch in rows.reshape(7, 40):
        assert np.sort(epoch).tolist() == list(range(40))


def test_sampling_follows_the_rates(toy_store):
    order = sampled_order(toy_store, 10, seed=0, rates=(0.3, 0.7))
    counts = np.zeros(2)
    for step in range(20):
        tasks, _, _ = order(step)
        assert len(tasks) == 10
        counts += np.bincount(tasks, minlength=2)
    assert counts.tolist() == [60, 140]
    tasks, _, _ = sampled_order(toy_store, 10, seed=0, rates=(1.0, 0.0))(3)
    assert tasks.tolist() == [0] * 10


def test_a_store_is_read_back_from_the_cache_and_keyed_by_its_settings(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("DSS_CACHE", str(tmp_path))
    mixture, bytes_ = named_mixture("toy_step_by_step_rules", [toy]), load_vocabulary("bytes")
    lengths = {"inputs_length": 64, "targets_length": 32}
    first = open_store(mixture, "train", bytes_, **lengths)
    again = open_store(mixture, "train", bytes_, **lengths)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert first.ids == again.ids
    np.testing.assert_array_equal(first.tasks[1].targets.tokens, again.tasks[1].targets.tokens)
    half = open_store(mixture, "train", bytes_, fraction=0.5, **lengths)
    assert len(half) == 20
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def is_cut(vocabulary, row, limit):
    return any(len(vocabulary.encode(text)) + 1 > limit for text in (row.inputs, row.targets))


def test_a_store_counts_truncated_and_unparsed_rows(data_root, vocab_path):
    mixture, vocabulary = named_mixture("svamp_step_by_step_palm"), load_vocabulary(vocab_path)
    store = open_store(mixture, "train", vocabulary, inputs_length=40, targets_length=40)
    for task, tokens in zip(mixture.tasks, store.tasks, strict=True):
        rows = task.rows("train")
        for side, ragged in (("inputs", tokens.inputs), ("targets", tokens.targets)):
            lengths = [len(vocabulary.encode(getattr(row, side))) + 1 for row in rows]
            assert ragged.num_cut == sum(length > 40 for length in lengths)
    label, rationale = (tokens.ledger for tokens in store.tasks)
    assert label.rows == rationale.rows == 800
    assert sum(label.fates.values()) == sum(rationale.fates.values()) == 800
    assert rationale.fates["unparsed"] == 12
    assert label.fates["in another split"] == rationale.fates["in another split"] == 80
    cut = {r.id for r in mixture.tasks[0].rows("train") if is_cut(vocabulary, r, 40)}
    assert label.fates["truncated"] == len(cut) > 0


def test_a_store_depends_on_the_held_out_tenth_and_the_label_set(toy_folder, tmp_path):
    import shutil

    from dss.data.datasets import Dataset

    folder = tmp_path / "mine"
    shutil.copytree(toy_folder, folder)

    def train_ids(**options) -> set[str]:
        mine = Dataset.from_files(folder, name="mine", **options)
        mixture = named_mixture("mine_finetune", [mine])
        return set(
            open_store(
                mixture, "train", load_vocabulary("bytes"), inputs_length=64, targets_length=32
            ).ids
        )

    assert len(train_ids()) == 40
    with pytest.raises(DssError, match=r"train.jsonl:1: label 'no' is not one of yes"):
        train_ids(labels=("yes",))
    (folder / "valid.jsonl").unlink()
    assert len(train_ids()) == 36


def test_a_validation_split_may_lack_rationales(toy_folder, tmp_path):
    import shutil

    from dss.data.datasets import Dataset

    folder = tmp_path / "mine"
    shutil.copytree(toy_folder, folder)
    (folder / "valid.rules.jsonl").write_text("")
    mine = Dataset.from_files(folder, name="mine")
    mixture, lengths = (
        named_mixture("mine_step_by_step_rules", [mine]),
        dict.fromkeys(("inputs_length", "targets_length"), 64),
    )
    valid = open_store(mixture, "valid", load_vocabulary("bytes"), **lengths)
    assert (valid.rows[:, 1] == -1).all()
    batch = Batches(valid, sequential_order(valid, 4), num_steps=2)[1]
    assert set(np.unique(batch.decoder_task_ids)) == {0, 1}


def test_a_task_without_rows_is_an_error(tmp_path):
    from dss.data.datasets import Dataset
    from tests.conftest import write_jsonl

    write_jsonl(tmp_path / "train.jsonl", [{"id": "a", "input": "x"}])
    write_jsonl(tmp_path / "valid.jsonl", [{"id": "a", "input": "x"}])
    bare = Dataset.from_files(tmp_path, name="bare")
    with pytest.raises(DssError, match="bare_label_gold: no train rows"):
        open_store(
            named_mixture("bare_finetune", [bare]),
            "train",
            load_vocabulary("bytes"),
            inputs_length=8,
            targets_length=8,
        )


def test_steps_outside_the_sample_of_shapes_fit_too():
    """The shapes of a long run are chosen from some steps; every other step has a shape as well."""
    rng = np.random.default_rng(0)
    sides = [
        Ragged(np.ones(lengths.sum(), np.int32), np.concatenate([[0], lengths.cumsum()]))
        for lengths in (rng.integers(2, 30, 400), rng.integers(2, 12, 400))
    ]
    rows, counts = np.arange(400)[:, None], np.ones((400, 1), int)
    store = TokenStore((TaskTokens(*sides),), rows, counts, tuple(map(str, range(400))))
    looked_at = []
    order = paired_order(store, 8, seed=0)
    spy = Order(lambda step: looked_at.append(step) or order(step), order.most)
    batches = Batches(store, spy, num_steps=5000, groups=2)
    assert len(set(looked_at)) <= 256
    assert max(looked_at) > 4900
    assert len(batches.shapes) <= 3
    assert batches.spare
    sample = set(looked_at)
    batches.shapes, batches.spare = (
        batches.shapes[:1],
        None,
    )  # too small for many steps: larger ones are made for them
    for step in (step for step in range(300, 340) if step not in sample):
        batch = batches[step]
        tokens = (batch.encoder_segment_ids > 0).sum()
        assert tokens == store.lengths(*order(step)[:2])[:, 0].sum()
        read = batch.encoder_rows < batch.encoder_input_tokens.shape[1]
        assert read.sum() == tokens
