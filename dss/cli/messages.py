"""The library's messages in the words of the command line."""

import argparse
import re

__all__ = ["in_flags", "options_of"]

NAMED = re.compile(r"`([\w./]+)(?:=([^`]*))?`")
FLAGS = {  # where the flag is not the field's
    "Experiment.student": "--gin_file=students/SIZE.gin",
    "Experiment.method": "--gin_file=methods/NAME.gin",
    "Experiment.dataset": "--gin_file=datasets/NAME.gin",
    "accept_changed_data": "--changed-data=accept",
    "hinted": "--hint",
    "model": "--teacher",
    "parameters": "--param",
}


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns the option of each argument of a command, by the argument's name."""
    return {a.dest: max(a.option_strings, key=len) for a in parser._actions if a.option_strings}


def in_flags(message: str, options: dict[str, str]) -> str:
    """Returns a message with the flags of the arguments and fields that it names in backticks.

    The library names what Python calls take, such as `max_cost` of `dss.annotate`, the fields of an
    experiment, such as `Experiment.run_dir`, and shipped gin files.

    Args:
      message: the library's message.
      options: the options of the running command, from `options_of`.

    >>> in_flags("give `max_cost`, `TrainerConfig.patience=8` or `runs/adafactor.gin`",
    ...          {"max_cost": "--max-cost"})
    'give --max-cost, --gin.TrainerConfig.patience=8 or --gin_file=runs/adafactor.gin'
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        is_field = name[0].isupper() and "." in name
        if not is_field and name.endswith(".gin"):
            return f"--gin_file={name}"
        out = options.get(name.rpartition(".")[2] if is_field else name) or FLAGS.get(name)
        if out is None and is_field:
            out = _gin_flag(name, options)
        if out is None:
            return match[0]
        return out if value is None else f"{out}={value.strip(chr(39))}"

    return NAMED.sub(flag, message)


def _gin_flag(field: str, options: dict[str, str]) -> str:
    from dss.config.gin_files import macro_of

    macro = macro_of(field)
    return options.get(macro.lower(), f"--gin.{macro}")
