"""`dss inspect`."""

import argparse
import contextlib
import dataclasses
from typing import TYPE_CHECKING

from dss.cli.checks import check_flags
from dss.cli.options import add_gin_options, gin_folders
from dss.cli.tables import make_console, make_table
from dss.errors import DssError

if TYPE_CHECKING:
    from rich.console import Console

    from dss.config.experiment import Experiment
    from dss.data.vocabulary import Vocabulary
    from dss.mixtures.ledger import Ledger
    from dss.mixtures.methods import Mixture
    from dss.mixtures.tasks import Task, TaskRows

__all__ = ["add_arguments", "run"]

FILL_STEPS = 8  # batches whose packing density is averaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "mixture",
        nargs="?",
        metavar="MIXTURE",
        help="the name of a mixture; without it, all names are listed, or those of DATASET_PATH",
    )
    add_gin_options(parser)
    parser.add_argument(
        "--examples",
        type=int,
        default=2,
        metavar="N",
        help="the number of examples to show for each task (default: 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the contents of a mixture, or lists the mixtures."""
    search = gin_folders(args)
    check_flags(args.gin)

    from dss.config.data import open_dataset, open_datasets, open_mixture
    from dss.config.gin_files import parse_gin
    from dss.data.vocabulary import load_vocabulary
    from dss.mixtures.methods import mixture_names

    experiment = parse_gin(args.gin_file, args.gin, search)
    console = make_console()
    if args.mixture is not None:
        experiment = dataclasses.replace(
            experiment, mixture=args.mixture, method=None, teacher=None
        )
    if not experiment.has_task:
        if experiment.dataset_name or experiment.data.dataset_path:
            datasets = [open_dataset(experiment)]
        else:
            datasets = [*open_datasets(experiment.data).values()]
        for dataset in datasets:
            for name in mixture_names(dataset):
                console.print(name)
        return 0
    mixture = open_mixture(experiment)
    console.print(f"[bold]{mixture.name}[/bold]")
    _print_sources(console, mixture)
    _print_counts(console, mixture, experiment)
    vocabulary = None
    if experiment.vocabulary is not None:
        vocabulary = load_vocabulary(experiment.vocabulary)
        mixture.dataset.labels.check_distinct(vocabulary)
    _print_ledgers(console, mixture, experiment, vocabulary)
    if vocabulary is None:
        console.print("give --gin.VOCABULARY=FILE to see lengths, batches and examples")
        return 0
    _print_lengths(console, mixture, vocabulary, experiment)
    _print_batches(console, mixture, vocabulary, experiment)
    _print_examples(console, mixture, vocabulary, experiment, args.examples)
    return 0


def _splits(mixture: "Mixture") -> list[str]:
    from dss.data.datasets import SPLITS

    return [split for split in SPLITS if mixture.dataset.has(split)]


def _print_sources(console: "Console", mixture: "Mixture") -> None:
    table = make_table("tasks", "task", "input -> target", "rate")
    for task, rate in zip(mixture.tasks, mixture.rates, strict=True):
        target = task.kind.replace("_", " ")
        source = "gold" if task.teacher is None else task.teacher
        form = f"{task.prefix}x -> {target} ({source})"
        form += ", by its start id" if task.mark else ""
        table.add_row(task.name, form, f"{rate:g}")
    console.print(table)
    teachers = {task.teacher for task in mixture.tasks}
    for split in ("train", "valid", "test"):
        files = sorted(
            {
                str(file)
                for teacher in teachers
                if mixture.dataset.has(split, teacher)
                for file in mixture.dataset.source.files(
                    mixture.dataset.source_split(split), teacher
                )
            }
        )
        shown = (
            files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "") if files else ""
        )
        held_out = split == "valid" and not mixture.dataset.source.has("valid")
        note = " (a tenth of train, held out)" if held_out and files else ""
        console.print(f"  {split:<6}{shown or 'no file'}{note}", markup=False)
    console.print()


def _print_counts(console: "Console", mixture: "Mixture", experiment: "Experiment") -> None:
    from dss.batches.statistics import measure_split

    dataset = mixture.dataset
    teachers = sorted({t.teacher for t in mixture.tasks if t.teacher})
    table = make_table(
        "examples", "split", "teacher", "examples", "labelled", "outputs", "teacher accuracy"
    )
    for split in _splits(mixture):
        available = [teacher for teacher in teachers if dataset.has(split, teacher)]
        statistics = measure_split(
            dataset, split, available, fraction=experiment.data.fraction, seed=experiment.seed
        )
        counts = str(statistics.examples), str(statistics.labelled)
        if not available:
            table.add_row(split, "-", *counts, "", "")
        for teacher, outputs in statistics.teachers.items():
            statuses = ", ".join(f"{count} {name}" for name, count in outputs.statuses.items())
            accuracy = "" if outputs.accuracy is None else f"{outputs.accuracy:.2%}"
            table.add_row(split, teacher, *counts, statuses, accuracy)
    console.print(table)


def _print_ledgers(
    console: "Console",
    mixture: "Mixture",
    experiment: "Experiment",
    vocabulary: "Vocabulary | None",
) -> None:
    """Prints the ledger of each file."""
    from dss.mixtures.ledger import LEFT_OUT, USED

    for split in _splits(mixture):
        if not any(task.has(split) for task in mixture.tasks):
            continue
        ledgers = _ledgers(mixture.available(split), split, experiment, vocabulary)
        table = make_table(f"{split}: rows of the file", "rows", *(t.name for t, _ in ledgers))
        for fate in (*USED, *LEFT_OUT):
            counts = [ledger.fates.get(fate, 0) for _, ledger in ledgers]
            if any(counts):
                table.add_row(fate, *(f"{count:,}" for count in counts))
        table.add_row("total", *(f"{ledger.rows:,}" for _, ledger in ledgers))
        console.print(table)
        for task, ledger in ledgers:
            if ledger.strays:
                ids = ", ".join(map(repr, ledger.stray_ids))
                line = f"{task.teacher} has {ledger.strays:,} outputs whose id no row has: {ids}"
                console.print(f"  {line}\n", markup=False)


def _ledgers(
    mixture: "Mixture", split: str, experiment: "Experiment", vocabulary: "Vocabulary | None"
) -> "list[tuple[Task, Ledger]]":
    from dss.mixtures.ledger import make_ledger
    from dss.runs.data import split_store

    if vocabulary is not None:
        with contextlib.suppress(DssError):  # no rows: the error follows the table
            store = split_store(experiment, mixture, split, vocabulary)
            pairs = zip(mixture.tasks, store.tasks, strict=True)
            return [(task, tokens.ledger) for task, tokens in pairs if tokens.ledger is not None]
    fraction = experiment.data.fraction
    return [
        (
            task,
            make_ledger(
                task,
                mixture.dataset,
                split,
                _read(task, split, experiment),
                fraction=fraction,
            ),
        )
        for task in mixture.tasks
    ]


def _read(task: "Task", split: str, experiment: "Experiment") -> "TaskRows":
    """Returns the rows that the experiment reads."""
    data = experiment.data
    return task.read(
        split,
        fraction=data.fraction,
        seed=experiment.seed,
        keep_unparsed=data.keep_unparsed,
        rationales=experiment.rationales,
    )


def _print_lengths(
    console: "Console", mixture: "Mixture", vocabulary: "Vocabulary", experiment: "Experiment"
) -> None:
    from dss.batches.statistics import measure_lengths

    data = experiment.data
    table = make_table(
        "tokens, including EOS",
        *("split", "text", "rows", "50%", "90%", "99%", "longest", "total", "limit", "truncated"),
    )
    for split in _splits(mixture):
        for task in mixture.tasks:
            if not task.has(split):
                continue
            rows = _read(task, split, experiment).rows
            if not rows:
                continue
            both = measure_lengths(
                rows,
                vocabulary,
                inputs_length=data.inputs_length,
                targets_length=data.targets_length,
            )
            names = (f"{task.prefix}inputs", task.kind)
            limits = (data.inputs_length, data.targets_length)
            for name, lengths, limit in zip(names, both, limits, strict=True):
                percentiles = [str(p) for p in lengths.percentiles]
                cells = (f"{lengths.total:,}", str(limit), f"{lengths.truncated:.1%}")
                table.add_row(split, name, str(len(rows)), *percentiles, *cells)
    console.print(table)


def _print_batches(
    console: "Console", mixture: "Mixture", vocabulary: "Vocabulary", experiment: "Experiment"
) -> None:
    """Prints the shapes of training batches, and the packing density of the first ones."""
    import numpy as np

    from dss.batches.statistics import describe_labels
    from dss.runs.data import training_batches, training_store

    store = training_store(experiment)
    for line in describe_labels(
        mixture, vocabulary, store, fraction=experiment.data.fraction, seed=experiment.seed
    ):
        console.print(f"  {line}\n", markup=False)
    starts = mixture.start_ids(vocabulary)
    batches = training_batches(experiment, mixture, store, experiment.microbatches, starts)
    kind = "packed" if batches.packed else "unpacked"
    table = make_table(
        f"{kind} batches of {experiment.batch_size} examples",
        *("shape", "side", "slots", "attention rows"),
    )
    for number, shape in enumerate(batches.shapes, start=1):
        if not batches.packed:
            encoder = decoder = str(shape.input_rows)
            groups = shape.input_rows
        else:
            widths, groups = shape.widths, batches.groups
            encoder = f"{groups * shape.input_rows} of {widths.inputs}"
            decoder = f"{groups * shape.target_rows} of {widths.targets}, over {widths.cross}"
        table.add_row(str(number), "encoder", str(groups * shape.inputs), encoder)
        table.add_row("", "decoder", str(groups * shape.targets), decoder)
    console.print(table)
    steps = min(FILL_STEPS, len(batches))
    encoder, decoder = np.mean([batches[step].fill for step in range(steps)], axis=0)
    console.print(
        f"  packing density over {steps} steps: encoder {encoder:.1%}, decoder {decoder:.1%}\n"
    )


def _print_examples(
    console: "Console",
    mixture: "Mixture",
    vocabulary: "Vocabulary",
    experiment: "Experiment",
    count: int,
) -> None:
    from dss.data.vocabulary import encode_example

    data = experiment.data
    for task in mixture.tasks:
        for row in _read(task, "train", experiment).rows[:count]:
            console.print(f"{task.name} {row.id}", style="bold", markup=False)
            sides = (
                ("inputs", row.inputs, data.inputs_length),
                ("targets", row.targets, data.targets_length),
            )
            for side, text, length in sides:
                ids = encode_example(vocabulary, text, length)
                pieces = " ".join(vocabulary.pieces(ids))
                console.print(f"  {side}: {text!r}", markup=False)
                console.print(f"    ids: {ids}", style="dim", markup=False)
                console.print(f"    pieces: {pieces}", style="dim", markup=False)
