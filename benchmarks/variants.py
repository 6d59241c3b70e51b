"""Compares the variants of gin/variants/ with plain step-by-step, paired by seed.

    python benchmarks/variants.py --task quickstart --folder DIR
    python benchmarks/variants.py --task noisy --folder DIR
    python benchmarks/variants.py --task cqa --folder DIR --data-root DATA --vocab FILE

Tasks: `quickstart`, synthetic, whose teacher is always right; `noisy`, the same with a teacher of
five samples that errs on hard questions, rambles or is silent, at the rates below, so that filters
have an effect; `cqa` and `svamp` with PaLM's rationales and a tiny student from scratch. Variants
without data in a task (several samples) are skipped.

A seed fixes subset, parameters and order for all variants. Accuracy is on test, of the best
validation checkpoint: mean over seeds, with a 95% bootstrap confidence interval over test examples.
The difference from the baseline is paired, with the same interval and Student's over seeds. A
variant helps or harms if neither interval contains 0. The label loss, nats per token, is the lowest
on validation; it is more informative where accuracy is at chance. Finished runs are in DIR/outcomes
and are not repeated.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dss.cli.options import prepare_jax
from dss.config.experiment import Experiment
from dss.config.gin_files import parse_gin
from dss.errors import DssError
from dss.evaluation.significance import paired_bootstrap
from dss.paths import gin_root
from dss.quickstart import METHODS, make_data, quickstart_experiment
from dss.runs.directory import load_run
from dss.runs.student import evaluate
from dss.runs.train import run_experiment
from dss.training.metrics import read_metrics

BASELINE = "baseline"
VARIANTS = sorted(path.stem for path in (gin_root() / "variants").glob("*.gin"))
NEED_SAMPLES = {"agreed_rationales", "several_rationales"}
NEED_ERRORS = {"right_rationales", "short_rationales"}  # of the teacher
SYNTHETIC, REAL = ("quickstart", "noisy"), ("cqa", "svamp")
TEACHER, SAMPLES = "noisy", 5
HARD, ERRS = 0.4, 0.6  # fraction of hard questions, and of wrong samples among theirs
RAMBLES, SILENT = 0.15, 0.05  # fractions of all samples
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _sample(rng: np.random.Generator, rationale: str, people: list[str], hard: bool) -> dict:
    """Returns a sample of the noisy teacher, made from a correct rationale."""
    words = rationale.split()
    a, b = int(words[4]), int(words[9])  # A lived in century a and B in century b . ...
    if hard and rng.random() < ERRS:
        a, b = b, a  # confuses the two people
    label, relation = ("yes", "is") if a < b else ("no", "is not")
    text = (
        f"{words[0]} lived in century {a} and {words[6]} in century {b} . {a} {relation} before {b}"
    )
    kind = rng.random()
    if kind < RAMBLES:
        text = " ".join(rng.choice(people, 60)) + " " + text
    elif kind < RAMBLES + SILENT:
        text = "is before"
    return {"rationale": text, "label": label, "status": "ok"}


def add_noisy_teacher(data: Path) -> None:
    """Writes the noisy teacher's outputs beside the examples, as `dss annotate --samples`."""
    rng = np.random.default_rng(1)
    for split in ("train", "valid"):
        right = [json.loads(line) for line in (data / f"{split}.rules.jsonl").open()]
        people = sorted({w for o in right for w in (o["rationale"].split()[i] for i in (0, 6))})
        lines = []
        for output in right:
            hard = rng.random() < HARD
            samples = [_sample(rng, output["rationale"], people, hard) for _ in range(SAMPLES)]
            labels = [sample["label"] for sample in samples]
            winner = max(dict.fromkeys(labels), key=labels.count)
            chosen = samples[labels.index(winner)]
            vote = labels.count(winner) / SAMPLES
            lines.append({"id": output["id"], **chosen, "vote": vote, "samples": samples})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (data / f"{split}.{TEACHER}.jsonl").write_text(text)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One student to train."""

    name: str
    experiment: Experiment
    outcome: Path


def _flags(args: argparse.Namespace) -> list[str]:
    return [
        f"DATA_ROOT={args.data_root}",
        f"VOCABULARY={args.vocab}",
        f"BATCH_SIZE={args.batch}",
        f"TRAIN_STEPS={args.steps}",
        f"EVAL_PERIOD={max(args.steps // 5, 1)}",
        "LEARNING_RATE=1e-3",
    ]


def _base(args: argparse.Namespace, seed: int) -> Experiment:
    if args.task in REAL:
        files = ["students/tiny.gin", f"datasets/{args.task}.gin", "methods/step_by_step.gin"]
        return parse_gin(files, [*_flags(args), f"RANDOM_SEED={seed}"])
    base = quickstart_experiment(args.folder, METHODS[2], args.examples, seed)
    assert base.student is not None
    # one_encoder_pass needs an id past the vocabulary; all variants have it.
    student = dataclasses.replace(base.student, vocab_size=base.student.vocab_size + 32)
    trainer = dataclasses.replace(base.trainer, train_steps=args.steps, eval_period=args.steps)
    teacher = TEACHER if args.task == "noisy" else base.teacher
    return dataclasses.replace(base, student=student, trainer=trainer, teacher=teacher)


def _changed(base: Experiment, variant: str) -> Experiment:
    """Returns an experiment with the settings of a variant's gin file."""
    if variant == BASELINE:
        return base
    plain, varied = parse_gin([]), parse_gin([f"variants/{variant}.gin"])
    once = varied.data.one_encoder_pass
    changes = {
        name: getattr(varied, name)
        for name in ("rationales", "alpha", "alpha_end")
        if getattr(varied, name) != getattr(plain, name)
    }
    data = dataclasses.replace(base.data, one_encoder_pass=once)
    return dataclasses.replace(base, data=data, **changes)


def trials(args: argparse.Namespace) -> Iterator[Trial]:
    without = NEED_SAMPLES if args.task != "noisy" else set()
    if args.task == "quickstart":
        without = without | NEED_ERRORS
    for seed in range(args.seeds):
        for variant in (BASELINE, *(v for v in args.variants if v not in without)):
            run = f"{args.task}-{variant}-{seed}"
            experiment = dataclasses.replace(
                _changed(_base(args, seed), variant), run_dir=str(args.folder / "runs" / run)
            )
            yield Trial(variant, experiment, args.folder / "outcomes" / f"{run}.json")


def train(trial: Trial) -> None:
    """Trains a student and writes its verdicts on test."""
    began = time.monotonic()
    result = run_experiment(trial.experiment)
    run = Path(str(trial.experiment.run_dir))
    measured = evaluate(load_run(run), split="test")
    losses = [line.get("valid/label_loss") for line in read_metrics(run / "metrics.jsonl")]
    outcome = {
        "seed": trial.experiment.seed,
        "steps": result.step,
        "checkpoint": measured.step,
        "seconds": round(time.monotonic() - began, 1),
        "label_loss": min(loss for loss in losses if loss is not None),
        "verdicts": measured.scored.verdicts,
    }
    trial.outcome.parent.mkdir(parents=True, exist_ok=True)
    partial = trial.outcome.with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    partial.replace(trial.outcome)
    shutil.rmtree(run)


def _over_seeds(differences: np.ndarray) -> list[float] | None:
    """Returns Student's 95% confidence interval of a mean; None if it is not tabulated."""
    n = len(differences)
    if n - 1 not in T975:
        return None
    half = T975[n - 1] * statistics.stdev(differences) / n**0.5
    return [differences.mean() - half, differences.mean() + half]


def summarize(verdicts: dict[str, np.ndarray], losses: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns accuracies, losses and differences.

    Args:
      verdicts: correctness, [seeds, test examples] by variant.
      losses: label losses on validation, [seeds] by variant.
    """
    base = verdicts[BASELINE]
    rows = {}
    for name, own in verdicts.items():
        mean = own.mean(axis=0)
        accuracy, low, high = paired_bootstrap(mean, np.zeros_like(mean))
        rows[name] = {
            "accuracy": accuracy,
            "interval": [low, high],
            "of_seeds": [*own.mean(1)],
            "label_loss": losses[name].mean(),
        }
        if name == BASELINE:
            continue
        difference, *over_examples = paired_bootstrap(mean, base.mean(axis=0))
        by_seed = own.mean(axis=1) - base.mean(axis=1)
        over_seeds = _over_seeds(by_seed)
        rows[name] |= {
            "difference": difference,
            "over_examples": over_examples,
            "over_seeds": over_seeds,
            "of_seeds_difference": [*by_seed],
            "label_loss_over_seeds": _over_seeds(losses[name] - losses[BASELINE]),
            "says": _verdict(over_examples, over_seeds),
        }
    return rows


def _verdict(*intervals: list[float] | None) -> str:
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return "one seed: undecided"
    if all(low > 0 for low, _ in known):
        return "helps"
    return "harms" if all(high < 0 for _, high in known) else "no difference shown"


def show(rows: dict[str, dict]) -> None:
    def points(pair: list[float] | None) -> str:
        return "" if pair is None else f"{100 * pair[0]:+.1f} to {100 * pair[1]:+.1f}"

    columns = (
        "variant",
        "loss",
        "difference",
        "accuracy",
        "95%",
        "difference",
        "examples",
        "seeds",
    )
    print("{:<20} {:>6} {:>16} {:>8} {:>14} {:>10} {:>16} {:>16}".format(*columns))
    for name, row in rows.items():
        low, high = row["interval"]
        loss = row.get("label_loss_over_seeds")
        loss_text = f"{loss[0]:+.3f} to {loss[1]:+.3f}" if loss else ""
        line = f"{name:<20} {row['label_loss']:>6.3f} {loss_text:>16}"
        line += f" {row['accuracy']:>8.1%} {f'{low:.1%} to {high:.1%}':>14}"
        if "difference" in row:
            line += f" {100 * row['difference']:>+10.1f} {points(row['over_examples']):>16}"
            line += f" {points(row['over_seeds']):>16}  {row['says']}"
        print(line)


def _take_a_core(cores: "multiprocessing.Queue[int]") -> None:
    prepare_jax()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})  # small students train fastest on one core


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--task",
        required=True,
        choices=(*SYNTHETIC, *REAL),
        help="data and teacher of the students",
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of data, runs and outcomes"
    )
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument(
        "--examples",
        type=int,
        default=500,
        help="training examples of a synthetic task, at most 1000",
    )
    parser.add_argument(
        "--steps", type=int, help="training steps (default: 400 synthetic, 1000 real)"
    )
    parser.add_argument("--batch", type=int, default=32, help="examples per step of a real task")
    parser.add_argument("--processes", type=int, default=1, help="students trained in parallel")
    parser.add_argument("--data-root", type=Path, help="the released datasets")
    parser.add_argument("--vocab", type=Path, help="SentencePiece model")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if args.task in REAL and (args.data_root is None or args.vocab is None):
        parser.error("give --data-root and --vocab")
    args.steps = args.steps or (400 if args.task in SYNTHETIC else 1000)
    args.folder = args.folder.absolute()
    if args.task in SYNTHETIC and not (args.folder / "timeline" / "train.noisy.jsonl").is_file():
        make_data(args.folder)
        add_noisy_teacher(args.folder / "timeline")
    todo = list(trials(args))
    missing = [trial for trial in todo if not trial.outcome.is_file()]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for i in range(args.processes):
        queue.put(cores[i % len(cores)])
    pool = concurrent.futures.ProcessPoolExecutor(
        args.processes, context, initializer=_take_a_core, initargs=(queue,)
    )
    try:
        waiting = {pool.submit(train, trial): trial for trial in missing}
        for i, done in enumerate(concurrent.futures.as_completed(waiting), start=1):
            done.result()
            print(f"[{i}/{len(missing)}] {waiting[done].outcome.stem}", flush=True)
    except DssError as error:
        print(f"variants: {error}", file=sys.stderr)
        return 2
    finally:
        pool.shutdown(cancel_futures=True)

    found: dict[str, list] = {}
    losses: dict[str, list] = {}
    seconds: dict[str, list] = {}
    for trial in todo:
        outcome = json.loads(trial.outcome.read_text())
        found.setdefault(trial.name, []).append(outcome["verdicts"])
        losses.setdefault(trial.name, []).append(outcome["label_loss"])
        seconds.setdefault(trial.name, []).append(outcome["seconds"])
    rows = summarize(*({name: np.array(v) for name, v in by.items()} for by in (found, losses)))
    show(rows)
    if args.json:
        result = {
            "task": args.task,
            "seeds": args.seeds,
            "steps": args.steps,
            "examples": args.examples if args.task in SYNTHETIC else None,
            "test_examples": len(found[BASELINE][0]),
            "rows": rows,
            "seconds": seconds,
            "machine": f"{os.cpu_count()} cores",
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
