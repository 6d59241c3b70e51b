import pytest

from dss.data.registry import register
from dss.errors import UserError
from dss.mixtures.tasks import extract_label, get_mixture, mixture_names, with_teacher
from tests.conftest import write_jsonl


def test_the_names_of_a_dataset(toy):
    assert mixture_names("toy") == [
        "toy_finetune",
        "toy_label_gold",
        "toy_distill_rules",
        "toy_step_by_step_rules",
        "toy_step_by_step_unlabeled_rules",
        "toy_single_target_rules",
        "toy_label_rules",
        "toy_rationale_rules",
        "toy_rationale_then_label_rules",
    ]


def test_step_by_step_predicts_and_explains(toy):
    mixture = get_mixture("toy_step_by_step_rules", alpha=0.3)
    assert mixture.rates == (0.3, 0.7)
    label, rationale = (task.rows("test")[1] for task in mixture.tasks)
    assert (label.inputs, label.targets) == ("predict: is 1 good", "yes")
    assert (rationale.inputs, rationale.targets) == ("explain: is 1 good", "1 is 1 mod 3")


def test_single_target_holds_rationale_and_label(toy):
    row = get_mixture("toy_single_target_rules").tasks[0].rows("test")[1]
    assert row.targets == "1 is 1 mod 3 So the answer is yes"
    assert extract_label(row.targets) == "yes"


@pytest.fixture
def gaps(tmp_path):
    ids = ("ok", "blank", "refused", "nothing", "no label", "unparsed")
    rows = [{"id": i, "input": "x", "label": "a"} for i in ids]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows)
    journal = [
        {"id": "ok", "rationale": "r", "label": "a"},
        {"id": "blank", "rationale": " ", "label": " "},
        {"id": "refused", "rationale": "I cannot", "status": "refused"},
        {"id": "no label", "rationale": "r", "label": " "},
        {
            "id": "unparsed",
            "rationale": "Okay, let me see",
            "raw": "Okay, let me see",
        },
    ]
    write_jsonl(tmp_path / "train.t.jsonl", journal)
    return register("gaps", tmp_path)


def test_what_the_teacher_did_not_give_is_not_trained_on(gaps):
    label, rationale = get_mixture("gaps_step_by_step_unlabeled_t").tasks
    assert [row.id for row in rationale.rows("train")] == ["ok", "no label"]
    assert [row.id for row in label.rows("train")] == ["ok"]
    kept = rationale.rows("train", keep_unparsed=True)
    assert [row.id for row in kept] == ["ok", "blank", "refused", "no label", "unparsed"]
    assert [kept[1].targets, kept[-1].targets] == [" ", "Okay, let me see"]


def test_a_split_without_rationales_keeps_its_labels(gaps):
    mixture = get_mixture("gaps_step_by_step_t", alpha=0.3).available("valid")
    assert [task.name for task in mixture.tasks] == ["gaps_label_gold"]
    assert mixture.rates == (0.3,)


def test_unknown_mixtures_name_the_nearest(toy):
    with pytest.raises(UserError, match="did you mean 'toy_step_by_step_rules'"):
        get_mixture("toy_step_by_step_rulse")
    with pytest.raises(UserError, match="ALPHA is 2"):
        get_mixture("toy_finetune", alpha=2)


def test_a_name_says_its_teacher_where_no_files_do(tmp_path):
    register("gone", tmp_path / "gone", labels=("a",), must_exist=False)
    both = get_mixture("gone_step_by_step_unlabeled_my_llm").tasks
    assert [task.name for task in both] == ["gone_label_my_llm", "gone_rationale_my_llm"]
    assert get_mixture("gone_single_target_t").tasks[0].kind == "rationale_then_label"
    assert get_mixture("gone_label_gold").tasks[0].teacher is None
    with pytest.raises(UserError, match="unknown mixture 'gone_step_by'"):
        get_mixture("gone_step_by")
    with pytest.raises(UserError, match="gone: no such file"):
        get_mixture("gone_distill_t").tasks[0].rows("train")


def test_the_teacher_of_a_name_can_be_replaced():
    name = with_teacher("cqa_step_by_step_palm", "gpt_neox")
    assert name == "cqa_step_by_step_gpt_neox"
    with pytest.raises(UserError, match="has no teacher"):
        with_teacher("cqa_finetune", "palm")


def test_a_blank_label_is_no_label(tmp_path):
    rows = [
        {"id": str(i), "input": "x", "label": label} for i, label in enumerate(["a", "", " \t"])
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows[:1])
    dataset = register("blank", tmp_path, labels=("a",))
    assert [e.label for e in dataset.examples("train")] == ["a", None, None]
    assert [row.id for row in get_mixture("blank_finetune").tasks[0].rows("train")] == ["0"]
