"""Prompts: the text of requests and the parsing of answers, in one YAML file per task.

    instruction      text at the start (the system message of a chat); optional
    exemplars        list of {input, rationale, label}
    form             {question, answer, pattern}: two Jinja templates and a regular expression
    hint             the same for hint mode, which shows the gold label; optional
    choices_pattern  regular expression with one group, which matches each choice in an input
    labels           closed set of labels; without it and without choices, any text is a label
    metric           "text" or "equation": how labels are compared
    stop             stop sequences, such as the start of a next question
    parameters       request parameters, such as max_tokens and temperature

Templates may use `input`, `choices` (the choices in the input, or the labels) and, in an answer or
a hint, `label` and `rationale`. An undefined name is an error. Templates run in a sandbox. A
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
from dss.errors import TeacherError, unknown_name
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
INTERNAL_FIELDS = ("name", "source")  # fields that a prompt's file does not have
REASON = re.compile(r"[(,;:\n]| because | - | – | — ")  # separates a label from a reason after it
SEARCH_SECONDS = 5  # time limit for a prompt's pattern, which may backtrack for very long
SEPARATOR = "\n\n"  # between the exemplars of a plain completion
ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """A few-shot example with its answer."""

    input: str
    rationale: str
    label: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Rationale and label of a text: empty and None if not found. A refusal has neither."""

    rationale: str
    label: str | None
    is_refusal: bool = False
    reason: str | None = None  # why the search was given up


@dataclasses.dataclass(frozen=True)
class Form:
    """Templates of a question and its answer, and the pattern that parses answers.

    Attributes:
      question: Jinja template of the question.
      answer: Jinja template of the expected answer.
      pattern: regular expression that finds `rationale` and `label` in an answer.
    """

    question: jinja2.Template
    answer: jinja2.Template
    pattern: regex.Pattern[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a task; the module describes the fields."""

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
        """Returns the possible labels of an input; empty if any text is a label.

        Raises:
          TeacherError: if `choices_pattern` exceeds its time limit.
        """
        if self.choices_pattern is None:
            return self.labels.closed
        try:
            matches = self.choices_pattern.findall(text, timeout=SEARCH_SECONDS)
        except TimeoutError:
            raise TeacherError(
                f"prompt {self.name}: choices_pattern takes more than {SEARCH_SECONDS} s on an "
                f"input that begins with {text[:40]!r}; simplify the pattern"
            ) from None
        return tuple(choice.strip() for choice in matches)

    def turns(self, *, hinted: bool = False) -> list[tuple[str, str]]:
        """Returns (question, answer) of each exemplar.

        Raises:
          TeacherError: if an exemplar does not fit the templates.
        """
        form = self._form(hinted)
        out = []
        for number, exemplar in enumerate(self.exemplars, 1):
            where = f"prompt {self.name}: exemplar {number}"
            values = self._values(exemplar.input) | {"label": exemplar.label}
            question = _render(where, form.question, values)
            answer = _render(where, form.answer, values | {"rationale": exemplar.rationale})
            out.append((question, answer))
        return out

    def question(self, example: Example, *, hinted: bool = False) -> str:
        """Returns the question about an example.

        Raises:
          TeacherError: if the example does not fit the template or, in hint mode, has no gold
            label.
        """
        values: dict[str, Any] = self._values(example.input)
        if hinted:
            if example.label is None:
                raise TeacherError(f"example {example.id!r} has no label, which `hinted` needs")
            values["label"] = example.label
        return _render(f"example {example.id!r}", self._form(hinted).question, values)

    def parse(self, text: str, example: Example, *, hinted: bool = False) -> Parsed:
        """Returns the rationale and the label in a teacher's text about an example.

        Thoughts in `<think>` tags are removed, and the text is truncated at the first stop
        sequence. An answer in JSON is decoded; in any other, the pattern is applied, and Markdown
        and LaTeX around the parts are removed. A label is None if it is not a possible one, in
        upper or lower case, or if the metric cannot read it. In hint mode the label is the gold
        label, or None if the text concludes another one.
        """
        text = without_thoughts(text)
        ends = [index for index in map(text.find, self.stop) if index >= 0]
        text = text[: min(ends, default=None)]
        answer = read_json_answer(text)
        if answer:
            rationale, label = answer.rationale or "", answer.label
        else:
            try:
                rationale, label = self._search(plain(text), example, hinted)
            except TimeoutError:
                return Parsed("", None, reason=f"the pattern took more than {SEARCH_SECONDS} s")
        if self._is_refusal(text, label, example.input):
            return Parsed("", None, is_refusal=True)
        possible = self._possible_label(label, example.input) if label else None
        if hinted:
            assert example.label is not None
            is_wrong = label and not (possible and self.labels.is_right(possible, example.label))
            possible = None if is_wrong else example.label
        return Parsed(rationale, possible)

    def _search(self, text: str, example: Example, hinted: bool) -> tuple[str, str | None]:
        """Returns the rationale and the label that the pattern finds.

        A cue that ends the question, such as `Reasoning:`, is removed if the rationale repeats it.
        """
        match = self._form(hinted).pattern.search(text, timeout=SEARCH_SECONDS)
        if match is None:
            return "", None
        groups = match.groupdict()
        rationale = plain_rationale(groups["rationale"] or "")
        cue = self.question(example, hinted=hinted).rpartition("\n")[2].strip()
        if cue.endswith(":") and rationale.casefold().startswith(cue.casefold()):
            rationale = rationale[len(cue) :].strip()
        return rationale, read_label(groups.get("label"))

    def _is_refusal(self, text: str, label: str | None, input_text: str) -> bool:
        """Returns whether a text without a label, or a label where any text is one, is a refusal.

        One word, such as "Sorry", may be an answer.
        """
        if label is None:
            return is_refusal(text)
        return " " in label and not self.choices(input_text) and is_refusal(label)

    def _possible_label(self, label: str, input_text: str) -> str | None:
        """Returns the label in the prompt's spelling; None if it is not a possible one."""
        choices = self.choices(input_text)
        if label in choices:
            return label
        if not choices:
            label = plain_label(label)
            if self.labels.metric == "equation":
                label = plain_equation(label)
            return label if label and self.labels.is_readable(label) else None
        folded = {choice.casefold(): choice for choice in choices}
        for candidate in (label, label.rstrip(". "), plain_label(label)):
            if candidate.casefold() in folded:
                return folded[candidate.casefold()]
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
            raise TeacherError(f"prompt {self.name}: has no form 'hint', which `hinted` needs")
        return self.hint

    def _values(self, text: str) -> dict[str, Any]:
        return {"input": text, "choices": list(self.choices(text))}


def _render(where: str, template: jinja2.Template, values: Mapping[str, Any]) -> str:
    try:
        return template.render(values)
    except Exception as error:  # an expression in a template may raise any
        raise TeacherError(f"{where}: does not fit the template: {error}") from None


def prompt_names() -> list[str]:
    """Returns the names of the shipped prompts."""
    files = (Path(str(file)) for file in SHIPPED.iterdir())
    return sorted(file.stem for file in files if file.suffix == ".yaml")


def load_prompt(source: str) -> Prompt:
    """Returns the prompt of a name (a shipped one) or of a YAML file.

    Raises:
      TeacherError: if there is no such prompt, or it is invalid; see `read_prompt`.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        where, name = str(path), path.stem
    elif source in prompt_names():
        where, name, path = f"prompt {source}", source, Path(str(SHIPPED / f"{source}.yaml"))
    else:
        raise unknown_name("prompt", source, prompt_names(), TeacherError)
    try:
        return read_prompt(where, name, path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TeacherError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise TeacherError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_prompt(where: str, name: str, text: str) -> Prompt:
    """Returns the prompt of a YAML text.

    Args:
      where: location of the text, for error messages.
      name: name of the prompt.
      text: YAML text.

    Raises:
      TeacherError: if the text is invalid, or an exemplar's own answer does not parse as its
        rationale and label.
    """
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise TeacherError(f"{where}{line}: not YAML: {problem}") from None
    prompt = dataclasses.replace(_read(where, name, content), source=text)
    for hinted in (False, True) if prompt.hint else (False,):
        _check_exemplars(where, prompt, hinted)
    return prompt


def with_labels(prompt: Prompt, labels: Labels) -> Prompt:
    """Returns a prompt with other labels and their metric.

    Raises:
      TeacherError: if an exemplar's label is not one of them.
    """
    if labels == prompt.labels:
        return prompt
    content = yaml.safe_load(prompt.source)
    content |= {"labels": [*labels.closed], "metric": labels.metric}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    return read_prompt(f"prompt {prompt.name}", prompt.name, text)


def _read(where: str, name: str, content: Any) -> Prompt:
    names = [field.name for field in dataclasses.fields(Prompt)]
    fields = [name for name in names if name not in INTERNAL_FIELDS]
    fields.append("metric")  # of the labels
    values = _mapping(where, content, fields, ("exemplars", "form"))
    exemplars = values["exemplars"]
    if not isinstance(exemplars, list):
        raise TeacherError(f"{where}: exemplars: should be a list")
    keys = [field.name for field in dataclasses.fields(Exemplar)]
    parsed = []
    for number, value in enumerate(exemplars, 1):
        location = f"{where}: exemplar {number}"
        value = _mapping(location, value, keys, keys)
        parsed.append(Exemplar(**{key: _text(f"{location}: {key}", value[key]) for key in keys}))
    metric = _text(f"{where}: metric", values.get("metric", "text"))
    if metric not in METRICS:
        raise TeacherError(f"{where}: {unknown_name('metric', metric, METRICS)}")
    choices = values.get("choices_pattern")
    choices = None if choices is None else _pattern(f"{where}: choices_pattern", choices)
    if choices is not None and choices.groups != 1:
        raise TeacherError(f"{where}: choices_pattern: has {choices.groups} groups; give it one")
    stop = _texts(f"{where}: stop", values.get("stop", []))
    if not all(stop):
        raise TeacherError(f"{where}: stop: an empty text would end every answer at its start")
    parameters = values.get("parameters", {})
    if not isinstance(parameters, dict):
        raise TeacherError(f"{where}: parameters: should be NAME: VALUE lines")
    return Prompt(
        name=name,
        exemplars=tuple(parsed),
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
            raise TeacherError(f"{where}: pattern: has no group (?P<{group}>...)")
    return Form(question, answer, pattern)


def _template(where: str, value: Any) -> jinja2.Template:
    try:
        return ENVIRONMENT.from_string(_text(where, value))
    except jinja2.TemplateSyntaxError as error:
        raise TeacherError(f"{where}: not a Jinja template: {error}") from None


def _check_exemplars(where: str, prompt: Prompt, hinted: bool) -> None:
    answers = [answer for _, answer in prompt.turns(hinted=hinted)]
    for number, (exemplar, answer) in enumerate(zip(prompt.exemplars, answers, strict=True), 1):
        example = Example(str(number), exemplar.input, exemplar.label)
        parsed = prompt.parse(answer, example, hinted=hinted)
        if parsed != Parsed(exemplar.rationale, exemplar.label):
            raise TeacherError(
                f"{where}: exemplar {number}: its own answer {answer!r} parses as rationale "
                f"{parsed.rationale!r} and label {parsed.label!r}; fix the pattern or the labels"
            )


def _mapping(
    where: str, value: Any, allowed: Sequence[str], required: Sequence[str]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TeacherError(f"{where}: should have {', '.join(required)}, as NAME: VALUE lines")
    for key in value:
        if key not in allowed:
            raise TeacherError(f"{where}: {unknown_name('name', str(key), allowed)}")
    for key in required:
        if key not in value:
            raise TeacherError(f"{where}: has no `{key}`")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TeacherError(f"{where}: {value!r} is a {type(value).__name__}; put text in quotes")
    try:  # joins surrogate pairs, in which JSON escapes characters above U+FFFF
        value = value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise TeacherError(f"{where}: contains an unpaired surrogate, half a character") from None
    return value.strip() if where.endswith(("input", "rationale", "label")) else value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TeacherError(f"{where}: should be a list of texts")
    return tuple(_text(where, item) for item in value)


def _pattern(where: str, value: Any) -> regex.Pattern[str]:
    try:
        return regex.compile(_text(where, value))
    except regex.error as error:
        raise TeacherError(f"{where}: not a regular expression: {error}") from None
