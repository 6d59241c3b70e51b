"""Cleaning of a teacher's text before a prompt's pattern is applied.

Models write thoughts, Markdown, LaTeX, JSON that the prompt did not ask for, and refusals. None of
these may end up in a rationale or a label.
"""

import json
import re
from typing import NamedTuple

__all__ = [
    "JsonAnswer",
    "is_refusal",
    "plain",
    "plain_label",
    "plain_rationale",
    "read_json_answer",
    "without_thoughts",
]

THINK = re.compile(r"</?(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
FENCE = re.compile(r"\A```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```\s*\Z", re.DOTALL)
HEADING = re.compile(r"^#{1,6}[ \t]+([^\n]+)$", re.MULTILINE)
BOLD = re.compile(r"\*\*|__(?=\S)|(?<=\S)__")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX = {  # replacements in a label
    re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"): r"\1",
    re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"): r"\1/\2",
}
BLOCK_QUOTE = re.compile(r"^[ \t]*>[ \t]?", re.MULTILINE)  # in Markdown
BULLET = re.compile(r"\n[ \t]*(?:[-*•]|\d+[.)])[ \t]*\Z")  # of the list item that held the label
QUOTES = tuple(map(tuple, ("``", "''", '""', "$$", "**", "“”", "‘’", "«»")))  # around a label
RATIONALE_KEYS = ("rationale", "reasoning", "explanation")
LABEL_KEYS = ("label", "answer")
REFUSAL = re.compile(
    r"\A\W*(?:(?:i['’]m|i am)\s+(?:\w+\s+){0,2}?sorry\b|sorry\b|i apologi[sz]e\b|"
    r"(?:i\s+)?(?:can['’]?t|cannot|can not|won['’]t|will not|(?:am|['’]m) (?:unable|not able) to)"
    r"\s+"
    r"(?:help|assist|comply|answer|provide|fulfil|fulfill|do|discuss|engage|continue)\b|"
    r"as an ai\b)",
    re.IGNORECASE,
)


class JsonAnswer(NamedTuple):
    """Parts of an answer in JSON; None for a missing one."""

    rationale: str | None
    label: str | None


def without_thoughts(text: str) -> str:
    """Returns a text without its `<think>...</think>` blocks.

    A block without a closing tag extends to the end of the text. One without an opening tag, which
    some servers omit, begins at the start.

    >>> without_thoughts("<think>Hm. Label: a?</think>It is.\\nLabel: b")
    'It is.\\nLabel: b'
    >>> without_thoughts("Hm.</think> Label: b"), without_thoughts("<think>Hm.")
    (' Label: b', '')
    """
    visible, depth, start = "", 0, 0
    for tag in THINK.finditer(text):
        if tag[0].startswith("</"):
            if depth == 0:
                visible = ""
            depth, start = max(depth - 1, 0), tag.end()
        else:
            if depth == 0:
                visible += text[start : tag.start()]
            depth += 1
    return visible + text[start:] if depth == 0 else visible


def read_json_answer(text: str) -> JsonAnswer | None:
    """Returns the parts of a JSON object, with or without a code fence; None for other text.

    >>> read_json_answer('{"rationale": "It crashes.", "label": "bug"}')
    JsonAnswer(rationale='It crashes.', label='bug')
    """
    text = text.strip()
    fenced = FENCE.match(text)
    text = fenced[1].strip() if fenced else text
    if not text.startswith("{"):
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None

    def part(keys: tuple[str, ...]) -> str | None:
        for key in keys:
            content = value.get(key)
            if isinstance(content, str | int | float) and not isinstance(content, bool):
                return str(content).strip()
        return None

    answer = JsonAnswer(part(RATIONALE_KEYS), part(LABEL_KEYS))
    return None if answer == JsonAnswer(None, None) else answer


def plain(text: str) -> str:
    """Returns a text without Markdown's bold and block quotes; headings become lines with a colon.

    >>> plain("### Reasoning\\nIt **shines**.\\n\\n> **Label:** good")
    'Reasoning:\\nIt shines.\\n\\nLabel: good'
    """
    return HEADING.sub(_heading, BOLD.sub("", BLOCK_QUOTE.sub("", text)))


def plain_rationale(text: str) -> str:
    """Returns a rationale without surrounding white space and the bullet of a label after it.

    >>> plain_rationale("It shines.\\n- ")
    'It shines.'
    """
    return BULLET.sub("", text.rstrip()).strip()


def _heading(match: re.Match[str]) -> str:
    title = match[1].rstrip(" \t#").removesuffix(":").rstrip()
    return match[1] if ":" in title else f"{title}:"


def plain_label(label: str) -> str:
    """Returns a label without LaTeX, surrounding quotes and a final full stop.

    >>> [plain_label(label) for label in ("$\\\\boxed{72}$.", "`billing`", "3.5.", "U.S.")]
    ['72', 'billing', '3.5', 'U.S.']
    >>> plain_label("$\\\\boxed{\\\\frac{1}{2}}$"), plain_label("\\\\text{Nairobi}")
    ('1/2', 'Nairobi')
    """
    previous = None
    while label != previous:
        previous, label = label, label.strip()
        if label.endswith(".") and re.search(r"\D\.", label[:-1]) is None:
            label = label[:-1].rstrip()
        for opening, closing in QUOTES:
            if len(label) > 2 and label[0] == opening and label[-1] == closing:
                label = label[1:-1]
        boxed = BOXED.fullmatch(label)
        label = boxed[1] if boxed else label
    for pattern, inner in LATEX.items():
        label = pattern.sub(inner, label)
    return label


def is_refusal(text: str) -> bool:
    """Returns whether a text begins as a refusal does."""
    return REFUSAL.match(text) is not None
