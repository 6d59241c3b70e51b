"""Progress of training on the terminal."""

from dss.cli.progress import Lines
from dss.training.loop import Progress

__all__ = ["TrainProgress"]

SCORES = ("accuracy", "rouge_l", "macro_f1", "balanced_accuracy")  # shown where measured


class TrainProgress(Progress):
    """Shows the loss, the accuracy, the throughput and the time left."""

    def __init__(self, display: Lines, examples_per_step: int):
        self.display, self.examples_per_step = display, examples_per_step
        self.accuracy: str | None = None

    def say(self, line: str) -> None:
        """See `Progress.say`."""
        self.display.say(line)

    def update(self, step: int, values: dict[str, float]) -> None:
        """See `Progress.update`."""
        parts = [f"loss {values['train/loss']:.4f}"]
        parts += [self.accuracy] if self.accuracy else []
        if rate := values.get("examples_per_second"):
            parts += [f"{rate:.1f} examples/s"]
            parts += self.display.left(step, rate / self.examples_per_step)
        self.display.show(step, "  ".join(parts))

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """See `Progress.evaluated`."""
        shown = {name.removeprefix("valid/"): value for name, value in values.items()}
        scores = [f"{name} {shown[name]:.1%}" for name in SCORES if name in shown]
        self.accuracy = f"valid {'  '.join(scores)}"
        losses = "  ".join(f"{n} {v:.4f}" for n, v in shown.items() if n.endswith("loss"))
        self.display.say(f"step {step}/{self.display.total}  {self.accuracy}  valid {losses}")

    def finished(self, data_wait: float) -> None:
        """See `Progress.finished`."""
        self.display.say(f"waiting for batches: {data_wait:.1%} of step time")

    def close(self) -> None:
        """See `Progress.close`."""
        self.display.close()
