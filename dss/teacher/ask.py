"""One session with a teacher: the requests without an answer are sent."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from dss.errors import DssError
from dss.teacher.annotate import Annotator, Limits, Progress, State
from dss.teacher.client import Client
from dss.teacher.job import Job
from dss.teacher.journal import Journal
from dss.teacher.prices import Price
from dss.teacher.reply import FINAL

__all__ = ["ask", "open_journal"]

T = TypeVar("T")


@contextlib.contextmanager
def open_journal(job: Job, *, create: bool = True) -> Iterator[Journal]:
    """Opens the journal of a job, and closes it.

    Args:
      job: the job.
      create: whether the journal is written to; else it must exist.

    Raises:
      TeacherError: if another process uses the journal, or it cannot be read.
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
    journal: Journal,
    client: Client,
    limits: Limits,
    *,
    price: Price | None = None,
    make_progress: Callable[[int], Progress] = lambda requests: Progress(),
    export: Callable[[], Any],
    parquet: bool = False,
    replace: bool = False,
) -> State:
    """Sends the requests of a job that have no answer in the journal.

    Args:
      job: the examples and the teacher.
      journal: the open journal of the job.
      client: the client of the endpoint.
      limits: the limits on requests, rate and cost.
      price: the price of the model; None if unknown.
      make_progress: returns the callbacks, given the number of requests.
      export: called before an error is raised, if answers came first.
      parquet: whether the answers are to be exported to Parquet too.
      replace: whether outputs may be overwritten though answers would be lost.

    Returns:
      The state at the end, with the reason of an early one.

    Raises:
      TeacherError: if an argument or an example is wrong, the key is rejected, or the endpoint
        refuses to answer.
    """
    total = job.check(journal, parquet=parquet, replace=replace, most_requests=limits.max_requests)
    progress = make_progress(total * job.writer.teacher.samples)
    annotator = Annotator(journal, job.writer, client, limits, price=price, progress=progress)
    try:
        return _run(annotator.run(job.examples(), total))
    except DssError:
        if any(annotator.state.status_counts[status] for status in FINAL):
            export()
        raise
    finally:
        progress.close()


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
