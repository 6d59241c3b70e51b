"""Batches form by arrival, are bounded, and survive errors and clients that go."""

import asyncio
import threading

import pytest

from dss.serving.batcher import Batcher, BusyError


class Gate:
    """A function that answers in upper case once it is opened, and records its batches."""

    def __init__(self, *, is_open: bool = True):
        self.batches: list[list[str]] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        if is_open:
            self.opened.set()

    def __call__(self, texts: list[str]) -> list[str]:
        self.batches.append(texts)
        self.entered.set()
        self.opened.wait(60)
        if "bad" in texts:
            raise ValueError("no answer")
        return [text.upper() for text in texts]


def run(scenario, gate, **options):
    async def main():
        batcher = Batcher(gate, **{"size": 4, "wait": 0.0, "limit": 8, **options})
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            gate.opened.set()
            await batcher.close()

    return asyncio.run(main())


def test_requests_that_arrive_together_are_one_batch_and_keep_their_order():
    gate = Gate()

    async def scenario(batcher):
        return await asyncio.gather(batcher.submit(["a", "b"]), batcher.submit(["c"]))

    assert run(scenario, gate, wait=0.05) == [["A", "B"], ["C"]]
    assert gate.batches == [["a", "b", "c"]]


def test_a_large_request_is_several_batches():
    gate = Gate()
    assert run(lambda b: b.submit(list("abcdefg")), gate) == list("ABCDEFG")
    assert gate.batches == [list("abcd"), list("efg")]


def test_what_the_queue_has_no_room_for_is_refused():
    gate = Gate(is_open=False)

    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.submit(["a"]))
        await asyncio.to_thread(gate.entered.wait, 60)
        others = asyncio.ensure_future(batcher.submit(list("bcdefghi")))
        await asyncio.sleep(0)
        assert batcher.waiting == 8
        with pytest.raises(BusyError):
            await batcher.submit(["j"])
        gate.opened.set()
        return await first + await others

    assert run(scenario, gate) == list("ABCDEFGHI")


def test_an_error_is_that_of_its_text_only():
    gate = Gate()

    async def scenario(batcher):
        bad = asyncio.ensure_future(batcher.submit(["bad"]))
        good = asyncio.ensure_future(batcher.submit(["good", "fine"]))
        with pytest.raises(ValueError, match="no answer"):
            await bad
        return await good

    assert run(scenario, gate, wait=0.05) == ["GOOD", "FINE"]
    assert gate.batches == [["bad", "good", "fine"], ["bad"], ["good"], ["fine"]]


def test_texts_of_a_client_that_has_gone_are_not_answered():
    gate = Gate(is_open=False)

    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.submit(["a"]))
        await asyncio.to_thread(gate.entered.wait, 60)
        gone = asyncio.ensure_future(batcher.submit(["b", "c"]))
        last = asyncio.ensure_future(batcher.submit(["d"]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        return await first, await last

    assert run(scenario, gate) == (["A"], ["D"])
    assert gate.batches == [["a"], ["d"]]
