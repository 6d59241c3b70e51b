"""What a teacher is asked, and how its text is read: one YAML file a task.

    instruction      text that stands first (the system message of a chat); may be missing
    exemplars        a list of {input, rationale, label}
    form             {question, answer, pattern}: two Jinja templates and a regular expression
    hint             the same for hint mode, where the gold label is shown; may be missing
    choices_pattern  a regular expression with one group: the answers that an input offers
    labels           the closed set of labels; without it and choices any text is one
    metric           "text" or "equation": when two labels are the same
    stop             where the next question would begin; the text after it is not read
    parameters       of the request, such as max_tokens and temperature

Templates see `input`, `choices` (the answers offered, or the labels), and in an answer or a hint
`label` and `rationale`; a name that is not defined is an error, and they run in a sandbox. A
pattern has the groups `rationale` and `label`.
"""

import dataclasses
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import regex
import yaml

from dss.data.equations import plain_equation
from dss.data.examples import Example
from dss.data.labels import ANY_LABEL, Labels, read_label
from dss.data.metrics import METRICS
from dss.errors import UserError, unknown_name
from dss.teacher.answers import (
    is_refusal,
    plain,
    plain_label,
    plain_rationale,
    read_json_answer,
    without_thoughts,
)

__all__ = [
    "Exemplar",
    "Form",
    "Parsed",
    "Prompt",
    "load_prompt",
    "prompt_names",
    "read_prompt",
    "with_labels",
]

SHIPPED = importlib.resources.files("dss.teacher") / "prompts"
OURS = ("name", "source")  # fields of a prompt that its file does not give
REASON = re.compile(r"[(,;:\n]| because | - | – | — ")  # begins what follows a label
SEARCH_SECONDS = 5  # for a prompt's own pattern in a text; one that backtracks may take for ever
SEPARATOR = "\n\n"  # between the exemplars of a plain completion
ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """An example with its answer, shown to the teacher."""

    input: str
    rationale: str
    label: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What was found in a text: a blank rationale or a label of None is one that was not.

    A text may also decline to answer; then it has neither.
    """

    rationale: str
    label: str | None
    is_refusal: bool = False
    reason: str | None = None  # why nothing was looked for in the whole text


@dataclasses.dataclass(frozen=True)
class Form:
    """How a question and its answer are written.

    Attributes:
      question: Jinja template of what the teacher reads.
      answer: Jinja template of what it should write after it.
      pattern: finds `rationale` and `label` in what it wrote.
    """

    question: jinja2.Template
    answer: jinja2.Template
    pattern: regex.Pattern[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a teacher is asked about the examples of a task; see the module."""

    name: str
    exemplars: tuple[Exemplar, ...]
    form: Form
    hint: Form | None = None
    instruction: str = ""
    choices_pattern: regex.Pattern[str] | None = None
    labels: Labels = ANY_LABEL
    stop: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""  # the YAML text

    def choices(self, text: str) -> tuple[str, ...]:
        """Returns the labels that are possible for an input; none where any text is."""
        if self.choices_pattern is None:
            return self.labels.closed
        try:
            found = self.choices_pattern.findall(text, timeout=SEARCH_SECONDS)
        except TimeoutError:
            raise UserError(
                f"prompt {self.name}: choices_pattern takes more than {SEARCH_SECONDS} s on an "
                f"input that begins {text[:40]!r}; make it simpler"
            ) from None
        return tuple(choice.strip() for choice in found)

    def turns(self, *, hinted: bool = False) -> list[tuple[str, str]]:
        """Returns (question, answer) of each exemplar.

        Raises:
          UserError: one of them cannot be written with the templates.
        """
        form = self._form(hinted)
        out = []
        for number, shown in enumerate(self.exemplars, 1):
            where = f"prompt {self.name}: exemplar {number}"
            values = self._values(shown.input) | {"label": shown.label}
            question = _render(where, form.question, values)
            answer = _render(where, form.answer, values | {"rationale": shown.rationale})
            out.append((question, answer))
        return out

    def question(self, example: Example, *, hinted: bool = False) -> str:
        """Returns what the teacher reads of an example.

        Raises:
          UserError: the template does not fit the example, or there is no gold label to show.
        """
        values: dict[str, Any] = self._values(example.input)
        if hinted:
            if example.label is None:
                raise UserError(f"example {example.id!r} has no label, which --hint would show")
            values["label"] = example.label
        return _render(f"example {example.id!r}", self._form(hinted).question, values)

    def parse(self, text: str, example: Example, *, hinted: bool = False) -> Parsed:
        """Returns the rationale and the label in a teacher's text about an example.

        Thoughts in `<think>` tags are left out, and the text ends at the first stop sequence. An
        answer in JSON is read as such. In any other, Markdown and LaTeX around the parts are
        forgiven. A label outside the possible ones, or that the metric cannot read, is none;
        letters of another case are forgiven. In hint mode the label is the one that was shown,
        and a text that concludes another one has no label.
        """
        text = without_thoughts(text)
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        text = text[: min(ends, default=None)]
        answer = read_json_answer(text)
        if answer:
            rationale, label = answer.rationale or "", answer.label
        else:
            try:
                rationale, label = self._search(plain(text), example, hinted)
            except TimeoutError:
                return Parsed("", None, reason=f"the pattern took more than {SEARCH_SECONDS} s")
        if self._declines(text, label, example.input):
            return Parsed("", None, is_refusal=True)
        possible = self._possible(label, example.input) if label else None
        if hinted:
            assert example.label is not None
            wrong = label and not (possible and self.labels.is_right(possible, example.label))
            possible = None if wrong else example.label
        return Parsed(rationale, possible)

    def _search(self, text: str, example: Example, hinted: bool) -> tuple[str, str | None]:
        """Returns what the pattern finds; the question's last word, such as `Reasoning:`, may be
        repeated before the rationale.
        """
        match = self._form(hinted).pattern.search(text, timeout=SEARCH_SECONDS)
        if match is None:
            return "", None
        found = match.groupdict()
        rationale = plain_rationale(found["rationale"] or "")
        cue = self.question(example, hinted=hinted).rpartition("\n")[2].strip()
        if cue.endswith(":") and rationale.casefold().startswith(cue.casefold()):
            rationale = rationale[len(cue) :].strip()
        return rationale, read_label(found.get("label"))

    def _declines(self, text: str, label: str | None, given: str) -> bool:
        """Returns whether a text declines to answer: all of it or, where any words may be a label,
        its label. One word, such as "Sorry", may be an answer.
        """
        if label is None:
            return is_refusal(text)
        return " " in label and not self.choices(given) and is_refusal(label)

    def _possible(self, label: str, text: str) -> str | None:
        """Returns the label as the prompt writes it; None where it is not a possible one."""
        choices = self.choices(text)
        if label in choices:
            return label
        if not choices:
            label = plain_label(label)
            if self.labels.metric == "equation":
                label = plain_equation(label)
            return label if label and self.labels.is_readable(label) else None
        folded = {choice.casefold(): choice for choice in choices}
        for words in (label, label.rstrip(". "), plain_label(label)):
            if words.casefold() in folded:
                return folded[words.casefold()]
        # A reason may follow, but no other choice: "billing (it is about money)".
        head, _, reason = REASON.sub("\0", label, count=1).partition("\0")
        choice = folded.get(plain_label(head).casefold())
        others = (re.escape(other) for other in folded if folded[other] != choice)
        if choice and not re.search(rf"\b(?:{'|'.join(others)})\b", reason.casefold()):
            return choice
        return None

    def _form(self, hinted: bool) -> Form:
        if not hinted:
            return self.form
        if self.hint is None:
            raise UserError(f"prompt {self.name}: has no `hint`, which --hint needs")
        return self.hint

    def _values(self, text: str) -> dict[str, Any]:
        return {"input": text, "choices": list(self.choices(text))}


def _render(where: str, template: jinja2.Template, values: Mapping[str, Any]) -> str:
    try:
        return template.render(values)
    except Exception as error:  # whatever a template's expression raises
        raise UserError(f"{where}: does not fit the template: {error}") from None


def prompt_names() -> list[str]:
    """Returns the names of the prompts that are shipped."""
    files = (Path(str(file)) for file in SHIPPED.iterdir())
    return sorted(file.stem for file in files if file.suffix == ".yaml")


def load_prompt(source: str) -> Prompt:
    """Returns a prompt: the name of a shipped one, or a YAML file.

    Raises:
      UserError: there is none, or see `read_prompt`.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        where, name = str(path), path.stem
    elif source in prompt_names():
        where, name, path = f"prompt {source}", source, Path(str(SHIPPED / f"{source}.yaml"))
    else:
        raise unknown_name("prompt", source, prompt_names())
    try:
        return read_prompt(where, name, path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_prompt(where: str, name: str, text: str) -> Prompt:
    """Returns the prompt of a YAML text.

    Raises:
      UserError: names `where` it stands; something is wrong, or the exemplars' own answers do not
        give their rationale and label when they are parsed.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{where}{line}: not YAML: {problem}") from None
    prompt = dataclasses.replace(_read(where, name, content), source=text)
    for hinted in (False, True) if prompt.hint else (False,):
        _check_exemplars(where, prompt, hinted)
    return prompt


def with_labels(prompt: Prompt, labels: Labels) -> Prompt:
    """Returns a prompt as its file would be with these labels and their metric.

    Raises:
      UserError: if an exemplar's label is none of them.
    """
    if labels == prompt.labels:
        return prompt
    content = yaml.safe_load(prompt.source)
    content |= {"labels": [*labels.closed], "metric": labels.metric}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    return read_prompt(f"prompt {prompt.name}", prompt.name, text)


def _read(where: str, name: str, content: Any) -> Prompt:
    fields = [field.name for field in dataclasses.fields(Prompt) if field.name not in OURS]
    fields.append("metric")  # of the labels
    values = _mapping(where, content, fields, ("exemplars", "form"))
    exemplars = values["exemplars"]
    if not isinstance(exemplars, list):
        raise UserError(f"{where}: exemplars: should be a list")
    keys = [field.name for field in dataclasses.fields(Exemplar)]
    shown = []
    for number, value in enumerate(exemplars, 1):
        at = f"{where}: exemplar {number}"
        value = _mapping(at, value, keys, keys)
        shown.append(Exemplar(**{key: _text(f"{at}: {key}", value[key]) for key in keys}))
    metric = _text(f"{where}: metric", values.get("metric", "text"))
    if metric not in METRICS:
        raise UserError(f"{where}: {unknown_name('metric', metric, METRICS)}")
    choices = values.get("choices_pattern")
    choices = None if choices is None else _pattern(f"{where}: choices_pattern", choices)
    if choices is not None and choices.groups != 1:
        raise UserError(f"{where}: choices_pattern: has {choices.groups} groups; give it one")
    stop = _texts(f"{where}: stop", values.get("stop", []))
    if not all(stop):
        raise UserError(f"{where}: stop: an empty text stops at once")
    parameters = values.get("parameters", {})
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: parameters: should be NAME: VALUE lines")
    return Prompt(
        name=name,
        exemplars=tuple(shown),
        form=_read_form(f"{where}: form", values["form"], ("rationale", "label")),
        hint=_read_form(f"{where}: hint", values["hint"], ("rationale",))
        if values.get("hint")
        else None,
        instruction=_text(f"{where}: instruction", values.get("instruction", "")),
        choices_pattern=choices,
        labels=Labels(_texts(f"{where}: labels", values.get("labels", [])), metric),
        stop=stop,
        parameters=parameters,
    )


def _read_form(where: str, content: Any, groups: Sequence[str]) -> Form:
    keys = ("question", "answer", "pattern")
    values = _mapping(where, content, keys, keys)
    question, answer = (_template(f"{where}: {key}", values[key]) for key in keys[:2])
    pattern = _pattern(f"{where}: pattern", values["pattern"])
    for group in groups:
        if group not in pattern.groupindex:
            raise UserError(f"{where}: pattern: has no group (?P<{group}>...)")
    return Form(question, answer, pattern)


def _template(where: str, value: Any) -> jinja2.Template:
    try:
        return ENVIRONMENT.from_string(_text(where, value))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: not a Jinja template: {error}") from None


def _check_exemplars(where: str, prompt: Prompt, hinted: bool) -> None:
    answers = [answer for _, answer in prompt.turns(hinted=hinted)]
    for number, (shown, answer) in enumerate(zip(prompt.exemplars, answers, strict=True), 1):
        example = Example(str(number), shown.input, shown.label)
        parsed = prompt.parse(answer, example, hinted=hinted)
        if parsed != Parsed(shown.rationale, shown.label):
            raise UserError(
                f"{where}: exemplar {number}: its own answer {answer!r} parses as rationale "
                f"{parsed.rationale!r} and label {parsed.label!r}; mend the pattern or the labels"
            )


def _mapping(where: str, value: Any, known: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: should have {', '.join(needed)}, as NAME: VALUE lines")
    for key in value:
        if key not in known:
            raise UserError(f"{where}: {unknown_name('name', str(key), known)}")
    for key in needed:
        if key not in value:
            raise UserError(f"{where}: has no `{key}`")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {value!r} is a {type(value).__name__}; put text in quotes")
    try:  # JSON writes what is beyond the first 65,536 characters in two halves
        value = value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise UserError(f"{where}: holds half a character") from None
    return value.strip() if where.endswith(("input", "rationale", "label")) else value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: should be a list of texts")
    return tuple(_text(where, item) for item in value)


def _pattern(where: str, value: Any) -> regex.Pattern[str]:
    try:
        return regex.compile(_text(where, value))
    except regex.error as error:
        raise UserError(f"{where}: not a regular expression: {error}") from None
