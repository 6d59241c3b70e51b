"""`dss annotate --pipeline-options`: the same work in an Apache Beam pipeline."""

import collections
import json

from dss.testing import FakeEndpoint
from tests.integration.test_annotate import command, run
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
        return right(body)

    with FakeEndpoint(answer) as endpoint:
        args = command(tmp_path, endpoint.url, PIPELINE, "--samples=2", "--temperature=1")
        done = run(*args)
        assert done.returncode == 1, done.stderr
        assert "4 requests brought no answer" in done.stdout
        assert endpoint.count == 600
        assert max(endpoint.asked.values()) == 2
        broken = False
        done = run(*args)
        assert done.returncode == 0, done.stderr
        assert endpoint.count == 604
        lines = [json.loads(line) for line in (tmp_path / "numbers.m.jsonl").open()]
        assert len(lines) == 301
        by_id = {line["id"]: line for line in lines}
        assert all(by_id[f"n{i}"]["label"] == label_of(i) for i in range(300))
        assert by_id["again"]["rationale"] == "It is 7."
        assert collections.Counter(line["status"] for line in lines) == {"ok": 301}
        assert run(*args).returncode == 0
        assert endpoint.count == 604


def test_a_wrong_key_in_a_pipeline_keeps_the_answers_that_were_paid_for(tmp_path):
    numbers_file(tmp_path, 100)
    asked = collections.Counter()

    def answer(body):
        asked["n"] += 1
        return right(body) if asked["n"] <= 30 else failure(401, message="bad key")

    with FakeEndpoint(answer) as endpoint:
        args = command(tmp_path, endpoint.url, PIPELINE, "--concurrency=4")
        done = run(*args)
        assert done.returncode == 1
        assert "HTTP 401: bad key" in done.stderr
        assert "70 requests brought no answer" in done.stdout
        asked.subtract(n=1000)
        assert run(*args).returncode == 0
    assert endpoint.count <= 100 + 4
    assert len((tmp_path / "numbers.m.jsonl").read_text().splitlines()) == 100


def test_limits_that_workers_cannot_share_are_refused(tmp_path):
    numbers_file(tmp_path, 2)
    done = run(*command(tmp_path, "http://127.0.0.1:9/v1", PIPELINE, "--max-requests=3"))
    assert done.returncode == 2
    assert "--max-requests: the workers of a pipeline do not share one count" in done.stderr
