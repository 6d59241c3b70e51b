"""Throughput, memory and restart time of `dss annotate` against an instant local endpoint.

    python benchmarks/annotate.py --examples 100000

Examples are CQA-like questions with the shipped prompt (ten exemplars, about 3,300 characters per
request). Prints requests per second, the peak memory of the annotating process, and the time of the
same command once everything is answered. Exit status 1 if a target is missed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"requests_per_second": 500.0, "peak_mb": 300.0, "restart_seconds": 5.0}
FEWEST = 100_000  # examples from which on the targets apply
DSS = "import sys; from dss.cli.main import main; sys.exit(main())"


def serve(url: multiprocessing.Queue, count) -> None:
    """Runs the endpoint; for a separate process."""
    from dss.testing import FakeEndpoint, chat_reply

    reply = chat_reply("A shelf holds books. So the answer is (a) shelf.", prompt_tokens=900)

    def answer(_):
        count.value += 1
        return reply

    with FakeEndpoint(answer, keep=False) as endpoint:
        url.put(endpoint.url)
        time.sleep(1e6)


def write_questions(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i in range(count):
            question = f"Where would you put book number {i} so that others find it again?"
            choices = "(a) shelf\n(b) river\n(c) oven\n(d) cloud\n(e) shoe"
            line = {"id": str(i), "input": f"{question}\nAnswer Choices:\n{choices}"}
            file.write(json.dumps(line | {"label": "shelf"}) + "\n")


def timed(command: list[str]) -> tuple[float, float]:
    """Runs a command that must succeed; returns its seconds and peak memory in MB."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"annotate failed: {' '.join(command)}")
    return time.monotonic() - began, usage.ru_maxrss / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=FEWEST, help="number of examples")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    url, count = context.Queue(), context.Value("q", 0)
    server = context.Process(target=serve, args=(url, count), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        write_questions(questions, args.examples)
        command = [sys.executable, "-c", DSS, "annotate", "--input", str(questions)]
        command += ["--prompt", "cqa", "--teacher", "fake", "--base-url", url.get()]
        seconds, peak = timed(command)
        restart, _ = min(timed(command) for _ in range(3))
        lines = sum(1 for _ in (Path(folder) / "questions.fake.jsonl").open())
        server.terminate()
    figures = {
        "examples": args.examples,
        "requests": count.value,
        "lines": lines,
        "requests_per_second": round(args.examples / seconds, 1),
        "peak_mb": round(peak, 1),
        "restart_seconds": round(restart, 2),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}",
    }
    for name, value in figures.items():
        print(f"{name:<20} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    missed = figures["requests_per_second"] < TARGETS["requests_per_second"]
    missed |= any(figures[name] > TARGETS[name] for name in ("peak_mb", "restart_seconds"))
    wrong = lines != args.examples or count.value != args.examples
    return int(wrong or (missed and args.examples >= FEWEST))


if __name__ == "__main__":
    sys.exit(main())
