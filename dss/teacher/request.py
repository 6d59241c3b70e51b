"""A teacher and the requests that are sent to it, each known by a key."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from dss.data.examples import Example
from dss.errors import UserError
from dss.teacher.prompt import SEPARATOR, Prompt
from dss.teacher.reply import MOST_TOKENS

__all__ = ["Request", "Teacher", "Writer", "file_name"]

OURS = ("model", "messages", "prompt", "stream", "n", "best_of")  # parameters that we set
MOST = ("max_tokens", "max_completion_tokens")  # parameters that limit an answer
PATHS = {"chat": "/chat/completions", "completions": "/completions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model behind an OpenAI-compatible endpoint, and how it is asked.

    Attributes:
      model: its name at the endpoint.
      base_url: of the endpoint, up to and with its version, as https://host/v1.
      api: "chat" shows the exemplars as turns of a conversation; "completions" as one text.
      parameters: of every request, over the prompt's; None takes one away.
      samples: answers an example, each a request of its own.
      hinted: the gold label is shown and only the rationale asked.
    """

    model: str
    base_url: str
    api: Literal["chat", "completions"] = "chat"
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 1
    hinted: bool = False

    def __post_init__(self):
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        wrong = UserError(f"--base-url {self.base_url!r}: give one like https://host/v1")
        try:
            parts = urlsplit(self.base_url)
            port = parts.port
        except ValueError:
            raise wrong from None
        is_url = parts.scheme in ("http", "https") and parts.hostname and port != 0
        if not is_url or not re.fullmatch(r"[!-~]+", self.base_url):
            raise wrong
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError("--base-url: holds a key or a query; give the key in the environment")
        if not self.model.isprintable() or not self.model.strip():
            raise UserError(f"--teacher {self.model!r}: is no model's name")
        if self.samples < 1:
            raise UserError(f"--samples {self.samples}: give at least 1")

    @property
    def path(self) -> str:
        """Where requests are sent to, below the base URL."""
        return PATHS[self.api]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a teacher.

    Attributes:
      key: SHA-256 over endpoint, model, messages, parameters and sample, in hexadecimal.
      example: the example's id.
      sample: which of the samples it is, from 0.
      question: what is asked after the exemplars.
      characters: of all the text that is sent.
    """

    key: str
    example: str
    sample: int
    question: str
    characters: int


class Writer:
    """Writes the requests about examples; the exemplars are rendered once."""

    def __init__(self, prompt: Prompt, teacher: Teacher):
        """Raises UserError where the prompt and the teacher do not go together."""
        self.prompt, self.teacher = prompt, teacher
        named = {**prompt.parameters, "stop": list(prompt.stop) or None, **teacher.parameters}
        self._parameters = {name: value for name, value in named.items() if value is not None}
        _check_parameters(self._parameters, teacher.samples)
        if teacher.samples > 1 and self._parameters.get("temperature") == 0:
            raise UserError(
                f"--samples {teacher.samples} at temperature 0 would buy the same answer "
                f"{teacher.samples} times; give --temperature"
            )
        turns = prompt.turns(hinted=teacher.hinted)
        self._messages: list[dict[str, str]] = []
        if prompt.instruction:
            self._messages.append({"role": "system", "content": prompt.instruction})
        for question, answer in turns:
            self._messages.append({"role": "user", "content": question})
            self._messages.append({"role": "assistant", "content": answer.strip()})
        blocks = [prompt.instruction] if prompt.instruction else []
        blocks += [question + answer for question, answer in turns]
        self._text = "".join(block + SEPARATOR for block in blocks)
        chat = teacher.api == "chat"
        shown = sum(len(m["content"]) for m in self._messages) if chat else len(self._text)
        self._shown_characters = shown
        # The key's hash begins with what all requests have in common.
        common = {"base_url": teacher.base_url, "path": teacher.path, "body": self._body("")}
        self._hash = hashlib.sha256(json.dumps(common, sort_keys=True).encode())

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that an answer may have; None where nothing limits it."""
        return max(
            (self._parameters[name] for name in MOST if name in self._parameters), default=None
        )

    def body(self, request: Request) -> dict[str, Any]:
        """Returns what is sent."""
        return self._body(request.question)

    def _body(self, question: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.teacher.model}
        if self.teacher.api == "chat":
            body["messages"] = [*self._messages, {"role": "user", "content": question}]
        else:
            body["prompt"] = self._text + question
        return body | self._parameters

    def requests(self, example: Example) -> list[Request]:
        """Returns the requests about an example, one a sample.

        Raises:
          UserError: see `Prompt.question`.
        """
        question = self.prompt.question(example, hinted=self.teacher.hinted)
        out = []
        for sample in range(self.teacher.samples):
            key = self._hash.copy()
            key.update(json.dumps([question, sample]).encode())
            characters = self._shown_characters + len(question)
            out.append(Request(key.hexdigest(), example.id, sample, question, characters))
        return out

    def show(self, request: Request) -> str:
        """Returns a request's text for people to read."""
        body = self.body(request)
        if "prompt" in body:
            return body["prompt"]
        return "\n".join(f"[{m['role']}] {m['content']}" for m in body["messages"])


def _check_parameters(parameters: Mapping[str, Any], samples: int) -> None:
    for name in OURS:
        if name in parameters:
            raise UserError(f"parameter {name!r}: is not yours to set; see --teacher and --samples")
    if samples > 1 and "seed" in parameters:
        raise UserError(
            f"parameter 'seed': would make all {samples} samples the same; leave it out"
        )
    try:
        json.dumps(parameters, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"parameters: cannot be sent as JSON: {error}") from None
    for name in MOST:
        value = parameters.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MOST_TOKENS:
            raise UserError(f"parameter {name!r}: is {value!r}; give a whole number of tokens")


def file_name(model: str) -> str:
    """Returns a model's name as a part of a file's name.

    Names that have lost a letter keep a hash of what they were, so that they differ.

    >>> file_name("Qwen/Qwen2.5-7B")
    'Qwen_Qwen2.5-7B'
    >>> file_name("模型")
    '__-c98e'
    """
    name = re.sub(r"[^\w.-]", "_", model, flags=re.ASCII).strip(".") or "teacher"
    if model.isascii():
        return name
    return f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:4]}"
