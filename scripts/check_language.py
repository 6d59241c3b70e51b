#!/usr/bin/env python
"""Checks docstrings against the rules of CONTRIBUTING.md, "How to write".

An argument's description is a noun phrase, so few open with a function word, and docstrings use the
terms of the field in place of words of our own. Prints each fault; with folders or files as
arguments, of those alone.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 0.02  # of the descriptions may open with a function word
FUNCTION_WORDS = re.compile(
    "of|which|that|what|how|where|who|whose|when|if|as|with|by|from|for|in|on|at|to|into|and|or|but"
    "|it|its|is|are|was|were|be|so|than|such|see"
)
# Phrases that the glossary replaces; each is a regular expression.
GLOSSARY = {
    r"takes? (?:the state's|its|their) memory": "donated",
    r"whose memory is taken": "donated",
    r"(?<!\w)lies? (?:so|split|on a mesh|on the mesh)": "sharding, sharded over",
    r"computed again backward|recomputed backward": "rematerialized",
    r"what devices send": "collective communication, bytes sent",
    r"how surely": "confidence interval",
    r"how full": "packing density, fill rate",
    r"\b(?:a|the|its) share of\b": "fraction, proportion",
    r"\bsettles? (?:the|what|an)\b": "resolve",
    r"\bdeals? (?:out|them|examples)\b": "balance",
    r"\bwhat goes on\b": "hypothesis, beam",
    r"\bwhat is said\b": "logits, scores",
    r"\bverbs?\b": "command",
    r"\bset aside\b": "quarantined",
    r"\btaken out\b": "disabled (of an ablation)",
    r"\bfrom nothing\b": "from scratch, randomly initialised",
    r"\bgo(?:es)? on from\b|\bcontinues? where\b": "resume",
    r"\b(?:says|tells|is told|knows) (?:what|which|how|where|that|of)\b": "code does not speak",
}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yields each docstring of a file with the line that it begins in."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)):
            yield node.body[0].lineno, text


def descriptions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields line, name and description of the arguments and attributes in a docstring."""
    section = None
    for number, line in enumerate(text.splitlines()):
        if heading := re.fullmatch(r"\s*(Args|Attributes|Returns|Raises|Yields):\s*", line):
            section, indent = heading[1], len(line) - len(line.lstrip()) + 2
        elif section in ("Args", "Attributes"):
            item = re.fullmatch(r"(\s*)(\*{0,2}\w+): (.*)", line)
            if item and len(item[1]) == indent:
                yield number, item[2], item[3]


def main(arguments: list[str]) -> int:
    """Prints the faults of the files; returns the exit status."""
    paths = [Path(argument) for argument in arguments] or [ROOT / "dss", ROOT / "tasks"]
    files = [f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]
    count, opens, terms = 0, [], []
    for path in files:
        for start, text in docstrings(path):
            for number, name, description in descriptions(text):
                count += 1
                first = re.split(r"\W", description.lower(), maxsplit=1)[0]
                if FUNCTION_WORDS.fullmatch(first):
                    opens.append(f"{path}:{start + number}: {name}: {description}")
            for pattern, better in GLOSSARY.items():
                for match in re.finditer(pattern, text, re.IGNORECASE):
                    line = start + text.count("\n", 0, match.start())
                    terms.append(f"{path}:{line}: {match[0]!r}; write: {better}")
    print(*terms, sep="\n", end="\n" if terms else "")
    many = len(opens) > MOST * count
    if many or arguments:
        print(*opens, sep="\n", end="\n" if opens else "")
    print(
        f"{count} descriptions, {len(opens)} open with a function word"
        f" (at most {MOST:.0%}); {len(terms)} terms to replace"
    )
    return int(many or bool(terms))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
