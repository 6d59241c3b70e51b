import os
import sqlite3

import pytest

from dss.errors import DssError
from dss.teacher.journal import Attempt, Journal, Usage
from dss.teacher.reply import Reply


def attempt(request, status="answered", tokens=None, **changes):
    reply = Reply(
        status=status,
        code=200 if status == "answered" else None,
        response="{}",
        prompt_tokens=tokens,
        completion_tokens=tokens and 1,
    )
    return Attempt(key=request.key, reply=reply, latency=0.1, at=1.0, **changes)


@pytest.fixture
def opened(numbers):
    job = numbers.job()
    journal = Journal(job.journal_path)
    journal.describe(job.writer)
    requests = [r for e in job.examples() for r in job.writer.requests(e)]
    yield job, journal, requests
    journal.close()


def test_the_outcome_is_the_first_final_attempt_else_the_last(opened):
    _, journal, (first, second, *_) = opened
    assert journal.outcome(first.key) is None
    journal.add([first, second], [attempt(first, "failed"), attempt(first, "timeout")])
    assert journal.outcome(first.key).reply.status == "timeout"
    answered = attempt(first, tokens=5)
    journal.add([], [answered, attempt(first, tokens=9), attempt(first, "failed")])
    assert journal.outcome(first.key) == answered
    assert journal.final_among([first.key, second.key]) == {first.key}


def test_usage_counts_every_attempt_that_was_paid_for(opened):
    job, journal, requests = opened
    teacher = job.writer.teacher
    journal.add(
        requests[:4],
        [
            attempt(requests[0], tokens=10),
            attempt(requests[0], tokens=10),  # another process sent it again
            attempt(requests[1], "timeout"),
            attempt(requests[2], "failed"),
            attempt(requests[3], tokens=7, origin="batch:1"),
        ],
    )
    length = requests[0].characters
    assert journal.usage(teacher) == Usage(
        prompt=20,
        completion=2,
        characters=2 * length,
        uncounted=1,
        uncounted_characters=length,
        uncounted_completion=50,
    )
    assert journal.usage(teacher, batch=True) == Usage(prompt=7, completion=1, characters=length)
    assert journal.counts(teacher) == {"answered": 3, "failed": 1, "timeout": 1}


def test_attempts_of_the_same_origin_are_written_once(opened):
    _, journal, requests = opened
    assert journal.add(requests[:1], [attempt(requests[0], origin="batch:1")]) == 1
    assert journal.add([], [attempt(requests[0], origin="batch:1")]) == 0


def test_the_prompt_and_the_parameters_are_stored_with_the_requests(opened):
    job, journal, requests = opened
    journal.add(requests[:2], [])
    journal.describe(job.writer)
    with sqlite3.connect(job.journal_path) as connection:
        (count, content), *_ = connection.execute("SELECT count(*), content FROM settings")
        stored = connection.execute("SELECT example, sample, model FROM requests").fetchall()
    assert count == 1
    assert "Two is twice one." in content
    assert sorted(stored) == [("n0", 0, "m"), ("n1", 0, "m")]


def test_a_second_writer_is_refused_and_a_reader_is_not(opened):
    job, journal, requests = opened
    journal.add(requests[:1], [attempt(requests[0])])
    with pytest.raises(DssError, match="another process is writing to this journal"):
        Journal(job.journal_path)
    reader = Journal(job.journal_path, create=False)
    assert reader.outcome(requests[0].key) is not None
    reader.close()


def test_the_lock_is_independent_of_other_files_and_of_the_path(opened, tmp_path):
    job, *_ = opened
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for path in job.folder.iterdir():
        if "lock" in path.name:
            path.unlink()
    (job.folder / "journal.lock").symlink_to(kept)
    other_names = [tmp_path / "link.sqlite", tmp_path / "hard.sqlite"]
    other_names[0].symlink_to(job.journal_path)
    other_names[1].hardlink_to(job.journal_path)
    for path in (job.journal_path, *other_names):
        with pytest.raises(DssError, match="another process is writing to this journal"):
            Journal(path)
    assert kept.read_text() == "mine"


def test_a_missing_or_invalid_journal_is_a_one_line_error(tmp_path):
    with pytest.raises(DssError, match="no such journal"):
        Journal(tmp_path / "journal.sqlite", create=False)
    (tmp_path / "journal.sqlite").write_text("this is a text and not a data base" * 100)
    with pytest.raises(DssError, match="not a database"):
        Journal(tmp_path / "journal.sqlite")
    os.mkfifo(tmp_path / "pipe.sqlite")
    for create in (True, False):
        with pytest.raises(DssError, match="not a regular file, so not a journal"):
            Journal(tmp_path / "pipe.sqlite", create=create)


def test_keys_depend_on_everything_that_is_sent(numbers):
    jobs = {
        "same": numbers.job(),
        "url": numbers.job("http://127.0.0.1:8/v1"),
        "api": numbers.job(api="completions"),
        "parameter": numbers.job(parameters={"top_p": 0.5}),
        "hint": numbers.job(hinted=True),
        "samples": numbers.job(samples=2, parameters={"temperature": 1}),
    }
    examples = list(jobs["same"].examples())
    keys = {n: [r.key for r in j.writer.requests(examples[0])] for n, j in jobs.items()}
    every = [key for of_job in keys.values() for key in of_job]
    assert len(set(every)) == len(every) == 7
    assert keys["same"] == [r.key for r in numbers.job().writer.requests(examples[0])]
    assert jobs["same"].writer.requests(examples[1])[0].key not in every
