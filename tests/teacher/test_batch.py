import json
import random

import pytest

from dss.errors import DssError
from dss.teacher import batch
from dss.teacher.batch import export_batch, import_batch
from dss.teacher.journal import Journal
from dss.teacher.prices import Price
from dss.testing import FakeEndpoint, last_question
from tests.conftest import write_jsonl
from tests.teacher.conftest import label_of
from tests.teacher.test_annotate import lines_of, right


@pytest.fixture
def exported(numbers):
    """The job, its journal, and the requests of its batch files."""
    job = numbers.job()
    journal = Journal(job.journal_path)
    journal.describe(job.writer)
    files = export_batch(journal, job.writer, job.examples(), job.folder / "batch" / "numbers")
    requests = [json.loads(line) for path, _ in files for line in path.read_text().splitlines()]
    yield job, journal, requests
    journal.close()


def result(request, number, code=200):
    n = int(last_question(request["body"]).split("Number: ")[1].split("\n")[0])
    body = json.loads(right(request["body"]).body) if code == 200 else {"error": {"message": "no"}}
    response = {"status_code": code, "request_id": f"r{n}", "body": body}
    line = {"id": f"batch_req_{number}", "custom_id": request["custom_id"], "response": response}
    return line | {"error": None}


def test_a_batch_has_the_requests_of_a_run(exported):
    job, _, requests = exported
    assert len(requests) == 20
    assert {request["url"] for request in requests} == {"/v1/chat/completions"}
    assert len({request["custom_id"] for request in requests}) == 20
    first = next(job.examples())
    assert requests[0]["body"] == job.writer.body(job.writer.requests(first)[0])


def test_results_and_errors_are_imported_in_any_order_and_only_once(exported):
    job, journal, requests = exported
    lines = [result(request, i) for i, request in enumerate(requests)]
    lines[4] = result(requests[4], 4, code=400)
    expired = {"code": "batch_expired", "message": "This request expired."}
    lines[5] = {"id": "e5", "custom_id": requests[5]["custom_id"], "response": None}
    lines[5]["error"] = expired
    message = lines[6]["response"]["body"]["choices"][0]["message"]
    message["content"] = message["content"].replace("It is 6.", "It is 6. \ud83d")
    lines.append(result(requests[0] | {"custom_id": "other"}, 99))
    random.Random(0).shuffle(lines)
    results = write_jsonl(job.folder / "results.jsonl", lines[:12])
    errors = write_jsonl(job.folder / "errors.jsonl", lines[12:])
    assert import_batch(journal, [errors, results]) == {"new": 20, "before": 0, "unknown": 1}
    assert import_batch(journal, [results, errors]) == {"new": 0, "before": 20, "unknown": 1}
    job.export(journal)
    outputs = lines_of(job)
    assert [line["id"] for line in outputs] == [f"n{i}" for i in range(20)]
    for i, line in enumerate(outputs):
        assert (line["status"], line["label"]) == (
            ("error", None) if i in (4, 5) else ("ok", label_of(i))
        )
    assert outputs[5]["raw"] == "This request expired."
    # Only failed requests are exported again.
    again = export_batch(journal, job.writer, job.examples(), job.folder / "batch" / "numbers")
    assert [count for _, count in again] == [2]


def test_results_with_the_same_id_are_distinguished_by_their_requests(exported):
    job, journal, requests = exported
    lines = [result(request, i) | {"id": "the same \ud83d"} for i, request in enumerate(requests)]
    lines[0]["custom_id"] = "half \ud83d"
    results = write_jsonl(job.folder / "results.jsonl", lines)
    assert import_batch(journal, [results]) == {"new": 19, "before": 0, "unknown": 1}
    lines[1]["response"]["status_code"] = 10**30
    write_jsonl(results, lines[1:2])
    with pytest.raises(DssError, match=r"results.jsonl:1: has neither a `response` with a status"):
        import_batch(journal, [results])


def test_a_batch_is_charged_at_batch_prices(exported):
    job, journal, requests = exported
    results = [result(request, i) for i, request in enumerate(requests)]
    import_batch(journal, [write_jsonl(job.folder / "results.jsonl", results)])
    usage = journal.usage(job.writer.teacher, batch=True)
    assert (usage.prompt, usage.completion) == (2000, 100)
    price = Price(input=2.0, output=4.0, batch_input=1.0, batch_output=2.0)
    assert price.cost(usage, batch=True) == pytest.approx(2200 / 1e6)
    assert Price(input=2.0, output=4.0).cost(usage, batch=True) is None


def test_a_run_sends_only_the_requests_without_a_batch_result(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        beside = job.folder / "numbers-000.jsonl"
        beside.write_text("mine")
        journal = Journal(job.journal_path)
        journal.describe(job.writer)
        ((path, _),) = export_batch(journal, job.writer, job.examples(), job.folder / "numbers")
        requests = [json.loads(line) for line in path.read_text().splitlines()]
        results = [result(request, i) for i, request in enumerate(requests[:15])]
        import_batch(journal, [write_jsonl(job.folder / "results.jsonl", results)])
        journal.close()
        assert numbers.ask(job).sent == 5
        assert beside.read_text() == "mine"
    assert endpoint.count == 5
    assert {line["status"] for line in lines_of(job)} == {"ok"}


@pytest.mark.parametrize(("requests", "size"), [(7, 10**9), (50_000, 4000)])
def test_files_do_not_exceed_the_providers_limits(exported, monkeypatch, requests, size):
    job, journal, all_requests = exported
    monkeypatch.setattr(batch, "MOST_REQUESTS", requests)
    monkeypatch.setattr(batch, "MOST_BYTES", size)
    stem = job.folder / "batch" / "numbers"
    files = export_batch(journal, job.writer, job.examples(), stem)
    assert len(files) > 2
    assert sum(count for _, count in files) == 20
    assert all(count <= requests and path.stat().st_size <= size for path, count in files)
    assert sorted(stem.parent.iterdir()) == [path for path, _ in files]
    text = "".join(path.read_text() for path, _ in files)
    assert [json.loads(line) for line in text.splitlines()] == all_requests


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x"}, "results.jsonl:3: has no `custom_id`"),
        ({"custom_id": "k", "response": {}}, "results.jsonl:3: has neither"),
    ],
)
def test_an_invalid_line_is_named_and_the_lines_before_it_are_kept(exported, line, message):
    job, journal, requests = exported
    good = [result(request, i) for i, request in enumerate(requests[:2])]
    path = write_jsonl(job.folder / "results.jsonl", [*good, line])
    with pytest.raises(DssError, match=message):
        import_batch(journal, [path])
    assert len(journal.final_among([r["custom_id"] for r in requests])) == 2
