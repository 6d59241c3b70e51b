"""The `dss` command line. The module of a command is imported only if the command is called."""

import argparse
import importlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dss import __version__
from dss.cli.messages import in_flags, options_of
from dss.errors import DssError, missing_package

__all__ = ["main"]

COMMANDS = {
    "quickstart": "demonstrate the method on synthetic data, in minutes, without a download",
    "data": "make a dataset from the columns of a table: CSV, Excel, Parquet, JSON",
    "annotate": "collect a label and a rationale for every example from a teacher",
    "inspect": "show the contents of a mixture: sources, counts, lengths, examples",
    "plan": "estimate the requirements of a run, without training",
    "train": "train a student, or resume a run",
    "eval": "evaluate a student on a split",
    "sweep": "train and evaluate methods x students x fractions of the data x seeds",
    "predict": "predict labels, and rationales, for new inputs",
    "serve": "answer requests with a student, over HTTP",
    "report": "write a page of results: accuracy by data and size, comparisons, answers",
    "import": "create a run from a T5 checkpoint of T5X or Hugging Face",
    "export": "convert a student to the format of Hugging Face, T5X or CTranslate2",
}
FULL_DISK = "No space left on device"


class _Parser(argparse.ArgumentParser):
    """A parser with one-line error messages, like those of the commands."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _chain(error: BaseException | None) -> list[BaseException]:
    out = []
    while error is not None and error not in out:
        out.append(error)
        error = error.__cause__ or error.__context__
    return out


def _parser(command: str | None) -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """Returns the parser of the command line, and the options of a command, see `options_of`."""
    parser = _Parser(
        prog="dss",
        description="Distilling step-by-step: small T5 students from large language models.",
    )
    parser.add_argument("--version", action="version", version=f"dss {__version__}")
    options: dict[str, str] = {}
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text)
        if name == command:
            _module(name).add_arguments(subparser)
            options = options_of(subparser)
    return parser, options


def _module(command: str):
    return importlib.import_module(f"dss.cli.{command}_command")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    command = next((a for a in argv if not a.startswith("-")), None)
    parser, options = _parser(command)
    # argparse counts an unknown option with a space in it as a positional argument.
    gin = [a for a in argv if a.startswith("--gin.")]
    args, unknown = parser.parse_known_args([a for a in argv if a not in gin])
    if gin and not getattr(args, "takes_gin", False):
        unknown += gin
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.options = options
    args.gin = [a.removeprefix("--gin.") for a in gin]
    return args


def _is_redundant(error: BaseException | None) -> bool:
    """Returns whether an error of a background thread only repeats that the disk is full.

    Libraries print such errors from writer threads, and from Orbax writes that end after it has
    failed; the error that the main thread raises is enough.
    """
    return FULL_DISK in str(error) or str(error) == "Event loop is closed"


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    if not _is_redundant(args.exc_value):
        threading.__excepthook__(args)


def _unraisable_hook(args: Any) -> None:
    if not _is_redundant(args.exc_value):
        sys.__unraisablehook__(args)


def _without_gcsfs(chain: Sequence[BaseException]) -> DssError | None:
    """Returns the error for a bucket that no installed package can read; None for other errors."""
    found = any(isinstance(error, ImportError) and "gcsfs" in str(error) for error in chain)
    return missing_package("a gs:// path", "gcsfs", "gcs") if found else None


def _is_process_loss(error: BaseException) -> bool:
    """Returns whether an error is one that JAX raises if another process has ended."""
    return type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)


def _process() -> str | None:
    """Returns the index and number of the processes, in words; None for a single process."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return f"process {jax.process_index()} of {jax.process_count()}"


def _end_at_once(status: int) -> NoReturn:
    """Ends one of several processes without the exit barrier, which could wait forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # log files are complete while a command runs
        sys.stdout.reconfigure(line_buffering=True)
    threading.excepthook, sys.unraisablehook = _thread_excepthook, _unraisable_hook
    try:
        return _module(args.command).run(args)
    except KeyboardInterrupt:
        print("dss: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        chain, process = _chain(error), _process()
        error = _without_gcsfs(chain) or error
        prefix = f"dss {args.command}" if process is None else f"dss {args.command}: {process}"
        if isinstance(error, DssError):  # raised in every process
            print(f"{prefix}: {in_flags(str(error), args.options)}", file=sys.stderr)
            return 2
        if any(FULL_DISK in str(e) for e in chain):
            path = next((e.filename for e in chain if isinstance(e, OSError) and e.filename), None)
            print(
                f"{prefix}: {path or 'disk'}: {FULL_DISK.lower()}; free some space and repeat the "
                "command: saved files are kept, and a run resumes from its last checkpoint",
                file=sys.stderr,
            )
            # At exit, libraries retry their writes and print long errors.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        elif isinstance(error, OSError) and error.filename:
            reason = (error.strerror or type(error).__name__).lower()
            print(f"{prefix}: {error.filename}: {reason}", file=sys.stderr)
        elif process and (lost := next(filter(_is_process_loss, chain), None)):
            print(
                f"{prefix}: {str(lost).splitlines()[0]}; if another process has ended, restart all "
                "processes: the run resumes from its last checkpoint",
                file=sys.stderr,
            )
        elif process:
            traceback.print_exception(error)
            _end_at_once(1)
        else:
            raise
        if process:
            _end_at_once(2)
        return 2
