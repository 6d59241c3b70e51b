"""Exports for Hugging Face and CTranslate2 have the student's logits, tokens and labels."""

import dataclasses
import errno
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

import dss
from dss.cli import main as cli
from dss.config.experiment import DataConfig, Experiment
from dss.config.gin_files import parse_gin
from dss.data.vocabulary import (
    BYTES,
    SentencePieceVocabulary,
    encode_example,
    load_vocabulary,
)
from dss.errors import DssError
from dss.evaluation.evaluator import evaluation_set
from dss.export import comparison
from dss.export.agreement import measure
from dss.export.ctranslate2_engine import CTranslate2Engine, load_engine
from dss.export.export import Quantization, export
from dss.export.model_card import model_card
from dss.interop import (
    ctranslate2_export,
    huggingface,
    huggingface_export,
    shards,
    t5x_export,
)
from dss.interop.huggingface_export import model_config, write_model, write_tokenizer
from dss.mixtures.methods import named_mixture
from dss.parallel.config import MeshConfig
from dss.paths import PREDICTIONS
from dss.runs.directory import load_run
from dss.runs.start import create_run, import_checkpoint
from dss.runs.student import answer, evaluate
from dss.student.config import DecodingConfig
from dss.student.decoding import generate
from dss.student.network import bind, init_params
from dss.training.checkpoints import Checkpoints
from dss.training.step import TrainState
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # relative to the largest logit
V1_0 = {"activation": "relu", "gated": False, "tied_embeddings": True, "scaled_logits": True}
KINDS = {
    "1.1, deep encoder": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "1.0": V1_0,
    "tied, not scaled, not gated": {"tied_embeddings": True, "gated": False},
    "silu": {"activation": "silu"},
}
TEXTS = [f"is {i} good" for i in range(24)]


def flat(params) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(p.key for p in path): np.asarray(x) for path, x in leaves}


def sharp(config):
    """Returns parameters scaled so that outputs differ between inputs."""
    return jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, init_params(config, 0))


@pytest.fixture
def make_run(toy_folder):
    """Returns a function that makes a run on the toy dataset with one checkpoint, at step 7."""
    toy_data = DataConfig(dataset_path=str(toy_folder), labels=("yes", "no"))

    def make(folder, config, vocabulary=BYTES, mixture="toy_finetune", data=toy_data, **values):
        experiment = Experiment(
            run_dir=str(folder),
            student=config,
            vocabulary=str(vocabulary),
            mixture=mixture,
            data=data,
            dropout_rate=0.0,
            decoding=DecodingConfig(closed=False, max_length=12),
            **values,
        )
        run, _ = create_run(experiment)
        checkpoints = Checkpoints(run.folder / "checkpoints")
        checkpoints.save(TrainState(np.int32(7), sharp(config), ()), 0.5)
        checkpoints.close()
        return run

    return make


def outputs(model, tokenizer, texts) -> list[str]:
    """Returns the texts that transformers generates with the defaults of the folder."""
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)


def load(folder):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_transformers_has_the_logits_and_tokens_of_dss(kind, tmp_path):
    import torch

    config = tiny_config(**KINDS[kind])
    params = sharp(config)
    write_model(tmp_path, config, flat(params), DecodingConfig(max_length=20))
    write_tokenizer(tmp_path, config, load_vocabulary(BYTES), 64)
    model, _ = load(tmp_path)
    draw = np.random.default_rng(0)
    inputs, targets = draw.integers(3, 380, (4, 24)), draw.integers(3, 380, (4, 9))
    inputs[:, -1], inputs[0, 12:], targets[:, 0] = 1, 0, 0
    ours = jax.jit(lambda p, *a: bind(config, p)(*a))(params, inputs, targets)
    with torch.inference_mode():
        theirs = model(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor(inputs != 0).long(),
            decoder_input_ids=torch.tensor(targets),
        ).logits.numpy()
        written = model.generate(
            torch.tensor(inputs), attention_mask=torch.tensor(inputs != 0).long()
        )
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()
    greedy, _ = generate(config, params, inputs, max_length=20)
    np.testing.assert_array_equal(written[:, 1:], np.asarray(greedy)[:, : written.shape[1] - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_keep_every_bit(kind, tmp_path):
    config = tiny_config(**KINDS[kind])
    params = init_params(config, 0)
    write_model(tmp_path, config, flat(params), DecodingConfig())
    assert huggingface.read_config(tmp_path) == config
    again = huggingface.load_params(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_imported_model_is_exported_unchanged(shared, vocab_path, tmp_path):
    source = shared / "fixtures" / "reference_cqa" / "model"
    run = import_checkpoint(
        Experiment(
            run_dir=str(tmp_path / "run"),
            initial_checkpoint=str(source),
            vocabulary=str(vocab_path),
        )
    )
    written = export(run, "hf", tmp_path / "out")
    assert written.step == 0
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, written.path))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert "imported" in (written.path / "README.md").read_text()


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    from transformers import AutoModelForSeq2SeqLM

    config = tiny_config()
    params = init_params(config, 0)
    write_model(tmp_path, config, flat(params), DecodingConfig(), limit=30_000)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files[0] == f"model-00001-of-{count:05d}.safetensors"
    assert (
        max(len(f.read_bytes()) for f in tmp_path.glob("*.safetensors")) < 34_000
    )  # with the header
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_params(tmp_path, config), params)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(model.lm_head.weight.detach(), params["head"].T)


def test_a_tensor_above_the_limit_has_its_own_file(tmp_path):
    like = {name: np.zeros(size, np.float32) for name, size in (("a", 2), ("b", 9), ("c", 2))}
    shards.write_shards(tmp_path, like, like.items(), limit=16)
    held = [list(load_file(f)) for f in sorted(tmp_path.glob("*.safetensors"))]
    assert held == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_the_tokenizer_gives_the_ids_of_dss_on_the_released_data(
    kind, data_root, vocab_path, tmp_path
):
    from transformers import AutoTokenizer

    vocabulary = load_vocabulary(BYTES if kind == "bytes" else vocab_path)
    config = tiny_config(vocab_size=384 if kind == "bytes" else 32128)
    write_tokenizer(tmp_path, config, vocabulary, 10_000)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [" a  b\n", "p </s> h", "ﬁ ½ é 🙂", "", "</s></s>x"]
    for name, split in (
        ("cqa", "train"),
        ("svamp", "train"),
        ("anli1", "test"),
        ("esnli", "valid"),
    ):
        for row in named_mixture(f"{name}_finetune").tasks[0].rows(split)[:600]:
            texts += [row.inputs, row.targets]
    theirs = tokenizer(texts).input_ids
    ours = [encode_example(vocabulary, text, 10_000) for text in texts]
    different = [t for t, a, b in zip(texts, theirs, ours, strict=True) if a != b]
    # Segmentations of "****" are equally likely, and sums in 32 and 64 bits break the tie
    # differently; nothing else differs.
    assert all("****" in text or "oooo" in text for text in different)
    assert len(different) <= (2 if kind == "sentencepiece" else 0)
    whole = [ids for ids in ours if 1 not in ids[:-1]]  # a student's text ends at the first EOS
    decoded = tokenizer.batch_decode(whole, skip_special_tokens=True)
    assert decoded == [vocabulary.decode(ids) for ids in whole]
    assert len(tokenizer) <= config.vocab_size


OTHER_MODELS = {
    "is of type BPE or character": {"model_type": "bpe"},
    "falls back to bytes": {"byte_fallback": True, "vocab_size": 400},
    "puts no space before a text": {"add_dummy_prefix": False},
    "keeps repeated spaces": {"remove_extra_whitespaces": False},
    "puts spaces after words": {"treat_whitespace_as_suffix": True},
    "has user-defined symbols": {"user_defined_symbols": ["<x>"]},
}


def train_vocabulary(path, **options):
    """Trains a small SentencePiece model with T5's special ids."""
    draw = np.random.default_rng(0)
    words = ["alpha", "beta", "crash", "invoice", "is", "good", "bad", "refund", "page"]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(draw.choice(words, 6)) for _ in range(500)),
            model_writer=file,
            minloglevel=2,
            hard_vocab_limit=False,
            **{"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options,
        )
    return path


@pytest.mark.parametrize("difference", OTHER_MODELS)
def test_a_tokenizer_that_would_give_other_ids_is_refused(difference, make_run, tmp_path):
    words = train_vocabulary(tmp_path / "words.model", **OTHER_MODELS[difference])
    run = make_run(tmp_path / "run", tiny_config(), words)
    with pytest.raises(DssError, match=rf"would give other ids: the model {difference}"):
        export(run, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_whole_words_is_exported_with_a_note(make_run, tmp_path):
    """Such as the quickstart's vocabulary: only words that it lacks have other ids."""
    words = train_vocabulary(tmp_path / "words.model", model_type="word")
    run = make_run(tmp_path / "run", tiny_config(), words)
    note = export(run, "hf", tmp_path / "out").note
    assert note == "transformers gives other ids for words outside the vocabulary"


def test_ids_are_compared_when_a_folder_is_written(make_run, tmp_path, monkeypatch):
    words = train_vocabulary(tmp_path / "words.model")
    run = make_run(tmp_path / "run", tiny_config(), words)
    export(run, "hf", tmp_path / "out")
    encode = SentencePieceVocabulary.encode
    monkeypatch.setattr(SentencePieceVocabulary, "encode", lambda *args: [*encode(*args), 5])
    with pytest.raises(DssError, match="transformers gives other ids for 'predict: The refund"):
        export(run, "hf", tmp_path / "other")


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_exported_folder_predicts_as_dss_does(make_run, toy, tmp_path, num_beams):
    run = make_run(tmp_path / "run", tiny_config())
    run = load_run(run.folder, [f"DecodingConfig.num_beams={num_beams}"])
    folder = export(run, "hf", tmp_path / "out").path
    mixture = named_mixture("toy_finetune", [toy])
    ours = [a.text for a in answer(run.predictor()[0], mixture, TEXTS, 1024)]
    assert len(set(ours)) > 1
    assert outputs(*load(folder), ["predict: " + t for t in TEXTS]) == ours


@pytest.mark.parametrize(("words", "kind"), [("bytes", {}), ("sentencepiece", V1_0)])
def test_ctranslate2_predicts_as_dss_does(words, kind, make_run, toy, vocab_path, tmp_path, capsys):
    pytest.importorskip("ctranslate2")
    config = tiny_config(**kind, vocab_size=384 if words == "bytes" else 32128)
    run = make_run(tmp_path / "run", config, BYTES if words == "bytes" else vocab_path)
    folder = export(run, "ctranslate2", tmp_path / "out").path
    assert capsys.readouterr().err == ""
    mixture = named_mixture("toy_finetune", [toy])
    ours = [a.text for a in answer(run.predictor()[0], mixture, TEXTS, 1024)]
    assert run_card(folder, TEXTS) == ours


def run_card(folder, texts) -> list[str]:
    """Runs the card's example on some texts; returns what it prints."""
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('FOLDER = "."', f"FOLDER = {str(folder)!r}")
    code = code.replace('TEXTS = ["the text of an example"]', f"TEXTS = {texts!r}")
    printed: list = []
    exec(compile(code, "card", "exec"), {"print": printed.append})
    return printed[0]


def test_the_card_has_the_training_scores_and_command(toy_folder, make_run, tmp_path):
    run = make_run(
        tmp_path / "my-student",
        tiny_config(),
        mixture="toy_step_by_step_rules",
        alpha=0.25,
        data=DataConfig(dataset_path=str(toy_folder), labels=("yes", "no"), fraction=0.5),
    )
    (run.folder / "metrics.jsonl").write_text(
        '{"step": 7, "train/loss": 3.0}\n{"step": 7, "valid/accuracy": 0.625, "valid/loss": 2.5}\n'
        '{"step": 8, "valid/accuracy": 1.0}\n'
    )
    result = evaluate(run)
    predictions = result.save(run.folder / PREDICTIONS)
    folder = export(run, "hf", tmp_path / "out").path
    card = (folder / "README.md").read_text()
    for wanted in (
        "# my-student",
        "`toy_step_by_step_rules`",
        "distilling step-by-step",
        "the teacher rules",
        "gold labels",
        "0.25 for the label loss, 0.75 for the rationale loss",
        "fraction of the training data | 0.5",
        "steps | 7 of 10000",
        "valid accuracy, in training | 62.50%",
        "valid loss, in training | 2.5000",
        f"test accuracy | {result.scored.value:.2%} (95% CI: ",
        "With the prefix `explain: `",
        "--gin.DataConfig.dataset_path=$DATA",
        f"dss {dss.__version__}, jax {jax.__version__}",
    ):
        assert wanted in card, wanted
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (folder / "config.gin").read_text()
    repeated = parse_gin(
        [str(folder / "config.gin")],
        ["Experiment.run_dir=again", f"DataConfig.dataset_path={toy_folder}"],
    )
    assert repeated.data == run.experiment.data
    assert dataclasses.replace(repeated, run_dir=run.experiment.run_dir) == run.experiment
    predictions.write_text('{"id": "1"}\n')
    with pytest.raises(DssError, match=r"jsonl:1: no score; delete the file"):
        model_card(run, 7)


def test_the_card_has_the_decoder_start_id_and_the_final_alpha(make_run, tmp_path):
    run = make_run(tmp_path / "run", tiny_config(), mixture="toy_step_by_step_rules")
    data = dataclasses.replace(run.experiment.data, one_encoder_pass=True)
    experiment = dataclasses.replace(run.experiment, data=data, alpha=0.3, alpha_end=0.9)
    card = model_card(dataclasses.replace(run, experiment=experiment), 7)
    assert "explain: " not in card
    start = load_vocabulary(run.vocabulary_source).size
    assert f"the decoder start id {start} instead of 0" in " ".join(card.split())
    assert "0.3 for the label loss, 0.7 for the rationale loss, annealed to 0.9 |" in card


def test_the_card_names_a_base_model_on_the_hub(make_run, tmp_path):
    run = make_run(tmp_path / "run", tiny_config())
    for source, named in (
        ("hf:google/byt5-small", "base_model: google/byt5-small"),
        ("google/byt5-small", "base_model: google/byt5-small"),
        ("hf:/models/t5", None),
        ("hf:../t5", None),
        (None, None),
    ):
        experiment = dataclasses.replace(run.experiment, initial_checkpoint=source)
        card = model_card(dataclasses.replace(run, experiment=experiment), 7)
        assert ("base_model" in card) == (named is not None)
        assert (named or "") in card
        assert f"initial checkpoint | {source or 'none: randomly initialised'} |" in card


@pytest.mark.parametrize(
    ("to", "where", "checkpoint", "message"),
    [
        ("hff", "new", "best", "unknown format 'hff'; did you mean 'hf'?"),
        ("hf", "full", "best", "full: not empty; export into a new folder"),
        ("hf", "full/file", "best", "full/file: not empty"),
        ("t5x", "gs://bucket/new", "best", "gs://bucket/new: cannot export into a bucket"),
        ("hf", "new", "9", "no checkpoint '9'; available: 7, latest, best"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(
    to, where, checkpoint, message, make_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_run("run", tiny_config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.iterdir())
    args = ["export", "run", "--to", to, where, f"--checkpoint={checkpoint}"]
    assert cli.main(args) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_run_without_a_checkpoint_is_an_error(tmp_path, capsys):
    create_run(Experiment(run_dir=str(tmp_path / "run"), student=tiny_config(), vocabulary=BYTES))
    assert cli.main(["export", str(tmp_path / "run"), "--to=hf", str(tmp_path / "out")]) == 2
    assert "no checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_configuration_of_another_size_is_an_error(make_run, tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny_config())
    config = run.folder / "config.gin"
    config.write_text(config.read_text().replace("T5Config.d_ff = 32", "T5Config.d_ff = 64"))
    assert cli.main(["export", str(run.folder), "--to=hf", str(tmp_path / "out")]) == 2
    assert "a checkpoint of another size" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]


def test_a_student_that_transformers_cannot_represent_is_an_error():
    with pytest.raises(DssError, match="untied embeddings and scaled logits"):
        model_config(tiny_config(scaled_logits=True))


@pytest.mark.parametrize("to", ["hf", "t5x", "ctranslate2"])
def test_an_export_with_other_logits_is_not_written(to, make_run, tmp_path, monkeypatch):
    if to != "t5x":
        pytest.importorskip({"hf": "transformers"}.get(to, to))
    run = make_run(tmp_path / "run", tiny_config())
    write_model, train_state = huggingface_export.write_model, t5x_export.train_state

    def wrong_model(folder, config, *args):
        write_model(folder, dataclasses.replace(config, activation="silu"), *args)

    def wrong_state(*args):
        state, kept = train_state(*args)
        return state | {"target": jax.tree.map(lambda x: 1.1 * x, state["target"])}, kept

    monkeypatch.setattr(huggingface_export, "write_model", wrong_model)
    monkeypatch.setattr(t5x_export, "train_state", wrong_state)
    with pytest.raises(DssError, match="computes other logits from the export"):
        export(run, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_is_not_compared_for_lack_of_memory(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", tiny_config())
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    monkeypatch.setattr(comparison, "MEMINFO", tmp_path / "meminfo")
    assert "for lack of memory" in export(run, "hf", tmp_path / "out").note


def test_an_export_that_cannot_be_compared_has_a_note(make_run, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", tiny_config())

    def dummy(*args):
        raise ImportError("T5 needs another PyTorch\nand so on")

    monkeypatch.setattr(comparison, "check", dummy)
    written = export(run, "hf", tmp_path / "out")
    assert written.note.endswith("logits: T5 needs another PyTorch")
    assert (written.path / "config.json").is_file()


def test_a_student_of_a_mesh_is_exported_on_one_device(make_run, tmp_path):
    run = make_run(tmp_path / "run", tiny_config(), mesh=MeshConfig(data=64, model=2))
    assert export(run, "t5x", tmp_path / "out").note.startswith("without the run's optimizer")


@pytest.mark.parametrize("missing", [["ctranslate2"], ["transformers", "torch"]])
def test_missing_packages_of_ctranslate2_are_named(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n in missing else find(n))
    with pytest.raises(DssError, match=rf"needs {', '.join(missing)} \(not"):
        ctranslate2_export.check_installed()


@pytest.mark.parametrize("to", ["hf", "t5x", "ctranslate2"])
def test_a_full_disk_leaves_no_files_and_the_next_export_succeeds(
    to, make_run, tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run", tiny_config())
    (tmp_path / "out").mkdir()  # an empty folder is allowed
    (tmp_path / ".out.partial").mkdir()  # left by an export that was killed
    (tmp_path / ".out.partial" / "old").write_text("")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    last = {
        "hf": "dss.export.export.model_card",  # written last, after the tensors
        "t5x": "orbax.checkpoint.Checkpointer.save",
        "ctranslate2": "dss.interop.ctranslate2_export.convert",
    }[to]
    with monkeypatch.context() as patch:
        patch.setattr(last, full)
        with pytest.raises(OSError, match="No space left"):
            export(run, to, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "run"]
    assert list((tmp_path / "out").iterdir()) == []
    if to == "hf":
        export(run, to, tmp_path / "out")
        assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "run"]
        assert not (tmp_path / "out" / "old").exists()
        assert (tmp_path / "out" / "model.safetensors").is_file()


def int8(**values) -> Quantization:
    return Quantization(form="int8", **values)


def test_an_int8_export_is_verified_on_validation_labels(make_run, tmp_path):
    config = tiny_config(d_model=64, d_kv=16, d_ff=128, vocab_size=384)
    decoding = DecodingConfig(batch_size=8)  # among the labels
    run = make_run(tmp_path / "run", config)
    run = dataclasses.replace(
        run, experiment=dataclasses.replace(run.experiment, decoding=decoding)
    )
    written = export(run, "ctranslate2", tmp_path / "out", quantization=int8(min_agreement=0))
    card = (written.path / "README.md").read_text()
    assert "## Quantization" in card
    assert "equal labels: " in written.note
    assert "| equal labels | " in card
    assert "of float32) |" in card
    found = measure(run, written.path, 7, 400)
    assert found.examples > 0
    assert found.size == (written.path / "model.bin").stat().st_size < 0.5 * found.float_size
    engine = load_engine(written.path, load_vocabulary(BYTES), decoding)
    predictor, _ = run.predictor()
    mixture, examples = run.mixture(), evaluation_set(run.mixture(), "valid")
    theirs, ours = (e.answer(mixture, examples, 64) for e in (engine, predictor))
    for a, b in zip(theirs, ours, strict=True):
        assert sum(a.probabilities.values()) == pytest.approx(1)
        assert a.probabilities == pytest.approx(b.probabilities, abs=0.1)


def test_a_quantized_export_reads_data_that_have_moved(make_run, toy_folder, tmp_path, capsys):
    gone = DataConfig(dataset_path=str(tmp_path / "toy"), labels=("yes", "no"))
    shutil.copytree(toy_folder, tmp_path / "toy")
    make_run(tmp_path / "run", tiny_config(), data=gone)
    (tmp_path / "there").mkdir()
    (tmp_path / "toy").rename(tmp_path / "there" / "toy")
    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to=ctranslate2"]
    command += ["--quantization=int8", "--min-agreement=0"]
    assert cli.main(command) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert cli.main([*command, f"--dataset_path={tmp_path / 'there' / 'toy'}"]) == 0
    assert "few examples: this says little" in capsys.readouterr().out


def test_a_float_engine_has_the_students_probabilities_and_texts(make_run, tmp_path):
    run = make_run(tmp_path / "run", tiny_config())
    folder = export(run, "ctranslate2", tmp_path / "out").path
    vocabulary = load_vocabulary(BYTES)
    engine = load_engine(folder, vocabulary, run.experiment.decoding)
    predictor, _ = run.predictor()
    inputs = [encode_example(vocabulary, text, 64) for text in TEXTS[:5]]
    options = [("yes", "no"), ("x",), ("one", "two", "three"), ("yes", "no"), ("a", "b")]
    for a, b in zip(engine.choose(inputs, options), predictor.choose(inputs, options), strict=True):
        assert a.text == b.text
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
    texts = [e.generate(inputs, max_length=12) for e in (engine, predictor)]
    assert texts[0] == texts[1]
    with pytest.raises(DssError, match="decodes from the start id 0"):
        engine.generate(inputs, max_length=2, start=5)
    with pytest.raises(DssError, match="no CTranslate2 model"):
        load_engine(tmp_path, vocabulary, run.experiment.decoding)


def test_an_export_below_the_agreement_fails_with_the_figures_and_leaves_nothing(
    make_run, tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run", tiny_config())
    answer = CTranslate2Engine.predict
    monkeypatch.setattr(CTranslate2Engine, "predict", lambda *args: ["?", *answer(*args)[1:]])
    with pytest.raises(DssError, match=r"int8: equal labels: .* size of the weights.*nothing was"):
        export(run, "ctranslate2", tmp_path / "out", quantization=int8(min_agreement=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to=hf", "--quantization=int8"), "--quantization is for CTranslate2"),
        (("--to=ctranslate2", "--quantization=int7"), "unknown quantization 'int7'; did you mean"),
        (("--to=ctranslate2", "--min-agreement=0.5"), "are for --quantization"),
        (
            ("--to=ctranslate2", "--quantization=int8", "--min-agreement=2"),
            "--min-agreement=2: give a share",
        ),
        (("--to=ctranslate2", "--quantization=int8", "--examples=0"), "--examples=0: give at"),
    ],
)
def test_quantizations_that_cannot_be_are_refused(make_run, tmp_path, options, message, capsys):
    make_run(tmp_path / "run", tiny_config())
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
