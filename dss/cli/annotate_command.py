"""`dss annotate`."""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dss.cli.messages import in_flags
from dss.errors import DssError, missing_package

if TYPE_CHECKING:
    from dss.teacher.annotate import Limits
    from dss.teacher.job import Job
    from dss.teacher.journal import Journal
    from dss.teacher.prices import Price

__all__ = ["add_arguments", "run"]

SHOWN_PROMPTS = 2  # by --dry-run
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = (
        "The API key is read from the environment variable OPENAI_API_KEY, or the one that "
        "--key-env names. To resume a stopped run, repeat the command: no answer is paid for twice."
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="NAME", help="released dataset, such as cqa")
    data.add_argument("--split", default="train", help="split of the dataset (default: train)")
    data.add_argument("--data-root", metavar="DIR", help="folder of the released datasets")
    data.add_argument("--input", type=Path, metavar="FILE", help="your own JSON lines instead")
    data.add_argument(
        "--output", type=Path, metavar="DIR", help="output folder (default: the examples' folder)"
    )
    data.add_argument(
        "--replace", action="store_true", help="overwrite outputs even if answers are lost"
    )

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", metavar="MODEL", help="name of the model at the endpoint")
    teacher.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible endpoint with its version, such as http://localhost:8000/v1 "
        "(default: OPENAI_BASE_URL, else OpenAI)",
    )
    teacher.add_argument(
        "--api",
        choices=("chat", "completions"),
        default="chat",
        help="chat or plain completions (default: chat)",
    )
    teacher.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="VAR",
        help="environment variable of the API key (default: OPENAI_API_KEY)",
    )
    teacher.add_argument(
        "--name", help="name of the teacher in files and mixtures (default: the model's)"
    )

    requests = parser.add_argument_group("requests")
    requests.add_argument("--prompt", metavar="FILE", help="YAML file, or name of a shipped prompt")
    requests.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers per example (default: 1)"
    )
    requests.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature, instead of the prompt's",
    )
    requests.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="request parameter, in JSON; null removes one of the prompt's; repeatable",
    )
    requests.add_argument(
        "--hint", action="store_true", help="show the gold label and ask only for the rationale"
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--concurrency", type=int, metavar="N", help="maximum requests in flight (default: 64)"
    )
    limits.add_argument(
        "--requests-per-minute", type=float, metavar="N", help="request budget (default: none)"
    )
    limits.add_argument(
        "--tokens-per-minute",
        type=float,
        metavar="N",
        help="budget of prompt and completion tokens (default: none)",
    )
    limits.add_argument(
        "--timeout", type=float, metavar="S", help="seconds to wait for a reply (default: 300)"
    )
    limits.add_argument(
        "--attempts", type=int, metavar="N", help="maximum attempts per request (default: 6)"
    )
    limits.add_argument(
        "--max-requests", type=int, metavar="N", help="maximum requests that this run sends"
    )
    limits.add_argument(
        "--max-cost",
        type=float,
        metavar="X",
        help="maximum cost of all requests to this teacher, including earlier runs",
    )
    limits.add_argument(
        "--prices", type=Path, metavar="FILE", help="YAML file of token prices; see docs/teacher.md"
    )

    group = parser.add_argument_group("other modes, which send no requests")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--dry-run", action="store_true", help="show prompts, tokens and cost")
    modes.add_argument("--reparse", action="store_true", help="parse the stored answers again")
    modes.add_argument(
        "--report", action="store_true", help="print statistics and write a page of the outputs"
    )
    modes.add_argument(
        "--batch-export", type=Path, metavar="DIR", help="write files for a provider's batch API"
    )
    modes.add_argument(
        "--batch-import", type=Path, nargs="+", metavar="FILE", help="read result files of a batch"
    )
    parser.add_argument("--parquet", action="store_true", help="write a Parquet file too")
    parser.add_argument(
        "--pipeline-options",
        metavar="OPTIONS",
        help="run as an Apache Beam pipeline with these options, in one argument: "
        "'--runner=DirectRunner --direct_num_workers=2'",
    )


def run(args: argparse.Namespace) -> int:
    """Annotates, or runs the mode that the options select."""
    try:
        if args.parquet:
            import pyarrow.parquet  # noqa: F401  fails before anything is paid for
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
        return next((mode for chosen, mode in modes if chosen), lambda: _run(args, job, price))()
    except ModuleNotFoundError as error:
        extras = "teacher" if args.pipeline_options is None else "teacher,beam"
        raise missing_package("annotation", error.name, extras) from None


def _job(args: argparse.Namespace) -> "Job":
    from dss.data.datasets import Dataset
    from dss.teacher.client import default_url
    from dss.teacher.job import dataset_job, file_job
    from dss.teacher.request import Teacher

    if (args.dataset is None) == (args.input is None):
        raise DssError("give what to annotate: --dataset NAME, or --input FILE with --prompt FILE")
    if args.teacher is None:
        raise DssError("give the teacher's model with --teacher")
    parameters = dict(_parameter(text) for text in args.param)
    if args.temperature is not None:
        parameters["temperature"] = args.temperature
    teacher = Teacher(
        model=args.teacher,
        base_url=default_url() if args.base_url is None else args.base_url,
        api=args.api,
        parameters=parameters,
        samples=args.samples,
        hinted=args.hint,
    )
    destination = {"output": args.output, "name": args.name}
    if args.input is not None:
        if args.prompt is None:
            raise DssError("--input needs --prompt: a YAML file, or the name of a shipped prompt")
        return file_job(args.input, args.prompt, teacher, **destination)
    dataset = Dataset.released(args.dataset, args.data_root)
    return dataset_job(dataset, args.split, args.prompt, teacher, **destination)


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise DssError(f"--param {text}: give it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _price(args: argparse.Namespace, job: "Job") -> "Price | None":
    from dss.teacher.prices import load_price

    if args.prices is None:
        return None
    return load_price(args.prices, job.writer.teacher.model)


def _limits(args: argparse.Namespace) -> "Limits":
    from dss.teacher.annotate import Limits

    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)}
    return Limits(**{name: value for name, value in values.items() if value is not None})


def _run_pipeline(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.ask import open_journal
    from dss.teacher.beam import run_pipeline

    limits = _limits(args)
    for name in ("max_requests", "max_cost"):
        if getattr(limits, name) is not None:
            raise DssError(
                f"--{name.replace('_', '-')}: not possible with --pipeline-options, as the workers "
                "do not share a count; omit one of the two"
            )
    try:
        options = shlex.split(args.pipeline_options)
    except ValueError as error:
        raise DssError(f"--pipeline-options: {error}") from None
    with open_journal(job) as journal:
        job.check(journal, parquet=args.parquet, replace=args.replace)
        unanswered = run_pipeline(job, journal, limits, args.key_env, options)
        _export(args, job, journal)
    return _report_unanswered(unanswered)


def _report_unanswered(count: int) -> int:
    """Prints the number of requests without an answer, unless 0; returns the exit status."""
    if count:
        print(f"{count} requests got no answer; run the same command again to retry them")
    return int(count > 0)


def _run(args: argparse.Namespace, job: "Job", price: "Price | None") -> int:
    from dss.cli.annotate_progress import AnnotateProgress
    from dss.cli.progress import display_for
    from dss.teacher.ask import ask, open_journal
    from dss.teacher.client import Client, api_key

    limits, teacher = _limits(args), job.writer.teacher
    client = Client(teacher, api_key(args.key_env, teacher.base_url), limits.timeout)
    with open_journal(job) as journal:
        state = ask(
            job,
            journal,
            client,
            limits,
            price=price,
            make_progress=lambda n: AnnotateProgress(display_for("request", n), price),
            export=lambda: _export(args, job, journal),
            parquet=args.parquet,
            replace=args.replace,
        )
        if state.stopped is not None:
            print(f"{in_flags(state.stopped, args.options)}; run the same command again to resume")
        try:
            _export(args, job, journal)
        except DssError as error:
            if state.stopped != "interrupted":
                raise
            print(in_flags(str(error), args.options))
    status = _report_unanswered(state.unanswered)
    return INTERRUPTED if state.stopped == "interrupted" else status


def _export(args: argparse.Namespace, job: "Job", journal: "Journal") -> None:
    counts = job.export(journal, parquet=args.parquet, replace=args.replace)
    job.save_usage(journal, _price(args, job))
    if counts is None:
        print(f"{job.file('jsonl')}: unchanged")
        return
    by_status = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(f"{job.file('jsonl')}: {counts.total()} lines: {by_status or 'none'}")


def _reparse(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.ask import open_journal

    if not job.journal_path.is_file():
        raise DssError(f"{job.journal_path}: no such journal; nothing was annotated there yet")
    with open_journal(job) as journal:
        _export(args, job, journal)
    return 0


def _report(job: "Job", price: "Price | None") -> int:
    from rich.console import Console

    from dss.teacher.ask import open_journal
    from dss.teacher.report import make_report, write_page

    with open_journal(job, create=False) as journal:
        report = make_report(job, journal, price)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"annotations by {report.teacher}")
    for name, value in report.lines():
        console.print(f"  {name}: {value}")
    for output in report.worst:
        console.print(f"\nunparsed {output.example.id}: {output.raw!r}")
    page = job.file("html")
    write_page(report, page)
    console.print(f"\npage of the outputs: {page}")
    return 0


def _batch_export(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.ask import open_journal
    from dss.teacher.batch import export_batch

    stem = args.batch_export / f"{job.stem}.{job.name}"
    if args.batch_export.resolve() == job.folder.resolve():
        raise DssError(f"--batch-export {args.batch_export}: give another folder than the outputs'")
    with open_journal(job) as journal:
        job.check(journal, replace=args.replace)
        files = export_batch(journal, job.writer, job.examples(), stem)
    for path, count in files:
        print(f"{path}: {count} requests, {path.stat().st_size:,} bytes")
    print(
        "Upload the files to the provider, then import its result files with --batch-import. Until"
    )
    print("then, do not run or export again: the same requests would be sent and paid for twice.")
    return 0


def _batch_import(args: argparse.Namespace, job: "Job") -> int:
    from dss.teacher.ask import open_journal
    from dss.teacher.batch import import_batch

    with open_journal(job) as journal:
        counts = import_batch(journal, args.batch_import)
        print(
            f"{counts['new']} results imported; {counts['before']} were imported before, "
            f"{counts['unknown']} are of requests that are not in this journal"
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
    count = answered = characters = remaining = 0
    for example in job.examples():
        for request in job.writer.requests(example):
            count += 1
            if journal is not None and journal.final_among([request.key]):
                answered += 1
                continue
            characters += request.characters
            remaining += 1
    if not count:
        raise DssError(f"{job.source}: no examples")
    for example in itertools.islice(job.examples(), SHOWN_PROMPTS):
        request = job.writer.requests(example)[0]
        print(f"---- {example.id}\n{job.writer.show(request)}\n")
    body = job.writer.body(request)
    parameters = {name: body[name] for name in body if name not in ("messages", "prompt")}
    print(f"---- parameters: {json.dumps(parameters, ensure_ascii=False)}")
    prompt = round(characters * tokens_per_character(usage))
    basis = "by the endpoint's counts so far" if usage.prompt else "at 4 characters per token"
    print(f"requests: {count:,}, of which {answered:,} have an answer")
    limit = job.writer.most_tokens
    completion = None if limit is None else limit * remaining
    bound = "unlimited, without max_tokens" if completion is None else f"at most {completion:,}"
    print(f"input tokens: about {prompt:,}, {basis}; output tokens: {bound}")
    if price is None:
        print("cost: unknown; give a file with this model's price with --prices")
    elif completion is None:
        print("cost: unknown, as answers have no limit; give max_tokens")
    else:
        cost = price.cost(Usage(prompt=prompt, completion=completion))
        print(f"cost: at most about {price.text(cost or 0.0)}")
    return 0
