import dataclasses
import shutil

import pytest

from dss.config.data import open_mixture
from dss.config.experiment import DataConfig, Experiment
from dss.data.datasets import Dataset
from dss.errors import ConfigError, DataError, DssError
from dss.mixtures.methods import Method, make_mixture, mixture_names, named_mixture
from dss.mixtures.tasks import extract_label
from tests.conftest import write_jsonl


def test_mixture_names_of_a_dataset(toy):
    assert mixture_names(toy) == [
        "toy_finetune",
        "toy_label_gold",
        "toy_distill_rules",
        "toy_step_by_step_rules",
        "toy_step_by_step_unlabeled_rules",
        "toy_single_target_rules",
        "toy_rationale_rules",
        "toy_label_rules",
        "toy_rationale_then_label_rules",
    ]


def test_step_by_step_has_a_label_and_a_rationale_task(toy):
    mixture = named_mixture("toy_step_by_step_rules", [toy], alpha=0.3)
    assert mixture.rates == (0.3, 0.7)
    label, rationale = (task.rows("test")[1] for task in mixture.tasks)
    assert (label.inputs, label.targets) == ("predict: is 1 good", "yes")
    assert (rationale.inputs, rationale.targets) == ("explain: is 1 good", "1 is 1 mod 3")


def test_single_target_has_rationale_and_label(toy):
    row = named_mixture("toy_single_target_rules", [toy]).tasks[0].rows("test")[1]
    assert row.targets == "1 is 1 mod 3 So the answer is yes"
    assert extract_label(row.targets) == "yes"


@pytest.fixture
def gaps(tmp_path):
    ids = ("ok", "blank", "refused", "nothing", "no label", "unparsed")
    rows = [{"id": i, "input": "x", "label": "a"} for i in ids]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows)
    outputs = [
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
    write_jsonl(tmp_path / "train.t.jsonl", outputs)
    return Dataset.from_files(tmp_path, name="gaps")


def test_missing_labels_and_rationales_are_not_trained_on(gaps):
    label, rationale = named_mixture("gaps_step_by_step_unlabeled_t", [gaps]).tasks
    assert [row.id for row in rationale.rows("train")] == ["ok", "no label"]
    assert [row.id for row in label.rows("train")] == ["ok"]
    kept = rationale.rows("train", keep_unparsed=True)
    assert [row.id for row in kept] == ["ok", "blank", "refused", "no label", "unparsed"]
    assert [kept[1].targets, kept[-1].targets] == [" ", "Okay, let me see"]


def test_a_split_without_rationales_keeps_the_label_task(gaps):
    mixture = named_mixture("gaps_step_by_step_t", [gaps], alpha=0.3).available("valid")
    assert [task.name for task in mixture.tasks] == ["gaps_label_gold"]
    assert mixture.rates == (0.3,)


def test_an_unknown_mixture_suggests_the_nearest(toy):
    with pytest.raises(DssError, match="did you mean 'toy_step_by_step_rules'"):
        named_mixture("toy_step_by_step_rulse", [toy])
    with pytest.raises(DssError, match="ALPHA is 2"):
        named_mixture("toy_finetune", [toy], alpha=2)


def test_without_files_any_teacher_in_a_name_is_accepted(tmp_path):
    gone = Dataset.from_files(tmp_path / "gone", name="gone", labels=("a",), must_exist=False)
    both = named_mixture("gone_step_by_step_unlabeled_my_llm", [gone]).tasks
    assert [task.name for task in both] == ["gone_label_my_llm", "gone_rationale_my_llm"]
    assert named_mixture("gone_single_target_t", [gone]).tasks[0].kind == "rationale_then_label"
    assert named_mixture("gone_label_gold", [gone]).tasks[0].teacher is None
    with pytest.raises(DssError, match="unknown mixture 'gone_step_by'"):
        named_mixture("gone_step_by", [gone])
    with pytest.raises(DssError, match="gone: no such file"):
        named_mixture("gone_distill_t", [gone]).tasks[0].rows("train")


def test_a_teacher_that_contradicts_the_mixture_is_refused():
    experiment = Experiment(mixture="cqa_step_by_step_palm", teacher="gpt_neox")
    with pytest.raises(ConfigError, match=r"TEACHER is 'gpt_neox', but mixture .* another teacher"):
        open_mixture(experiment)
    for mixture in ("cqa_step_by_step_gpt_neox", "cqa_finetune"):
        assert open_mixture(dataclasses.replace(experiment, mixture=mixture)).name == mixture


def test_a_name_with_two_possible_teachers_is_an_error(tmp_path):
    """`step_by_step_unlabeled_x` can be read with the teacher x or the teacher unlabeled_x."""
    folder = tmp_path / "two"
    for split in ("train", "valid"):
        write_jsonl(folder / f"{split}.jsonl", [{"id": "a", "input": "x", "label": "l"}])
    for teacher in ("x", "unlabeled_x"):
        row = {"id": "a", "rationale": f"by {teacher}", "label": "l"}
        write_jsonl(folder / f"train.{teacher}.jsonl", [row])
    two = Dataset.from_files(folder)
    with pytest.raises(DssError, match="TEACHER unlabeled_x or METHOD step_by_step_unlabeled"):
        named_mixture("two_step_by_step_unlabeled_x", [two])
    rationales = {
        make_mixture(two, method, teacher).tasks[1].rows("train")[0].targets
        for method, teacher in (
            (Method.STEP_BY_STEP, "unlabeled_x"),
            (Method.STEP_BY_STEP_UNLABELED, "x"),
        )
    }
    assert rationales == {"by x", "by unlabeled_x"}


def test_a_method_uses_the_only_teacher_and_needs_teacher_with_several(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "toy")
    experiment = Experiment(method="step_by_step", data=DataConfig(dataset_path=str(folder)))
    assert open_mixture(experiment).name == "toy_step_by_step_rules"
    shutil.copy(folder / "train.rules.jsonl", folder / "train.other.jsonl")
    with pytest.raises(DssError, match=r"needs a teacher: give TEACHER; .*'toy': other, rules"):
        open_mixture(experiment)
    with pytest.raises(DssError, match="unknown teacher 'rule'; did you mean 'rules'"):
        open_mixture(dataclasses.replace(experiment, teacher="rule"))
    with pytest.raises(DssError, match="unknown method 'step_by_stp'; did you mean"):
        open_mixture(dataclasses.replace(experiment, method="step_by_stp"))
    with pytest.raises(DssError, match="no dataset: give"):
        open_mixture(Experiment(method="finetune"))
    with pytest.raises(DssError, match=r"no method: give `Experiment.method`"):
        open_mixture(Experiment(dataset="cqa"))


def test_two_folders_with_one_name_keep_their_labels(tmp_path):
    experiments = []
    for folder, labels in (("a", ("billing", "bug")), ("b", ("spam", "ham"))):
        rows = [{"input": f"{i}?", "label": labels[i % 2]} for i in range(20)]
        path = write_jsonl(tmp_path / folder / "data" / "train.jsonl", rows).parent
        data = DataConfig(dataset_path=str(path), labels=labels)
        experiments.append(Experiment(method="finetune", data=data))
    first, second = map(open_mixture, experiments)
    assert first.dataset.choices("x") == ("billing", "bug")
    assert second.dataset.choices("x") == ("spam", "ham")
    assert {row.targets for row in first.tasks[0].rows("train")} == {"billing", "bug"}
    assert first.name == second.name == "data_finetune"


def test_a_blank_label_counts_as_missing(tmp_path):
    rows = [
        {"id": str(i), "input": "x", "label": label} for i, label in enumerate(["a", "", " \t"])
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "valid.jsonl", rows[:1])
    dataset = Dataset.from_files(tmp_path, name="blank", labels=("a",))
    assert [e.label for e in dataset.examples("train")] == ["a", None, None]
    assert [
        row.id for row in named_mixture("blank_finetune", [dataset]).tasks[0].rows("train")
    ] == ["0"]


def test_errors_of_names_are_of_their_kind():
    with pytest.raises(DataError, match="unknown method"):
        Method.parse("stepbystep")
    with pytest.raises(DataError, match="unknown dataset"):
        Dataset.released("cqaa")
    with pytest.raises(ConfigError, match="must be at least 1"):
        Experiment(batch_size=0)


def test_a_released_dataset_and_a_path_are_not_given_both(toy_folder):
    data = DataConfig(dataset_path=str(toy_folder))
    with pytest.raises(
        ConfigError, match=r"dataset is 'cqa' and DataConfig.dataset_path is '.*toy'; give one"
    ):
        open_mixture(Experiment(dataset="cqa", method="finetune", data=data))
    with pytest.raises(
        ConfigError, match=r"unknown dataset 'tickets'.*give `DataConfig.dataset_path`"
    ):
        open_mixture(Experiment(dataset="tickets", method="finetune"))


def test_an_export_reads_no_data_of_the_working_folder(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_folder.parent)  # where a folder of the same name is
    experiment = Experiment(dataset="toy", method="step_by_step", teacher="my_llm")
    mixture = open_mixture(experiment, must_exist=False)
    assert mixture.name == "toy_step_by_step_my_llm"


def test_labels_are_a_list_or_one_text_with_commas(toy_folder):
    assert Dataset.from_files(toy_folder, labels="yes,no").labels.closed == ("yes", "no")
    with pytest.raises(DataError, match="one is given twice"):
        Dataset.from_files(toy_folder, labels=("yes", "yes"))
