"""A spreadsheet with all that spreadsheets have, from the teacher to the evaluation.

The rows and what the teacher writes are those handed with the project: tickets with empty cells,
equal bodies, several scripts and labels in two cases, and answers in every shape.
"""

import csv
import json

import pytest
from etils import epath

from dss.runs.session import read_sessions
from dss.teacher.prompt import load_prompt
from dss.testing import FakeEndpoint, chat_reply, last_question
from tests.conftest import SHARED, write_jsonl
from tests.end_to_end.conftest import STUDENT
from tests.end_to_end.runs import call

# Of 301 rows 14 have no label, one no text, 28 are held out; the teacher's shapes go round.
TABLE = """
trained 230 150
duplicate 27 19
conflicting duplicate 1 0
no label 14 0
empty input 1 1
unparsed 0 49
refused 0 54
in another split 28 28
total 301 301
""".strip().splitlines()
HELD_OUT = ("trained 28 21", "unparsed 0 2", "refused 0 5", "in another split 273 273")
LABELS = "[billing, bug, how-to, account access]"


@pytest.fixture(scope="module")
def rows(shared):
    with (shared / "faults/data/tickets.csv").open(encoding="utf-8-sig", newline="") as file:
        return [
            {"id": r["ticket_id"], "input": r["body"], "label": r["category"]}
            for r in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    text = load_prompt("classification").source
    text = text.replace("[billing, bug, question]", LABELS).replace("question\n", "how-to\n")
    path = tmp_path_factory.mktemp("prompt") / "tickets.yaml"
    path.write_text(
        text.replace("billing, bug or question", "billing, bug, how-to or account access")
    )
    return path


def shapes():
    lines = (SHARED / "faults/teacher_texts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    texts = [row["raw"] for row in found if row["labels"]]
    return [t.replace("Question.", "How-to.").replace("question", "how-to") for t in texts]


def test_a_spreadsheet_is_annotated_inspected_trained_and_evaluated(
    rows, prompt, vocab_path, tmp_path
):
    folder = tmp_path / "tickets"
    source = write_jsonl(folder / "train.jsonl", rows)
    inputs, texts = list(dict.fromkeys(row["input"] for row in rows)), shapes()

    def answer(body):
        question = last_question(body)
        (here,) = (i for i, text in enumerate(inputs) if question == f"Message: {text}\nReasoning:")
        return chat_reply(texts[here % len(texts)])

    with FakeEndpoint(answer) as endpoint:
        command = ["annotate", f"--input={source}", f"--prompt={prompt}", "--teacher=m"]
        command.append(f"--base-url={endpoint.url}")
        said = call(*command, status=2)
        assert "train.jsonl:51: label 'Billing' is not one of billing, bug" in said
        assert "did you mean 'billing'?" in said
        assert endpoint.count == 0
        write_jsonl(source, [{**row, "label": row["label"].lower()} for row in rows])
        said = call(*command)
        assert endpoint.count == len(inputs)
    assert "train.m.jsonl: 301 lines: 191 ok, 59 refused, 51 unparsed" in said

    (tmp_path / "student.gin").write_text(STUDENT.replace("384", "32128"))
    data = [
        f"--gin_file={tmp_path / 'student.gin'}",
        f"--gin.DATASET_PATH={folder}",
        f"--gin.VOCABULARY={vocab_path}",
        f"--gin.MODEL_DIR={tmp_path / 'run'}",
        "--gin.DATASET_LABELS=billing,bug,how-to,account access",
        "--gin.MIXTURE_OR_TASK_NAME=tickets_step_by_step_m",
        *("--gin.TRAIN_STEPS=3", "--gin.EVAL_PERIOD=3"),
    ]
    said = call("inspect", *data)
    lines = [line.split() for line in said.splitlines()]
    for row in (*TABLE, *HELD_OUT):
        assert row.split() in lines, row
    assert "the vocabulary has no token for 129 of 8,865 input tokens" in said

    said = call("train", *data)
    assert "tickets_label_gold: 301 rows: 230 trained, 27 duplicate, 1 conflicting" in said
    (label, rationale) = read_sessions(epath.Path(tmp_path / "run"))[0]["data"]["tasks"]
    for column, task in enumerate((label, rationale), 1):
        counts = {" ".join(row.split()[:-2]): int(row.split()[column - 3]) for row in TABLE}
        total = counts.pop("total")
        assert task["ledger"]["fates"] == {fate: n for fate, n in counts.items() if n}
        assert task["ledger"]["rows"] == total == sum(task["ledger"]["fates"].values())
    said = call("eval", tmp_path / "run", "--split=valid")
    assert "of 28)" in said
    assert "teacher m: accuracy 28.57%" in said
