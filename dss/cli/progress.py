"""How training shows itself: a bar on a terminal, lines elsewhere."""

import sys
import time

from dss.training.trainer import Progress

__all__ = ["BarProgress", "LineProgress", "progress_for"]


def _left(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h left"
    return f"{minutes:.0f} min left" if minutes >= 2 else f"{seconds:.0f} s left"


class LineProgress(Progress):
    """Prints a line at an evaluation, and every few seconds."""

    def __init__(self, total: int, examples_per_step: int, every: float = 10.0):
        self.total, self.examples_per_step, self.every = total, examples_per_step, every
        self.printed = 0.0
        self.accuracy: str | None = None

    def text(self, step: int, values: dict[str, float]) -> str:
        """Returns what is worth saying of a step."""
        rate = values["examples_per_second"]
        parts = [f"loss {values['train/loss']:.4f}"]
        parts += [self.accuracy] if self.accuracy else []
        left = (self.total - step) * self.examples_per_step / rate
        return "  ".join([*parts, f"{rate:.1f} examples/s", _left(left)])

    def update(self, step: int, values: dict[str, float]) -> None:
        """See `Progress.update`."""
        if time.monotonic() - self.printed >= self.every or step == self.total:
            self.printed = time.monotonic()
            print(f"step {step}/{self.total}  {self.text(step, values)}", flush=True)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """See `Progress.evaluated`."""
        shown = {name.removeprefix("valid/"): value for name, value in values.items()}
        score = next(name for name in ("accuracy", "rouge_l") if name in shown)
        self.accuracy = f"valid {score} {shown[score]:.1%}"
        losses = "  ".join(f"{n} {v:.4f}" for n, v in shown.items() if n.endswith("loss"))
        self.say(f"step {step}/{self.total}  {self.accuracy}  valid {losses}")

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)


class BarProgress(LineProgress):
    """A bar with the loss, the accuracy, examples a second and the time left."""

    def __init__(self, total: int, examples_per_step: int):
        super().__init__(total, examples_per_step)
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
        )
        self.task = self.bar.add_task("compiling", total=total)
        self.bar.start()

    def update(self, step: int, values: dict[str, float]) -> None:
        """See `Progress.update`."""
        self.bar.update(self.task, completed=step, description=self.text(step, values))
        if step == self.total:
            self.bar.refresh()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.bar.console.print(line, highlight=False)

    def close(self) -> None:
        """See `Progress.close`."""
        self.bar.stop()


def progress_for(total: int, examples_per_step: int) -> LineProgress:
    """Returns the progress display that suits standard output."""
    kind = BarProgress if sys.stdout.isatty() else LineProgress
    return kind(total, examples_per_step)
