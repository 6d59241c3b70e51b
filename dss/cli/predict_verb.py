"""`dss predict`."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from dss.cli.options import add_run_options, open_run, prepare_jax

__all__ = ["add_arguments", "run"]

CHUNK = 1024  # inputs read before their predictions are written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_run_options(parser)
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="JSON lines with an 'input', or - (default) for standard input: JSON or plain lines",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--rationale", action="store_true", help="write the rationale too")


def _read(source: str) -> Iterator[dict]:
    if source != "-":
        from dss.data.examples import read_examples

        for example in read_examples(Path(source), "input"):
            yield {"id": example.id, "input": example.input}
        return
    for number, line in enumerate(sys.stdin):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("input"), str):
            yield {"id": str(value.get("id", f"input-{number}")), "input": value["input"]}
        else:
            yield {"id": f"input-{number}", "input": line}


def run(args: argparse.Namespace) -> int:
    """Writes one JSON line an input: id, input, label and, if asked for, rationale."""
    import itertools

    from dss.data.tasks import get_mixture
    from dss.errors import UserError
    from dss.runs import explain, label, use_data

    prepare_jax()
    found = open_run(args)
    experiment = found.experiment
    if experiment.mixture is None:
        raise UserError(f"{found.folder}: no mixture; say with --mixture what the student predicts")
    use_data(experiment.data, must_exist=False)
    mixture = get_mixture(experiment.mixture, experiment.alpha)
    rows = _read(args.input)
    predictor, _ = found.predictor(args.checkpoint)
    length = experiment.data.inputs_length
    output = args.output.open("w", encoding="utf-8") if args.output else sys.stdout
    try:
        while chunk := list(itertools.islice(rows, CHUNK)):
            texts = [row["input"] for row in chunk]
            labels = label(predictor, mixture, texts, length)
            rationales = explain(predictor, mixture, texts, length) if args.rationale else None
            for i, row in enumerate(chunk):
                line = row | {"label": labels[i]}
                if rationales is not None:
                    line["rationale"] = rationales[i]
                print(json.dumps(line, ensure_ascii=False), file=output, flush=True)
    finally:
        if args.output:
            output.close()
    return 0
