"""Compares the parse of the released data with the reference's, row by row.

    python benchmarks/parse_released.py --data-root DIR --expected released_teacher_outputs.json

Prints one row per split. Exit status 1 on any difference.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from dss.data.datasets import Dataset
from dss.errors import DssError

TEACHER = "palm"


def sha256(texts: list) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def measure(name: str, split: str, root: Path | None) -> dict:
    """Returns the recorded quantities of a split, computed from the parse of dss."""
    dataset = Dataset.released(name, root)
    examples = dataset.source.examples(split)
    outputs = dataset.source.outputs(split, TEACHER)
    labels = [o.label or "" for o in outputs]
    rationales = [o.rationale for o in outputs]
    right = [
        dataset.labels.is_right(label, e.label or "")
        for label, e in zip(labels, examples, strict=True)
    ]
    return {
        "examples": len(examples),
        "teacher_outputs": len(outputs),
        "unparsed_labels": sum(not label.strip() for label in labels),
        "empty_rationales": sum(not rationale.strip() for rationale in rationales),
        "teacher_accuracy": sum(right) / len(right),
        "sha256_inputs": sha256([e.input for e in examples]),
        "sha256_gold": sha256([e.label for e in examples]),
        "sha256_teacher_labels": sha256(labels),
        "sha256_rationales": sha256(rationales),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="the released datasets")
    parser.add_argument(
        "--expected", type=Path, required=True, help="JSON of the reference's parse"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    rows = []
    try:
        expected = json.loads(args.expected.read_text())
        for key, wanted in expected.items():
            got = measure(*key.split("/"), args.data_root)
            rows.append({"split": key, "differs": [k for k in got if got[k] != wanted[k]], **got})
    except (DssError, OSError, ValueError) as error:
        print(f"parse_released: {error}", file=sys.stderr)
        return 2
    print(f"{'split':<12} {'rows':>6} {'no label':>9} {'no rationale':>13} {'accuracy':>9}")
    for row in rows:
        verdict = "differs: " + ", ".join(row["differs"]) if row["differs"] else "ok"
        print(
            f"{row['split']:<12} {row['examples']:>6} {row['unparsed_labels']:>9} "
            f"{row['empty_rationales']:>13} {row['teacher_accuracy']:>9.2%}  {verdict}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["differs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
