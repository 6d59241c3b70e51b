"""Times `dss serve` under many clients, against a naive handler of transformers and `dss predict`.

    python benchmarks/serve.py RUN INPUTS.jsonl [--clients 64] [--requests 2000] [--repeats 3]
        [--sides run int8 naive] [--json FILE]

RUN is a run of `dss train` with a closed set of labels; INPUTS has JSON lines with an `input`.
Sides: `run`, the run served by JAX; `int8`, its verified int8 export served by CTranslate2;
`naive`, its Hugging Face export in a FastAPI handler that generates for one request at a time.
Each side serves in its own process, and --clients clients send --requests requests of one input,
each client the next one when its last is answered. Sides take turns; the figures are medians over
--repeats: latency (p50, p95) and throughput. Memory is the server's resident memory before the
first and after the last turn. `dss predict` labels the same inputs as one file, timed without its
start: the rate that its progress shows.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np

NAIVE = """
import sys, fastapi, torch, uvicorn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, prefix, port = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
app = fastapi.FastAPI()

@app.post("/predict")
def predict(request: dict) -> dict:
    inputs = tokenizer([prefix + request["inputs"]], truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs)
    return {"predictions": [{"label": tokenizer.decode(output[0], skip_special_tokens=True)}]}

@app.get("/health")
def health() -> dict:
    return {}

uvicorn.run(app, port=int(port), log_level="warning")
"""
PREFIX = "predict: "
PORT = 8471


def dss(*args: str) -> list[str]:
    return [sys.executable, "-m", "dss", *args]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[subprocess.Popen]:
    """Starts a server and waits until it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"serve: {command[-1]} ended with status {process.returncode}")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def resident_mb(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def load(port: int, inputs: list[str], clients: int) -> tuple[list[float], float, list[str]]:
    """Returns the seconds of each request, the seconds of all, and the labels."""
    seconds, labels, pending = [0.0] * len(inputs), [""] * len(inputs), iter(range(len(inputs)))

    async def client(session: httpx2.AsyncClient) -> None:
        for i in pending:
            began = time.perf_counter()
            reply = await session.post("/predict", json={"inputs": inputs[i]})
            seconds[i] = time.perf_counter() - began
            reply.raise_for_status()
            labels[i] = reply.json()["predictions"][0]["label"]

    limits = httpx2.Limits(max_connections=clients)
    url = f"http://127.0.0.1:{port}"
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return seconds, time.perf_counter() - began, labels


def predict_rate(run: str, inputs: list[str], folder: Path) -> float:
    """Returns the predictions per second of `dss predict`, as its last progress line has them."""
    source = folder / "inputs.jsonl"
    source.write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
    output = f"--output={folder / 'labels.jsonl'}"
    done = subprocess.run(
        dss("predict", run, f"--input={source}", output, "--replace"),
        check=True,
        capture_output=True,
        text=True,
    )
    return float(re.findall(r"([\d.]+) predictions/s", done.stderr)[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument("inputs", type=Path, help="JSON lines with an input")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    sides = ("run", "int8", "naive")
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    lines = args.inputs.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["input"] for line in lines if line.strip()]
    inputs = [texts[i % len(texts)] for i in range(args.requests)]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        commands = {"run": dss("serve", args.run)}
        if "int8" in args.sides:
            form = ("--to=ctranslate2", "--quantization=int8")
            subprocess.run(dss("export", args.run, f"{folder}/int8", *form), check=True)
            commands["int8"] = dss("serve", f"{folder}/int8")
        if "naive" in args.sides:
            subprocess.run(dss("export", args.run, f"{folder}/hf", "--to=hf"), check=True)
            commands["naive"] = [sys.executable, "-c", NAIVE, f"{folder}/hf", PREFIX]
        servers = {}
        for number, side in enumerate(args.sides):
            port = PORT + number
            option = str(port) if side == "naive" else f"--port={port}"
            process = stack.enter_context(serving([*commands[side], option], port))
            servers[side] = (port, process, resident_mb(process))
        found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in args.sides}
        labels: dict[str, list[str]] = {}
        for _ in range(args.repeats):
            for side, (port, _, _) in servers.items():
                seconds, total, labels[side] = asyncio.run(load(port, inputs, args.clients))
                p50, p95 = np.quantile(seconds, (0.5, 0.95))
                found[side].append((float(p50), float(p95), len(inputs) / total))
        for side, (_, process, before) in servers.items():
            p50, p95, rate = (statistics.median(x) for x in zip(*found[side], strict=True))
            equal = np.mean(
                [a == b for a, b in zip(labels[side], labels[args.sides[0]], strict=True)]
            )
            rows[side] = {
                "p50_ms": round(1000 * p50, 1),
                "p95_ms": round(1000 * p95, 1),
                "requests_per_second": round(rate, 1),
                "equal_labels": round(float(equal), 4),
                "memory_mb": [round(before), round(resident_mb(process))],
            }
        predicted = predict_rate(args.run, inputs, folder)
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{len(inputs)} requests of {args.clients} clients, {args.repeats} turns; {where}")
    print(f"{'side':<8} {'p50 ms':>8} {'p95 ms':>8} {'req/s':>8} {'equal':>7}  memory MB")
    for side, row in rows.items():
        before, after = row["memory_mb"]
        print(
            f"{side:<8} {row['p50_ms']:>8} {row['p95_ms']:>8} {row['requests_per_second']:>8} "
            f"{row['equal_labels']:>7.1%}  {before} -> {after}"
        )
    print(f"dss predict: {predicted:.1f} inputs/s")
    if args.json is not None:
        args.json.write_text(json.dumps({"sides": rows, "predict": predicted}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
