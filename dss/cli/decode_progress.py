"""How decoding shows itself."""

import sys
import time
from collections.abc import Hashable

from dss.cli.progress import Lines
from dss.evaluation.evaluator import DecodingProgress

__all__ = ["DecodeProgress"]


class DecodeProgress(DecodingProgress):
    """Shows answers a second and the time left, on standard error: standard output is for results.

    Batches that compile are left out of the rate.
    """

    def __init__(self) -> None:
        self._shapes: set[Hashable] = set()
        self._done = self._counted = 0
        self._seconds = 0.0

    def expect(self, total: int | None) -> None:
        """See `DecodingProgress.expect`."""
        self._display = Lines("answer", total, file=sys.stderr)
        self._display.say("reading the student")

    def began(self, shape: Hashable) -> None:
        """See `DecodingProgress.began`."""
        if not self._shapes:
            self._display.say("compiling")
        self._compiles = shape not in self._shapes
        self._shapes.add(shape)
        self._began = time.monotonic()

    def ended(self, count: int) -> None:
        """See `DecodingProgress.ended`."""
        self._done += count
        parts = []
        if not self._compiles:
            self._counted += count
            self._seconds += time.monotonic() - self._began
        if self._counted:
            rate = self._counted / self._seconds
            parts = [f"{rate:.1f} answers/s", *self._display.left(self._done, rate)]
        self._display.show(self._done, "  ".join(parts))
