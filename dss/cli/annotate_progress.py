"""Progress display of `dss annotate`."""

import time

from dss.cli.progress import Lines, time_left
from dss.teacher.annotate import Progress, State
from dss.teacher.pacing import Pacer
from dss.teacher.prices import Price
from dss.teacher.reply import FINAL

__all__ = ["AnnotateProgress"]


class AnnotateProgress(Progress):
    """Shows the rate, tokens, current and projected cost, failures by status, and time left."""

    def __init__(self, display: Lines, price: Price | None):
        self.display, self.price = display, price
        self._began = time.monotonic()

    def update(self, state: State, pacer: Pacer) -> None:
        """See `Progress.update`."""
        usage, seconds = state.usage, time.monotonic() - self._began
        rate = state.done_in_run / seconds if seconds else 0.0
        parts = [f"{rate:.1f}/s", f"{pacer.in_flight} in flight"]
        parts.append(f"{usage.prompt + usage.completion:,} tokens")
        if self.price is None or state.cost is None:
            parts.append("cost unknown")
        else:
            projected = state.projected_cost
            total = "" if projected is None else f" of about {self.price.text(projected)}"
            parts.append(self.price.text(state.cost) + total)
        failures = {s: count for s, count in state.status_counts.items() if s not in FINAL}
        parts += [f"{count} {status}" for status, count in sorted(failures.items())]
        if rate:
            parts.append(time_left((state.total - state.done) / rate))
        self.display.show(state.done, "  ".join(parts))

    def say(self, line: str) -> None:
        """See `Progress.say`."""
        self.display.say(line)

    def close(self) -> None:
        """See `Progress.close`."""
        self.display.close()
