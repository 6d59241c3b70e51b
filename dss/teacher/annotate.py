"""Asks a teacher about examples until each has its answers, or something says stop.

What is asked, how often, and what it may cost is decided here; how fast in `dss.teacher.pacing`,
what a reply means in `dss.teacher.reply`. Every attempt is in the journal before it is acted on.
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
from dss.errors import UserError
from dss.teacher.client import Client
from dss.teacher.journal import Attempt, Journal, Usage
from dss.teacher.pacing import Clock, Pacer, backoff
from dss.teacher.prices import Price, tokens_per_character, total_cost
from dss.teacher.reply import FINAL, STOPPING, Reply
from dss.teacher.request import Request, Writer

__all__ = ["Annotator", "Limits", "Progress", "State"]

IN_A_ROW = 20  # requests without an answer after which none is expected any more
LOOKED_UP_AT_ONCE = 64  # requests in the journal
MOST_DENSE = 4.0  # tokens a character of a prompt until the endpoint has counted: one a byte
COMPLAINTS = ("limited", "failed", "timeout", "dropped", "unreachable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be asked, and how fast.

    Attributes:
      concurrency: the most requests at once; what the endpoint takes is found below it.
      requests_per_minute: None for no such budget.
      tokens_per_minute: of prompts and answers; None for no such budget.
      timeout: seconds for a whole reply.
      attempts: at a request in one run; waiting for a place after a 429 counts for none.
      max_requests: that this run sends.
      max_cost: of everything that the journal holds of this teacher.
    """

    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    attempts: int = 6
    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("concurrency", "attempts", "max_requests") else 0
            if value is not None and not (value >= least and 0 < value < math.inf):
                flag = "--" + field.name.replace("_", "-")
                raise UserError(f"{flag} {value}: give {'at least 1' if least else 'more than 0'}")


@dataclasses.dataclass
class State:
    """How far a run is.

    Attributes:
      total: requests that there are: examples times samples.
      done: requests that are settled, earlier answers and failures counted.
      asked: requests that this run has settled.
      sent: attempts that this run has sent.
      no_answer: requests that this run gave up, or stopped asking after they had failed.
      kinds: attempts of this run by their status.
      usage: tokens of everything that was sent to the teacher, in this run and before.
      cost: of that usage and of batches; None where no price is known.
      cost_before: what it was when this run began.
      stopped: why the run ended early; None where it did not.
    """

    total: int
    done: int = 0
    asked: int = 0
    sent: int = 0
    no_answer: int = 0
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    usage: Usage = Usage()
    cost: float | None = None
    cost_before: float = 0.0
    stopped: str | None = None

    @property
    def projected_cost(self) -> float | None:
        """What everything will have cost in the end, if the rest is like what this run asked."""
        if self.cost is None or not self.asked:
            return self.cost if self.done == self.total else None
        each = (self.cost - self.cost_before) / self.asked
        return self.cost + each * (self.total - self.done)


class Progress:
    """Is told how a run goes; this one keeps quiet."""

    def update(self, state: State, pacer: Pacer) -> None:
        """Is called after each reply."""

    def say(self, line: str) -> None:
        """Is called with what a user should know."""

    def close(self) -> None:
        """Is called at the end."""


class Annotator:
    """Sends the requests that have no answer yet. `run` may be called once."""

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
          journal: open for writing, and described.
          writer: of the requests.
          client: that sends them.
          limits: how much and how fast.
          price: of the model; None where nobody gave one.
          progress: is told how it goes.
          clock: another one for tests.

        Raises:
          UserError: a limit on costs that cannot be kept.
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
        self._in_a_row = 0
        self._asking: set[str] = set()
        self._densest = MOST_DENSE  # tokens a character of a prompt
        self._reserved: list[float] = []  # the most that each attempt in flight can cost
        self._usage = journal.usage(writer.teacher)
        self._batch_usage = journal.usage(writer.teacher, batch=True)
        self._count_cost()
        self.state.cost_before = self.state.cost or 0.0
        if limits.max_cost is not None and self.state.cost is None:
            lacks = "the model's price" if price is None else "its batch_input and batch_output"
            raise UserError(f"--max-cost needs {lacks}; give a file that has it with --prices")
        self._pending: list[tuple[Request, Attempt, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        # Commits wait for the disk; those that come meanwhile share the next one.
        self._disk = concurrent.futures.ThreadPoolExecutor(1)

    async def run(self, examples: Iterable[Example], total: int) -> State:
        """Asks about every example that has no answer.

        Args:
          examples: read one by one.
          total: how many they are.

        Returns:
          The state at the end; `stopped` says why there is more to do.

        Raises:
          UserError: the key is wrong, the quota used up, nothing succeeds, the disk is full, or an
            example does not fit the prompt. What was answered by then is in the journal.
        """
        self.state.total = total * self.writer.teacher.samples
        tasks: set[asyncio.Task[None]] = set()
        with self._signals(tasks):
            try:
                async for request in self._unanswered(examples):
                    if not await self.pacer.enter():
                        break
                    self._asking.add(request.key)
                    task = asyncio.create_task(self._ask(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            except Exception as error:  # the examples: what is in flight is waited for
                self._fail(error)
            try:
                while tasks or self._pending:
                    await asyncio.gather(*tasks, return_exceptions=True)
                    if self._flushing is not None:  # replies whose requests were left at once
                        await self._flushing
            finally:
                self.progress.update(self.state, self.pacer)
                self._disk.shutdown()
                await self.client.close()
        if self._error is not None:
            raise self._error
        return self.state

    def stop(self, reason: str) -> None:
        """Sends nothing more; what is in flight is waited for."""
        if self.state.stopped is None:
            self.state.stopped = reason
            self.pacer.stop()

    async def _unanswered(self, examples: Iterable[Example]) -> AsyncIterator[Request]:
        requests = (request for example in examples for request in self.writer.requests(example))
        while chunk := list(itertools.islice(requests, LOOKED_UP_AT_ONCE)):
            final = self.journal.final_among([request.key for request in chunk])
            for request in chunk:
                # The same question may have come before, in this chunk even.
                known = request.key in final or request.key in self._asking
                if known or self.journal.final_among([request.key]):
                    self.state.done += 1
                else:
                    yield request
            await asyncio.sleep(0)  # replies get their turn
            if self.pacer.stopped.is_set():
                return

    async def _ask(self, request: Request) -> None:
        try:
            await self._until_settled(request)
        except Exception as error:  # the disk: whatever it is, nothing more may be bought
            self._fail(error)
        finally:
            self._asking.discard(request.key)
            self.pacer.leave()

    async def _until_settled(self, request: Request) -> None:
        """Attempts a request until it has its final reply, is given up, or the run stops."""
        failures = limited = 0
        while (result := await self._attempt(request)) is not None:
            reply, wait = result
            if wait is not None and reply.status not in FINAL:
                self._pause(reply, wait)
            if reply.status in FINAL:
                self._settle(answered=True)
                return
            if reply.status in STOPPING:
                self._fail(UserError(f"{self.writer.teacher.base_url}: {reply.message}"))
                return
            if reply.status == "limited":
                limited += 1
            else:
                failures += 1
            if reply.status == "rejected" or failures == self.limits.attempts:
                self._settle(answered=False)
                self._give_up_if_hopeless(reply)
                return
            if wait is None:
                seconds = backoff(max(limited, failures), random.random())
                await self.pacer.clock.wait(self.pacer.stopped, seconds)
        self.state.no_answer += failures > 0

    def _give_up_if_hopeless(self, reply: Reply) -> None:
        where = self.writer.teacher.base_url
        if set(self.state.kinds) == {"unreachable"}:
            self._fail(UserError(f"{where}: no server answers there: {reply.message}"))
        elif self._in_a_row >= IN_A_ROW:
            what = f"{IN_A_ROW} requests in a row brought no answer; the last: {reply.message}"
            self._fail(UserError(f"{where}: {what}"))

    async def _attempt(self, request: Request) -> tuple[Reply, float | None] | None:
        """Sends a request once and journals the reply; returns None where it may not be sent."""
        tokens = self._prompt_tokens(request)
        most_cost = await self._afford(request)
        if most_cost is None:
            return None
        self._reserved.append(most_cost)
        try:
            sent_at = await self.pacer.turn(tokens + (self.writer.most_tokens or 0))
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
                self.pacer.came_back()
            self._count(request, reply, tokens)
        finally:
            self._reserved.remove(most_cost)
            self.pacer.wake()
        self.progress.update(self.state, self.pacer)
        if reply.status in COMPLAINTS:
            self.pacer.complained(sent_at)
        elif reply.status in FINAL:
            self.pacer.went_well()
        return reply, wait

    def _may_send(self) -> bool:
        """Returns whether one more may be sent; the first only if its answer can be kept."""
        most = self.limits.max_requests
        if most is not None and self.state.sent >= most:
            self.stop(f"--max-requests {most} reached")
            return False
        if not self.state.sent:
            self.journal.make_room()
        self.state.sent += 1
        return True

    async def _afford(self, request: Request) -> float | None:
        """Waits until the most that a request can cost is left; returns it, or None if never."""
        budget = self.limits.max_cost
        while not self.pacer.stopped.is_set():
            most_cost = self._most_cost(request)  # known better with every reply
            if budget is None:
                return most_cost
            assert self.state.cost is not None
            assert self.price is not None
            if self.state.cost + sum(self._reserved) + most_cost <= budget:
                return most_cost
            if not self._reserved:
                spent = self.price.text(self.state.cost)
                self.stop(f"--max-cost {budget:g} reached: {spent} spent, the next may not fit")
            else:
                await self.pacer.changed()
        return None

    def _prompt_tokens(self, request: Request) -> float:
        return request.characters * tokens_per_character(self._usage)

    def _most_cost(self, request: Request) -> float:
        """Returns what a request can cost, its prompt taken as dense as the densest one so far."""
        if self.price is None or self.limits.max_cost is None:
            return 0.0
        if self.writer.most_tokens is None:
            raise UserError(
                "--max-cost needs a limit on each answer: give max_tokens in the prompt's "
                "parameters or with --param max_tokens=N"
            )
        prompt = math.ceil(request.characters * self._densest)
        tokens = Usage(prompt=prompt, completion=self.writer.most_tokens)
        return self.price.cost(tokens) or 0.0

    async def _record(self, request: Request, attempt: Attempt) -> None:
        """Returns when the attempt is on the disk."""
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
                    if not future.done():  # its request was left at once
                        future.set_result(None)

    def _count(self, request: Request, reply: Reply, expected_prompt: float) -> None:
        self.state.kinds[reply.status] += 1
        if reply.prompt_tokens is not None:
            completion = reply.completion_tokens or 0
            density = reply.prompt_tokens / max(1, request.characters)
            self._densest = density if self._densest == MOST_DENSE else max(density, self._densest)
            self._usage += Usage(
                prompt=reply.prompt_tokens,
                cached=reply.cached_tokens or 0,
                completion=completion,
                characters=request.characters,
            )
            expected = expected_prompt + (self.writer.most_tokens or 0)
            self.pacer.used(reply.prompt_tokens + completion - expected)
        elif reply.is_silent:
            self._usage += Usage(
                silent=1,
                silent_characters=request.characters,
                silent_completion=self.writer.most_tokens or 0,
            )
        self._count_cost()

    def _count_cost(self) -> None:
        self.state.usage = self._usage
        self.state.cost = total_cost(self.price, self._usage, self._batch_usage)

    def _settle(self, *, answered: bool) -> None:
        self.state.done += 1
        self.state.asked += 1
        self.state.no_answer += not answered
        self._in_a_row = 0 if answered else self._in_a_row + 1

    def _pause(self, reply: Reply, seconds: float) -> None:
        is_longer = self.pacer.pause(seconds)
        if is_longer and seconds >= 1:
            until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + seconds))
            self.progress.say(
                f"the endpoint asks to wait {seconds:.0f} s, until {until} (HTTP {reply.code})"
            )

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.stop(str(error))

    @contextlib.contextmanager
    def _signals(self, tasks: Iterable[asyncio.Task[None]]) -> Iterator[None]:
        """Ends the run after what is in flight at Ctrl-C, SIGTERM or where the terminal is closed;
        at the second such signal at once.
        """
        loop = asyncio.get_running_loop()

        def end() -> None:
            if self.state.stopped is None:
                self.progress.say(
                    "interrupted: finishing what is in flight; once more leaves at once"
                )
                self.stop("interrupted")
                return
            self._error = self._error or KeyboardInterrupt()  # type: ignore[assignment]
            for task in list(tasks):
                task.cancel()

        caught = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            # Only the main thread may; in other ones nobody presses Ctrl-C.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, end)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)
