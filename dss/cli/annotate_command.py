"""`dss annotate`."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dss.errors import UserError, missing_package

if TYPE_CHECKING:
    from dss.teacher.annotate import Limits
    from dss.teacher.job import Job
    from dss.teacher.journal import Journal
    from dss.teacher.prices import Price

__all__ = ["add_arguments", "run"]

OPENAI_URL = "https://api.openai.com/v1"
SHOWN_PROMPTS = 2  # by --dry-run
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.epilog = (
        "The key is read from the environment (OPENAI_API_KEY, or what --key-env names). The same "
        "command goes on where it was stopped, and pays for no answer twice."
    )
    what = parser.add_argument_group("what is annotated")
    what.add_argument("--dataset", metavar="NAME", help="a released dataset, such as cqa")
    what.add_argument("--split", default="train", help="of the dataset (default: train)")
    what.add_argument("--data-root", metavar="DIR", help="where the released datasets are")
    what.add_argument("--input", type=Path, metavar="FILE", help="your own JSON lines instead")
    what.add_argument("--output", type=Path, metavar="DIR", help="default: beside the examples")
    what.add_argument(
        "--replace", action="store_true", help="write over outputs though answers would be lost"
    )

    teacher = parser.add_argument_group("the teacher")
    teacher.add_argument("--teacher", metavar="MODEL", help="its name at the endpoint")
    teacher.add_argument(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL", OPENAI_URL),
        metavar="URL",
        help="an OpenAI-compatible endpoint, with its version: http://localhost:8000/v1",
    )
    teacher.add_argument("--api", choices=("chat", "completions"), default="chat")
    teacher.add_argument("--key-env", default="OPENAI_API_KEY", metavar="VAR")
    teacher.add_argument("--name", help="in files and mixtures (default: the model's)")

    how = parser.add_argument_group("how it is asked")
    how.add_argument("--prompt", metavar="FILE", help="YAML, or the name of one that is shipped")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="answers an example")
    how.add_argument("--temperature", type=float, metavar="T", help="in place of the prompt's")
    how.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the request, in JSON; null takes one of the prompt's away; repeatable",
    )
    how.add_argument(
        "--hint", action="store_true", help="show the gold label and ask only for the rationale"
    )

    limits = parser.add_argument_group("how fast, and how much")
    limits.add_argument("--concurrency", type=int, metavar="N", help="at most (default: 64)")
    limits.add_argument("--requests-per-minute", type=float, metavar="N")
    limits.add_argument("--tokens-per-minute", type=float, metavar="N")
    limits.add_argument("--timeout", type=float, metavar="S", help="for a reply (default: 300)")
    limits.add_argument("--attempts", type=int, metavar="N", help="at a request (default: 6)")
    limits.add_argument("--max-requests", type=int, metavar="N", help="that this run sends")
    limits.add_argument(
        "--max-cost", type=float, metavar="X", help="of all that was ever asked of this teacher"
    )
    limits.add_argument("--prices", type=Path, metavar="FILE", help="YAML of yours: see the docs")

    also = parser.add_argument_group("in place of asking")
    other = also.add_mutually_exclusive_group()
    other.add_argument("--dry-run", action="store_true", help="show prompts, tokens and price")
    other.add_argument("--reparse", action="store_true", help="read the stored answers again")
    other.add_argument("--report", action="store_true", help="numbers, and a page to read")
    other.add_argument("--batch-export", type=Path, metavar="DIR", help="write a provider's files")
    other.add_argument("--batch-import", type=Path, nargs="+", metavar="FILE", help="read results")
    parser.add_argument("--parquet", action="store_true", help="export to Parquet too")
    parser.add_argument(
        "--pipeline-options",
        metavar="OPTIONS",
        help="ask in an Apache Beam pipeline with these options, in one argument: "
        "'--runner=DirectRunner --direct_num_workers=2'",
    )


def run(args: argparse.Namespace) -> int:
    """Annotates, or does what stands in its place."""
    try:
        if args.parquet:
            import pyarrow.parquet  # noqa: F401  before anything is paid for
        job = _job(args)
        price = _price(args, job)
        modes: tuple[tuple[Any, Callable[[], int]], ...] = (
            (args.dry_run, lambda: _dry_run(job, price)),
            (args.reparse, lambda: _reparse(args, job)),
            (args.report, lambda: _report(job, price)),
            (args.batch_export, lambda: _batch_export(args, job)),
            (args.batch_import, lambda: _batch_import(args, job)),
            (args.pipeline_options is not None, lambda: _run_pipeline(args, job)),
        )
        return next((mode for asked, mode in modes if asked), lambda: _ask(args, job, price))()
    except ModuleNotFoundError as error:
        extras = "teacher" if args.pipeline_options is None else "teacher,beam"
        raise missing_package("annotation", error.name, extras) from None


def _job(args: argparse.Namespace) -> "Job":
    from dss.data.datasets import Dataset
    from dss.teacher.job import dataset_job, file_job
    from dss.teacher.request import Teacher

    if (args.dataset is None) == (args.input is None):
        raise UserError("give what to annotate: --dataset NAME, or --input FILE with --prompt FILE")
    if args.teacher is None:
        raise UserError("give the model with --teacher")
    parameters = dict(_parameter(text) for text in args.param)
    if args.temperature is not None:
        parameters["temperature"] = args.temperature
    teacher = Teacher(
        model=args.teacher,
        base_url=args.base_url,
        api=args.api,
        parameters=parameters,
        samples=args.samples,
        hinted=args.hint,
    )
    placed = {"output": args.output, "name": args.name}
    if args.input is not None:
        if args.prompt is None:
            raise UserError("--input needs --prompt: a YAML file, or a shipped one's name")
        return file_job(args.input, args.prompt, teacher, **placed)
    dataset = Dataset.released(args.dataset, args.data_root)
    return dataset_job(dataset, args.split, args.prompt, teacher, **placed)


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"--param {text}: give it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _price(args: argparse.Namespace, job: "Job") -> "Price | None":
    from dss.teacher.prices import load_price

    if args.prices is None:
        return None
    return load_price(args.prices, job.writer.teacher.model)


@contextlib.contextmanager
def _journal(job: "Job", *, create: bool = True) -> Iterator["Journal"]:
    from dss.teacher.journal import Journal

    journal = Journal(job.journal_path, create=create)
    try:
        if create:
            journal.describe(job.writer)
        yield journal
    finally:
        journal.close()


def _limits(args: argparse.Namespace) -> "Limits":
    from dss.teacher.annotate import Limits

    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)}
    return Limits(**{name: value for name, value in named.items() if value is not None})


def _run_pipeline(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.beam import run_pipeline

    limits = _limits(args)
    for name in ("max_requests", "max_cost"):
        if getattr(limits, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: the workers of a pipeline do not share one count; "
                "leave it or --pipeline-options away"
            )
    try:
        options = shlex.split(args.pipeline_options)
    except ValueError as error:
        raise UserError(f"--pipeline-options: {error}") from None
    with _journal(job) as journal:
        job.check(journal, parquet=args.parquet, replace=args.replace)
        missing = run_pipeline(job, journal, limits, args.key_env, options)
        _export(args, job, journal)
    return _said_missing(missing)


def _said_missing(count: int) -> int:
    """Says that requests have no answer, where some have none; returns the exit status."""
    if count:
        print(f"{count} requests brought no answer; the same command tries them again")
    return int(count > 0)


def _ask(args: argparse.Namespace, job: "Job", price: "Price | None") -> int:
    import asyncio

    from dss.cli.annotate_progress import AnnotateProgress
    from dss.cli.progress import display_for
    from dss.teacher.annotate import Annotator
    from dss.teacher.client import Client, api_key
    from dss.teacher.reply import FINAL

    limits, teacher = _limits(args), job.writer.teacher
    client = Client(teacher, api_key(args.key_env, teacher.base_url), limits.timeout)
    with _journal(job) as journal:
        total = job.check(
            journal,
            parquet=args.parquet,
            replace=args.replace,
            most_requests=limits.max_requests,
        )
        progress = AnnotateProgress(display_for("request", total * teacher.samples), price)
        annotator = Annotator(journal, job.writer, client, limits, price=price, progress=progress)
        try:
            state = asyncio.run(annotator.run(job.examples(), total))
        except UserError:
            if any(annotator.state.kinds[status] for status in FINAL):
                _export(args, job, journal)
            raise
        finally:
            progress.close()
        if state.stopped is not None:
            print(f"{state.stopped}; the same command goes on")
        try:
            _export(args, job, journal)
        except UserError as error:
            if state.stopped != "interrupted":
                raise
            print(error)
    status = _said_missing(state.no_answer)
    return INTERRUPTED if state.stopped == "interrupted" else status


def _export(args: argparse.Namespace, job: "Job", journal: "Journal") -> None:
    counts = job.export(journal, parquet=args.parquet, replace=args.replace)
    job.save_usage(journal, _price(args, job))
    if counts is None:
        print(f"{job.file('jsonl')}: nothing new")
        return
    shown = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(f"{job.file('jsonl')}: {counts.total()} lines: {shown or 'none'}")


def _reparse(args: argparse.Namespace, job: "Job") -> int:
    if not job.journal_path.is_file():
        raise UserError(f"{job.journal_path}: no such journal; nothing was annotated there yet")
    with _journal(job) as journal:
        _export(args, job, journal)
    return 0


def _report(job: "Job", price: "Price | None") -> int:
    from rich.console import Console

    from dss.teacher.report import make_report, write_page

    with _journal(job, create=False) as journal:
        report = make_report(job, journal, price)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"annotations of {report.teacher}")
    for name, value in report.lines():
        console.print(f"  {name}: {value}")
    for found in report.worst:
        console.print(f"\nunparsed {found.example.id}: {found.raw!r}")
    page = job.file("html")
    write_page(report, page)
    console.print(f"\nto read through: {page}")
    return 0


def _batch_export(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.batch import export_batch

    stem = args.batch_export / f"{job.stem}.{job.name}"
    if args.batch_export.resolve() == job.folder.resolve():
        raise UserError(f"--batch-export {args.batch_export}: give a folder of its own")
    with _journal(job) as journal:
        job.check(journal, replace=args.replace)
        files = export_batch(journal, job.writer, job.examples(), stem)
    for path, count in files:
        print(f"{path}: {count} requests, {path.stat().st_size:,} bytes")
    print("now: hand them to the provider; then give its files with --batch-import. Until then a")
    print("live run, or another export, would ask for the same answers again")
    return 0


def _batch_import(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.batch import import_batch

    with _journal(job) as journal:
        counts = import_batch(journal, args.batch_import)
        print(
            f"{counts['new']} results read; {counts['before']} were there before, "
            f"{counts['unknown']} are of requests that this journal did not write"
        )
        _export(args, job, journal)
    return 0


def _dry_run(job: "Job", price: "Price | None") -> int:
    import itertools

    from dss.teacher.journal import Journal, Usage
    from dss.teacher.prices import tokens_per_character

    usage = Usage()
    journal = None
    if job.journal_path.is_file():
        journal = Journal(job.journal_path, create=False)
        usage = journal.usage(job.writer.teacher)
    count = answered = characters = left = 0
    for example in job.examples():
        for request in job.writer.requests(example):
            count += 1
            if journal is not None and journal.final_among([request.key]):
                answered += 1
                continue
            characters += request.characters
            left += 1
    if not count:
        raise UserError(f"{job.source}: no examples")
    for example in itertools.islice(job.examples(), SHOWN_PROMPTS):
        request = job.writer.requests(example)[0]
        print(f"---- {example.id}\n{job.writer.show(request)}\n")
    sent = {k: v for k, v in job.writer.body(request).items() if k not in ("messages", "prompt")}
    print(f"---- parameters: {json.dumps(sent, ensure_ascii=False)}")
    prompt = round(characters * tokens_per_character(usage))
    basis = "as counted so far" if usage.prompt else "at 4 characters a token"
    print(f"requests: {count:,}, of which {answered:,} have an answer")
    most = None if job.writer.most_tokens is None else job.writer.most_tokens * left
    at_most = "nobody knows: no max_tokens" if most is None else f"at most {most:,}"
    print(f"tokens to read: about {prompt:,}, {basis}; to write: {at_most}")
    if price is None:
        print("price: unknown; give a file that has this model's with --prices")
    elif most is None:
        print("price: unknown, as nothing limits an answer; give max_tokens")
    else:
        cost = price.cost(Usage(prompt=prompt, completion=most))
        print(f"price: at most about {price.text(cost or 0.0)}")
    return 0
