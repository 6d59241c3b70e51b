"""MkDocs hook: pages made from the repository, so that they cannot differ from it.

The home page, Contributing and Changelog are the files at the top; the command reference is the
output of `--help`; the gin reference is made from gin/ and from the configuration classes.
"""

import ast
import contextlib
import io
import os
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = {  # modules whose dataclasses gin fills in
    "dss/config/experiment.py": ("Experiment", "DataConfig"),
    "dss/data/rationales.py": ("RationaleConfig",),
    "dss/student/config.py": ("T5Config", "DecodingConfig"),
    "dss/training/config.py": ("OptimizerConfig", "TrainerConfig"),
    "dss/parallel/config.py": ("MeshConfig",),
    "dss/sweeps/sweep.py": ("SweepConfig",),
}
GIN_FOLDERS = ("datasets", "methods", "students", "layouts", "variants", "runs", "t5x")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    pages: dict[str, Callable[[], str]] = {
        "index.md": lambda: _top_level("README.md"),
        "contributing.md": lambda: _top_level("CONTRIBUTING.md"),
        "changelog.md": lambda: _top_level("CHANGELOG.md"),
        "reference/commands.md": _commands,
        "reference/gin.md": _gin,
    }
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files


def _top_level(name: str) -> str:
    """Returns a file of the top level with its links as seen from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    text = text.replace("](CONTRIBUTING.md", "](contributing.md")
    text = text.replace("](CHANGELOG.md", "](changelog.md")
    return re.sub(r"\[([^\]]*)\]\((?:LICENSE|notebooks/[^)]*)\)", r"\1", text)


def _help(*command: str) -> str:
    """Returns what `dss COMMAND --help` prints."""
    from dss.cli.main import main

    printed = io.StringIO()
    width = mock.patch.dict(os.environ, {"COLUMNS": "100"})
    with width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().rstrip()


def _commands() -> str:
    summary = _help()
    names = re.findall(r"^    (\w+)(?:  |$)", summary, re.MULTILINE)
    assert len(names) > 5, summary
    parts = ["# Command line", "`dss COMMAND --help` prints the same.", f"```\n{summary}\n```"]
    parts += [f"## dss {name}\n\n```\n{_help(name)}\n```" for name in names]
    return "\n\n".join(parts) + "\n"


def _gin() -> str:
    macros = (ROOT / "gin/runs/train.gin").read_text(encoding="utf-8").split("\n\n")
    parts = [
        "# gin files and fields",
        "`--gin_file=FILE` reads a file of these folders or of your own; `--gin.NAME=VALUE` "
        "sets a macro or a field. [Training](../training.md#configuration) describes the order.",
        f"## Macros\n\n```\n{macros[1]}\n```",
        "## Files",
        *(_folder(name) for name in GIN_FOLDERS),
        "## Fields",
        *(_fields(ROOT / file, name) for file, names in CONFIGURATIONS.items() for name in names),
    ]
    return "\n\n".join(parts) + "\n"


def _folder(name: str) -> str:
    rows = ["| file | purpose |", "|---|---|"]
    for file in sorted((ROOT / "gin" / name).glob("*.gin")):
        header = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
        text = re.sub(r"\n#\s*", " ", header[0].strip()) if header else ""
        text = text.removeprefix("#").strip().removeprefix("Purpose:").strip()
        text = re.split(r" (?:Score|Source|Cost|Measured|Command):", text)[0]
        rows.append(f"| `{name}/{file.name}` | {_cell(text)} |")
    return f"### {name}/\n\n" + "\n".join(rows)


def _fields(path: Path, name: str) -> str:
    """Returns the table of a configuration's fields, described by the comments beside them."""
    source = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    described = dict(re.findall(r"^ +(\w+): (.*)$", ast.get_docstring(node) or "", re.MULTILINE))
    rows = ["| field | type | default | description |", "|---|---|---|---|"]
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
        text = next(
            (comments[n] for n in lines if n in comments), described.get(field.target.id, "")
        )
        default = re.sub(r"\s+", " ", ast.unparse(field.value)) if field.value else ""
        default = re.sub(r"dataclasses\.field\(default_factory=lambda: (.*)\)", r"\1", default)
        rows.append(
            f"| `{field.target.id}` | `{ast.unparse(field.annotation)}` "
            f"| {f'`{default}`' if default else ''} | {_cell(text)} |"
        )
    return f"### {name}\n\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
