import dataclasses
import json
import re
import shutil
import sys

import pytest

from dss.cli.main import main
from dss.config.data import open_mixture, resolve
from dss.config.gin_files import gin_name, load_config, parse_gin, save_config
from dss.data.datasets import Dataset
from dss.errors import DssError
from dss.paths import gin_root
from dss.runs.data import training_batches, training_store
from dss.runs.directory import load_run
from dss.runs.train import run_experiment
from dss.student.network import num_parameters
from tests.conftest import tiny_config, write_jsonl

STUDENTS = sorted(p.stem for p in (gin_root() / "students").glob("*.gin"))
VARIANTS = sorted(p.stem for p in (gin_root() / "variants").glob("*.gin"))
DATASETS = sorted(p.stem for p in (gin_root() / "datasets").glob("*.gin"))
METHODS = sorted(p.stem for p in (gin_root() / "methods").glob("*.gin"))
PAIRS = [(dataset, method) for dataset in DATASETS for method in METHODS]
TWO_PAIRS = [("cqa", "step_by_step"), ("svamp", "step_by_step")]
ONE_OF_EACH_KIND = [("svamp", "step_by_step"), ("cqa", "single_target"), ("esnli", "finetune")]
MILLIONS = {
    "tiny": 9,
    "small": 77,
    "base": 248,
    "large": 783,
    "xl": 2850,
    "xxl": 11135,
    "t5_1_0_small": 61,
    "t5_1_0_base": 223,
    "mt5_small": 300,
    "byt5_small": 300,
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_has_its_size(name):
    student = parse_gin([f"students/{name}.gin"]).student
    assert round(num_parameters(student) / 1e6) == MILLIONS[name]


def small(experiment, tmp_path):
    """Returns the experiment with a student that compiles in seconds, for one step."""
    return dataclasses.replace(
        experiment,
        student=tiny_config(num_encoder_layers=1, num_decoder_layers=1),
        run_dir=str(tmp_path / "run"),
        batch_size=8,
        trainer=dataclasses.replace(experiment.trainer, train_steps=1),
        data=dataclasses.replace(experiment.data, feature_lengths={"inputs": 64, "targets": 32}),
        decoding=dataclasses.replace(experiment.decoding, rationale_length=8, max_length=8),
    )


def opening(path):
    """Returns the names of the header lines of a gin file."""
    lines = (gin_root() / path).read_text().splitlines()
    return [line.split(":")[0] for line in lines if re.match(r"# [A-Z]\w+: ", line)]


def as_id(name):
    return name if isinstance(name, str) else "-".join(name)


def some(names, always):
    """Returns test cases; those not in `always` are marked exhaustive."""
    return [
        pytest.param(name, marks=() if name in always else pytest.mark.exhaustive, id=as_id(name))
        for name in names
    ]


def assert_makes_batches(experiment):
    """Checks that the first batch of an experiment has sequences of each task."""
    experiment = resolve(experiment)
    mixture = open_mixture(experiment)
    batches = training_batches(experiment, mixture, training_store(experiment), groups=1)
    assert set(batches.order(0)[0].tolist()) == set(range(len(mixture.tasks)))
    assert batches[0].decoder_target_tokens.any()


def files_of(pair):
    """Returns the gin files of a dataset and a method."""
    return [f"datasets/{pair[0]}.gin", f"methods/{pair[1]}.gin"]


def parse_pair(pair, root):
    return parse_gin(files_of(pair), [f"DATA_ROOT={root}", "VOCABULARY=bytes"])


@pytest.mark.parametrize("file", files_of(("*", "*")))
def test_files_of_datasets_and_methods_have_a_header(file):
    paths = [*gin_root().glob(file)]
    assert len(paths) == 5
    for path in paths:
        assert opening(path) == ["# Purpose", "# Score", "# Cost", "# Command"]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_method_of_every_dataset_makes_batches(pair, small_root, tmp_path):
    experiment = parse_pair(pair, small_root)
    teacher = [] if pair[1] == "finetune" else ["palm"]
    assert open_mixture(experiment).name == "_".join([*pair, *teacher])
    assert_makes_batches(small(experiment, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("pair", some(PAIRS, ONE_OF_EACH_KIND))
def test_every_method_of_every_dataset_trains_a_step(pair, small_root, tmp_path):
    result = run_experiment(small(parse_pair(pair, small_root), tmp_path))
    assert (result.step, result.best_step) == (1, 1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.slow
def test_a_new_run_keeps_its_vocabulary(small_root, vocab_path, tmp_path):
    macros = [f"DATA_ROOT={small_root}", f"VOCABULARY={vocab_path}"]
    experiment = small(parse_gin(["datasets/cqa.gin", "methods/finetune.gin"], macros), tmp_path)
    student = dataclasses.replace(experiment.student, vocab_size=32128)
    assert run_experiment(dataclasses.replace(experiment, student=student)).step == 1
    run = load_run(tmp_path / "run")
    assert run.experiment.vocabulary == "vocabulary.model"
    assert (tmp_path / "run" / "vocabulary.model").read_bytes() == vocab_path.read_bytes()


@pytest.fixture(scope="module")
def sampled_root(small_root, tmp_path_factory):
    """A folder with CQA and SVAMP and a teacher `thrice` with three samples per example."""
    root = tmp_path_factory.mktemp("sampled")
    for name, wrong in (("cqa", "v"), ("svamp", "(1 + 1)")):
        shutil.copytree(small_root / name, root / name)
        outputs = []
        for i, example in enumerate(get_examples(root, name)):
            right = {"rationale": f"The reason is {i}.", "label": example.label, "status": "ok"}
            other = right | {"rationale": "None of it at all.", "label": wrong}
            samples = [right, right | {"rationale": f"One more reason: {i}."}, other]
            outputs.append({"id": example.id, **right, "vote": 0.75, "samples": samples})
        write_jsonl(root / name / f"{name}_train.thrice.jsonl", outputs)
    return root


def get_examples(root, name):
    return Dataset.released(name, root).source.examples("train")


def parse_variant(name, pair, root):
    """Returns the experiment of a dataset and a method with a variant, and without it."""
    macros = [f"DATA_ROOT={root}", "VOCABULARY=bytes", "TEACHER=thrice"]
    files = files_of(pair)
    return parse_gin([*files, f"variants/{name}.gin"], macros), parse_gin(files, macros)


@pytest.mark.parametrize("pair", TWO_PAIRS, ids="-".join)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_with_a_method_makes_batches(name, pair, sampled_root, tmp_path):
    assert opening(f"variants/{name}.gin") == ["# Purpose", "# Source", "# Measured", "# Command"]
    experiment, plain = parse_variant(name, pair, sampled_root)
    assert experiment != plain
    assert_makes_batches(small(experiment, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("pair", some(TWO_PAIRS, TWO_PAIRS[:1]))
@pytest.mark.parametrize("name", some(VARIANTS, ["alpha_schedule", "several_rationales"]))
def test_every_variant_trains_a_step(name, pair, sampled_root, tmp_path):
    experiment, plain = parse_variant(name, pair, sampled_root)
    experiment = small(experiment, tmp_path)
    result = run_experiment(experiment)
    assert (result.step, result.best_step) == (1, 1)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first.get("train/alpha") == (0.5 if name == "alpha_schedule" else None)
    assert load_config(tmp_path / "run").rationales == experiment.rationales
    with pytest.raises(DssError, match="the run of another experiment"):
        run_experiment(small(plain, tmp_path))


@pytest.mark.slow
def test_a_student_without_embeddings_for_start_ids_is_an_error(small_root, tmp_path):
    files = ["datasets/cqa.gin", "methods/step_by_step.gin", "variants/one_encoder_pass.gin"]
    experiment = small(parse_gin(files, [f"DATA_ROOT={small_root}", "VOCABULARY=bytes"]), tmp_path)
    full = dataclasses.replace(experiment, student=tiny_config(vocab_size=259))
    message = r"starts from the id 259 past the vocabulary, and the student has 259 embeddings"
    with pytest.raises(DssError, match=message):
        run_experiment(full)
    # A mixture of one task needs no start id of its own.
    assert run_experiment(dataclasses.replace(full, method="finetune")).step == 1


def test_config_gin_has_the_whole_configuration(tmp_path):
    experiment = parse_gin(
        ["students/tiny.gin", "datasets/cqa.gin", "methods/step_by_step.gin", "runs/adafactor.gin"],
        ["ALPHA=0.3", "MODEL_DIR=runs/a b", "OptimizerConfig.b2=0.95", "MeshConfig.model=2"],
    )
    assert experiment.optimizer.name == "adafactor"
    assert experiment.run_dir == "runs/a b"
    save_config(experiment, tmp_path)
    assert load_config(tmp_path) == experiment
    assert load_config(tmp_path, ["Experiment.alpha=0.9"]).alpha == 0.9
    assert load_config(tmp_path, ["ALPHA=0.8", "DATA_ROOT=/data"]).alpha == 0.8
    assert load_config(tmp_path, ["DATA_ROOT=/data"]).data.root == "/data"
    with pytest.raises(DssError, match="unknown macro 'ALPHE'"):
        load_config(tmp_path, ["ALPHE=0.8"])


def test_resolve_student_sets_dtype_and_dropout():
    experiment = parse_gin(["students/tiny.gin"], ["Experiment.dtype=bfloat16", "DROPOUT_RATE=0.2"])
    student = experiment.resolve_student(experiment.student)
    assert (student.dtype, student.remat, student.dropout_rate) == ("bfloat16", "none", 0.2)


def test_user_gin_files_are_found_in_search_paths(tmp_path):
    (tmp_path / "mine.gin").write_text("BATCH_SIZE = 7\n")
    assert parse_gin(["mine.gin"], search_paths=[str(tmp_path)]).batch_size == 7
    for text, message in (
        ("ALPHA == 3", r"configuration: .*bad.gin"),
        ("ALPHA = (", r"configuration: .*EOF in multi-line"),
        ("import nosuchmodule", r"configuration: No module named 'nosuchmodule'"),
    ):
        (tmp_path / "bad.gin").write_text(f"BATCH_SIZE = 7\n{text}\n")
        with pytest.raises(DssError, match=message):
            parse_gin(["bad.gin"], search_paths=[str(tmp_path)])


@pytest.mark.parametrize("module", ["seqio", "dss.integrations.seqio_tasks"])
def test_a_gin_file_that_needs_seqio_names_the_extra(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    monkeypatch.delitem(sys.modules, "dss.integrations.seqio_tasks", raising=False)
    (tmp_path / "mine.gin").write_text(f"import {module}\n")
    with pytest.raises(DssError, match=r"pip install 'dss\[seqio\]' \(\S+mine.gin:1\)") as error:
        parse_gin(["mine.gin"], search_paths=[str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_folder_named_runs_does_not_hide_included_files(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.gin").write_text("include 'runs/adafactor.gin'\n")
    monkeypatch.chdir(tmp_path)
    assert parse_gin(["mine.gin"]).optimizer.name == "adafactor"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("alpha", "ALPHA"),
        ("trainer.train_steps", "TRAIN_STEPS"),
        ("trainer.patience", "TrainerConfig.patience"),
    ],
)
def test_gin_name_of_a_field(path, name):
    assert gin_name(path) == name


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("ALPHA=1.5", "ALPHA must be in"),
        ("ALPHA_END=-1", "ALPHA_END must be in"),
        ("RationaleConfig.min_agreement=60", "RationaleConfig.min_agreement must be in"),
        ("RationaleConfig.max_words=0", "RationaleConfig.max_words must be at least 1"),
        ("TRAIN_FRACTION=0", "TRAIN_FRACTION must be in"),
        ("TASK_FEATURE_LENGTHS={'inputs': 8}", "TASK_FEATURE_LENGTHS must be"),
        (
            "OptimizerConfig.name='sgd'",
            "OptimizerConfig.name must be one of 'adamw', 'adafactor', got 'sgd'",
        ),
        ("DataConfig.batches='both'", "must be one of 'paired', 'sampled'"),
        ("MeshConfig.model=0", "has no devices"),
        ("BATCH_SIZE=abc", "Experiment.batch_size must be of type int, got 'abc'"),
        ("BATCH_SIZE=10.5", "Experiment.batch_size must be of type int, got 10.5"),
        ("DROPOUT_RATE=1.5", "Experiment.dropout_rate must be in"),
        ("Experiment.eval_examples=0", "Experiment.eval_examples must be at least 1"),
        ("TRAIN_STEP=5", "unknown macro 'TRAIN_STEP'; did you mean 'TRAIN_STEPS'"),
        ("DATASET_LABELS=3", "DataConfig.labels must be of type tuple"),
        ("DATASET_LABELS=(0, 1)", "DataConfig.labels must be of type tuple"),
        ("MeshConfig.rules=(('embed',),)", "MeshConfig.rules must be of type tuple"),
        ("T5Config.dtype=bfloat16", "T5Config.dtype is set but not used"),
        ("ALPHA=%NOPE", "macro 'NOPE' is used but not set"),
    ],
)
def test_invalid_values_are_errors(flag, message):
    with pytest.raises(DssError, match=message):
        parse_gin([], [flag])


@pytest.mark.parametrize("flag", ["ALPHA_END=0.9", "DataConfig.one_encoder_pass=True"])
def test_options_of_paired_batches_are_errors_with_sampled_ones(flag):
    with pytest.raises(DssError, match=r"needs DataConfig.batches='paired'"):
        parse_gin([], ["DataConfig.batches=sampled", flag])


HOSTILE = {
    "an import": "import os\n",
    "an include": "include '/etc/passwd'\n",
    "a block": "Experiment:\n  alpha = 0.1\n",
    "'@os.system'": "Experiment.alpha = @os.system()\n",
    "'@T5Config'": "Experiment.student = @T5Config\n",
    "'%ALPHA'": "Experiment.alpha = %ALPHA\n",
    "'ALPHA'": "ALPHA = 0.1\n",
    "'os.system'": "os.system.command = 'touch %s'\n",
    "'scope'": "scope/Experiment.alpha = 0.1\n",
}


@pytest.mark.parametrize("refused", HOSTILE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_runs_configuration_with_code_is_an_error(refused, first, tmp_path):
    save_config(parse_gin(["students/tiny.gin"]), tmp_path)
    file = tmp_path / "config.gin"
    values, statement = file.read_text(), HOSTILE[refused].replace("%s", str(tmp_path / "ran"))
    file.write_text(statement + values if first else values + statement)
    line = 1 if first else values.count("\n") + 1
    message = re.escape(f"config.gin:{line}: {refused} in the configuration of a run")
    with pytest.raises(DssError, match=message):
        load_config(tmp_path)
    with pytest.raises(DssError, match=message):  # as a gin file too
        parse_gin([str(file)])
    assert not (tmp_path / "ran").exists()


def test_code_in_a_runs_configuration_is_not_executed(tmp_path):
    run = tmp_path / "runs" / "downloaded"
    run.mkdir(parents=True)
    (run / "config.gin").write_text(
        "from __gin__ import dynamic_registration\nimport os\nimport dss.config.experiment\n"
        "dss.config.experiment.Experiment.alpha = @os.system()\n"
        f"os.system.command = 'touch {tmp_path}/ran'\n"
    )
    for command in ("eval", "predict"):
        assert main([command, str(run)]) == 2
    assert main(["report", str(run.parent), "-o", str(tmp_path / "report.html")]) == 2
    assert main(["train", "--gin_file", str(run / "config.gin")]) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["Experiment.alpha = (", "\0", "=" * 99, "(" * 9999])
def test_a_malformed_configuration_of_a_run_is_an_error(text, tmp_path):
    (tmp_path / "config.gin").write_text(text)
    with pytest.raises(DssError, match=r"config\.gin: not a configuration: "):
        load_config(tmp_path)


def test_a_mixture_given_for_a_run_replaces_its_method_and_teacher(tmp_path):
    run = parse_gin(["datasets/cqa.gin", "methods/step_by_step.gin"])
    save_config(run, tmp_path)
    for mixture in ("cqa_finetune", "cqa_distill_gpt_neox"):
        for flag in (f"Experiment.mixture={mixture}", f"MIXTURE_OR_TASK_NAME={mixture}"):
            assert open_mixture(load_config(tmp_path, [flag])).name == mixture
    finetuned = load_config(tmp_path, ["METHOD=finetune"])
    assert open_mixture(finetuned).name == "cqa_finetune"
