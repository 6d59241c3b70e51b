import json

import pytest
from etils import epath

from dss.batches.store import tokenize
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.runs.session import SESSIONS_FILE, Session, describe_data, describe_machine
from dss.training.metrics import read_metrics
from tests.conftest import write_jsonl


def _lines(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder)]


def test_sessions_log_their_start_and_outcome(tmp_path):
    folder, path = epath.Path(tmp_path), tmp_path / SESSIONS_FILE
    with Session() as session:
        session.begin(folder, 0, {"device": "x"})
        session.outcome = "stopped by SIGTERM at step 3"
    session = Session()
    session.begin(folder, 3, {})
    error = DssError("step 5: the loss is nan\nmore")
    session.__exit__(DssError, error, None)
    with path.open("a") as file:
        file.write('{"event": "be')  # incomplete, as after a kill
    with Session() as session:
        session.begin(folder, 5, {})
    lines = _lines(path)
    seconds = [line.pop("seconds") for line in lines if "seconds" in line]
    assert lines == [
        {"event": "begin", "step": 0, "device": "x"},
        {"event": "end", "outcome": "stopped by SIGTERM at step 3"},
        {"event": "begin", "step": 3},
        {"event": "end", "outcome": "failed: step 5: the loss is nan"},
        {"event": "begin", "step": 5},
        {"event": "end", "outcome": "done"},
    ]
    assert all(0 <= s < 60 for s in seconds)


def test_a_session_that_fails_before_it_begins_writes_nothing(tmp_path):
    with pytest.raises(DssError), Session():
        raise DssError("no mixture")
    assert list(tmp_path.iterdir()) == []


def test_describe_machine_has_devices_and_versions():
    found = json.loads(json.dumps(describe_machine()))
    assert (found["device"], found["devices"], found["processes"]) == ("cpu", 8, 1)
    assert {"dss", "python", "jax", "orbax-checkpoint"} <= set(found["versions"])


def test_describe_data_counts_missing_and_truncated_rows(toy):
    mixture = named_mixture("toy_step_by_step_rules", [toy])
    rows = [task.rows("train") for task in mixture.tasks]
    store = tokenize(
        [rows[0], rows[1][5:]], load_vocabulary("bytes"), inputs_length=64, targets_length=13
    )
    found = describe_data(mixture, store)
    assert (found["dataset"], found["examples"]) == ("toy", 40)
    label, rationale = found["tasks"]
    assert (label["kind"], label["teacher"], label["examples"]) == ("label", None, 40)
    assert (rationale["teacher"], rationale["examples"]) == ("rules", 35)
    assert (label["cut_targets"], rationale["cut_inputs"]) == (0, 0)
    assert rationale["usage"] is None
    assert rationale["cut_targets"] == 35 - 5, "9 is 0 mod 3 has 13 tokens, and just fits"


def test_describe_data_has_the_usage_of_teacher_outputs(tmp_path):
    numbers = [str(i) for i in range(20)]
    examples = [{"id": i, "input": "q", "label": "a"} for i in numbers]
    write_jsonl(tmp_path / "train.jsonl", examples)
    outputs = [{"id": i, "rationale": "r", "label": "a"} for i in numbers]
    write_jsonl(tmp_path / "train.gpt-9.jsonl", outputs)
    (tmp_path / "train.gpt-9.usage.json").write_text('{"outputs": 1, "cost": 0.5}\n')
    mine = Dataset.from_files(tmp_path, name="mine")
    mixture = named_mixture("mine_step_by_step_gpt_9", [mine])
    rows = [task.rows("train") for task in mixture.tasks]
    bytes_ = load_vocabulary("bytes")
    store = tokenize(rows, bytes_, inputs_length=64, targets_length=64)
    label, rationale = describe_data(mixture, store)["tasks"]
    assert (label["usage"], rationale["usage"]) == (None, {"outputs": 1, "cost": 0.5})
    (tmp_path / "train.gpt-9.usage.json").write_text("{")
    assert describe_data(mixture, store)["tasks"][1]["usage"] is None
