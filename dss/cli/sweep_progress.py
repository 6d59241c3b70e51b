"""Progress of a sweep on the terminal."""

from pathlib import Path

from dss.cli.progress import time_left
from dss.sweeps.runner import Outcome, SweepProgress
from dss.sweeps.sweep import SweepRun

__all__ = ["SweepLines"]


class SweepLines(SweepProgress):
    """Prints a line at the start and at the end of each run, with the time left."""

    def __init__(self, total: int):
        """Creates a display for `total` runs."""
        self.total = total

    def began(self, done: int) -> None:
        """See `SweepProgress.began`."""
        print(f"{self.total} runs, {done} of them already done", flush=True)

    def started(self, number: int, run: SweepRun, log: Path) -> None:
        """See `SweepProgress.started`."""
        print(f"[{number}/{self.total}] {run.name}: started; log: {log}", flush=True)

    def waiting(self, run: SweepRun) -> None:
        """See `SweepProgress.waiting`."""
        print(f"{run.name}: waiting for another process that executes it", flush=True)

    def ended(self, number: int, outcome: Outcome, seconds: float, left: float | None) -> None:
        """See `SweepProgress.ended`."""
        times = [f"{seconds / 60:.1f} min"] + ([time_left(left)] if left else [])
        text = f"[{number}/{self.total}] {outcome.run.name}: {_describe(outcome)}"
        print(f"{text}; {', '.join(times)}", flush=True)


def _describe(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return f"FAILED: {outcome.error}"
    summary = outcome.summary
    text = f"{summary['metric'].replace('_', ' ')} {summary['value']:.2%}"
    if summary["interval"]:
        low, high = summary["interval"]
        text += f" (95% CI: {low:.2%} to {high:.2%})"
    return text
