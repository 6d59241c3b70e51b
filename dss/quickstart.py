"""A demonstration on synthetic data where rationales carry knowledge that labels do not.

Each invented person has an unstated century. A question asks which of two people lived first: its
label, yes or no, carries one bit about them, and its rationale carries both centuries. Test
questions are about pairs that are not in the training set. The data are chosen to show how the
method works, not how much it gains on other tasks.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from dss.batches.store import TokenStore
from dss.config.experiment import DataConfig, Experiment
from dss.mixtures.methods import Method
from dss.paths import PREDICTIONS
from dss.runs.data import training_store
from dss.runs.directory import load_run
from dss.runs.student import evaluate
from dss.runs.train import run_experiment
from dss.student.config import T5Config
from dss.training.config import OptimizerConfig, TrainerConfig

__all__ = [
    "METHODS",
    "Outcome",
    "Student",
    "draw",
    "make_data",
    "quickstart_experiment",
    "run_quickstart",
    "summarize",
]

DATASET, TEACHER = "timeline", "rules"
NAMES, CENTURIES = 60, 12
TRAIN, VALID, TEST = 1000, 100, 400
STEPS, BATCH = 400, 32
MAX_PROCESSES = 8  # each needs about 1 GB of memory
METHODS = ("finetune", "finetune, same compute", "step by step")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one trained student."""

    method: str
    examples: int  # labelled training examples
    seed: int
    steps: int
    accuracy: float  # on the test pairs, in [0, 1]


def _people(rng: np.random.Generator) -> dict[str, int]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names: dict[str, int] = {}
    while len(names) < NAMES:
        name = "".join(rng.choice(syllables, 2)) + str(rng.choice(list("bnrs")))
        names.setdefault(name, int(rng.integers(1, CENTURIES + 1)))
    return names


def _question(people: dict[str, int], first: str, second: str) -> tuple[str, str, str]:
    a, b = people[first], people[second]
    label, relation = ("yes", "is") if a < b else ("no", "is not")
    rationale = (
        f"{first} lived in century {a} and {second} in century {b} . {a} {relation} before {b}"
    )
    return f"did {first} live before {second} ?", label, rationale


def make_data(folder: Path, seed: int = 0) -> None:
    """Writes the examples, the outputs of the rule-based teacher, and a vocabulary of their words.

    Args:
      folder: the folder for `timeline/` and `vocabulary.model`.
      seed: the seed of the people and the questions.
    """
    rng = np.random.default_rng(seed)
    people = _people(rng)
    pairs = [(a, b) for a in people for b in people if people[a] != people[b] and a < b]
    rng.shuffle(pairs)
    splits = {"train": TRAIN, "valid": VALID, "test": TEST}
    data = folder / DATASET
    data.mkdir(parents=True, exist_ok=True)
    words = []
    for split, count in splits.items():
        lines, outputs = [], []
        for i in range(count):
            pair = pairs.pop()  # each pair has one question, in one split
            text, label, rationale = _question(people, *rng.permutation(pair))
            lines.append({"id": f"{split}-{i}", "input": text, "label": label})
            outputs.append(
                {"id": f"{split}-{i}", "rationale": rationale, "label": label, "raw": rationale}
            )
            words += [f"predict: explain: {text}", label, rationale]
        for name, rows in ((split, lines), (f"{split}.{TEACHER}", outputs)):
            content = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{name}.jsonl").write_text(content, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "vocabulary"),
        model_type="word",
        vocab_size=4096,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )


@dataclasses.dataclass(frozen=True)
class Student:
    """A student to train, with its experiment."""

    method: str
    examples: int  # labelled training examples
    seed: int
    experiment: Experiment


def quickstart_experiment(
    folder: Path, method: str, examples: int, seed: int, steps: int = STEPS
) -> Experiment:
    """Returns the experiment of a student.

    Args:
      folder: the folder with the data, from `make_data`.
      method: one of `METHODS`.
      examples: the number of training examples.
      seed: the seed of parameters, order, subsample and dropout.
      steps: the number of training steps.
    """
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "vocabulary.model"))
    run = f"{method.replace(', ', '-').replace(' ', '-')}-{examples}-{seed}"
    fraction = min(1.0, (examples + 0.5) / TRAIN)  # so that rounding loses no example
    return Experiment(
        method=Method.STEP_BY_STEP if method == METHODS[2] else Method.FINETUNE,
        teacher=TEACHER if method == METHODS[2] else None,
        run_dir=str(folder / "runs" / run),
        student=T5Config(
            vocab_size=-(-vocabulary.get_piece_size() // 32) * 32,
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
        ),
        vocabulary=str(folder / "vocabulary.model"),
        dropout_rate=0.1,
        alpha=0.3,
        batch_size=BATCH,
        seed=seed,
        data=DataConfig(
            dataset_path=str(folder / DATASET), labels=("yes", "no"), fraction=fraction
        ),
        # Without weight decay, finetuning stays at chance level even with 1000 examples.
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant", weight_decay=1.0),
        trainer=TrainerConfig(train_steps=steps, eval_period=steps, log_period=50),
    )


def _compute_ratio(store: TokenStore) -> float:
    """Returns the cost of a step relative to finetuning: the tokens of both tasks over those of
    the label task.
    """
    tokens = [int(t.inputs.offsets[-1] + t.targets.offsets[-1]) for t in store.tasks]
    return sum(tokens) / tokens[0]


def _students(folder: Path, sizes: Sequence[int], seeds: int) -> list[Student]:
    out = []
    for size in sizes:
        for seed in range(seeds):
            pair = quickstart_experiment(folder, METHODS[2], size, seed, STEPS)
            same_compute = round(STEPS * _compute_ratio(training_store(pair)))
            steps = dict(zip(METHODS, (STEPS, same_compute, STEPS), strict=True))
            out += [
                Student(m, size, seed, quickstart_experiment(folder, m, size, seed, steps[m]))
                for m in METHODS
            ]
    return out


def _train(student: Student) -> Outcome:
    """Trains and evaluates a student, in a worker process."""
    experiment = student.experiment
    result = run_experiment(experiment)
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    assert experiment.run_dir is not None
    run = load_run(experiment.run_dir)
    evaluation = evaluate(run, split="test", checkpoint="latest")
    evaluation.save(run.folder / PREDICTIONS)  # for `dss report`
    accuracy = evaluation.scored.value
    return Outcome(student.method, student.examples, student.seed, result.step, accuracy)


def _init_worker(cores: "multiprocessing.Queue[int]", prepare: Callable[[], None]) -> None:
    """Pins a worker process to one core, on which students of this size train fastest."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    prepare()


def run_quickstart(
    folder: Path,
    *,
    sizes: Sequence[int] = (250, 500, 1000),
    seeds: int = 3,
    say: Callable[[str], None] = print,
    prepare: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Trains and evaluates a student for every method, size and seed; finished runs are not
    repeated.

    Args:
      folder: the folder for data, runs and results.
      sizes: the numbers of training examples, at most 1000; smaller sets are subsets of larger
        ones.
      seeds: the number of seeds.
      say: a function that prints a message for every trained student.
      prepare: a module-level function that each worker process calls at its start.
    """
    if not (folder / "vocabulary.model").is_file():
        make_data(folder)
    students = _students(folder, sizes, seeds)
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    cores = cores[: min(len(students), MAX_PROCESSES)]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for core in cores:
        queue.put(core)
    outcomes: list[Outcome] = []
    pool = concurrent.futures.ProcessPoolExecutor(
        len(cores), context, initializer=_init_worker, initargs=(queue, prepare)
    )
    try:
        for done in concurrent.futures.as_completed([pool.submit(_train, s) for s in students]):
            outcome = done.result()
            outcomes.append(outcome)
            say(
                f"[{len(outcomes)}/{len(students)}] {outcome.examples} examples, "
                f"seed {outcome.seed}, {outcome.method}, {outcome.steps} steps: "
                f"{outcome.accuracy:.1%}"
            )
    finally:
        pool.shutdown(cancel_futures=True)
    outcomes.sort(key=lambda o: (o.examples, o.seed, METHODS.index(o.method)))
    text = json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    return outcomes


def summarize(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], tuple[float, float]]:
    """Returns the mean and standard deviation of accuracy over seeds, by method and number of
    examples.
    """
    groups: dict[tuple[str, int], list[float]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.method, outcome.examples), []).append(outcome.accuracy)
    return {
        k: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0)
        for k, v in groups.items()
    }


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Saves a figure of accuracy by number of examples, one line per method, with each seed as a
    point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    sizes = sorted({o.examples for o in outcomes})
    summary = summarize(outcomes)
    styles = (("o", ":", "#767676"), ("s", "--", "#4477aa"), ("^", "-", "#cc3311"))
    for method, (marker, line, colour) in zip(METHODS, styles, strict=True):
        means = [100 * summary[method, size][0] for size in sizes]
        axes.plot(sizes, means, line, color=colour, marker=marker, label=method)
        points = [o for o in outcomes if o.method == method]
        axes.scatter(
            [o.examples for o in points],
            [100 * o.accuracy for o in points],
            color=colour,
            s=12,
            alpha=0.5,
        )
    axes.axhline(50, color="black", linewidth=0.8)
    axes.annotate(
        "chance", (sizes[-1], 50), xytext=(0, -4), textcoords="offset points", ha="right", va="top"
    )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("labelled training examples")
    axes.set_ylabel("accuracy on unseen pairs, %")
    axes.set_title("Synthetic timeline task: mean over seeds")
    figure.legend(loc="outside lower center", ncols=len(METHODS), frameon=False)
    axes.set_ylim(40, 102)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
    pyplot.close(figure)
