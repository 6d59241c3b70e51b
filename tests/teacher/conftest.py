"""Fixtures: a prompt, an annotation job over a few examples, and a clock that does not wait."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from dss.teacher.annotate import Annotator, Limits
from dss.teacher.client import Client
from dss.teacher.job import Job, file_job
from dss.teacher.journal import Journal
from dss.teacher.pacing import Clock
from dss.teacher.request import Teacher
from tests.conftest import write_jsonl

PROMPT = """
labels: [even, odd]
stop: ["\\nNumber:"]
parameters: {max_tokens: 50, temperature: 0}
form:
  question: "Number: {{ input }}\\nWhy:"
  answer: " {{ rationale }}\\nLabel: {{ label }}"
  pattern: '(?s)\\A\\s*(?P<rationale>.*?)\\s*(?:Label: (?P<label>[^\\n]*))?\\Z'
hint:
  question: "Number: {{ input }}\\nLabel: {{ label }}\\nWhy:"
  answer: " {{ rationale }}"
  pattern: '(?s)\\A\\s*(?P<rationale>.*?)\\s*(?:Label: (?P<label>[^\\n]*))?\\Z'
exemplars:
  - {input: "two", rationale: Two is twice one., label: even}
  - {input: "three", rationale: Three is two and one., label: odd}
"""


class FastClock(Clock):
    """A clock whose waits take no time; they are recorded and advance the time."""

    def __init__(self):
        self.ahead, self.waits = 0.0, []

    def now(self) -> float:
        return super().now() + self.ahead

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        self.waits.append(seconds)
        self.ahead += seconds
        await asyncio.sleep(0)


def label_of(number: int) -> str:
    return "odd" if number % 2 else "even"


def numbers_file(folder: Path, count: int) -> Path:
    rows = [{"id": f"n{i}", "input": str(i), "label": label_of(i)} for i in range(count)]
    return write_jsonl(folder / "numbers.jsonl", rows)


@dataclasses.dataclass
class Numbers:
    """An annotation job that labels numbers as even or odd."""

    folder: Path
    count: int = 20

    def job(self, url: str = "http://127.0.0.1:9/v1", **changes) -> Job:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "prompt.yaml").write_text(PROMPT)
        source = numbers_file(self.folder, self.count)
        teacher = Teacher(model="m", base_url=url, **changes)
        prompt = str(self.folder / "prompt.yaml")
        return file_job(source, prompt, teacher, output=None, name=None)

    def ask(self, job: Job, *, clock=None, key="secret", price=None, progress=None, **limits):
        """Runs a job and returns the final state; waits take no time unless `clock` is given."""
        journal = Journal(job.journal_path)
        try:
            journal.describe(job.writer)
            client = Client(job.writer.teacher, key, limits.get("timeout", 30.0))
            annotator = Annotator(
                journal,
                job.writer,
                client,
                Limits(**limits),
                clock=clock or FastClock(),
                price=price,
                progress=progress,
            )
            return asyncio.run(annotator.run(job.examples(), self.count))
        finally:
            job.export(journal, replace=True)
            journal.close()


@pytest.fixture
def numbers(tmp_path) -> Numbers:
    return Numbers(tmp_path / "data")
