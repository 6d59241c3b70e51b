"""Queries a teacher about examples until every request has a final reply or the run stops.

This module decides what is sent, how often it is retried and what it may cost. `dss.teacher.pacing`
sets the rate, and `dss.teacher.reply` classifies replies. Every attempt is written to the journal
before it is used.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import random
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator

from dss.data.examples import Example
from dss.errors import TeacherError
from dss.teacher.client import Client
from dss.teacher.journal import Attempt, Journal, Usage
from dss.teacher.pacing import Clock, Pacer, backoff
from dss.teacher.prices import Price, tokens_per_character, total_cost
from dss.teacher.reply import FINAL, STOPPING, Reply
from dss.teacher.request import Request, Writer

__all__ = ["Annotator", "Limits", "Progress", "State"]

MAX_CONSECUTIVE_FAILURES = 20  # unanswered requests in a row that stop the run
LOOKUP_CHUNK = 64  # requests per look-up in the journal
MAX_DENSITY = 4.0  # tokens per character of a prompt before the first count: one per byte
OVERLOAD_STATUSES = ("limited", "failed", "timeout", "dropped", "unreachable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the rate, retries and cost of a run.

    Attributes:
      concurrency: maximum requests in flight; the limit in use adapts to the endpoint.
      requests_per_minute: request budget; None for unlimited.
      tokens_per_minute: budget of prompt and completion tokens; None for unlimited.
      timeout: seconds to wait for a complete reply.
      attempts: maximum failed attempts per request in one run; 429 replies are not counted.
      max_requests: maximum attempts that this run sends, including retries; None for unlimited.
      max_cost: maximum cost of all of this teacher's attempts in the journal; None for unlimited.
    """

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    attempts: int = 6
    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            minimum = 1 if field.name in ("concurrency", "attempts", "max_requests") else 0
            if value is not None and not (value >= minimum and 0 < value < math.inf):
                bound = "at least 1" if minimum else "more than 0"
                raise TeacherError(f"`{field.name}={value}`: give {bound}")


@dataclasses.dataclass
class State:
    """Progress of a run.

    Attributes:
      total: number of requests: examples times samples.
      done: requests that are settled: answered earlier, answered in this run, or given up.
      done_in_run: requests settled by this run.
      sent: attempts sent by this run.
      unanswered: requests that this run gave up, or that had failed when the run stopped.
      status_counts: attempts of this run by status.
      usage: tokens of all attempts sent directly, in this run and earlier ones.
      cost: cost of that usage and of batches; None if a price is unknown.
      initial_cost: cost at the start of this run; 0 if unknown.
      stopped: reason why the run stopped early; None if it did not.
    """

    total: int
    done: int = 0
    done_in_run: int = 0
    sent: int = 0
    unanswered: int = 0
    status_counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    usage: Usage = Usage()
    cost: float | None = None
    initial_cost: float = 0.0
    stopped: str | None = None

    @property
    def projected_cost(self) -> float | None:
        """Final cost, extrapolated from the requests settled by this run; None if unknown."""
        if self.cost is None or not self.done_in_run:
            return self.cost if self.done == self.total else None
        cost_per_request = (self.cost - self.initial_cost) / self.done_in_run
        return self.cost + cost_per_request * (self.total - self.done)


class Progress:
    """Progress callbacks. The base class ignores all events."""

    def update(self, state: State, pacer: Pacer) -> None:
        """Called after each reply."""

    def say(self, line: str) -> None:
        """Called with a message for the user."""

    def close(self) -> None:
        """Called at the end of the run."""


class Annotator:
    """Sends the requests that have no final reply. `run` may be called once."""

    def __init__(
        self,
        journal: Journal,
        writer: Writer,
        client: Client,
        limits: Limits,
        *,
        price: Price | None = None,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ):
        """Makes an annotator.

        Args:
          journal: journal open for writing, after a call of `describe`.
          writer: builder of the requests.
          client: client of the endpoint.
          limits: limits on rate, retries and cost.
          price: price of the model; None if unknown.
          progress: progress callbacks; None for none.
          clock: replacement clock for tests.

        Raises:
          TeacherError: if `limits.max_cost` is set and a price is unknown.
        """
        self.journal, self.writer, self.client, self.limits = journal, writer, client, limits
        self.price = price
        self.progress = progress or Progress()
        self.pacer = Pacer(
            limits.concurrency,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            clock=clock,
        )
        self.state = State(total=0)
        self._error: Exception | None = None
        self._consecutive_failures = 0
        self._in_progress: set[str] = set()  # keys of requests
        self._density = MAX_DENSITY  # highest tokens per character of a prompt so far
        self._reserved: list[float] = []  # maximum cost of each attempt in flight
        self._usage = journal.usage(writer.teacher)
        self._batch_usage = journal.usage(writer.teacher, batch=True)
        self._count_cost()
        self.state.initial_cost = self.state.cost or 0.0
        if limits.max_cost is not None and self.state.cost is None:
            missing = "the model's price" if price is None else "its batch_input and batch_output"
            raise TeacherError(f"`max_cost` needs {missing}; give a file that has it with `prices`")
        self._pending: list[tuple[Request, Attempt, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        # A commit waits for the disk; attempts that arrive meanwhile share the next commit.
        self._disk = concurrent.futures.ThreadPoolExecutor(1)

    async def run(self, examples: Iterable[Example], total: int) -> State:
        """Sends the requests of every example that have no final reply.

        Args:
          examples: examples, read one by one.
          total: number of examples.

        Returns:
          The final state; `stopped` is set if the run stopped early.

        Raises:
          TeacherError: if the key is wrong, the quota is used up, no request succeeds, the disk is
            full, or an example does not fit the prompt. Earlier replies are in the journal.
        """
        self.state.total = total * self.writer.teacher.samples
        tasks: set[asyncio.Task[None]] = set()
        with self._signals(tasks):
            try:
                async for request in self._unanswered(examples):
                    if not await self.pacer.acquire_slot():
                        break
                    self._in_progress.add(request.key)
                    task = asyncio.create_task(self._process_request(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            except Exception as error:  # an invalid example; requests in flight still finish
                self._fail(error)
            try:
                while tasks or self._pending:
                    await asyncio.gather(*tasks, return_exceptions=True)
                    if self._flushing is not None:  # attempts of cancelled requests
                        await self._flushing
            finally:
                self.progress.update(self.state, self.pacer)
                self._disk.shutdown()
                await self.client.close()
        if self._error is not None:
            raise self._error
        return self.state

    def stop(self, reason: str) -> None:
        """Stops sending; requests in flight still finish."""
        if self.state.stopped is None:
            self.state.stopped = reason
            self.pacer.stop()

    async def _unanswered(self, examples: Iterable[Example]) -> AsyncIterator[Request]:
        requests = (request for example in examples for request in self.writer.requests(example))
        while chunk := list(itertools.islice(requests, LOOKUP_CHUNK)):
            final = self.journal.final_among([request.key for request in chunk])
            for request in chunk:
                # An identical question may come earlier, even in the same chunk.
                is_known = request.key in final or request.key in self._in_progress
                if is_known or self.journal.final_among([request.key]):
                    self.state.done += 1
                else:
                    yield request
            await asyncio.sleep(0)  # lets other tasks process replies
            if self.pacer.stopped.is_set():
                return

    async def _process_request(self, request: Request) -> None:
        try:
            await self._attempt_until_settled(request)
        except Exception as error:  # such as a full disk, on which further replies would be lost
            self._fail(error)
        finally:
            self._in_progress.discard(request.key)
            self.pacer.release_slot()

    async def _attempt_until_settled(self, request: Request) -> None:
        """Attempts a request until it has a final reply, is given up, or the run stops."""
        failures = limited = 0
        while (result := await self._attempt(request)) is not None:
            reply, wait = result
            if wait is not None and reply.status not in FINAL:
                self._pause(reply, wait)
            if reply.status in FINAL:
                self._count_settled(answered=True)
                return
            if reply.status in STOPPING:
                self._fail(TeacherError(f"{self.writer.teacher.base_url}: {reply.message}"))
                return
            if reply.status == "limited":
                limited += 1
            else:
                failures += 1
            if reply.status == "rejected" or failures == self.limits.attempts:
                self._count_settled(answered=False)
                self._stop_if_none_succeed(reply)
                return
            if wait is None:
                seconds = backoff(max(limited, failures), random.random())
                await self.pacer.clock.wait(self.pacer.stopped, seconds)
        self.state.unanswered += failures > 0

    def _stop_if_none_succeed(self, reply: Reply) -> None:
        url = self.writer.teacher.base_url
        if set(self.state.status_counts) == {"unreachable"}:
            self._fail(TeacherError(f"{url}: cannot connect to a server: {reply.message}"))
        elif self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            count = MAX_CONSECUTIVE_FAILURES
            problem = f"{count} requests in a row got no answer; the last: {reply.message}"
            self._fail(TeacherError(f"{url}: {problem}"))

    async def _attempt(self, request: Request) -> tuple[Reply, float | None] | None:
        """Sends a request once and records the reply in the journal.

        Returns:
          The reply and the seconds to wait before the next request, if the endpoint gives any; None
          if the request may not be sent.
        """
        prompt_tokens = self._prompt_tokens(request)
        max_cost = await self._wait_for_budget(request)
        if max_cost is None:
            return None
        self._reserved.append(max_cost)
        try:
            expected_tokens = prompt_tokens + (self.writer.most_tokens or 0)
            sent_at = await self.pacer.wait_to_send(expected_tokens)
            if sent_at is None:
                return None
            try:
                if not self._may_send():
                    return None
                began = time.monotonic()
                reply, wait = await self.client.send(self.writer.body(request))
                latency = time.monotonic() - began
                attempt = Attempt(key=request.key, reply=reply, latency=latency, at=time.time())
                await self._record(request, attempt)
            finally:
                self.pacer.mark_returned()
            self._count_reply(request, reply, expected_tokens)
        finally:
            self._reserved.remove(max_cost)
            self.pacer.notify()
        self.progress.update(self.state, self.pacer)
        if reply.status in OVERLOAD_STATUSES:
            self.pacer.record_overload(sent_at)
        elif reply.status in FINAL:
            self.pacer.record_success()
        return reply, wait

    def _may_send(self) -> bool:
        """Returns whether another attempt may be sent, and counts it.

        Before the first one, disk space for replies is reserved in the journal.
        """
        max_requests = self.limits.max_requests
        if max_requests is not None and self.state.sent >= max_requests:
            self.stop(f"`max_requests={max_requests}` reached")
            return False
        if not self.state.sent:
            self.journal.make_room()
        self.state.sent += 1
        return True

    async def _wait_for_budget(self, request: Request) -> float | None:
        """Waits until the budget covers a request's maximum cost.

        Returns:
          The maximum cost; None if the run stops first.
        """
        budget = self.limits.max_cost
        while not self.pacer.stopped.is_set():
            max_cost = self._max_cost(request)  # the estimate changes with every reply
            if budget is None:
                return max_cost
            assert self.state.cost is not None
            assert self.price is not None
            if self.state.cost + sum(self._reserved) + max_cost <= budget:
                return max_cost
            if not self._reserved:
                spent = self.price.text(self.state.cost)
                problem = f"{spent} spent, and the next request may exceed it"
                self.stop(f"`max_cost={budget:g}` reached: {problem}")
            else:
                await self.pacer.wait_for_change()
        return None

    def _prompt_tokens(self, request: Request) -> float:
        return request.characters * tokens_per_character(self._usage)

    def _max_cost(self, request: Request) -> float:
        """Returns the maximum cost of a request, at the highest prompt density so far."""
        if self.price is None or self.limits.max_cost is None:
            return 0.0
        if self.writer.most_tokens is None:
            raise TeacherError(
                "`max_cost` needs a limit on each answer: give max_tokens in the prompt's "
                "parameters or in `parameters`"
            )
        prompt = math.ceil(request.characters * self._density)
        tokens = Usage(prompt=prompt, completion=self.writer.most_tokens)
        return self.price.cost(tokens) or 0.0

    async def _record(self, request: Request, attempt: Attempt) -> None:
        """Writes an attempt to the journal; returns once it is on disk."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._pending.append((request, attempt, written))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await written

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            batch, self._pending = self._pending, []
            requests, attempts, waiting = zip(*batch, strict=True)
            try:
                await loop.run_in_executor(self._disk, self.journal.add, requests, attempts)
            except Exception as error:
                self._fail(error)
                for future in waiting:
                    future.cancel()
            else:
                for future in waiting:
                    if not future.done():  # done if its request was cancelled
                        future.set_result(None)

    def _count_reply(self, request: Request, reply: Reply, expected_tokens: float) -> None:
        self.state.status_counts[reply.status] += 1
        if reply.prompt_tokens is not None:
            completion = reply.completion_tokens or 0
            density = reply.prompt_tokens / max(1, request.characters)
            self._density = density if self._density == MAX_DENSITY else max(density, self._density)
            self._usage += Usage(
                prompt=reply.prompt_tokens,
                cached=reply.cached_tokens or 0,
                completion=completion,
                characters=request.characters,
            )
            self.pacer.correct_tokens(reply.prompt_tokens + completion - expected_tokens)
        elif reply.is_uncounted:
            self._usage += Usage(
                uncounted=1,
                uncounted_characters=request.characters,
                uncounted_completion=self.writer.most_tokens or 0,
            )
        self._count_cost()

    def _count_cost(self) -> None:
        self.state.usage = self._usage
        self.state.cost = total_cost(self.price, self._usage, self._batch_usage)

    def _count_settled(self, *, answered: bool) -> None:
        self.state.done += 1
        self.state.done_in_run += 1
        self.state.unanswered += not answered
        self._consecutive_failures = 0 if answered else self._consecutive_failures + 1

    def _pause(self, reply: Reply, seconds: float) -> None:
        is_longer = self.pacer.pause(seconds)
        if is_longer and seconds >= 1:
            until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + seconds))
            self.progress.say(
                f"HTTP {reply.code} with Retry-After: waiting {seconds:.0f} s, until {until}"
            )

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.stop(str(error))

    @contextlib.contextmanager
    def _signals(self, tasks: Iterable[asyncio.Task[None]]) -> Iterator[None]:
        """Handles SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal).

        The first signal stops sending; the second one cancels the requests in flight.
        """
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self.state.stopped is None:
                self.progress.say(
                    "interrupted: finishing the requests in flight; interrupt again to quit at once"
                )
                self.stop("interrupted")
                return
            self._error = self._error or KeyboardInterrupt()  # type: ignore[assignment]
            for task in list(tasks):
                task.cancel()

        handled = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            # Handlers can be set in the main thread only.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, on_signal)
                handled.append(number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
