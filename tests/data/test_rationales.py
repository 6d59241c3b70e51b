import pytest

from dss.batches.order import paired_order, sampled_order
from dss.batches.store import open_store
from dss.data.datasets import Dataset
from dss.data.examples import read_teacher_outputs
from dss.data.rationales import RationaleConfig
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import Method, make_mixture, named_mixture
from tests.conftest import write_jsonl


def samples(*pairs):
    return [{"rationale": r, "label": label, "status": "ok"} for r, label in pairs]


OUTPUTS = [
    {
        "id": "agreed",
        "rationale": "one two",
        "label": "a",
        "vote": 0.75,
        "samples": samples(("one two", "a"), ("three", "a"), ("one two", "a"), ("no", "b")),
    },
    {
        "id": "wrong",
        "rationale": "one two three",
        "label": "b",
        "vote": 0.6667,
        "samples": samples(("one two three", "b"), ("right", "a"), ("b it is", "b")),
    },
    {"id": "asked once", "rationale": "one two three four", "label": "a"},
    {"id": "refused", "rationale": "I cannot", "label": None, "status": "refused", "vote": 0.0},
]


@pytest.fixture
def folder(tmp_path):
    examples = [{"id": o["id"], "input": f"x {o['id']}", "label": "a"} for o in OUTPUTS]
    examples.append({"id": "never asked", "input": "x", "label": "a"})
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"{split}.jsonl", examples)
        write_jsonl(tmp_path / f"{split}.t.jsonl", OUTPUTS)
    return tmp_path


def mixture_of(folder, method=Method.STEP_BY_STEP):
    return make_mixture(Dataset.from_files(folder, name="mine"), method, "t")


def rows(folder, method=Method.STEP_BY_STEP, split="train", **config):
    task = mixture_of(folder, method).tasks[-1]
    found = task.rows(split, rationales=RationaleConfig(**config))
    return [(row.id, row.targets) for row in found]


AGREED, WRONG, ONCE = ((o["id"], o["rationale"]) for o in OUTPUTS[:3])


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, [AGREED, WRONG, ONCE]),
        ({"right_only": True}, [AGREED, ONCE]),
        ({"min_words": 3}, [WRONG, ONCE]),
        ({"max_words": 3}, [AGREED, WRONG]),
        ({"min_words": 3, "max_words": 3}, [WRONG]),
        ({"min_agreement": 0.7}, [AGREED]),
        ({"min_agreement": 0.6, "max_words": 2}, [AGREED]),
        ({"several": True}, [AGREED, ("agreed", "three"), WRONG, ("wrong", "b it is"), ONCE]),
        (
            {"several": True, "right_only": True},
            [AGREED, ("agreed", "three"), ("wrong", "right"), ONCE],
        ),
        ({"several": True, "max_words": 1}, [("agreed", "three")]),
    ],
    ids=str,
)
def test_filters_select_rationales(folder, config, kept):
    assert rows(folder, **config) == kept


def test_filters_do_not_affect_labels_other_splits_and_unparsed_outputs(folder):
    config = RationaleConfig(right_only=True, max_words=1)
    label, rationale = mixture_of(folder).tasks
    assert len(label.rows("train", rationales=config)) == 5
    assert rows(folder, Method.DISTILL, max_words=1) == [
        ("agreed", "a"),
        ("wrong", "b"),
        ("asked once", "a"),
    ]
    assert rows(folder, split="valid", max_words=1) == [AGREED, WRONG, ONCE]
    kept = rationale.rows("train", keep_unparsed=True, rationales=config)
    assert [row.id for row in kept] == ["refused"]


def test_single_targets_are_filtered_whole(folder):
    found = rows(folder, Method.SINGLE_TARGET, right_only=True, min_words=3)
    assert found == [("asked once", "one two three four So the answer is a")]


def test_what_was_left_out_is_counted(folder):
    config = RationaleConfig(right_only=True, max_words=2, several=True)
    rationale = mixture_of(folder).tasks[1]
    read = rationale.read("train", rationales=config)
    assert [row.id for row in read.rows] == ["agreed", "agreed", "wrong"]
    left_out = {"asked once": "too long", "refused": "refused", "never asked": "missing"}
    assert read.left_out == left_out


def test_filters_that_need_samples_are_an_error_for_a_single_one(toy):
    rationale = named_mixture("toy_step_by_step_rules", [toy]).tasks[1]
    for config in ({"min_agreement": 0.5}, {"several": True}):
        (name,) = config
        with pytest.raises(
            DssError, match=f"{name} needs several samples per example, but teacher rules"
        ):
            rationale.rows("train", rationales=RationaleConfig(**config))


def test_a_vote_and_samples_are_checked(tmp_path):
    for value, message in (
        ({"vote": 2}, "'vote' is 2; it must be a number between 0 and 1"),
        ({"vote": True}, "'vote' is True"),
        ({"samples": "no"}, "'samples' is not a list of JSON objects"),
        ({"samples": [{"status": "fine"}]}, "status 'fine' is not one of"),
        ({"samples": [{"rationale": []}]}, "'rationale' is a list"),
    ):
        path = write_jsonl(tmp_path / "train.t.jsonl", [{"id": "1"} | value])
        with pytest.raises(DssError, match=f"train.t.jsonl:1: {message}"):
            read_teacher_outputs(path, "t")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_words": -1}, "min_words must be at least 0"),
        ({"max_words": 0}, "max_words must be at least 1"),
        ({"min_words": 5, "max_words": 4}, "max_words must be at least 5, got 4"),
        ({"min_agreement": 1.1}, r"min_agreement must be in \[0, 1\]"),
        ({"right_only": 1}, "right_only must be of type bool"),
    ],
)
def test_values_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        RationaleConfig(**config)


@pytest.fixture
def several(folder):
    return open_store(
        mixture_of(folder),
        "train",
        load_vocabulary("bytes"),
        inputs_length=32,
        targets_length=32,
        rationales=RationaleConfig(several=True),
    )


def written(store, order, steps):
    """Returns the rationales of each step as a set."""
    out = []
    for tasks, found, _ in map(order, steps):
        targets = store.tasks[1].targets
        out.append(
            {
                load_vocabulary("bytes").decode(targets[r])
                for t, r in zip(tasks, found, strict=True)
                if t
            }
        )
    return out


def test_each_epoch_trains_on_another_sample(several):
    assert several.counts.tolist() == [[1, 2], [1, 2], [1, 1], [1, 0], [1, 0]]
    order = paired_order(several, 5, seed=3)
    first = {"one two", "one two three", "one two three four"}
    second = {"three", "b it is", "one two three four"}
    assert written(several, order, range(4)) == [first, second, first, second]
    assert written(several, paired_order(several, 5, seed=3), [3]) == [second]
    sampled = sampled_order(several, 3, seed=0, rates=(0.0, 1.0))
    assert written(several, sampled, range(3)) == [first, second, first]


def test_ids_of_any_sample_are_those_of_its_example(several):
    for tasks, found, _ in map(paired_order(several, 5, seed=0), range(2)):
        assert sorted(several.ids_of(tasks, found)) == sorted(several.ids)
    rows = several.rows[1, 1] + 1
    assert several.ids_of([1], [rows]) == ["wrong"]


def test_filters_are_part_of_a_stores_key(folder):
    def count(**config):
        store = open_store(
            mixture_of(folder),
            "train",
            load_vocabulary("bytes"),
            inputs_length=32,
            targets_length=32,
            rationales=RationaleConfig(**config),
        )
        return len(store.tasks[1].inputs)

    assert [count(), count(right_only=True), count(several=True), count()] == [3, 2, 5, 3]
