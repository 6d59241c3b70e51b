"""Progress display of decoding."""

import sys
import time
from collections.abc import Hashable

from dss.cli.progress import Lines
from dss.evaluation.evaluator import DecodingProgress

__all__ = ["DecodeProgress"]


class DecodeProgress(DecodingProgress):
    """Prints predictions per second and the time left on standard error.

    Batches that include compilation do not count towards the rate.
    """

    def __init__(self) -> None:
        self._shapes: set[Hashable] = set()
        self._done = self._counted = 0
        self._seconds = 0.0

    def expect(self, total: int | None) -> None:
        """See `DecodingProgress.expect`."""
        self._display = Lines("prediction", total, file=sys.stderr)
        self._display.say("loading the student")

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
            parts = [f"{rate:.1f} predictions/s", *self._display.left(self._done, rate)]
        self._display.show(self._done, "  ".join(parts))
