"""How fast to ask: as many requests at once as the endpoint takes, within budgets per minute.

Concurrency grows by one with each reply until the endpoint first complains, is halved by a
complaint, and then grows by one a round: the additive increase and multiplicative decrease of
Chiu and Jain (1989), with TCP's slow start.
"""

import asyncio
import time

__all__ = ["Clock", "Pacer", "backoff"]

START = 4  # requests at once in the beginning
BURST_SECONDS = 1.0  # of a budget that may be spent at once
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0  # seconds


class Clock:
    """Tells the time and waits; the tests have a faster one."""

    def now(self) -> float:
        """Returns seconds that never run backwards."""
        return time.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Waits until an event, or for some seconds."""
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass


class Pacer:
    """Decides when the next request may be sent."""

    def __init__(
        self,
        most: int,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Clock | None = None,
    ):
        """Makes a pacer.

        Args:
          most: requests at once.
          requests_per_minute: None for no such budget.
          tokens_per_minute: of prompts and answers; None for no such budget.
          clock: another one for tests.
        """
        self.most, self.limit = most, float(min(START, most))
        self.in_flight = self._taken = 0
        self.clock = clock or Clock()
        self.stopped = asyncio.Event()
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._slow_start = True
        self._eased_at = float("-inf")
        self._paused_until = float("-inf")
        self._request_due = self._tokens_due = float("-inf")
        self._changed = asyncio.Event()

    async def enter(self) -> bool:
        """Waits for one of the `most` places; returns whether it was got, not stopped."""
        while self._taken >= self.most and not self.stopped.is_set():
            await self.changed()
        if self.stopped.is_set():
            return False
        self._taken += 1
        return True

    def leave(self) -> None:
        """Gives the place back."""
        self._taken -= 1
        self.wake()

    async def changed(self) -> None:
        """Waits until something may be possible that was not."""
        self._changed.clear()
        await self._changed.wait()

    def wake(self) -> None:
        """Ends the waits of `changed`."""
        self._changed.set()

    async def turn(self, tokens: float) -> float | None:
        """Waits until a request may be sent; `came_back` must follow.

        Args:
          tokens: that it will take, as far as is known.

        Returns:
          When it was let go, by the clock; None if the pacer was stopped.
        """
        while not self.stopped.is_set():
            now = self.clock.now()
            due = max(self._paused_until, self._request_due - BURST_SECONDS, self._tokens_due)
            if self.in_flight >= int(self.limit):
                await self.changed()
            elif due > now:
                await self.clock.wait(self.stopped, due - now)
            else:
                self._request_due = max(self._request_due, now) + self._request_seconds
                self._tokens_due = max(self._tokens_due, now) + tokens * self._token_seconds
                self.in_flight += 1
                return now
        return None

    def came_back(self) -> None:
        """Says that a request is not in flight any more."""
        self.in_flight -= 1
        self.wake()

    def used(self, tokens: float) -> None:
        """Corrects the tokens that `turn` was told by how many more there were (or fewer)."""
        self._tokens_due += tokens * self._token_seconds

    def went_well(self) -> None:
        """Lets one more in after a reply; after the first complaint one more a round."""
        self.limit = min(self.most, self.limit + (1 if self._slow_start else 1 / self.limit))
        self.wake()

    def complained(self, sent_at: float) -> None:
        """Halves the requests at once, once for all those that were sent before it was done."""
        self._slow_start = False
        if sent_at >= self._eased_at:
            self._eased_at = self.clock.now()
            self.limit = max(1.0, self.limit / 2)

    def pause(self, seconds: float) -> bool:
        """Sends nothing for some seconds; returns whether that is news of a second or more."""
        until = self.clock.now() + seconds
        is_longer = until >= self._paused_until + 1
        self._paused_until = max(self._paused_until, until)
        return is_longer

    def stop(self) -> None:
        """Ends all waiting."""
        self.stopped.set()
        self.wake()


def backoff(failures: int, share: float) -> float:
    """Returns the seconds to wait after a failure.

    Args:
      failures: so far, at least 1.
      share: a random number in [0, 1): the wait is spread over its upper half.
    """
    longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (failures - 1))
    return longest * (0.5 + share / 2)
