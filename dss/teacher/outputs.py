"""From a journal to what training reads: parse every answer, vote, write the lines.

All of it is a function of the stored texts and the prompt, so it can be done again at no cost.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dss.data.examples import Example, hash_input
from dss.paths import replacing
from dss.teacher.journal import Attempt, Journal
from dss.teacher.prompt import Parsed, Prompt
from dss.teacher.reply import Reply
from dss.teacher.request import Writer

__all__ = [
    "Annotation",
    "Sample",
    "annotation",
    "annotations",
    "read_sample",
    "vote",
    "write_jsonl",
    "write_parquet",
]

PARQUET_ROWS = 5000  # written at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of a teacher: "ok", "unparsed", "refused" or "error", with its raw text."""

    status: str
    rationale: str
    label: str | None
    raw: str
    finish_reason: str | None = None
    reason: str | None = None  # why a text is unparsed, where that is not the text's own fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a teacher's samples say of an example.

    Attributes:
      example: with its gold label, if it has one.
      status: that of the chosen sample; see `dss.data.examples`.
      rationale: of the first sample with the winning label.
      label: the winning label; None where no sample has one.
      raw: the chosen sample's text.
      vote: the share of the samples that have the winning label, in [0, 1].
      samples: all of them, in the order they were asked.
    """

    example: Example
    status: str
    rationale: str
    label: str | None
    raw: str
    vote: float
    samples: tuple[Sample, ...]

    @property
    def is_ok(self) -> bool:
        """Whether there are a rationale and a label to learn from."""
        return self.status == "ok"

    def line(self, teacher: str) -> dict[str, Any]:
        """Returns the JSON object that is written; `samples` only where there are several."""
        line: dict[str, Any] = {
            "id": self.example.id,
            "rationale": self.rationale,
            "label": self.label,
            "status": self.status,
            "teacher": teacher,
            "raw": self.raw,
            "input_hash": hash_input(self.example.input),
        }
        if reason := next((s.reason for s in self.samples if s.reason), None):
            line["reason"] = reason
        if len(self.samples) > 1:
            line["vote"] = round(self.vote, 4)
            kept = ("rationale", "label", "status")
            line["samples"] = [{name: getattr(s, name) for name in kept} for s in self.samples]
        return line


def read_sample(prompt: Prompt, example: Example, reply: Reply, *, hinted: bool) -> Sample:
    """Returns what a reply says of an example."""
    text = reply.text
    if reply.status != "answered":
        status = "refused" if reply.status == "refused" else "error"
        raw = text or reply.message
        return Sample(status=status, rationale="", label=None, raw=raw)
    parsed: Parsed = prompt.parse(text, example, hinted=hinted)
    status = "ok" if parsed.rationale and parsed.label else "unparsed"
    status = "refused" if parsed.is_refusal else status
    return Sample(
        status=status,
        rationale=parsed.rationale,
        label=parsed.label,
        raw=text,
        finish_reason=reply.finish_reason,
        reason=parsed.reason,
    )


def vote(prompt: Prompt, samples: Iterable[Sample]) -> tuple[Sample, float]:
    """Returns the sample to keep, and the share of all samples that have its label.

    The label that most samples have wins, the earlier one where two have as many (Wang et al.,
    2022, self-consistency); kept is its first sample, before others one that has a rationale.
    """
    samples = tuple(samples)
    groups: list[list[Sample]] = []
    for sample in samples:
        if sample.label is None:
            continue
        for group in groups:
            assert group[0].label is not None
            if prompt.labels.is_right(sample.label, group[0].label):
                group.append(sample)
                break
        else:
            groups.append([sample])
    if not groups:
        order = ("unparsed", "refused", "error")
        return min(samples, key=lambda sample: order.index(sample.status)), 0.0
    winners = max(groups, key=len)
    chosen = next((sample for sample in winners if sample.status == "ok"), winners[0])
    return chosen, len(winners) / len(samples)


def annotation(writer: Writer, example: Example, attempts: Iterable[Attempt]) -> Annotation:
    """Returns what attempts, one a sample, say of an example."""
    hinted = writer.teacher.hinted
    samples = tuple(
        read_sample(writer.prompt, example, attempt.reply, hinted=hinted) for attempt in attempts
    )
    chosen, share = vote(writer.prompt, samples)
    return Annotation(
        example=example,
        status=chosen.status,
        rationale=chosen.rationale,
        label=chosen.label,
        raw=chosen.raw,
        vote=share,
        samples=samples,
    )


def annotations(
    journal: Journal, writer: Writer, examples: Iterable[Example]
) -> Iterator[Annotation]:
    """Yields what the journal holds of each example in order; those never asked are left out."""
    for example in examples:
        found = [journal.outcome(request.key) for request in writer.requests(example)]
        attempts = [attempt for attempt in found if attempt is not None]
        if attempts:
            yield annotation(writer, example, attempts)


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines to a file that is replaced only when all are there; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_parquet(path: Path, found: Iterable[Annotation], teacher: str) -> None:
    """Writes annotations with their examples to a Parquet file, replaced when all are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    sample = pa.struct([("rationale", text), ("label", text), ("status", text), ("raw", text)])
    names = ("id", "input", "gold", "rationale", "label", "status", "teacher", "raw")
    schema = pa.schema(
        [(name, text) for name in names] + [("vote", pa.float64()), ("samples", pa.list_(sample))]
    )
    with replacing(path, binary=True) as file, pq.ParquetWriter(file, schema) as writer:
        rows = (
            {
                "id": a.example.id,
                "input": a.example.input,
                "gold": a.example.label,
                "rationale": a.rationale,
                "label": a.label,
                "status": a.status,
                "teacher": teacher,
                "raw": a.raw,
                "vote": a.vote,
                "samples": [{f.name: getattr(s, f.name) for f in sample} for s in a.samples],
            }
            for a in found
        )
        while chunk := list(itertools.islice(rows, PARQUET_ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
