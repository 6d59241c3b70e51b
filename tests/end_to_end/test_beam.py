"""`dss annotate --pipeline-options`: the same work in an Apache Beam pipeline."""

import collections
import json
import subprocess
import time

from dss.teacher.beam import BATCH
from dss.testing import FakeEndpoint
from tests.end_to_end.test_annotate import DSS, command, run
from tests.teacher.conftest import label_of, numbers_file
from tests.teacher.test_annotate import failure, number_of, right

PIPELINE = "--pipeline-options=--runner=DirectRunner"


def test_a_pipeline_asks_each_question_once_and_knows_what_earlier_ones_asked(tmp_path):
    source = numbers_file(tmp_path, 300)
    with source.open("a") as file:  # the same question under another id
        file.write(json.dumps({"id": "again", "input": "7", "label": "odd"}) + "\n")
    broken = True

    def answer(body):
        if number_of(body) in (5, 6) and broken:
            return failure(400)
        return right(body, text="It\u2028is {n}.\nLabel: {label}")

    with FakeEndpoint(answer) as endpoint:
        args = command(tmp_path, endpoint.url, PIPELINE, "--samples=2", "--temperature=1")
        done = run(*args)
        assert done.returncode == 1, done.stderr
        assert "4 requests got no answer" in done.stdout
        assert endpoint.count == 600
        assert max(endpoint.asked.values()) == 2
        broken = False
        done = run(*args)
        assert done.returncode == 0, done.stderr
        assert endpoint.count == 604
        lines = [json.loads(line) for line in (tmp_path / "numbers.m.jsonl").open()]
        assert [line["id"] for line in lines] == [*(f"n{i}" for i in range(300)), "again"]
        assert run(*args[:-3], *args[-2:], "--report").returncode == 0
        by_id = {line["id"]: line for line in lines}
        assert all(by_id[f"n{i}"]["label"] == label_of(i) for i in range(300))
        assert by_id["again"]["rationale"] == "It\u2028is 7."
        assert collections.Counter(line["status"] for line in lines) == {"ok": 301}
        # The journal has it all: neither a pipeline nor a run here asks again.
        assert run(*args).returncode == 0
        assert run(*[arg for arg in args if arg != PIPELINE]).returncode == 0
        assert endpoint.count == 604
    assert not (tmp_path / "numbers.m.pipeline").exists()


def test_a_wrong_key_in_a_pipeline_keeps_the_answers_that_were_paid_for(tmp_path):
    numbers_file(tmp_path, 400)  # two batches
    asked = collections.Counter()

    def answer(body):
        asked["n"] += 1
        return right(body) if asked["n"] <= 30 else failure(401, message="bad key")

    with FakeEndpoint(answer) as endpoint:
        args = command(tmp_path, endpoint.url, PIPELINE, "--concurrency=4")
        done = run(*args)
        assert done.returncode == 1
        assert "HTTP 401: bad key" in done.stderr
        assert "370 requests got no answer" in done.stdout
        asked.subtract(n=1000)
        assert run(*args).returncode == 0
    assert endpoint.count <= 400 + 4
    assert len((tmp_path / "numbers.m.jsonl").read_text().splitlines()) == 400


def test_limits_that_workers_cannot_share_are_refused(tmp_path):
    numbers_file(tmp_path, 2)
    done = run(*command(tmp_path, "http://127.0.0.1:9/v1", PIPELINE, "--max-requests=3"))
    assert done.returncode == 2
    assert "--max-requests: not possible with --pipeline-options" in done.stderr


def test_a_pipeline_that_is_killed_loses_only_what_was_in_hand(tmp_path):
    numbers_file(tmp_path, 1500)
    with FakeEndpoint(right) as endpoint:
        args = command(tmp_path, endpoint.url, PIPELINE)
        process = subprocess.Popen([*DSS, *args], stdout=subprocess.DEVNULL)
        while endpoint.count < 700:
            time.sleep(0.01)
        process.kill()
        process.wait()
        before = endpoint.count
        assert run(*args).returncode == 0
        asked_twice = endpoint.count - 1500
    # Those of the batch in hand; the endpoint may count a few that were sent as it ended.
    assert asked_twice <= before % BATCH + 64
    assert len((tmp_path / "numbers.m.jsonl").read_text().splitlines()) == 1500


def test_an_unknown_runner_is_one_line(tmp_path):
    numbers_file(tmp_path, 2)
    done = run(*command(tmp_path, "http://127.0.0.1:9/v1", "--pipeline-options=--runner=Nope"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]  # Beam warns of what it does not find before that
    assert last.startswith("dss annotate: --pipeline-options: Unexpected pipeline runner: Nope")
