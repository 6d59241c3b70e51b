"""Export of requests to a provider's batch API, and import of the results.

The files have the format of OpenAI's batch API, which other providers accept too: JSON lines whose
`custom_id` is the request's key. Results may be in any order and in any number of files.
"""

import glob
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dss.data.examples import Example, read_json_lines
from dss.errors import TeacherError
from dss.teacher.journal import Attempt, Journal
from dss.teacher.reply import Reply, read_reply
from dss.teacher.request import Request, Writer

__all__ = ["export_batch", "import_batch"]

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # per file, by OpenAI's limits
TRANSACTION_ROWS = 1000


def export_batch(
    journal: Journal, writer: Writer, examples: Iterable[Example], stem: Path
) -> list[tuple[Path, int]]:
    """Writes the requests without a final reply to files `<stem>.batch-000.jsonl`, ...

    Args:
      journal: journal open for writing, after a call of `describe`; it receives the requests.
      writer: builder of the requests.
      examples: examples to annotate.
      stem: path of the files without `.batch-...`; files of an earlier export are removed.

    Returns:
      (file, number of requests) for each file.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    for old in stem.parent.glob(f"{glob.escape(stem.name)}.batch-[0-9][0-9][0-9].jsonl"):
        old.unlink()
    out: list[tuple[Path, int]] = []
    lines: list[bytes] = []
    size = 0
    chunk: list[Request] = []

    def flush() -> None:
        nonlocal lines, size
        path = stem.parent / f"{stem.name}.batch-{len(out):03d}.jsonl"
        path.write_bytes(b"".join(lines))
        out.append((path, len(lines)))
        lines, size = [], 0

    for request in _unanswered_requests(journal, writer, examples):
        line = json.dumps(_batch_line(writer, request), ensure_ascii=False).encode() + b"\n"
        if lines and (len(lines) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
            flush()
        lines.append(line)
        size += len(line)
        chunk.append(request)
        if len(chunk) == TRANSACTION_ROWS:
            journal.add(chunk, [])
            chunk = []
    journal.add(chunk, [])
    if lines:
        flush()
    return out


def _unanswered_requests(
    journal: Journal, writer: Writer, examples: Iterable[Example]
) -> Iterator[Request]:
    """Yields each request without a final reply, identical ones once."""
    seen: set[bytes] = set()
    for example in examples:
        for request in writer.requests(example):
            key = bytes.fromhex(request.key)
            if key not in seen and not journal.final_among([request.key]):
                seen.add(key)
                yield request


def _batch_line(writer: Writer, request: Request) -> dict[str, Any]:
    url = "/v1" + writer.teacher.path
    return {"custom_id": request.key, "method": "POST", "url": url, "body": writer.body(request)}


def import_batch(journal: Journal, files: Sequence[Path]) -> dict[str, int]:
    """Adds results and errors of batches to a journal.

    Args:
      journal: journal open for writing.
      files: result and error files, in any order; importing one again changes nothing.

    Returns:
      Number of lines that are `new`, were imported `before`, or are of `unknown` requests.

    Raises:
      TeacherError: if a file is missing or a line is not a result; the lines before it are kept.
    """
    counts = {"new": 0, "before": 0, "unknown": 0}
    for path in files:
        chunk: list[Attempt] = []
        try:
            for where, value in read_json_lines(path):
                attempt = _read_result(where, value)
                if not journal.has_request(attempt.key):
                    counts["unknown"] += 1
                    continue
                chunk.append(attempt)
                if len(chunk) == TRANSACTION_ROWS:
                    _add_attempts(journal, chunk, counts)
                    chunk = []
        finally:
            _add_attempts(journal, chunk, counts)
    return counts


def _add_attempts(journal: Journal, chunk: Sequence[Attempt], counts: dict[str, int]) -> None:
    new = journal.add([], chunk)
    counts["new"] += new
    counts["before"] += len(chunk) - new


def _read_result(where: str, value: dict[str, Any]) -> Attempt:
    key, response, error = value.get("custom_id"), value.get("response"), value.get("error")
    if not isinstance(key, str):
        raise TeacherError(f"{where}: has no `custom_id`; is this a result file of a batch?")
    key = key.encode(errors="replace").decode()
    code = response.get("status_code") if isinstance(response, dict) else None
    if isinstance(code, int) and 100 <= code < 600:
        assert isinstance(response, dict)
        reply = read_reply(code, json.dumps(response.get("body")))
    elif isinstance(error, dict):  # an expired or cancelled request
        content = json.dumps({"error": error})
        reply = Reply(status="failed", code=None, response=content)
    else:
        raise TeacherError(f"{where}: has neither a `response` with a status code nor an `error`")
    origin = value.get("id")
    if not isinstance(origin, str):
        content = json.dumps(value, sort_keys=True)
        origin = hashlib.sha256(content.encode()).hexdigest()
    # The id alone is not enough, as some servers give several results the same id.
    origin = f"batch:{origin}:{key}".encode(errors="replace").decode()
    return Attempt(key=key, reply=reply, latency=None, at=time.time(), origin=origin)
