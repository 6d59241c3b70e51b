"""Packing density, number of shapes and throughput of packing the released data as in training.

    python benchmarks/packing.py --data-root DIR --vocab FILE [--batch 64] [--groups 1]
        [--steps 200] [--packed N] [--json FILE]

Training files of CQA and SVAMP, validation files of ANLI-R1 and e-SNLI. One process, one thread,
tokens in memory. Exit status 1 if a batch differs from its examples.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np

from dss.batches.batch import Batch
from dss.batches.batches import Batches
from dss.batches.order import paired_order
from dss.batches.store import TokenStore, open_store
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import Method, make_mixture

SPLITS = {"cqa": "train", "svamp": "train", "esnli": "valid", "anli1": "valid"}


def sequences(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the inputs and targets of every segment, sorted."""
    out = []
    for inputs, input_segments, targets, target_segments in zip(
        batch.encoder_input_tokens,
        batch.encoder_segment_ids,
        batch.decoder_target_tokens,
        batch.decoder_segment_ids,
        strict=True,
    ):
        for segment in range(1, input_segments.max() + 1):
            pair = inputs[input_segments == segment], targets[target_segments == segment]
            out.append(tuple(tuple(side.tolist()) for side in pair))
    return sorted(out)


def wanted(store: TokenStore, batches: Batches, step: int) -> list:
    """Returns the expected result of `sequences`, read from the store."""
    tasks, rows, _ = batches.order(step)
    out = []
    for task, row in zip(tasks, rows, strict=True):
        sides = (store.tasks[task].inputs, store.tasks[task].targets)
        spans = [slice(side.offsets[row], side.offsets[row] + side.lengths[row]) for side in sides]
        pair = (side.tokens[span].tolist() for side, span in zip(sides, spans, strict=True))
        out.append(tuple(map(tuple, pair)))
    return sorted(out)


def measure(store: TokenStore, args: argparse.Namespace) -> dict:
    began = time.perf_counter()
    order = paired_order(store, args.batch, seed=0)
    batches = Batches(store, order, num_steps=args.steps, groups=args.groups)
    chosen = time.perf_counter()
    steps = np.linspace(0, args.steps - 1, min(args.steps, args.packed), dtype=int).tolist()
    made = [batches[step] for step in steps]
    packed = time.perf_counter()
    tokens = sum(
        int(np.count_nonzero(ids))
        for batch in made
        for ids in (batch.encoder_segment_ids, batch.decoder_segment_ids)
    )
    encoder, decoder = np.mean([batch.fill for batch in made], axis=0)
    exact = all(
        sequences(batch) == wanted(store, batches, step)
        for step, batch in zip(steps, made, strict=True)
    )
    return {
        "fill": [round(float(encoder), 4), round(float(decoder), 4)],
        "shapes": [dataclasses.asdict(shape) for shape in batches.shapes],
        "choosing_seconds": round(chosen - began, 3),
        "tokens_per_second": round(tokens / (packed - chosen)),
        "exact": exact,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="the released datasets")
    parser.add_argument("--vocab", type=Path, required=True, help="SentencePiece model")
    parser.add_argument("--batch", type=int, default=64, help="examples per step")
    parser.add_argument("--groups", type=int, default=1, help="data shards x microbatches")
    parser.add_argument("--steps", type=int, default=200, help="number of steps of the run")
    parser.add_argument("--packed", type=int, default=200, help="steps to pack, spread over them")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    result: dict = {
        "batch": args.batch,
        "groups": args.groups,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "datasets": {},
    }
    try:
        vocabulary = load_vocabulary(str(args.vocab))
        for name, split in SPLITS.items():
            mixture = make_mixture(
                Dataset.released(name, args.data_root), Method.STEP_BY_STEP, "palm"
            )
            store = open_store(mixture, split, vocabulary, inputs_length=1024, targets_length=256)
            result["datasets"][name] = measure(store, args)
    except DssError as error:
        print(f"packing: {error}", file=sys.stderr)
        return 2
    print(f"{'':<12} {'fill':>12} {'shapes':>6} {'chosen in':>9} {'M tokens/s':>10} {'exact':>6}")
    for name, row in result["datasets"].items():
        filled = " ".join(f"{part:.1%}" for part in row["fill"])
        rate = row["tokens_per_second"] / 1e6
        exact = "yes" if row["exact"] else "NO"
        shapes, seconds = len(row["shapes"]), row["choosing_seconds"]
        print(f"{name:<12} {filled:>12} {shapes:>6} {seconds:>8.1f}s {rate:>10.2f} {exact:>6}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0 if all(row["exact"] for row in result["datasets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
