"""Journal of all requests and attempts: a SQLite file that stays valid if a run is killed.

It has a row per request (key, example, sample) and a row per attempt (status, raw response, tokens,
latency). An attempt is on disk before its reply is used.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dss.errors import TeacherError
from dss.teacher.reply import FINAL, Reply
from dss.teacher.request import Request, Teacher, Writer

__all__ = ["Attempt", "Journal", "Usage"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (
  id INTEGER PRIMARY KEY,
  content TEXT NOT NULL UNIQUE        -- JSON: the prompt and the teacher's parameters
);
CREATE TABLE IF NOT EXISTS requests (
  key TEXT PRIMARY KEY,
  example TEXT NOT NULL,
  sample INTEGER NOT NULL,
  model TEXT NOT NULL,
  base_url TEXT NOT NULL,
  most_tokens INTEGER,                -- limit on completion tokens
  setting INTEGER NOT NULL REFERENCES settings,
  characters INTEGER NOT NULL         -- length of the text sent
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL REFERENCES requests,
  status TEXT NOT NULL,               -- see dss.teacher.reply
  code INTEGER,                       -- HTTP status
  response TEXT NOT NULL,             -- body as received, or the connection's error
  finish_reason TEXT,
  prompt_tokens INTEGER,
  cached_tokens INTEGER,              -- part of prompt_tokens
  completion_tokens INTEGER,
  latency REAL,                       -- seconds
  at REAL NOT NULL,                   -- end of the attempt, seconds since 1970
  origin TEXT UNIQUE                  -- id of an attempt imported from a batch or a pipeline
);
CREATE INDEX IF NOT EXISTS attempts_by_key ON attempts (key, status);
CREATE TABLE IF NOT EXISTS exports (path TEXT PRIMARY KEY, fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS room (content BLOB NOT NULL); -- see Journal.make_room
"""
FINAL_SQL = ", ".join(f"'{status}'" for status in FINAL)
FIELDS = (
    "key, status, code, response, finish_reason, prompt_tokens, cached_tokens, completion_tokens, "
    "latency, at, origin"
)
BUSY_SECONDS = 60  # longest wait of a statement for another process's lock
ROOM = 2**20  # bytes reserved for replies in flight when the disk becomes full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a request.

    Attributes:
      key: key of the request.
      reply: reply, or the connection's error.
      latency: duration in seconds; None if it was not measured.
      at: end of the attempt, in seconds since 1970.
      origin: unique id of an attempt imported from a batch or a pipeline; None for one that was
        sent directly.
    """

    key: str
    reply: Reply
    latency: float | None
    at: float
    origin: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a teacher's attempts.

    Uncounted attempts may have been charged but have no token count: a timeout, a broken
    connection, or a reply without a valid count.

    Attributes:
      prompt: prompt tokens.
      cached: prompt tokens that were in the endpoint's cache.
      completion: completion tokens.
      characters: characters of the prompts whose tokens were counted.
      uncounted: number of uncounted attempts.
      uncounted_characters: characters of their prompts.
      uncounted_completion: maximum completion tokens of their answers.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    characters: int = 0
    uncounted: int = 0
    uncounted_characters: int = 0
    uncounted_completion: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        names = [field.name for field in dataclasses.fields(self)]
        return Usage(**dict(zip(names, map(sum, pairs), strict=True)))


class Journal:
    """An open journal. Reads and writes have separate connections, so that they may overlap."""

    def __init__(self, path: Path, *, create: bool = True):
        """Opens a journal.

        Args:
          path: journal file.
          create: whether to open the journal for writing: a missing file is created, and the file
            is locked against other writers.

        Raises:
          TeacherError: if the file is missing or not a journal, or another process writes to it.
        """
        self.path = path
        self._described: tuple[str, str, int | None, int] | None = None
        self._lock = None
        if not create and not path.exists():
            raise TeacherError(f"{path}: no such journal; nothing was annotated there yet")
        if path.exists() and not path.is_file():
            raise TeacherError(f"{path}: not a regular file, so not a journal; move it away")
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
        with self._errors():
            self._writer = self._connect()
            if create:
                self._writer.execute("PRAGMA journal_mode = WAL")
                # Replies that were paid for survive a power failure.
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.executescript(SCHEMA)
            self._reader = self._connect()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TeacherError(f"{self.path}: {error}; earlier entries are kept") from None

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()
        self._writer.close()
        if self._lock is not None:
            self._lock.close()

    def make_room(self) -> None:
        """Reserves 1 MiB in the journal, so that replies in flight can be kept on a full disk.

        Raises:
          TeacherError: if the disk is full, or the journal cannot be written for another reason.
        """
        with self._transaction():
            self._writer.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM,))
        with self._transaction():
            self._writer.execute("DELETE FROM room")
        with self._errors():  # frees SQLite's log, now 1 MiB long, for reuse
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def describe(self, writer: Writer) -> None:
        """Stores the prompt and the teacher of the requests that are added from now on."""
        setting = {
            "prompt": writer.prompt.source,
            "teacher": dataclasses.asdict(writer.teacher),
        }
        text = json.dumps(setting, sort_keys=True, ensure_ascii=False)
        with self._errors():
            self._writer.execute("INSERT OR IGNORE INTO settings (content) VALUES (?)", (text,))
            query = "SELECT id FROM settings WHERE content = ?"
            number = self._writer.execute(query, (text,)).fetchone()[0]
        teacher = writer.teacher
        self._described = (teacher.model, teacher.base_url, writer.most_tokens, number)

    def add(self, requests: Sequence[Request], attempts: Sequence[Attempt]) -> int:
        """Writes requests and attempts in one transaction, which is on disk on return.

        Args:
          requests: requests to add; those in the journal are left unchanged.
          attempts: attempts at requests that are in the journal or in `requests`.

        Returns:
          Number of new attempts; an attempt whose origin is in the journal is ignored.
        """
        assert self._described is not None or not requests
        request_rows = [
            (
                *(r.key, r.example, r.sample),
                *(self._described or ()),
                r.characters,
            )
            for r in requests
        ]
        attempt_rows = [
            (
                *(a.key, a.reply.status, a.reply.code, a.reply.response, a.reply.finish_reason),
                *(a.reply.prompt_tokens, a.reply.cached_tokens, a.reply.completion_tokens),
                *(a.latency, a.at, a.origin),
            )
            for a in attempts
        ]
        with self._transaction():
            self._writer.executemany(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)", request_rows
            )
            earlier_changes = self._writer.total_changes
            marks = ", ".join("?" * len(FIELDS.split(", ")))
            self._writer.executemany(
                f"INSERT OR IGNORE INTO attempts ({FIELDS}) VALUES ({marks})", attempt_rows
            )
            return self._writer.total_changes - earlier_changes

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # SQLite itself rolls back on a full disk
                    self._writer.execute("ROLLBACK")
                raise

    def has_request(self, key: str) -> bool:
        """Returns whether the journal has a request with a key."""
        with self._errors():
            row = self._reader.execute("SELECT 1 FROM requests WHERE key = ?", (key,)).fetchone()
        return row is not None

    def final_among(self, keys: Sequence[str]) -> set[str]:
        """Returns those keys whose requests have a final reply: answered or refused."""
        marks = ", ".join("?" * len(keys))
        query = f"SELECT key FROM attempts WHERE key IN ({marks}) AND status IN ({FINAL_SQL})"
        with self._errors():
            return {key for (key,) in self._reader.execute(query, keys)}

    def attempts_after(self, number: int) -> Iterator[Attempt]:
        """Yields the attempts after the one with a number; see `last_attempt`."""
        query = f"SELECT {FIELDS} FROM attempts WHERE id > ? ORDER BY id"
        with self._errors():
            yield from map(_attempt_from_row, self._reader.execute(query, (number,)))

    def outcome(self, key: str) -> Attempt | None:
        """Returns a request's first final attempt, else its last one; None without attempts."""
        query = f"""SELECT {FIELDS} FROM attempts WHERE key = ?
            ORDER BY status NOT IN ({FINAL_SQL}), IIF(status IN ({FINAL_SQL}), id, -id) LIMIT 1"""
        with self._errors():
            row = self._reader.execute(query, (key,)).fetchone()
        return None if row is None else _attempt_from_row(row)

    def usage(self, teacher: Teacher, *, batch: bool = False) -> Usage:
        """Returns the tokens of the attempts at a teacher's requests.

        Args:
          teacher: teacher, matched by model and base URL alone.
          batch: whether to count imported attempts instead of those sent directly.
        """
        query = """SELECT
              coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0),
              coalesce(sum(completion_tokens), 0),
              coalesce(sum(IIF(prompt_tokens IS NOT NULL, characters, 0)), 0),
              coalesce(sum(uncounted), 0), coalesce(sum(uncounted * characters), 0),
              coalesce(sum(uncounted * coalesce(most_tokens, 0)), 0)
            FROM (
              SELECT *, prompt_tokens IS NULL AND (status IN ('timeout', 'dropped') OR code = 200)
                AS uncounted
              FROM attempts JOIN requests USING (key)
              WHERE model = ? AND base_url = ? AND (origin IS NOT NULL) = ?
            )"""
        with self._errors():
            row = self._reader.execute(query, (teacher.model, teacher.base_url, batch)).fetchone()
        return Usage(**dict(zip([f.name for f in dataclasses.fields(Usage)], row, strict=True)))

    def counts(self, teacher: Teacher) -> dict[str, int]:
        """Returns the number of attempts at a teacher's requests by status."""
        query = """SELECT status, count(*) FROM attempts JOIN requests USING (key)
            WHERE model = ? AND base_url = ? GROUP BY status ORDER BY count(*) DESC, status"""
        with self._errors():
            return dict(self._reader.execute(query, (teacher.model, teacher.base_url)))

    def last_attempt(self) -> int:
        """Returns the number of the newest attempt; 0 without attempts."""
        with self._errors():
            return self._reader.execute("SELECT coalesce(max(id), 0) FROM attempts").fetchone()[0]

    def export_of(self, path: Path) -> str | None:
        """Returns the fingerprint of the last export to a file; None without an export."""
        query = "SELECT fingerprint FROM exports WHERE path = ?"
        with self._errors():
            row = self._reader.execute(query, (path.name,)).fetchone()
        return None if row is None else row[0]

    def set_export(self, path: Path, fingerprint: str) -> None:
        """Records the fingerprint of an export to a file."""
        with self._errors():
            query = "INSERT OR REPLACE INTO exports VALUES (?, ?)"
            self._writer.execute(query, (path.name, fingerprint))


def _lock(path: Path) -> BinaryIO:
    """Locks a journal against other writers; returns the open file that holds the lock.

    The lock is on the journal file itself, so that it depends neither on other files nor on the
    path to it. It ends with the process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # The descriptor stays open, as closing it would release this process's SQLite locks.
        raise TeacherError(f"{path}: another process is writing to this journal") from None
    return os.fdopen(descriptor, "rb")


def _attempt_from_row(row: tuple) -> Attempt:
    key, status, code, response, finish, prompt, cached, completion, latency, at, origin = row
    reply = Reply(
        status=status,
        code=code,
        response=response,
        finish_reason=finish,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
    )
    return Attempt(key=key, reply=reply, latency=latency, at=at, origin=origin)
