"""Teachers, and the requests sent to them, each identified by a key."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from dss.data.examples import Example
from dss.errors import TeacherError
from dss.teacher.prompt import SEPARATOR, Prompt
from dss.teacher.reply import MOST_TOKENS

__all__ = ["Request", "Teacher", "Writer", "file_name"]

RESERVED_PARAMETERS = ("model", "messages", "prompt", "stream", "n", "best_of")
LIMIT_PARAMETERS = ("max_tokens", "max_completion_tokens")
PATHS = {"chat": "/chat/completions", "completions": "/completions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model behind an OpenAI-compatible endpoint, and the settings of its requests.

    Attributes:
      model: name of the model at the endpoint.
      base_url: URL of the endpoint, including its version, such as https://host/v1.
      api: "chat" sends the exemplars as turns of a conversation, "completions" as one text.
      parameters: request parameters, which override the prompt's; None removes one.
      samples: number of answers per example, each from a separate request.
      hinted: whether to show the gold label and ask only for the rationale.
    """

    model: str
    base_url: str
    api: Literal["chat", "completions"] = "chat"
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 1
    hinted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        invalid_url = TeacherError(f"`base_url={self.base_url}`: give one like https://host/v1")
        try:
            parts = urlsplit(self.base_url)
            port = parts.port
        except ValueError:
            raise invalid_url from None
        is_url = parts.scheme in ("http", "https") and parts.hostname and port != 0
        if not is_url or not re.fullmatch(r"[!-~]+", self.base_url):
            raise invalid_url
        if parts.username or parts.password or parts.query or parts.fragment:
            raise TeacherError(
                "`base_url`: contains a user name, a query or a fragment; give the plain URL, and "
                "the API key in the environment"
            )
        if not self.model.isprintable() or not self.model.strip():
            raise TeacherError(f"`model` {self.model!r}: give the model's name at the endpoint")
        if self.samples < 1:
            raise TeacherError(f"`samples={self.samples}`: give at least 1")

    @property
    def path(self) -> str:
        """URL path of requests, relative to the base URL."""
        return PATHS[self.api]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a teacher.

    Attributes:
      key: SHA-256 of endpoint, model, messages, parameters and sample, in hexadecimal.
      example: id of the example.
      sample: index of the sample, from 0.
      question: text of the question, which follows the exemplars.
      characters: length of all the text sent.
    """

    key: str
    example: str
    sample: int
    question: str
    characters: int


class Writer:
    """Builds the requests about examples; the exemplars are rendered once."""

    def __init__(self, prompt: Prompt, teacher: Teacher):
        """Makes a writer.

        Raises:
          TeacherError: if a request parameter is invalid, or the prompt has no form for hint mode.
        """
        self.prompt, self.teacher = prompt, teacher
        parameters = {**prompt.parameters, "stop": list(prompt.stop) or None, **teacher.parameters}
        self._parameters = {name: value for name, value in parameters.items() if value is not None}
        _check_parameters(self._parameters, teacher.samples)
        if teacher.samples > 1 and self._parameters.get("temperature") == 0:
            raise TeacherError(
                f"`samples={teacher.samples}` at temperature 0 would buy the same answer "
                f"{teacher.samples} times; give a `temperature`"
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
        is_chat = teacher.api == "chat"
        length = sum(len(m["content"]) for m in self._messages) if is_chat else len(self._text)
        self._common_characters = length
        # Every key is a hash that starts with the common part of all requests.
        common = {"base_url": teacher.base_url, "path": teacher.path, "body": self._body("")}
        self._hash = hashlib.sha256(json.dumps(common, sort_keys=True).encode())

    @property
    def most_tokens(self) -> int | None:
        """Limit on the tokens of an answer; None without a limit."""
        limits = [self._parameters[name] for name in LIMIT_PARAMETERS if name in self._parameters]
        return max(limits, default=None)

    def body(self, request: Request) -> dict[str, Any]:
        """Returns the JSON body of a request."""
        return self._body(request.question)

    def _body(self, question: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.teacher.model}
        if self.teacher.api == "chat":
            body["messages"] = [*self._messages, {"role": "user", "content": question}]
        else:
            body["prompt"] = self._text + question
        return body | self._parameters

    def requests(self, example: Example) -> list[Request]:
        """Returns the requests about an example, one per sample.

        Raises:
          TeacherError: if the example does not fit the prompt; see `Prompt.question`.
        """
        question = self.prompt.question(example, hinted=self.teacher.hinted)
        out = []
        for sample in range(self.teacher.samples):
            key = self._hash.copy()
            key.update(json.dumps([question, sample]).encode())
            characters = self._common_characters + len(question)
            out.append(Request(key.hexdigest(), example.id, sample, question, characters))
        return out

    def show(self, request: Request) -> str:
        """Returns a request's text for display."""
        body = self.body(request)
        if "prompt" in body:
            return body["prompt"]
        return "\n".join(f"[{m['role']}] {m['content']}" for m in body["messages"])


def _check_parameters(parameters: Mapping[str, Any], samples: int) -> None:
    for name in RESERVED_PARAMETERS:
        if name in parameters:
            raise TeacherError(f"parameter {name!r}: is set by dss; see `model` and `samples`")
    if samples > 1 and "seed" in parameters:
        raise TeacherError(
            f"parameter 'seed': would make all {samples} samples the same; leave it out"
        )
    try:
        json.dumps(parameters, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise TeacherError(f"parameters: cannot be sent as JSON: {error}") from None
    for name in LIMIT_PARAMETERS:
        value = parameters.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MOST_TOKENS:
            raise TeacherError(f"parameter {name!r}: is {value!r}; give a whole number of tokens")


def file_name(model: str) -> str:
    """Returns a model's name in a form that fits into a file name.

    A name with non-ASCII letters, which are replaced, gets a hash so that it stays unique.

    >>> file_name("Qwen/Qwen2.5-7B")
    'Qwen_Qwen2.5-7B'
    >>> file_name("模型")
    '__-c98e'
    """
    name = re.sub(r"[^\w.-]", "_", model, flags=re.ASCII).strip(".") or "teacher"
    if model.isascii():
        return name
    return f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:4]}"
