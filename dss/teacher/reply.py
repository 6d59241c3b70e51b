"""What an endpoint's reply means, read from its HTTP status and its body alone.

| status | what came | what follows |
|---|---|---|
| answered | text | final |
| refused | the teacher declined, or a filter held the text back | final |
| empty | a reply without a choice or text | tried again |
| malformed | no JSON, or none of the expected form | tried again |
| failed | an error of the server, 5xx | tried again |
| timeout | nothing in time | tried again |
| dropped | the connection broke | tried again |
| unreachable | no connection could be made | tried again |
| limited | 429: too many requests | tried again when told |
| rejected | the request is wrong for this endpoint, other 4xx | not tried again in this run |
| denied | the key is wrong | the run stops |
| exhausted | the quota or the credit is used up | the run stops |
"""

import dataclasses
import json
from typing import Any

from dss.paths import BYTE_ORDER_MARK

__all__ = ["FINAL", "STOPPING", "Reply", "read_reply"]

FINAL = ("answered", "refused")
CUT_OFF = ("timeout", "dropped")
STOPPING = ("denied", "exhausted")
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
NO_CREDIT_TEXT = "credit balance is too low"
WRONG_KEY_TEXT = "API key not valid"  # Gemini says so with 400
MOST_TOKENS = 2**40  # no answer has more; what a database can hold
BESIDE_TEXT = ("reasoning_content", "reasoning", "reasoning_details", "tool_calls")
TRY_AGAIN_CODES = (408, 409, 425)
SHOWN = 300  # characters of a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply as it came, and what it means.

    Attributes:
      status: see the module.
      code: HTTP status; None where no reply came.
      response: the body as it came, or what the connection died of.
      finish_reason: the endpoint's.
      prompt_tokens: that the endpoint counted; None where it counted none.
      cached_tokens: those of them that it had in its cache.
      completion_tokens: of the answer.
    """

    status: str
    code: int | None
    response: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def text(self) -> str:
        """What the teacher wrote; blank where it wrote nothing."""
        return _text(_choice(_decoded(self.response))) if self.status in FINAL else ""

    @property
    def is_silent(self) -> bool:
        """Whether the attempt may have been paid for but brought no count of tokens."""
        return self.prompt_tokens is None and (self.status in CUT_OFF or self.code == 200)

    @property
    def message(self) -> str:
        """What went wrong, on one line."""
        error = _error(_decoded(self.response))
        said = error.get("message") if error else None
        text = said if isinstance(said, str) and said.strip() else self.response
        line = _whole(" ".join(text.split())[:SHOWN])
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        return f"HTTP {self.code}: {line}" if self.code else line


def read_reply(code: int, response: str) -> Reply:
    """Returns what a reply means; never fails, whatever came.

    Args:
      code: HTTP status.
      response: the body.
    """
    value = _decoded(response)
    error = _error(value)
    if 200 <= code < 300 and error:  # some gateways report an upstream's error so
        inner = error.get("code")
        code = inner if isinstance(inner, int) and 400 <= inner < 600 else 502
    if not 200 <= code < 300:
        return Reply(status=_error_status(code, error or {}), code=code, response=response)
    if not isinstance(value, dict) or "choices" not in value:
        return Reply(status="malformed", code=code, response=response)
    choice = _choice(value)
    finish = choice.get("finish_reason")
    message = choice.get("message")
    if finish == "content_filter" or (isinstance(message, dict) and message.get("refusal")):
        status = "refused"
    elif _text(choice).strip() or finish == "length" or _has_more_than_text(message):
        status = "answered"  # without a word too: the same again would be the same
    else:
        status = "empty"
    prompt, cached, completion = _usage(value.get("usage"))
    return Reply(
        status=status,
        code=code,
        response=response,
        finish_reason=_whole(finish) if isinstance(finish, str) else None,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
    )


def _error_status(code: int, error: dict[str, Any]) -> str:
    said = error.get("message")
    said = said if isinstance(said, str) else ""
    if (
        code == 402
        or NO_CREDIT_TEXT in said
        or any(error.get(name) in NO_CREDIT for name in ("code", "type"))
    ):
        return "exhausted"
    if code == 429:
        return "limited"
    if code == 401 or WRONG_KEY_TEXT in said:
        return "denied"
    return "failed" if code >= 500 or code in TRY_AGAIN_CODES else "rejected"


def _decoded(response: str) -> Any:
    try:
        return json.loads(response.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):
        return None


def _error(value: Any) -> dict[str, Any] | None:
    """Returns the error in a decoded body; Gemini's compatible endpoint puts it in a list."""
    if isinstance(value, list) and value:
        value = value[0]
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) and error else None


def _choice(value: Any) -> dict[str, Any]:
    choices = value.get("choices") if isinstance(value, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if isinstance(text, list):  # parts, of which some may be thoughts
        parts = [p.get("text") for p in text if isinstance(p, dict) and p.get("type") == "text"]
        text = "".join(part for part in parts if isinstance(part, str))
    return _whole(text) if isinstance(text, str) else ""


def _has_more_than_text(message: Any) -> bool:
    """Returns whether a message without text has thoughts or calls of tools."""
    return isinstance(message, dict) and any(message.get(name) for name in BESIDE_TEXT)


def _whole(text: str) -> str:
    """Returns a text with a mark in place of half characters, which no file can hold."""
    return text.encode(errors="replace").decode()


def _usage(usage: Any) -> tuple[int | None, int | None, int | None]:
    """Returns the prompt's, the cached and the answer's tokens.

    A reply that lacks one of the first two counts, or has an impossible one, has none: it is then
    paid for as the longest answer. So is a cache with more tokens than the prompt.
    """
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    if prompt is None or completion is None or (cached or 0) > prompt:
        return None, None, None
    return prompt, cached, completion


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS
    return value if is_count else None
