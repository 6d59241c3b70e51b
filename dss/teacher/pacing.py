"""Pacing of requests: adaptive concurrency, within budgets per minute.

Concurrency grows by one with each successful reply until the endpoint is first overloaded, is
halved by each overload, and then grows by one per round of requests: the additive increase and
multiplicative decrease of Chiu and Jain (1989), with TCP's slow start.
"""

import asyncio
import time

__all__ = ["Clock", "Pacer", "backoff"]

START = 4  # initial concurrency
BURST_SECONDS = 1.0  # seconds' worth of the request budget that may be used at once
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0  # seconds


class Clock:
    """A monotonic clock; tests replace it with one that does not wait."""

    def now(self) -> float:
        """Returns the monotonic time in seconds."""
        return time.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Waits for an event, at most for some seconds."""
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass


class Pacer:
    """Decides when the next request may be sent."""

    def __init__(
        self,
        max_concurrency: int,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Clock | None = None,
    ):
        """Makes a pacer.

        Args:
          max_concurrency: maximum requests in flight.
          requests_per_minute: request budget; None for unlimited.
          tokens_per_minute: budget of prompt and completion tokens; None for unlimited.
          clock: replacement clock for tests.
        """
        self.max_concurrency = max_concurrency
        self.limit = float(min(START, max_concurrency))
        self.in_flight = self._used_slots = 0
        self.clock = clock or Clock()
        self.stopped = asyncio.Event()
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._slow_start = True
        self._halved_at = float("-inf")
        self._paused_until = float("-inf")
        self._request_due = self._tokens_due = float("-inf")
        self._changed = asyncio.Event()

    async def acquire_slot(self) -> bool:
        """Waits for one of `max_concurrency` slots; returns False if the pacer is stopped."""
        while self._used_slots >= self.max_concurrency and not self.stopped.is_set():
            await self.wait_for_change()
        if self.stopped.is_set():
            return False
        self._used_slots += 1
        return True

    def release_slot(self) -> None:
        """Releases a slot."""
        self._used_slots -= 1
        self.notify()

    async def wait_for_change(self) -> None:
        """Waits for the next call of `notify`."""
        self._changed.clear()
        await self._changed.wait()

    def notify(self) -> None:
        """Wakes all tasks in `wait_for_change`."""
        self._changed.set()

    async def wait_to_send(self, tokens: float) -> float | None:
        """Waits until a request may be sent; a call of `mark_returned` must follow.

        Args:
          tokens: expected tokens of the request and its reply.

        Returns:
          Time on the clock at which the request may be sent; None if the pacer is stopped.
        """
        while not self.stopped.is_set():
            now = self.clock.now()
            due = max(self._paused_until, self._request_due - BURST_SECONDS, self._tokens_due)
            if self.in_flight >= int(self.limit):
                await self.wait_for_change()
            elif due > now:
                await self.clock.wait(self.stopped, due - now)
            else:
                self._request_due = max(self._request_due, now) + self._request_seconds
                self._tokens_due = max(self._tokens_due, now) + tokens * self._token_seconds
                self.in_flight += 1
                return now
        return None

    def mark_returned(self) -> None:
        """Removes a request from those in flight."""
        self.in_flight -= 1
        self.notify()

    def correct_tokens(self, difference: float) -> None:
        """Charges the token budget with a request's actual minus its expected tokens."""
        self._tokens_due += difference * self._token_seconds

    def record_success(self) -> None:
        """Raises the concurrency limit by one; after the first overload, by one per round."""
        increase = 1 if self._slow_start else 1 / self.limit
        self.limit = min(self.max_concurrency, self.limit + increase)
        self.notify()

    def record_overload(self, sent_at: float) -> None:
        """Halves the concurrency limit, unless the request was sent before the last halving."""
        self._slow_start = False
        if sent_at >= self._halved_at:
            self._halved_at = self.clock.now()
            self.limit = max(1.0, self.limit / 2)

    def pause(self, seconds: float) -> bool:
        """Stops sending for some seconds.

        Returns:
          Whether this extends the current pause by a second or more.
        """
        until = self.clock.now() + seconds
        is_longer = until >= self._paused_until + 1
        self._paused_until = max(self._paused_until, until)
        return is_longer

    def stop(self) -> None:
        """Stops the pacer and ends all waits."""
        self.stopped.set()
        self.notify()


def backoff(failures: int, jitter: float) -> float:
    """Returns the seconds to wait after a failure: exponential backoff with jitter.

    Args:
      failures: number of failures so far, at least 1.
      jitter: random number in [0, 1), which scales the wait from 50% to 100%.
    """
    longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (failures - 1))
    return longest * (0.5 + jitter / 2)
