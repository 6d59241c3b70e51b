"""What a teacher did, in numbers and as a page to read its rationales on."""

import collections
import dataclasses
import heapq
import importlib.resources
import json
import statistics
from pathlib import Path
from typing import Any

import jinja2

from dss.paths import write_whole
from dss.teacher.job import Job
from dss.teacher.journal import Journal, Usage
from dss.teacher.outputs import Annotation, annotations
from dss.teacher.prices import Price, total_cost

__all__ = ["Report", "make_report", "write_page"]

WORST = 10  # parse failures that are shown
SHOWN_ROWS, SHOWN_PROBLEMS = 4000, 1000  # that a page holds at most
TEMPLATE = importlib.resources.files("dss.teacher") / "report.html"


@dataclasses.dataclass(kw_only=True)
class Report:
    """Numbers about a teacher's outputs for a file of examples.

    Attributes:
      teacher: its name.
      examples: that the file has.
      statuses: outputs by status.
      attempts: at any of the teacher's requests, by status.
      with_gold: outputs whose example has a gold label.
      right: those of them whose label is the gold one.
      cut_off: answers that ended at the most tokens.
      words: of each rationale that there is.
      votes: of each output with several samples, in [0, 1].
      sent: tokens of what was sent from here.
      batch: tokens of what came in batches.
      cost: of both; None where no price is known.
      worst: the worst parse failures.
      rows: outputs to read.
    """

    teacher: str
    examples: int = 0
    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    attempts: dict[str, int]
    with_gold: int = 0
    right: int = 0
    cut_off: int = 0
    words: list[int] = dataclasses.field(default_factory=list)
    votes: list[float] = dataclasses.field(default_factory=list)
    sent: Usage
    batch: Usage
    cost: str
    worst: list[Annotation] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def outputs(self) -> int:
        """How many examples have an output."""
        return sum(self.statuses.values())

    def lines(self) -> list[tuple[str, str]]:
        """Returns (name, value) for people to read."""
        out = [("examples", f"{self.examples:,}"), ("with an output", f"{self.outputs:,}")]
        out += [(f"  {name}", f"{count:,}") for name, count in self.statuses.most_common()]
        if self.with_gold:
            share = self.right / self.with_gold
            right = f"{share:.2%} ({self.right:,} of {self.with_gold:,} with a gold label)"
            out.append(("teacher's accuracy", right))
        if self.votes:
            out.append(("mean vote share", f"{statistics.fmean(self.votes):.1%}"))
        if self.words:
            middle, longest = statistics.median(self.words), max(self.words)
            out.append(("words a rationale", f"{middle:.0f} (median), {longest} at most"))
        out.append(("cut off at the most tokens", f"{self.cut_off:,}"))
        attempts = ", ".join(f"{count:,} {name}" for name, count in self.attempts.items())
        out.append(("attempts", attempts or "none"))
        prompt, completion = (
            getattr(self.sent, name) + getattr(self.batch, name)
            for name in ("prompt", "completion")
        )
        cached = self.sent.cached + self.batch.cached
        tokens = f"{prompt:,} read ({cached:,} from the endpoint's cache), {completion:,} written"
        out.append(("tokens", tokens))
        if self.sent.silent:
            silent = f"{self.sent.silent:,}; in the cost as if their answers had been the longest"
            out.append(("attempts whose tokens nobody counted", silent))
        out.append(("cost", self.cost))
        return out


def make_report(job: Job, journal: Journal, price: Price | None) -> Report:
    """Returns the report of a job, read in one pass."""
    teacher = job.writer.teacher
    sent, batch = journal.usage(teacher), journal.usage(teacher, batch=True)
    cost = total_cost(price, sent, batch)
    report = Report(
        teacher=job.name,
        attempts=journal.counts(teacher),
        sent=sent,
        batch=batch,
        cost="unknown: no price was given" if price is None or cost is None else price.text(cost),
    )
    report.examples = sum(1 for _ in job.examples())
    stride = -(-report.examples // SHOWN_ROWS) or 1
    problems = 0
    worst: list[tuple[tuple[int, int], int, Annotation]] = []
    for number, found in enumerate(annotations(journal, job.writer, job.examples())):
        report.statuses[found.status] += 1
        is_right = _agreement(job, found)
        report.with_gold += is_right is not None
        report.right += bool(is_right)
        report.cut_off += sum(sample.finish_reason == "length" for sample in found.samples)
        if found.rationale:
            report.words.append(len(found.rationale.split()))
        if len(found.samples) > 1:
            report.votes.append(found.vote)
        if found.status == "unparsed":
            badness = (-bool(found.rationale) - bool(found.label), len(found.raw))
            item = (badness, -number, found)
            (heapq.heappushpop if len(worst) == WORST else heapq.heappush)(worst, item)
        is_problem = found.status != "ok" and problems < SHOWN_PROBLEMS
        if number % stride == 0 or is_problem:
            problems += is_problem
            report.rows.append(_row(found, is_right))
    report.worst = [found for _, _, found in sorted(worst, key=lambda item: item[:2], reverse=True)]
    return report


def _agreement(job: Job, found: Annotation) -> bool | None:
    gold = found.example.label
    if gold is None:
        return None
    return found.label is not None and job.writer.prompt.labels.is_right(found.label, gold)


def _row(found: Annotation, is_right: bool | None) -> dict[str, Any]:
    agreement = {True: "agrees", False: "differs", None: "no gold label"}[is_right]
    return {
        "id": found.example.id,
        "input": found.example.input,
        "gold": found.example.label,
        "label": found.label,
        "rationale": found.rationale,
        "status": found.status,
        "agreement": agreement,
        "raw": found.raw,
        "vote": round(found.vote, 3) if len(found.samples) > 1 else None,
    }


def write_page(report: Report, path: Path) -> None:
    """Writes a report as one HTML file that needs no network."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # In a script element only "<" could end it or open a comment.
    rows = json.dumps(report.rows, ensure_ascii=False).replace("<", "\\u003c")
    write_whole(path, template.render(report=report, rows=rows))
