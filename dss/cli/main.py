"""The `dss` command. A verb's module is imported only when it is asked for."""

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
from dss.errors import UserError, missing_package

__all__ = ["main"]

VERBS = {
    "quickstart": "see the method's gain on synthetic data, in minutes, without a download",
    "annotate": "have a teacher write a label and a rationale for every example",
    "inspect": "show what a mixture holds: sources, counts, lengths, examples",
    "plan": "say what a run would need, before paying for it",
    "train": "train a student, or continue a run",
    "eval": "measure a run's accuracy on a split",
    "sweep": "train and evaluate methods x students x fractions of the data x seeds",
    "predict": "label new inputs with a run's student",
    "report": "show what runs say, in one page: accuracy by data and size, comparisons, answers",
    "import": "make a run of a T5 checkpoint of T5X or Hugging Face",
    "export": "write a run's student for Hugging Face, T5X or CTranslate2",
}
FULL_DISK = "No space left on device"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, as verbs do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _chain(error: BaseException | None) -> list[BaseException]:
    out = []
    while error is not None and error not in out:
        out.append(error)
        error = error.__cause__ or error.__context__
    return out


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dss", description="Distilling step-by-step: small T5 students from large models."
    )
    parser.add_argument("--version", action="version", version=f"dss {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, help_text in VERBS.items():
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        if name == verb:
            _module(name).add_arguments(sub)
    return parser


def _module(verb: str):
    return importlib.import_module(f"dss.cli.{verb}_command")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    verb = next((a for a in argv if not a.startswith("-")), None)
    parser = _parser(verb)
    # argparse would take one with a blank in it for a positional argument.
    gin = [a for a in argv if a.startswith("--gin.")]
    args, unknown = parser.parse_known_args([a for a in argv if a not in gin])
    if gin and not getattr(args, "takes_gin", False):
        unknown += gin
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.gin = [a.removeprefix("--gin.") for a in gin]
    return args


def _is_echo(error: BaseException | None) -> bool:
    """Returns whether an error is one that libraries print of a full disk, where the raised one
    is enough: writers in threads, and Orbax's writes that end after it has given up.
    """
    return FULL_DISK in str(error) or str(error) == "Event loop is closed"


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    if not _is_echo(args.exc_value):
        threading.__excepthook__(args)


def _unraisable_hook(args: Any) -> None:
    if not _is_echo(args.exc_value):
        sys.__unraisablehook__(args)


def _without_gcsfs(chain: Sequence[BaseException]) -> UserError | None:
    """Returns the error for a bucket that no installed package can read; None for other errors."""
    found = any(isinstance(error, ImportError) and "gcsfs" in str(error) for error in chain)
    return missing_package("a gs:// path", "gcsfs", "gcs") if found else None


def _is_of_another(error: BaseException) -> bool:
    """Returns whether an error is what JAX raises where another process has gone."""
    return type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)


def _process() -> str | None:
    """Returns which one of several processes this is; None if it is alone."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return f"process {jax.process_index()} of {jax.process_count()}"


def _end_at_once(status: int) -> NoReturn:
    """Ends one of several processes without waiting for the others, which may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # so that a log file shows how far it is
        sys.stdout.reconfigure(line_buffering=True)
    threading.excepthook, sys.unraisablehook = _thread_excepthook, _unraisable_hook
    try:
        return _module(args.verb).run(args)
    except KeyboardInterrupt:
        print("dss: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        chain, process = _chain(error), _process()
        error = _without_gcsfs(chain) or error
        verb = args.verb if process is None else f"{args.verb}: {process}"
        if isinstance(error, UserError):  # which every process has
            print(f"dss {verb}: {error}", file=sys.stderr)
            return 2
        if any(FULL_DISK in str(e) for e in chain):
            where = next((e.filename for e in chain if isinstance(e, OSError) and e.filename), None)
            print(
                f"dss {verb}: {where or 'disk'}: {FULL_DISK.lower()}; free some and give the "
                "same command again: what was saved stays, and a run goes on from there",
                file=sys.stderr,
            )
            # At exit libraries try to write once more, and say at length that they cannot.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        elif isinstance(error, OSError) and error.filename:
            reason = (error.strerror or type(error).__name__).lower()
            print(f"dss {verb}: {error.filename}: {reason}", file=sys.stderr)
        elif process and (lost := next(filter(_is_of_another, chain), None)):
            print(
                f"dss {verb}: {str(lost).splitlines()[0]}; if another process has gone, start all "
                "of them again: the run goes on from its last checkpoint",
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
