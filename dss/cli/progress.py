"""How long work shows itself: a bar on a terminal, lines elsewhere."""

import sys
import time

__all__ = ["Bar", "Lines", "display_for", "time_left"]


def time_left(seconds: float) -> str:
    """Returns a time for people to read.

    >>> time_left(250), time_left(40)
    ('4 min left', '40 s left')
    """
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h left"
    return f"{minutes:.0f} min left" if minutes >= 2 else f"{seconds:.0f} s left"


class Lines:
    """Prints a line every few seconds, and at the end."""

    def __init__(self, noun: str, total: int, every: float = 10.0):
        """Makes a display.

        Args:
          noun: what is counted, such as "step".
          total: how many there are.
          every: seconds between lines.
        """
        self.noun, self.total, self.every = noun, total, every
        self._printed = float("-inf")
        self._ended = False

    def show(self, done: int, text: str) -> None:
        """Shows how far it is."""
        is_end = done == self.total and not self._ended
        if is_end or time.monotonic() - self._printed >= self.every:
            self._printed, self._ended = time.monotonic(), done == self.total
            self.say(f"{self.noun} {done}/{self.total}  {text}")

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)

    def close(self) -> None:
        """Ends the display."""


class Bar(Lines):
    """A bar that is drawn again and again, and lines above it."""

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
        self._bar.console.print(line, highlight=False)

    def close(self) -> None:
        """See `Lines.close`."""
        self._bar.stop()


def display_for(noun: str, total: int) -> Lines:
    """Returns the display that suits standard output."""
    return (Bar if sys.stdout.isatty() else Lines)(noun, total)
