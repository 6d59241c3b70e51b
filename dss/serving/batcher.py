"""Micro-batching: requests that arrive together are answered by one batch."""

import asyncio
import collections
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batcher", "BusyError"]

T = TypeVar("T")


class BusyError(Exception):
    """The queue is full."""


class Batcher(Generic[T]):
    """Answers texts in batches, in the order of their arrival, in a thread of its own.

    A batch starts when it is full, or `wait` seconds after its first text arrived, or as soon as
    the batch before it has ended if that took longer.
    """

    def __init__(
        self,
        run: Callable[[list[str]], Sequence[T]],
        *,
        size: int,
        wait: float,
        limit: int,
        observe: Callable[[int], None] = lambda _: None,
    ):
        """Makes a batcher.

        Args:
          run: function that answers a batch of texts.
          size: most texts of a batch.
          wait: seconds that the first text of a batch waits for others.
          limit: most texts in the queue.
          observe: called with the size of each batch.
        """
        self._run, self._size, self._wait, self._limit = run, size, wait, limit
        self._observe = observe
        self._queue: collections.deque[tuple[str, asyncio.Future[T]]] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of texts in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Starts to answer; in a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._answer())

    async def close(self) -> None:
        """Answers what is in the queue, and ends."""
        while self._queue:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, texts: Sequence[str]) -> list[T]:
        """Returns the answers of texts.

        Raises:
          BusyError: if the queue has no room for all of them.
        """
        if len(self._queue) + len(texts) > self._limit:
            raise BusyError
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[T]] = [loop.create_future() for _ in texts]
        self._queue.extend(zip(texts, futures, strict=True))
        self._arrived.set()
        try:
            return list(await asyncio.gather(*futures))
        finally:  # of a client that has gone, too
            for future in futures:
                future.cancel()

    async def _answer(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._queue) < self._size:
                await asyncio.sleep(self._wait)
            batch: list[tuple[str, asyncio.Future[T]]] = []
            while self._queue and len(batch) < self._size:
                item = self._queue.popleft()
                if not item[1].cancelled():
                    batch.append(item)
            if not self._queue:
                self._arrived.clear()
            if not batch:
                continue
            self._observe(len(batch))
            await self._answer_batch(batch)

    async def _answer_batch(self, batch: "list[tuple[str, asyncio.Future[T]]]") -> None:
        """Answers a batch; if it fails, each of its texts alone, so that only one fails."""
        loop, texts = asyncio.get_running_loop(), [text for text, _ in batch]
        try:
            answers = await loop.run_in_executor(self._thread, self._run, texts)
        except Exception as error:
            if len(batch) > 1:
                for item in batch:
                    await self._answer_batch([item])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
