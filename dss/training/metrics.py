"""Where a run's numbers go: JSON lines that a restart continues exactly, TensorBoard, and speed.

`metrics.jsonl` holds what the run computed, the same lines whether or not it was interrupted.
`speed.jsonl` holds what the clock said, which no restart can repeat.
"""

import json
import os
from pathlib import Path

from dss.training.processes import is_leader

__all__ = ["MetricsWriter", "read_metrics"]


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a metrics file; an unfinished last line is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _cut(path: Path, step: int) -> None:
    """Drops the lines after a step, all of them or none."""
    if not path.exists():
        return
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


class MetricsWriter:
    """Writes the metrics of a run that starts or continues after a step; the leader's alone.

    Args:
      folder: the run directory.
      step: the step that the run continues from; later lines, of a run that was killed, are cut.
    """

    def __init__(self, folder: Path, step: int):
        self._files = {}
        if not is_leader():
            return
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "speed"):
            path = folder / f"{name}.jsonl"
            _cut(path, step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of computed metrics; the same names on TensorBoard."""
        self._append("metrics", step, values)

    def write_speed(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of clock readings; the same names on TensorBoard."""
        self._append("speed", step, values)

    def _append(self, name: str, step: int, values: dict[str, float]) -> None:
        if not self._files:
            return
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")
        self._files[name].flush()
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._files:
            self._board.close()
