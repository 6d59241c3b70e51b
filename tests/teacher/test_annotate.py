import collections
import dataclasses
import email.utils
import gzip
import json
import re
import resource
import sqlite3
import time

import pytest

from dss.data.examples import hash_input
from dss.errors import DssError
from dss.teacher import prompt
from dss.teacher.annotate import Progress
from dss.teacher.job import file_job
from dss.teacher.journal import ROOM, Journal
from dss.teacher.prices import Price
from dss.testing import FakeEndpoint, FakeReply, chat_reply, completion_reply, last_question
from tests.teacher.conftest import FastClock, label_of

ERROR = {"message": "no", "type": "x", "code": None}


def number_of(body) -> int:
    return int(last_question(body).split("Number: ")[1].split("\n")[0])


def right(body, text="It is {n}.\nLabel: {label}", **changes) -> FakeReply:
    n = number_of(body)
    return chat_reply(text.format(n=n, label=label_of(n)), **changes)


def failure(code: int, /, **error) -> FakeReply:
    return FakeReply(code=code, body=json.dumps({"error": ERROR | error}).encode())


def lines_of(job) -> list[dict]:
    return [json.loads(line) for line in job.file("jsonl").read_text().splitlines()]


def attempts(job) -> collections.Counter:
    with sqlite3.connect(job.journal_path) as connection:
        rows = connection.execute("SELECT status, count(*) FROM attempts GROUP BY status")
        return collections.Counter(dict(rows.fetchall()))


class RecordedProgress(Progress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_every_example_is_asked_once_and_exported_in_order(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job)
        assert (state.done, state.sent, state.stopped) == (20, 20, None)
        again = numbers.ask(job)
    assert (endpoint.count, again.sent, again.done) == (20, 0, 20)
    lines = lines_of(job)
    assert [line["id"] for line in lines] == [f"n{i}" for i in range(20)]
    assert lines[3] == {
        "id": "n3",
        "rationale": "It is 3.",
        "label": "odd",
        "status": "ok",
        "teacher": "m",
        "raw": "It is 3.\nLabel: odd",
        "input_hash": hash_input("3"),
    }


def test_a_chat_shows_exemplars_as_turns_and_a_completion_as_one_text(numbers):
    with FakeEndpoint(right) as endpoint:
        numbers.ask(numbers.job(endpoint.url))
    body = endpoint.bodies[0]
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert body["messages"][1]["content"] == "Two is twice one.\nLabel: even"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "stop")} == {
        "model": "m",
        "max_tokens": 50,
        "temperature": 0,
        "stop": ["\nNumber:"],
    }

    def complete(body):
        n = int(body["prompt"].rpartition("Number: ")[2].split("\n")[0])
        return completion_reply(f" It is {n}.\nLabel: {label_of(n)}")

    with FakeEndpoint(complete) as endpoint:
        job = numbers.job(endpoint.url, api="completions", parameters={"temperature": None})
        numbers.ask(job)
    text = endpoint.bodies[0]["prompt"]
    assert text.startswith(
        "Number: two\nWhy: Two is twice one.\nLabel: even\n\nNumber: three\nWhy:"
    )
    assert text.endswith("\nWhy:")
    assert "temperature" not in endpoint.bodies[0]
    assert collections.Counter(line["status"] for line in lines_of(job)) == {"ok": 20}


ONCE = {  # replies to the first request of a number, with the attempt's status
    0: (failure(500), "failed"),
    1: (failure(503), "failed"),
    2: (FakeReply(code=200, body=b'{"choices": [{"mess', lost=True), "dropped"),
    3: (FakeReply(code=200, body=b'{"choices": [{"message": {"cont'), "malformed"),
    4: (FakeReply(code=200, body=b"<html>busy</html>"), "malformed"),
    5: (FakeReply(code=200, body=b'{"choices": []}'), "empty"),
    6: (FakeReply(code=200, body=b'{"choices": null}'), "empty"),
    7: (chat_reply(None), "empty"),
    8: (FakeReply(code=200, body=b'{"error": {"message": "upstream", "code": 502}}'), "failed"),
    9: (FakeReply(delay=3.0, body=b"{}"), "timeout"),
    10: (failure(429), "limited"),
    11: (FakeReply(code=200, body=b"[" * 100_000), "malformed"),
    12: (FakeReply(code=200, body=b'{"choices": [{"message": {"content": 3}}]}'), "empty"),
}
ALWAYS = {  # replies to every request of a number, with the status of attempt and output
    13: (failure(400, message="too long"), "rejected", "error"),
    14: (chat_reply("", finish_reason="content_filter"), "refused", "refused"),
    15: (chat_reply(None, refusal="I can not help."), "refused", "refused"),
    16: (chat_reply("It is", finish_reason="length"), "answered", "unparsed"),
    17: (chat_reply("", finish_reason="length"), "answered", "unparsed"),
    18: (chat_reply("It is 18.\nLabel: both"), "answered", "unparsed"),
}


def test_each_fault_has_its_status_and_other_requests_are_answered(numbers):
    seen = collections.Counter()

    def answer(body):
        n = number_of(body)
        seen[n] += 1
        if n in ONCE and seen[n] == 1:
            return ONCE[n][0]
        return ALWAYS[n][0] if n in ALWAYS else right(body)

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, timeout=1.0)
    expected = collections.Counter(status for _, status in ONCE.values())
    expected.update(status for _, status, _ in ALWAYS.values())
    expected["answered"] += 20 - len(ALWAYS)
    assert attempts(job) == expected
    assert state.status_counts == expected
    statuses = {int(line["id"][1:]): line["status"] for line in lines_of(job)}
    assert statuses == {n: ALWAYS[n][2] if n in ALWAYS else "ok" for n in range(20)}
    assert all(seen[n] == (2 if n in ONCE else 1) for n in range(20))
    assert state.unanswered == 1
    raw = {line["id"]: line["raw"] for line in lines_of(job)}
    assert raw["n13"] == "HTTP 400: too long"
    assert raw["n18"] == "It is 18.\nLabel: both"
    assert state.usage.uncounted == 8  # six replies without a count, a timeout, a broken connection


def test_retry_after_is_waited_for_however_long_and_reported(numbers):
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    waits = iter(["2", "300", date])
    clock, progress = FastClock(), RecordedProgress()

    def answer(body):
        wait = next(waits, None)
        if wait is None:
            return right(body)
        return FakeReply(code=429, headers={"Retry-After": wait}, body=b"{}")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, clock=clock, progress=progress, concurrency=1)
    assert (state.done, state.unanswered, endpoint.count) == (20, 0, 23)
    long = sorted(wait for wait in clock.waits if wait > 1)
    assert long == pytest.approx([2, 300, 3600], abs=2)
    assert [line.split(", until")[0] for line in progress.lines][:2] == [
        "HTTP 429 with Retry-After: waiting 2 s",
        "HTTP 429 with Retry-After: waiting 300 s",
    ]
    assert "HTTP 429" in progress.lines[2]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (failure(401, message="Incorrect API key provided"), "HTTP 401: Incorrect API key"),
        (failure(429, message="quota", code="insufficient_quota"), "HTTP 429: quota"),
        (failure(429, message="quota", type="insufficient_quota"), "HTTP 429: quota"),
        (failure(402, message="Payment required"), "HTTP 402: Payment required"),
        (failure(400, message="Your credit balance is too low"), "credit balance is too low"),
    ],
)
def test_a_wrong_key_or_no_quota_stops_the_run_with_one_line(numbers, reply, message):
    numbers.count = 500
    asked = collections.Counter()

    def answer(body):
        asked["n"] += 1
        return right(body) if asked["n"] <= 5 else reply

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        with pytest.raises(DssError, match=message) as caught:
            numbers.ask(job, concurrency=8)
    assert "\n" not in str(caught.value)
    assert endpoint.count <= 5 + 8
    assert sum(line["status"] == "ok" for line in lines_of(job)) == 5


def test_a_server_that_never_answers_ends_the_run_after_some_requests(numbers):
    numbers.count = 500
    with FakeEndpoint(lambda _: failure(404, message="no model m")) as endpoint:
        job = numbers.job(endpoint.url)
        with pytest.raises(DssError, match=r"20 requests in a row.*no model m"):
            numbers.ask(job)
    assert endpoint.count < 100
    with pytest.raises(DssError, match=r"cannot connect to a server: ConnectError"):
        numbers.ask(numbers.job("http://127.0.0.1:9/v1"), attempts=2)


def test_failures_are_retried_up_to_the_limit_and_by_the_next_run(numbers):
    broken = True

    def answer(body):
        return failure(500) if number_of(body) == 3 and broken else right(body)

    clock = FastClock()
    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, attempts=3, clock=clock)
        assert (state.unanswered, endpoint.count) == (1, 22)
        assert len(clock.waits) == 2
        assert 0.5 <= clock.waits[0] <= 1
        assert 1 <= clock.waits[1] <= 2
        assert lines_of(job)[3]["status"] == "error"
        broken = False
        state = numbers.ask(job)
    assert (state.unanswered, endpoint.count) == (0, 23)
    assert lines_of(job)[3]["status"] == "ok"


def test_identical_examples_are_paid_for_once(numbers, tmp_path):
    job = numbers.job()
    rows = "".join(json.dumps({"id": str(i), "input": str(i % 3)}) + "\n" for i in range(20))
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        job.source.write_text(rows)
        state = numbers.ask(job)
    assert endpoint.count == 3
    assert (state.done, len(lines_of(job))) == (20, 20)


def test_max_requests_stops_a_run_and_the_next_one_resumes_it(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, max_requests=7)
        assert (endpoint.count, state.stopped) == (7, "`max_requests=7` reached")
        assert len(lines_of(job)) == 7
        state = numbers.ask(job)
    assert (endpoint.count, state.stopped) == (20, None)


def test_max_cost_is_never_exceeded_and_counts_earlier_runs(numbers):
    price = Price(
        input=1000.0, output=1000.0
    )  # 0.1 for a prompt of 100 tokens, at most 0.05 for its answer

    def answer(body):
        return right(body, prompt_tokens=100)

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, max_cost=1.0, price=price)
        assert "`max_cost=1` reached" in state.stopped
        assert 0.8 < state.cost <= 1.0
        before = endpoint.count
        state = numbers.ask(job, max_cost=1.0, price=price)
        assert endpoint.count == before
        state = numbers.ask(job, max_cost=100.0, price=price)
    assert (endpoint.count, state.stopped) == (20, None)
    assert state.cost == pytest.approx(20 * 0.105)
    assert state.projected_cost == pytest.approx(state.cost)


def test_max_cost_needs_a_price_and_a_limit_on_each_answer(numbers):
    with pytest.raises(DssError, match="`max_cost` needs the model's price"):
        numbers.ask(numbers.job(), max_cost=1.0)
    job = numbers.job(parameters={"max_tokens": None})
    with pytest.raises(DssError, match="`max_cost` needs a limit on each answer"):
        numbers.ask(job, max_cost=1.0, price=Price(input=1.0, output=1.0))


def test_uncounted_attempts_are_charged_at_their_maximum_cost(numbers):
    numbers.count = 2
    seen = collections.Counter()

    def answer(body):
        seen[number_of(body)] += 1
        lost = seen[number_of(body)] == 1
        return FakeReply(body=b"x" * 100, lost=True) if lost else right(body, prompt_tokens=100)

    price = Price(input=1000.0, output=1000.0)
    with FakeEndpoint(answer) as endpoint:
        state = numbers.ask(numbers.job(endpoint.url), price=price)
    assert state.usage.uncounted == 2
    assert state.cost == pytest.approx(2 * 0.105 + 2 * (0.1 + 0.05), rel=0.02)


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 100}, {"prompt_tokens": 1, "completion_tokens": -9}]
)
def test_max_cost_is_kept_without_valid_token_counts(numbers, usage):
    def answer(body):
        value = json.loads(right(body).body) | {"usage": usage}
        return FakeReply(body=json.dumps(value).encode())

    price = Price(input=1000.0, output=1000.0)
    with FakeEndpoint(answer) as endpoint:
        state = numbers.ask(numbers.job(endpoint.url), max_cost=1.0, price=price)
        most = numbers.job().writer.most_tokens * 1000.0 / 1e6  # an answer's cost alone
    assert "`max_cost=1` reached" in state.stopped
    assert 0 < endpoint.count * most <= state.cost <= 1.0


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_names_its_target(numbers, code):
    numbers.count = 2
    with (
        FakeEndpoint(right) as other,
        FakeEndpoint(
            lambda _: FakeReply(code=code, headers={"Location": other.url + "/chat/completions"})
        ) as endpoint,
    ):
        job = numbers.job(endpoint.url)
        numbers.ask(job)
        assert (endpoint.count, other.count) == (2, 0)
    assert attempts(job) == {"rejected": 2}
    assert f"the endpoint redirects to {other.url}" in lines_of(job)[0]["raw"]


def test_a_reply_in_utf_16_is_read(numbers):
    numbers.count = 1

    def answer(body):
        return FakeReply(body=right(body).body.decode().encode("utf-16"))

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    assert lines_of(job)[0]["status"] == "ok"


def test_concurrency_adapts_to_the_limit_of_the_endpoint(numbers):
    """The endpoint rejects more than ten requests at a time; no answer is lost."""
    numbers.count = 400

    def answer(body):
        if endpoint.busy > 10:
            return failure(429)
        reply = right(body)
        return FakeReply(body=reply.body, delay=0.01)

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job, concurrency=64)
    assert (state.done, state.unanswered) == (400, 0)
    assert endpoint.at_once <= 64
    assert state.status_counts["limited"] < 150
    assert {line["status"] for line in lines_of(job)} == {"ok"}


def test_a_short_key_is_not_replaced_in_answers(numbers):
    with FakeEndpoint(lambda body: right(body, text="A test of {n}.\nLabel: {label}")) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job, key="test")
    assert lines_of(job)[3]["rationale"] == "A test of 3."


def test_a_retry_after_of_zero_keeps_the_exponential_backoff(numbers):
    seen = collections.Counter()

    def answer(body):
        seen["n"] += 1
        if seen["n"] <= 5:
            return FakeReply(code=429, headers={"Retry-After": "0"}, body=b"{}")
        return right(body)

    clock = FastClock()
    with FakeEndpoint(answer) as endpoint:
        numbers.ask(numbers.job(endpoint.url), clock=clock, concurrency=1)
    assert endpoint.count == 25
    assert clock.ahead > 0.5 + 1 + 2 + 4 + 8


def test_max_cost_covers_requests_in_flight_and_dense_prompts(numbers):
    """Prompts with more tokens than characters do not exceed the limit."""
    price = Price(input=1000.0, output=0.0)
    with FakeEndpoint(lambda body: right(body, prompt_tokens=300)) as endpoint:
        state = numbers.ask(numbers.job(endpoint.url), max_cost=1.0, price=price)
    assert 0.3 <= state.cost <= 1.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n": 5}, "'n': is set by dss"),
        ({"messages": []}, "'messages': is set by dss"),
        ({"model": "x"}, "'model': is set by dss"),
        ({"stream": True}, "'stream': is set by dss"),
        ({"max_tokens": -5}, "'max_tokens': is -5; give a whole number"),
        ({"max_tokens": "50"}, "'max_tokens': is '50'"),
        ({"temperature": float("nan")}, "cannot be sent as JSON"),
        ({"logit_bias": {1: 2, "a": 3}}, "cannot be sent as JSON"),
    ],
)
def test_invalid_parameters_are_refused(numbers, parameters, message):
    with pytest.raises(DssError, match=message):
        numbers.job(parameters=parameters)
    with pytest.raises(DssError, match="'seed': would make all 2 samples the same"):
        numbers.job(parameters={"seed": 1, "temperature": 1}, samples=2)


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://h:abc/v1", "http://h:99999/v1", "http://a b/v1", "ftp://h/v1"]
)
def test_a_wrong_url_is_refused(numbers, url):
    with pytest.raises(DssError, match="`base_url"):
        numbers.job(url)


def test_impossible_values_in_a_reply_lose_no_answer(numbers):
    bodies = iter(
        [
            {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 10**30}},
            {"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": -5}},
            {"choices": [{"message": {"content": "x"}, "finish_reason": "\ud83d"}]},
            {"error": {"code": 10**24}},
        ]
    )

    def answer(body):
        value = next(bodies, None)
        return right(body) if value is None else FakeReply(body=json.dumps(value).encode())

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        state = numbers.ask(job)
    assert (state.done, endpoint.count) == (20, 21)
    assert attempts(job) == {"answered": 20, "failed": 1}


def test_the_key_is_never_written_or_shown(numbers):
    """An answer and an error of the endpoint contain the key."""
    seen = collections.Counter()

    def answer(body):
        seen["n"] += 1
        if seen["n"] == 3:
            return failure(500, message="bad key sk-a-long-secret-1")
        return right(body, text="sk-a-long-secret-1 is {n}.\nLabel: {label}")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job, key="sk-a-long-secret-1")
        assert all("bearer sk-a-long-secret-1" in head.lower() for head in endpoint.headers)
    for path in job.folder.iterdir():
        assert b"sk-a-long-secret-1" not in path.read_bytes(), path
    assert lines_of(job)[0]["rationale"] == "[API key] is 0."
    echo = FakeEndpoint(lambda _: failure(401, message="sk-a-long-secret-1?"))
    with echo, pytest.raises(DssError, match=r"\[API key\]\?"):
        numbers.ask(
            numbers.job(echo.url, samples=1, parameters={"top_p": 1}), key="sk-a-long-secret-1"
        )


@pytest.mark.parametrize("written", ["sk-a-long\\u002dsecret-1", "sk\\u002da-long-secret-1"])
def test_a_key_that_a_reply_contains_in_escapes_is_hidden(numbers, written):
    def answer(body):
        body = chat_reply("KEY is 0.\nLabel: even").body.replace(b"KEY", written.encode())
        return FakeReply(body=body)

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job, key="sk-a-long-secret-1", max_requests=1)
    assert lines_of(job)[0]["rationale"] == "[API key] is 0."
    for path in job.folder.iterdir():
        content = path.read_bytes()
        assert b"long-secret" not in content, path
        assert b"002dsecret" not in content, path


def test_compressed_and_overlong_replies_are_not_read(numbers):
    bomb = FakeReply(body=gzip.compress(b" " * 10_000_000), headers={"content-encoding": "gzip"})
    for reply, message in (
        (bomb, "compressed with gzip, which was not requested"),
        (FakeReply(body=b" " * (2**24 + 1)), "a reply of more than 16,777,216 bytes"),
    ):
        with FakeEndpoint(lambda _, reply=reply: reply) as endpoint:
            job = numbers.job(endpoint.url)
            numbers.ask(job, max_requests=1, attempts=1)
        assert message in lines_of(job)[0]["raw"]
        assert lines_of(job)[0]["status"] == "error"


def test_a_pattern_that_exceeds_its_time_limit_leaves_the_line_unparsed(numbers, monkeypatch):
    monkeypatch.setattr(prompt, "SEARCH_SECONDS", 0.2)
    with FakeEndpoint(lambda body: right(body, text="a" * 60 + "\nLabel:x")) as endpoint:
        job = numbers.job(endpoint.url)
        path = job.folder / "slow.yaml"
        text = (job.folder / "prompt.yaml").read_text()
        several = "(?:\\w|\\w\\w|\\w\\w\\w|[ .])+"  # ways to read a word
        slow = f"'\\A\\s*(?P<rationale>{several})(?:\\nLabel: |\\nAnswer: )(?P<label>.*)'"
        path.write_text(
            re.sub(r"(?m)^(form:(?:\n.*){2}\n  pattern: ).*$", lambda m: m[1] + slow, text)
        )
        job = file_job(job.source, str(path), job.writer.teacher, output=None, name=None)
        numbers.ask(job, max_requests=1)
    (line,) = lines_of(job)
    assert (line["status"], line["rationale"]) == ("unparsed", "")
    assert line["reason"] == "the pattern took more than 0.2 s"


def test_an_invalid_usage_file_is_written_again(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    for broken in ("{", "[]", "3"):
        job.file("usage.json").write_text(broken)
        journal = Journal(job.journal_path)
        job.save_usage(journal, None)
        journal.close()
        assert json.loads(job.file("usage.json").read_text())["outputs"] == 20


def test_a_model_name_too_long_for_a_file_is_refused(numbers):
    job = numbers.job()
    teacher = dataclasses.replace(job.writer.teacher, model="m" * 300)
    with pytest.raises(DssError, match="300 characters are too many for a file name"):
        file_job(job.source, str(job.folder / "prompt.yaml"), teacher, output=None, name=None)


def test_an_endpoints_message_is_printed_without_control_characters(numbers):
    answer = failure(401, message="\x1b[2J\x1b]0;owned\x07 no")
    with FakeEndpoint(lambda _: answer) as endpoint, pytest.raises(DssError) as caught:
        numbers.ask(numbers.job(endpoint.url))
    assert str(caught.value).isprintable()


def test_requests_to_this_machine_bypass_proxies(numbers, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with FakeEndpoint(right) as endpoint:
        assert numbers.ask(numbers.job(endpoint.url)).unanswered == 0


def test_an_invalid_example_ends_the_run_and_keeps_the_answers(numbers):
    numbers.count = 150
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        with job.source.open("a") as file:
            file.write('{"id": "n3", "input": "x"}\n')
        with pytest.raises(DssError, match="duplicate id 'n3'"):
            numbers.ask(job)
    assert attempts(job)["answered"] == endpoint.count >= 64


def test_a_full_disk_ends_the_run_before_more_requests_are_sent(numbers, monkeypatch):
    written = collections.Counter()
    add = Journal.add

    def full(self, requests, attempts):
        written["n"] += 1
        if written["n"] > 2:
            raise DssError(f"{self.path}: database or disk is full")
        return add(self, requests, attempts)

    monkeypatch.setattr(Journal, "add", full)
    numbers.count = 200
    endpoint = FakeEndpoint(right)
    with endpoint, pytest.raises(DssError, match="disk is full"):
        numbers.ask(numbers.job(endpoint.url), concurrency=4)
    assert endpoint.count <= 3 * 4


def test_no_request_is_sent_if_the_journal_cannot_be_written(numbers):
    with FakeEndpoint(right) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job, max_requests=3)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, before[1]))  # bytes of a file
        try:
            for _ in range(2):
                with pytest.raises(DssError, match="disk"):
                    numbers.ask(job)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert endpoint.count == 3
        assert numbers.ask(job).done == endpoint.count == 20


def test_space_is_reserved_in_a_journal_once(numbers):
    job = numbers.job()
    for _ in range(3):
        journal = Journal(job.journal_path)
        journal.make_room()
        journal.close()
    assert ROOM < job.journal_path.stat().st_size < 2 * ROOM


def test_samples_are_separate_requests_and_the_majority_wins(numbers):
    seen = collections.Counter()

    def answer(body):
        n = number_of(body)
        seen[n] += 1
        label = label_of(n) if seen[n] != 2 else label_of(n + 1)
        return chat_reply(f"Try {seen[n]}.\nLabel: {label}")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url, samples=3, parameters={"temperature": 0.7})
        state = numbers.ask(job, concurrency=1)
    assert (endpoint.count, state.total) == (60, 60)
    line = lines_of(job)[5]
    assert (line["label"], line["vote"], line["rationale"]) == ("odd", 0.6667, "Try 1.")
    assert [sample["label"] for sample in line["samples"]] == ["odd", "even", "odd"]


def test_hint_mode_shows_the_label_and_keeps_it(numbers):
    def answer(body):
        n = number_of(body)
        assert f"\nLabel: {label_of(n)}\nWhy:" in last_question(body)
        return chat_reply("Label: odd" if n == 2 else f"Because of {n}.")

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url, hinted=True)
        numbers.ask(job)
    lines = lines_of(job)
    assert (lines[3]["label"], lines[3]["rationale"]) == ("odd", "Because of 3.")
    assert (lines[2]["label"], lines[2]["status"]) == (None, "unparsed")


def test_budgets_per_minute_are_kept(numbers):
    clock = FastClock()
    with FakeEndpoint(right) as endpoint:
        numbers.ask(numbers.job(endpoint.url), clock=clock, requests_per_minute=60)
    assert 17 <= clock.ahead <= 21  # 20 requests at one a second, a second's worth at once
    clock = FastClock()
    with FakeEndpoint(lambda body: right(body, prompt_tokens=1000)) as endpoint:
        job = numbers.job(endpoint.url)
        job.journal_path.unlink()
        numbers.ask(job, clock=clock, tokens_per_minute=60_000, concurrency=1)
    assert 16 <= clock.ahead <= 22  # 20 times 1,005 tokens at 1,000 a second
