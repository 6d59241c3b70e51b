"""Report on a teacher's outputs: statistics, and an HTML page for reading the rationales."""

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
SHOWN_ROWS, SHOWN_PROBLEMS = 4000, 1000  # limits of the page: sampled outputs, outputs not "ok"
TEMPLATE = importlib.resources.files("dss.teacher") / "report.html"


@dataclasses.dataclass(kw_only=True)
class Report:
    """Statistics of a teacher's outputs for a file of examples.

    Attributes:
      teacher: name of the teacher.
      examples: number of examples in the file.
      statuses: number of outputs by status.
      attempts: number of attempts at any of the teacher's requests, by status.
      with_gold: number of outputs whose example has a gold label.
      right: number of outputs whose label is the gold label.
      truncated: number of answers truncated at the token limit.
      words: number of words of each rationale.
      votes: vote of each output with several samples, in [0, 1].
      sent: tokens of attempts sent directly.
      batch: tokens of imported attempts.
      cost: total cost as text, "unknown: ..." without a price.
      worst: worst parse failures.
      rows: outputs shown on the page.
    """

    teacher: str
    examples: int = 0
    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    attempts: dict[str, int]
    with_gold: int = 0
    right: int = 0
    truncated: int = 0
    words: list[int] = dataclasses.field(default_factory=list)
    votes: list[float] = dataclasses.field(default_factory=list)
    sent: Usage
    batch: Usage
    cost: str
    worst: list[Annotation] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def outputs(self) -> int:
        """Number of examples with an output."""
        return sum(self.statuses.values())

    def lines(self) -> list[tuple[str, str]]:
        """Returns (name, value) pairs for display."""
        out = [("examples", f"{self.examples:,}"), ("with an output", f"{self.outputs:,}")]
        out += [(f"  {name}", f"{count:,}") for name, count in self.statuses.most_common()]
        if self.with_gold:
            accuracy = self.right / self.with_gold
            text = f"{accuracy:.2%} ({self.right:,} of {self.with_gold:,} with a gold label)"
            out.append(("teacher's accuracy", text))
        if self.votes:
            out.append(("mean vote", f"{statistics.fmean(self.votes):.1%}"))
        if self.words:
            median, longest = statistics.median(self.words), max(self.words)
            out.append(("words per rationale", f"{median:.0f} (median), {longest} (maximum)"))
        out.append(("truncated at the token limit", f"{self.truncated:,}"))
        attempts = ", ".join(f"{count:,} {name}" for name, count in self.attempts.items())
        out.append(("attempts", attempts or "none"))
        prompt, completion = (
            getattr(self.sent, name) + getattr(self.batch, name)
            for name in ("prompt", "completion")
        )
        cached = self.sent.cached + self.batch.cached
        tokens = f"{prompt:,} input ({cached:,} from the endpoint's cache), {completion:,} output"
        out.append(("tokens", tokens))
        if self.sent.uncounted:
            uncounted = f"{self.sent.uncounted:,}; the cost assumes their longest answers"
            out.append(("attempts without a token count", uncounted))
        out.append(("cost", self.cost))
        return out


def make_report(job: Job, journal: Journal, price: Price | None) -> Report:
    """Returns the report of a job from its journal."""
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
    for number, output in enumerate(annotations(journal, job.writer, job.examples())):
        report.statuses[output.status] += 1
        is_right = _is_right(job, output)
        report.with_gold += is_right is not None
        report.right += bool(is_right)
        report.truncated += sum(sample.finish_reason == "length" for sample in output.samples)
        if output.rationale:
            report.words.append(len(output.rationale.split()))
        if len(output.samples) > 1:
            report.votes.append(output.vote)
        if output.status == "unparsed":
            badness = (-bool(output.rationale) - bool(output.label), len(output.raw))
            item = (badness, -number, output)
            (heapq.heappushpop if len(worst) == WORST else heapq.heappush)(worst, item)
        is_problem = output.status != "ok" and problems < SHOWN_PROBLEMS
        if number % stride == 0 or is_problem:
            problems += is_problem
            report.rows.append(_row(output, is_right))
    ranked = sorted(worst, key=lambda item: item[:2], reverse=True)
    report.worst = [output for _, _, output in ranked]
    return report


def _is_right(job: Job, output: Annotation) -> bool | None:
    """Returns whether an output's label is the gold label; None without a gold label."""
    gold = output.example.label
    if gold is None:
        return None
    return output.label is not None and job.writer.prompt.labels.is_right(output.label, gold)


def _row(output: Annotation, is_right: bool | None) -> dict[str, Any]:
    agreement = {True: "agrees", False: "differs", None: "no gold label"}[is_right]
    return {
        "id": output.example.id,
        "input": output.example.input,
        "gold": output.example.label,
        "label": output.label,
        "rationale": output.rationale,
        "status": output.status,
        "agreement": agreement,
        "raw": output.raw,
        "vote": round(output.vote, 3) if len(output.samples) > 1 else None,
    }


def write_page(report: Report, path: Path) -> None:
    """Writes a report as a self-contained HTML file."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # "<" is escaped, as it could end the script element or open a comment.
    rows = json.dumps(report.rows, ensure_ascii=False).replace("<", "\\u003c")
    write_whole(path, template.render(report=report, rows=rows))
