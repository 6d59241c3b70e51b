"""`dss eval`."""

import argparse
import json
from pathlib import Path

from dss.cli.options import add_run_options, open_run, prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_run_options(parser)
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy; writes the predictions into the run directory."""
    from dss.runs import evaluate
    from dss.training.processes import is_leader

    prepare_jax()
    found = open_run(args)
    result = evaluate(found, split=args.split, which=args.checkpoint)
    if not is_leader():
        return 0
    path = result.save(found.folder / "predictions")
    scored = result.scored
    name = scored.metric.replace("_", " ")
    line = f"{result.mixture} {result.split}, step {result.step}: {name} {scored.value:.2%}"
    if scored.interval:
        low, high = scored.interval
        right = int(sum(scored.verdicts))
        line += f" (95%: {low:.2%} to {high:.2%}; {right} of {len(scored.verdicts)})"
    print(line)
    print(f"predictions: {path}")
    if args.json:
        summary = {
            "mixture": result.mixture,
            "split": result.split,
            "step": result.step,
            "metric": scored.metric,
            "value": scored.value,
            "interval": scored.interval,
            "examples": len(scored.verdicts),
        }
        args.json.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    return 0
