import json
import re

import pytest

from dss.errors import DssError
from dss.teacher.journal import Journal, Usage
from dss.teacher.prices import Price, load_price
from dss.teacher.report import make_report, write_page
from dss.testing import FakeEndpoint, chat_reply
from tests.teacher.conftest import label_of
from tests.teacher.test_annotate import number_of, right


@pytest.fixture
def reported(numbers):
    """A report over 20 outputs: 0-2 unparsed, 3 refused, 4 wrong, 5 truncated, the others right."""

    def answer(body):
        n = number_of(body)
        if n < 3:
            return chat_reply("</script><script>alert(1)</script>" + "?" * n + "\nLabel: both")
        if n == 3:
            return chat_reply("", finish_reason="content_filter")
        if n == 4:
            return chat_reply("Four words are here.\nLabel: odd")
        changes = {"finish_reason": "length"} if n == 5 else {}
        return right(body, text="It is {n}.\nLabel: {label}", **changes)

    with FakeEndpoint(answer) as endpoint:
        job = numbers.job(endpoint.url)
        numbers.ask(job)
    journal = Journal(job.journal_path, create=False)
    yield job, make_report(job, journal, Price(input=1.0, output=2.0, currency="EUR"))
    journal.close()


def test_a_report_counts_outputs_and_attempts(reported):
    _, report = reported
    assert report.statuses == {"ok": 16, "unparsed": 3, "refused": 1}
    assert (report.right, report.with_gold, report.truncated) == (15, 20, 1)
    assert sorted(report.words)[-1] == 4
    assert report.attempts == {"answered": 19, "refused": 1}
    lines = dict(report.lines())
    assert lines["teacher's accuracy"] == "75.00% (15 of 20 with a gold label)"
    assert lines["cost"].endswith("EUR")
    assert lines["tokens"].startswith("2,000 input")


def test_the_worst_parse_failures_come_first_with_their_raw_text(reported):
    _, report = reported
    assert [output.example.id for output in report.worst] == ["n2", "n1", "n0"]
    assert "??" in report.worst[0].raw


def test_the_page_contains_every_output_and_runs_no_script_of_a_teacher(reported):
    job, report = reported
    page = job.file("html")
    write_page(report, page)
    text = page.read_text()
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
    assert not re.search(r"""(src|href)=["']?(http|//)""", text)
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    rows = json.loads(data)
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(20)]
    assert rows[6]["agreement"] == "agrees"
    assert rows[4]["agreement"] == "differs"
    assert rows[5]["gold"] == label_of(5)
    assert rows[0]["raw"].startswith("</script><script>alert(1)")


def test_a_large_page_contains_a_sample_of_the_outputs(reported, monkeypatch):
    job, _ = reported
    monkeypatch.setattr("dss.teacher.report.SHOWN_ROWS", 5)
    monkeypatch.setattr("dss.teacher.report.SHOWN_PROBLEMS", 2)
    journal = Journal(job.journal_path, create=False)
    report = make_report(job, journal, None)
    journal.close()
    assert [row["id"] for row in report.rows] == ["n0", "n1", "n4", "n8", "n12", "n16"]
    assert report.statuses.total() == 20
    assert dict(report.lines())["cost"] == "unknown: no price was given"
    write_page(report, job.file("html"))
    assert "shows 6 of the 20 outputs" in job.file("html").read_text()


def test_prices_are_per_million_tokens_and_cached_ones_may_differ():
    usage = Usage(prompt=1_000_000, cached=400_000, completion=500_000)
    assert Price(input=2.0, output=8.0).cost(usage) == pytest.approx(6.0)
    assert Price(input=2.0, output=8.0, cached_input=0.5).cost(usage) == pytest.approx(5.4)


def test_a_price_file_has_prices_by_model(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("currency: EUR\nmodels:\n  m: {input: 1, output: 2.5}\n")
    assert load_price(path, "m") == Price(input=1, output=2.5, currency="EUR")
    assert load_price(path, "other") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no `models`"),
        ("models: {m: {input: 1}}", "m: give input and output"),
        ("models: {m: {input: 1, output: x}}", "output is 'x'"),
        ("models: {m: {input: 1, output: -1}}", "output is -1"),
        ("models: {m: {input: 1, output: 2, outptu: 3}}", "give input and output"),
        ("models: [", "not YAML"),
    ],
)
def test_a_missing_or_invalid_price_file_is_an_error(tmp_path, text, message):
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(DssError, match=message):
        load_price(path, "m")
    with pytest.raises(DssError, match="no such file"):
        load_price(tmp_path / "none.yaml", "m")
