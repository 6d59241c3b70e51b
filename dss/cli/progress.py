"""Progress displays: a bar on a terminal, lines elsewhere."""

import sys
import time
from typing import TextIO

from dss.cli.messages import in_flags

__all__ = ["Bar", "Lines", "display_for", "time_left"]


def time_left(seconds: float) -> str:
    """Returns the time left as text.

    >>> time_left(250), time_left(40)
    ('4 min left', '40 s left')
    """
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h left"
    return f"{minutes:.0f} min left" if minutes >= 2 else f"{seconds:.0f} s left"


class Lines:
    """Prints a line every few seconds, and at the end."""

    def __init__(
        self,
        noun: str,
        total: int | None,
        every: float = 10.0,
        file: TextIO | None = None,
    ):
        """Makes a display.

        Args:
          noun: the thing counted, such as "step".
          total: the number of things; None if it is unknown.
          every: seconds between lines.
          file: the stream for the lines; None for standard output.
        """
        self.noun, self.total, self.every, self.file = noun, total, every, file
        self._printed = float("-inf")
        self._ended = False

    def show(self, done: int, text: str) -> None:
        """Shows the number of things done and a text, unless a line was printed recently."""
        is_end = done == self.total and not self._ended
        if is_end or time.monotonic() - self._printed >= self.every:
            self._printed, self._ended = time.monotonic(), done == self.total
            total = "" if self.total is None else f"/{self.total}"
            self.say(f"{self.noun} {done}{total}  {text}".rstrip())

    def left(self, done: int, rate: float) -> list[str]:
        """Returns the time left at a rate, in things per second; empty if the total is unknown."""
        return [] if self.total is None else [time_left((self.total - done) / rate)]

    def say(self, line: str) -> None:
        """Prints a line."""
        print(in_flags(line, {}), file=self.file, flush=True)

    def close(self) -> None:
        """Ends the display."""


class Bar(Lines):
    """A progress bar, with lines above it."""

    def __init__(self, noun: str, total: int):
        super().__init__(noun, total)
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn(noun + " {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("starting", total=total)
        self._bar.start()

    def show(self, done: int, text: str) -> None:
        """See `Lines.show`."""
        self._bar.update(self._task, completed=done, description=text)
        if done == self.total:
            self._bar.refresh()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(in_flags(line, {}), highlight=False)

    def close(self) -> None:
        """See `Lines.close`."""
        self._bar.stop()


def display_for(noun: str, total: int) -> Lines:
    """Returns a bar if standard output is a terminal, else lines."""
    return (Bar if sys.stdout.isatty() else Lines)(noun, total)
