"""From a messy spreadsheet to a service: data, training, an int8 export, and labels over HTTP."""

import csv
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import openai
import pytest

from dss.cli.main import main
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

STUDENT = """
Experiment.student = @T5Config()
T5Config.vocab_size = 32128
T5Config.d_model = 32
T5Config.d_kv = 16
T5Config.d_ff = 64
T5Config.num_heads = 2
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
DATASET_PATH = 'tickets'
MODEL_DIR = 'run'
BATCH_SIZE = 32
TRAIN_STEPS = 60
EVAL_PERIOD = 60
LEARNING_RATE = 0.01
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}
"""


@pytest.fixture(scope="module")
def folder(shared, vocab_path, tmp_path_factory):
    """A folder with the dataset of the spreadsheet, a run, its int8 export and predictions."""
    folder = tmp_path_factory.mktemp("service")
    table = shared / "faults/data/tickets.csv"
    before = os.getcwd()
    (folder / "student.gin").write_text(STUDENT)
    os.chdir(folder)
    try:
        columns = ("--input=body", "--label=category", "--id=ticket_id", "--merge-labels")
        assert main(["data", str(table), *columns, "--output=tickets"]) == 0
        files = ("--gin_file=student.gin", "--gin_file=methods/finetune.gin")
        assert main(["train", *files, f"--gin.VOCABULARY={vocab_path}"]) == 0
        assert main(["export", "run", "int8", "--to=ctranslate2", "--quantization=int8"]) == 0
        predicted = ("--input", str(table), "--columns=body", "--output=labels.csv")
        assert main(["predict", "run", *predicted]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def serve(folder):
    """A function that starts `dss serve` and returns the process and its address when ready."""
    processes = []

    def start(source):
        command = [sys.executable, "-m", "dss", "serve", source, "--port=0"]
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        lines = []
        for line in process.stdout:
            lines.append(line)
            address, _, said = line.strip().rpartition(": ")
            if said == "ready":
                return process, address
        raise AssertionError("".join(lines))

    yield start
    for process in processes:
        process.kill()


def test_the_dataset_of_the_spreadsheet_has_every_row(folder, shared):
    with (shared / "faults/data/tickets.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = {row["ticket_id"]: row for row in csv.DictReader(file)}
    found = {}
    for split in ("train", "valid", "test"):
        for line in (folder / f"tickets/{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert row["id"] not in found
            found[row["id"]] = row
    assert found.keys() == rows.keys()
    for id_, row in found.items():
        assert row["input"] == rows[id_]["body"].strip()
        wanted = " ".join(rows[id_]["category"].lower().split())
        assert row.get("label", "") == wanted
    declared = json.loads((folder / "tickets/dataset.json").read_text())
    assert sorted(declared["labels"]) == ["account access", "billing", "bug", "how-to"]


@pytest.mark.parametrize("source", ["int8", pytest.param("run", marks=pytest.mark.exhaustive)])
def test_the_service_has_the_labels_of_predict(folder, serve, source):
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["body"]][:250]
    process, address = serve(source)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    done = client.completions.create(model=source, prompt=[row["body"] for row in rows])
    labels = [choice.text for choice in done.choices]
    assert len({*labels}) == 4
    equal = sum(a == b["label"] for a, b in zip(labels, rows, strict=True))
    assert equal == len(rows) if source == "run" else equal >= 0.99 * len(rows)
    message = {"role": "user", "content": rows[0]["body"]}
    chat = client.chat.completions.create(model=source, messages=[message])
    assert chat.choices[0].message.content == done.choices[0].text
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}/predict", b"{}")
    assert error.value.code == 422
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.exhaustive
def test_the_service_is_timed_against_a_naive_handler(folder):
    """That all sides answer every request alike; the figures are for a quiet machine."""
    command = (sys.executable, ROOT / "benchmarks/serve.py", "run", "tickets/train.jsonl")
    options = ("--requests=60", "--clients=8", "--repeats=1", "--json=figures.json")
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    assert [*figures["sides"]] == ["run", "int8", "naive"]
    assert all(row["equal_labels"] >= 0.95 for row in figures["sides"].values())
    assert all(row["p95_ms"] >= row["p50_ms"] > 0 for row in figures["sides"].values())
    assert figures["predict"] > 0


def test_what_cannot_be_served_is_a_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for options, message in (
        (("none",), "none: no run and no export"),
        (("tickets",), "tickets: no run and no export"),
        (("run", "--port=70000"), "--port 70000: give one from 0"),
        (("run", "--host=256.1.1.1"), "--host 256.1.1.1 --port 8000: "),
        (("run", "--key-env=NOT_SET"), "NOT_SET has no API key; set it, or unset it"),
        (("run", "--queue=0"), "--queue=0: give at least 1"),
    ):
        assert main(["serve", *options]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
