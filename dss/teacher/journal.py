"""Everything that was asked and answered: a SQLite file that a killed run leaves whole.

A row a request (its key, example and sample) and a row an attempt at it (status, raw response,
tokens, latency). An attempt is on the disk before anything is made of it.
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

from dss.errors import UserError
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
  most_tokens INTEGER,                -- that an answer may have
  setting INTEGER NOT NULL REFERENCES settings,
  characters INTEGER NOT NULL         -- of the text that is sent
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL REFERENCES requests,
  status TEXT NOT NULL,               -- see dss.teacher.reply
  code INTEGER,                       -- HTTP status
  response TEXT NOT NULL,             -- as it came, or what the connection died of
  finish_reason TEXT,
  prompt_tokens INTEGER,
  cached_tokens INTEGER,              -- of the prompt's
  completion_tokens INTEGER,
  latency REAL,                       -- seconds
  at REAL NOT NULL,                   -- when it ended, seconds since 1970
  origin TEXT UNIQUE                  -- its id in the batch that brought it
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
BUSY_SECONDS = 60  # that a statement waits for another process's
ROOM = 2**20  # bytes for the answers that are on their way when a disk is found full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a request.

    Attributes:
      key: the request's.
      reply: what came back.
      latency: seconds that it took; None where nobody measured.
      at: when it ended, seconds since 1970.
      origin: its id in the batch that brought it; None for one that was sent from here.
    """

    key: str
    reply: Reply
    latency: float | None
    at: float
    origin: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that a teacher's attempts took, and what is not known of them.

    Attributes:
      prompt: tokens of the prompts.
      cached: those of them that the endpoint had in its cache.
      completion: tokens of the answers.
      characters: of the prompts whose tokens were counted.
      silent: attempts that may have been paid for but brought no count: cut off, or timed out.
      silent_characters: of their prompts.
      silent_completion: the most tokens that their answers may have had.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    characters: int = 0
    silent: int = 0
    silent_characters: int = 0
    silent_completion: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        names = [field.name for field in dataclasses.fields(self)]
        return Usage(**dict(zip(names, map(sum, zip(mine, theirs, strict=True)), strict=True)))


class Journal:
    """A journal's file, open. Reads and writes use a connection each, so that they may overlap."""

    def __init__(self, path: Path, *, create: bool = True):
        """Opens a journal.

        Args:
          path: of the file.
          create: makes it where it is missing, and keeps other processes from writing to it.

        Raises:
          UserError: it is missing, no journal, or another process writes to it.
        """
        self.path = path
        self._described: tuple[str, str, int | None, int] | None = None
        self._lock = None
        if not create and not path.exists():
            raise UserError(f"{path}: no such journal; nothing was annotated there yet")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no journal, which is a file; move it away")
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
        with self._errors():
            self._writer = self._connect()
            if create:
                self._writer.execute("PRAGMA journal_mode = WAL")
                # Power may fail too: an answer that was paid for is on the disk when it counts.
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
            raise UserError(f"{self.path}: {error}; what was written before stays") from None

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()
        self._writer.close()
        if self._lock is not None:
            self._lock.close()

    def make_room(self) -> None:
        """Reserves 1 MiB in the journal, so that answers in flight can be kept on a full disk.

        Raises:
          UserError: if the disk is full, or the journal cannot be written for another reason.
        """
        with self._transaction():
            self._writer.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM,))
        with self._transaction():
            self._writer.execute("DELETE FROM room")
        with self._errors():  # SQLite's log, as long as the room now, begins anew
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def describe(self, writer: Writer) -> None:
        """Says who wrote the requests that are added from now on; prompt and teacher are kept."""
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
        """Writes requests and attempts in one transaction that is on the disk when this returns.

        Args:
          requests: those that are there already are left as they are.
          attempts: at requests that are there by then.

        Returns:
          How many attempts were new: one of the same origin is written once.
        """
        assert self._described is not None or not requests
        asked = [
            (
                *(r.key, r.example, r.sample),
                *(self._described or ()),
                r.characters,
            )
            for r in requests
        ]
        came = [
            (
                *(a.key, a.reply.status, a.reply.code, a.reply.response, a.reply.finish_reason),
                *(a.reply.prompt_tokens, a.reply.cached_tokens, a.reply.completion_tokens),
                *(a.latency, a.at, a.origin),
            )
            for a in attempts
        ]
        with self._transaction():
            self._writer.executemany(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?)", asked
            )
            before = self._writer.total_changes
            marks = ", ".join("?" * len(FIELDS.split(", ")))
            self._writer.executemany(
                f"INSERT OR IGNORE INTO attempts ({FIELDS}) VALUES ({marks})", came
            )
            return self._writer.total_changes - before

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # a full disk has rolled back already
                    self._writer.execute("ROLLBACK")
                raise

    def knows(self, key: str) -> bool:
        """Returns whether a request was ever written."""
        with self._errors():
            row = self._reader.execute("SELECT 1 FROM requests WHERE key = ?", (key,)).fetchone()
        return row is not None

    def final_among(self, keys: Sequence[str]) -> set[str]:
        """Returns those requests that need no more attempts: answered, or refused."""
        marks = ", ".join("?" * len(keys))
        query = f"SELECT key FROM attempts WHERE key IN ({marks}) AND status IN ({FINAL_SQL})"
        with self._errors():
            return {key for (key,) in self._reader.execute(query, keys)}

    def attempts_after(self, number: int) -> Iterator[Attempt]:
        """Yields the attempts that are newer than one of a number; see `last_attempt`."""
        query = f"SELECT {FIELDS} FROM attempts WHERE id > ? ORDER BY id"
        with self._errors():
            yield from map(_attempt, self._reader.execute(query, (number,)))

    def outcome(self, key: str) -> Attempt | None:
        """Returns the attempt that counts: the first final one, else the last; None of none."""
        query = f"""SELECT {FIELDS} FROM attempts WHERE key = ?
            ORDER BY status NOT IN ({FINAL_SQL}), IIF(status IN ({FINAL_SQL}), id, -id) LIMIT 1"""
        with self._errors():
            row = self._reader.execute(query, (key,)).fetchone()
        return None if row is None else _attempt(row)

    def usage(self, teacher: Teacher, *, batch: bool = False) -> Usage:
        """Returns the tokens of all attempts at a teacher's requests.

        Args:
          teacher: its model and base URL count, not its parameters.
          batch: of the attempts that came in batches, or of those that were sent from here.
        """
        query = """SELECT
              coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0),
              coalesce(sum(completion_tokens), 0),
              coalesce(sum(IIF(prompt_tokens IS NOT NULL, characters, 0)), 0),
              coalesce(sum(silent), 0), coalesce(sum(silent * characters), 0),
              coalesce(sum(silent * coalesce(most_tokens, 0)), 0)
            FROM (
              SELECT *, prompt_tokens IS NULL AND (status IN ('timeout', 'dropped') OR code = 200)
                AS silent
              FROM attempts JOIN requests USING (key)
              WHERE model = ? AND base_url = ? AND (origin IS NOT NULL) = ?
            )"""
        with self._errors():
            row = self._reader.execute(query, (teacher.model, teacher.base_url, batch)).fetchone()
        return Usage(**dict(zip([f.name for f in dataclasses.fields(Usage)], row, strict=True)))

    def counts(self, teacher: Teacher) -> dict[str, int]:
        """Returns how many attempts at a teacher's requests ended in each status."""
        query = """SELECT status, count(*) FROM attempts JOIN requests USING (key)
            WHERE model = ? AND base_url = ? GROUP BY status ORDER BY count(*) DESC, status"""
        with self._errors():
            return dict(self._reader.execute(query, (teacher.model, teacher.base_url)))

    def last_attempt(self) -> int:
        """Returns the number of the newest attempt; 0 where there is none."""
        with self._errors():
            return self._reader.execute("SELECT coalesce(max(id), 0) FROM attempts").fetchone()[0]

    def export_of(self, path: Path) -> str | None:
        """Returns the fingerprint of what was exported to a file; None of nothing."""
        query = "SELECT fingerprint FROM exports WHERE path = ?"
        with self._errors():
            row = self._reader.execute(query, (path.name,)).fetchone()
        return None if row is None else row[0]

    def set_export(self, path: Path, fingerprint: str) -> None:
        """Keeps what was exported to a file."""
        with self._errors():
            query = "INSERT OR REPLACE INTO exports VALUES (?, ?)"
            self._writer.execute(query, (path.name, fingerprint))


def _lock(path: Path) -> BinaryIO:
    """Returns an open file that keeps other processes from writing to a journal.

    The lock is the journal's own, whatever becomes of the files beside it and whatever name a
    process has for it, and ends with the process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # It stays open: closing it would end the locks that SQLite may have in this process.
        raise UserError(f"{path}: another process is annotating there") from None
    return os.fdopen(descriptor, "rb")


def _attempt(row: tuple) -> Attempt:
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
