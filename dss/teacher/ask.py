"""One session with a teacher: what it has not answered is asked, and its answers exported."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from dss.errors import UserError
from dss.teacher.annotate import Annotator, Limits, Progress, State
from dss.teacher.client import Client, api_key
from dss.teacher.job import Job
from dss.teacher.journal import Journal
from dss.teacher.prices import Price
from dss.teacher.reply import FINAL

__all__ = ["Session", "ask", "open_journal"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Session:
    """The outcome of a session with a teacher.

    Attributes:
      state: the requests, tokens and cost, and the reason of an early end.
      counts: the number of exported lines by status; None where nothing new was exported.
    """

    state: State
    counts: collections.Counter[str] | None


@contextlib.contextmanager
def open_journal(job: Job, *, create: bool = True) -> Iterator[Journal]:
    """Opens the journal of a job, and closes it.

    Args:
      job: the job.
      create: whether the journal is written to; else it must exist.

    Raises:
      UserError: if another process uses the journal, or it cannot be read.
    """
    journal = Journal(job.journal_path, create=create)
    try:
        if create:
            journal.describe(job.writer)
        yield journal
    finally:
        journal.close()


def ask(
    job: Job,
    limits: Limits,
    *,
    key_env: str = "OPENAI_API_KEY",
    price: Price | None = None,
    make_progress: Callable[[int], Progress] = lambda total: Progress(),
    parquet: bool = False,
    replace: bool = False,
) -> Session:
    """Sends the requests that have no answer yet, and exports the answers.

    Answers that came before an error are exported too.

    Args:
      job: the examples and the teacher.
      limits: the limits on requests, rate and cost.
      key_env: the environment variable that holds the key.
      price: the price of the model; None if unknown.
      make_progress: returns the callbacks, given the number of requests.
      parquet: whether to export to Parquet too.
      replace: whether to write over outputs though answers would be lost.

    Raises:
      UserError: if an argument, an example or the key is wrong, or the endpoint refuses to answer.
    """
    teacher = job.writer.teacher
    client = Client(teacher, api_key(key_env, teacher.base_url), limits.timeout)
    with open_journal(job) as journal:
        total = job.check(
            journal, parquet=parquet, replace=replace, most_requests=limits.max_requests
        )
        progress = make_progress(total * teacher.samples)

        def export() -> collections.Counter[str] | None:
            counts = job.export(journal, parquet=parquet, replace=replace)
            job.save_usage(journal, price)
            return counts

        annotator = Annotator(journal, job.writer, client, limits, price=price, progress=progress)
        try:
            state = _run(annotator.run(job.examples(), total))
        except UserError:
            if any(annotator.state.kinds[status] for status in FINAL):
                export()
            raise
        finally:
            progress.close()
        return Session(state, export())


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine, also where an event loop runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
