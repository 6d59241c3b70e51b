"""Export of a journal for training: parses every answer, votes over samples and writes files.

Outputs are a function of the stored texts and the prompt, so they can be written again at no cost.
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

PARQUET_ROWS = 5000  # rows per write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of a teacher. Its status is "ok", "unparsed", "refused" or "error"."""

    status: str
    rationale: str
    label: str | None
    raw: str
    finish_reason: str | None = None
    reason: str | None = None  # why a text is unparsed, if not because of the text itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """A teacher's samples for an example, and the one chosen by vote.

    Attributes:
      example: example, with its gold label if it has one.
      status: status of the chosen sample; see `dss.data.examples`.
      rationale: rationale of the chosen sample.
      label: winning label; None if no sample has a label.
      raw: text of the chosen sample.
      vote: fraction of the samples with the winning label, in [0, 1].
      samples: all samples, in the order of their requests.
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
        """Whether the annotation has a rationale and a label."""
        return self.status == "ok"

    def line(self, teacher: str) -> dict[str, Any]:
        """Returns the JSON object to write; `vote` and `samples` are for several samples only."""
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
            fields = ("rationale", "label", "status")
            line["samples"] = [{name: getattr(s, name) for name in fields} for s in self.samples]
        return line


def read_sample(prompt: Prompt, example: Example, reply: Reply, *, hinted: bool) -> Sample:
    """Returns the sample that a reply about an example gives."""
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
    """Returns the chosen sample and the fraction of all samples with its label.

    The label of most samples wins (self-consistency, Wang et al., 2022); in a tie, the earlier one.
    The chosen sample is the first "ok" one with that label, else the first one. If no sample has a
    label, an unparsed one is preferred to a refusal, and that to an error.
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
        preference = ("unparsed", "refused", "error")
        return min(samples, key=lambda sample: preference.index(sample.status)), 0.0
    winners = max(groups, key=len)
    chosen = next((sample for sample in winners if sample.status == "ok"), winners[0])
    return chosen, len(winners) / len(samples)


def annotation(writer: Writer, example: Example, attempts: Iterable[Attempt]) -> Annotation:
    """Returns the annotation that attempts, one per sample, give for an example."""
    hinted = writer.teacher.hinted
    samples = tuple(
        read_sample(writer.prompt, example, attempt.reply, hinted=hinted) for attempt in attempts
    )
    chosen, fraction = vote(writer.prompt, samples)
    return Annotation(
        example=example,
        status=chosen.status,
        rationale=chosen.rationale,
        label=chosen.label,
        raw=chosen.raw,
        vote=fraction,
        samples=samples,
    )


def annotations(
    journal: Journal, writer: Writer, examples: Iterable[Example]
) -> Iterator[Annotation]:
    """Yields the annotations of examples in order; examples without attempts are left out."""
    for example in examples:
        outcomes = [journal.outcome(request.key) for request in writer.requests(example)]
        attempts = [attempt for attempt in outcomes if attempt is not None]
        if attempts:
            yield annotation(writer, example, attempts)


def write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines, replacing the file only when complete; returns the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_parquet(path: Path, annotated: Iterable[Annotation], teacher: str) -> None:
    """Writes annotations and examples to a Parquet file, replacing it only when complete."""
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
            for a in annotated
        )
        while chunk := list(itertools.islice(rows, PARQUET_ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
