"""Fuzzed data folders: no traceback, ledgers add up, labels are trained unchanged."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dss.batches.store import open_store
from dss.cli.main import main
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary, round_trip
from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.teacher.prompt import load_prompt
from tests.end_to_end.conftest import STUDENT

pytestmark = pytest.mark.slow

LENGTHS = {"inputs_length": 48, "targets_length": 24}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", " ", "x", "X", "{", "m²", "a\tb", "1,200", "👋", "is 1 good"]),
)
PLAIN_LABELS = st.sampled_from(
    [None, "yes", "no", "Yes", " yes", "", "f{x}", "是", "m2", "m²", 1, 1.0]
)
LABELS = st.one_of(
    PLAIN_LABELS,
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.lists(st.text(max_size=2), max_size=1),
)
IDS = st.sampled_from([None, *range(9), "0", 1.0, "a", "ä"])
STATUSES = st.sampled_from(["ok", "ok", "ok", "unparsed", "refused", "error"])
RAW = st.one_of(
    TEXTS,
    st.builds("{}\nLabel: {}".format, TEXTS, st.sampled_from(["billing", "bug", "**bug**", "x"])),
    st.builds("<think>{}</think>{}".format, TEXTS, TEXTS),
    st.builds(lambda a, b: json.dumps({"rationale": a, "label": b}), TEXTS, TEXTS),
)


def rows_of(texts, labels, **more):
    """Returns a strategy of lists of rows with these fields."""
    fields = {"input": texts, "label": labels} | more
    return st.lists(st.fixed_dictionaries(fields), min_size=4, max_size=12)


ROWS = st.one_of(
    rows_of(TEXTS, PLAIN_LABELS),
    rows_of(TEXTS, PLAIN_LABELS),
    rows_of(TEXTS, LABELS, id=IDS),
)
PLAIN_OUTPUTS = {
    "id": st.builds("train-{}".format, st.integers(0, 14)),
    "rationale": TEXTS,
    "label": PLAIN_LABELS,
    "status": STATUSES,
    "input_hash": st.sampled_from([None, None, "0" * 16]),
}
WILD_OUTPUTS = PLAIN_OUTPUTS | {
    "id": IDS,
    "label": LABELS,
    "raw": RAW,
    "status": st.sampled_from(["ok", "stale", "fine", None]),
    "vote": st.sampled_from([None, 0.5, 2, "x"]),
}
OUTPUTS = st.one_of(
    st.lists(st.fixed_dictionaries(PLAIN_OUTPUTS), min_size=6, max_size=12),
    st.lists(st.fixed_dictionaries(PLAIN_OUTPUTS), min_size=6, max_size=12),
    st.lists(st.fixed_dictionaries(WILD_OUTPUTS), max_size=4),
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-8", "utf-16", "latin-1"])
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def write(path: Path, rows: list[dict], encoding: str, end: str) -> None:
    text = end.join(json.dumps(row, ensure_ascii=encoding == "latin-1") for row in rows)
    path.write_bytes(text.encode(encoding, errors="surrogatepass"))


def labels_of(path: Path) -> dict[str, str]:
    """Returns the labels of a file of examples by their ids, read without dss."""
    rows = [json.loads(s) for s in path.read_text("utf-8-sig").split("\n") if s.strip()]
    out = {}
    for i, row in enumerate(rows):
        key = row.get("id")
        label = row.get("label")
        texts = [
            str(int(v)) if isinstance(v, float) and v == int(v) and abs(v) < 2**53 else str(v)
            for v in (f"train-{i}" if key is None else key, label)
        ]
        if label is not None and texts[1].strip():
            out[texts[0]] = texts[1].strip()
    return out


def test_any_folder_is_inspected_or_refused_in_a_line(vocab_path):
    read, refusals = [], []

    @given(ROWS, OUTPUTS, ENCODINGS, st.sampled_from(["\n", "\r\n", "\n\n"]))
    @FUZZ
    def each(rows, outputs, encoding, end):
        inspect_and_read(vocab_path, rows, outputs, encoding, end, read, refusals)

    each()
    assert len(read) > 15
    assert len(refusals) > 15
    assert not any("\n" in message for message in refusals)


def inspect_and_read(vocab_path, rows, outputs, encoding, end, read, refusals):
    """Inspects a folder; checks each mixture's store, or keeps its error."""
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSS_CACHE", f"{temporary}/cache")
        folder = Path(temporary) / "any"
        folder.mkdir()
        write(folder / "train.jsonl", rows, encoding, end)
        write(folder / "train.t.jsonl", outputs, "utf-8", end)
        command = ["inspect", "any_step_by_step_t", f"--gin.DATASET_PATH={folder}"]
        command += [f"--gin.VOCABULARY={vocab_path}", "--gin.TRAIN_STEPS=8"]
        assert main(command) in (0, 2)
        dataset = Dataset.from_files(folder, name="any")
        for method in ("finetune", "step_by_step_t"):
            try:
                read.append(
                    check_store(
                        named_mixture(f"any_{method}", [dataset]), vocab_path, folder, len(rows)
                    )
                )
            except DssError as error:
                refusals.append(str(error))


def check_store(mixture, vocab_path, folder, count):
    """Compares a store's targets with the file; returns the number of examples."""
    vocabulary = load_vocabulary(vocab_path)
    store = open_store(mixture, "train", vocabulary, **LENGTHS)
    for tokens in store.tasks:
        assert tokens.ledger.rows == sum(tokens.ledger.fates.values()) == count
    labels = labels_of(folder / "train.jsonl")
    targets = store.tasks[0].targets
    for i, row in enumerate(store.rows[:, 0]):
        if row >= 0:
            written = vocabulary.decode(targets[row].tolist())
            wanted = labels[store.ids[i]]
            assert written == round_trip(vocabulary, wanted) or len(targets[row]) == 24
    return len(store)


@given(st.lists(RAW, min_size=1, max_size=8))
@FUZZ
def test_any_text_of_a_teacher_is_parsed(texts):
    from dss.data.examples import Example

    for name in ("classification", "free_form"):
        prompt = load_prompt(name)
        for text in texts:
            parsed = prompt.parse(text, Example("1", "x"), hinted=False)
            assert parsed.label is None or prompt.labels.admit(parsed.label)


@pytest.mark.slow
@given(rows_of(TEXTS, PLAIN_LABELS))
@settings(FUZZ, max_examples=2)
def test_any_folder_trains_a_step(rows):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "any"
        folder.mkdir()
        rows += [{"input": f"is {i} good", "label": "yes"} for i in range(20)]
        write(folder / "train.jsonl", rows, "utf-8-sig", "\n")
        (Path(temporary) / "student.gin").write_text(STUDENT)
        command = ["train", f"--gin_file={temporary}/student.gin", f"--gin.DATASET_PATH={folder}"]
        flags = [f"--gin.MODEL_DIR={temporary}/run", "--gin.MIXTURE_OR_TASK_NAME=any_finetune"]
        assert main([*command, *flags, "--gin.TRAIN_STEPS=1", "--gin.EVAL_PERIOD=1"]) == 0
