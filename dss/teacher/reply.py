"""Classification of an endpoint's reply by its HTTP status and body.

| status | reply | consequence |
|---|---|---|
| answered | text | final |
| refused | a refusal of the model, or a content filter | final |
| empty | no choice or no text | retried |
| malformed | not JSON, or not of the expected structure | retried |
| failed | server error, 5xx | retried |
| timeout | no complete reply in time | retried |
| dropped | broken connection | retried |
| unreachable | no connection | retried |
| limited | 429: too many requests | retried after a wait |
| rejected | request invalid for this endpoint, other 4xx; redirect | not retried in this run |
| denied | wrong API key | the run stops |
| exhausted | quota or credit used up | the run stops |
"""

import dataclasses
import json
from typing import Any

from dss.paths import BYTE_ORDER_MARK

__all__ = ["FINAL", "STOPPING", "Reply", "read_reply"]

FINAL = ("answered", "refused")
NO_REPLY = ("timeout", "dropped")  # the request may have been processed and charged
STOPPING = ("denied", "exhausted")
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
NO_CREDIT_TEXT = "credit balance is too low"
WRONG_KEY_TEXT = "API key not valid"  # Gemini's message, with HTTP status 400
MOST_TOKENS = 2**40  # bound of plausible counts, which a database integer can hold
NON_TEXT_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "tool_calls")
RETRIED_CODES = (408, 409, 425)
MESSAGE_CHARACTERS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply and its classification.

    Attributes:
      status: one of the statuses that the module lists.
      code: HTTP status; None without a reply.
      response: body as received, or the connection's error.
      finish_reason: the endpoint's reason for the end of the answer.
      prompt_tokens: prompt tokens by the endpoint's count; None without a count.
      cached_tokens: prompt tokens that were in the endpoint's cache.
      completion_tokens: completion tokens by the endpoint's count.
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
        """Text of the answer; empty without one."""
        return _text(_choice(_decoded(self.response))) if self.status in FINAL else ""

    @property
    def is_uncounted(self) -> bool:
        """Whether the attempt may have been charged but has no token count."""
        return self.prompt_tokens is None and (self.status in NO_REPLY or self.code == 200)

    @property
    def message(self) -> str:
        """Error message, on one line."""
        error = _error(_decoded(self.response))
        message = error.get("message") if error else None
        text = message if isinstance(message, str) and message.strip() else self.response
        line = _replace_surrogates(" ".join(text.split())[:MESSAGE_CHARACTERS])
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        return f"HTTP {self.code}: {line}" if self.code else line


def read_reply(code: int, response: str) -> Reply:
    """Returns the classified reply. Raises no error, whatever the body.

    Args:
      code: HTTP status.
      response: body of the reply.
    """
    value = _decoded(response)
    error = _error(value)
    if 200 <= code < 300 and error:  # some gateways report upstream errors with status 200
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
    elif _text(choice).strip() or finish == "length" or _has_non_text(message):
        status = "answered"  # even without text, as a retry would give the same
    else:
        status = "empty"
    prompt, cached, completion = _usage(value.get("usage"))
    return Reply(
        status=status,
        code=code,
        response=response,
        finish_reason=_replace_surrogates(finish) if isinstance(finish, str) else None,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
    )


def _error_status(code: int, error: dict[str, Any]) -> str:
    message = error.get("message")
    message = message if isinstance(message, str) else ""
    if (
        code == 402
        or NO_CREDIT_TEXT in message
        or any(error.get(name) in NO_CREDIT for name in ("code", "type"))
    ):
        return "exhausted"
    if code == 429:
        return "limited"
    if code == 401 or WRONG_KEY_TEXT in message:
        return "denied"
    return "failed" if code >= 500 or code in RETRIED_CODES else "rejected"


def _decoded(response: str) -> Any:
    try:
        return json.loads(response.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):
        return None


def _error(value: Any) -> dict[str, Any] | None:
    """Returns the error in a decoded body, or None. Gemini's endpoint wraps it in a list."""
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
    if isinstance(text, list):  # content parts, some of which may be thoughts
        parts = [p.get("text") for p in text if isinstance(p, dict) and p.get("type") == "text"]
        text = "".join(part for part in parts if isinstance(part, str))
    return _replace_surrogates(text) if isinstance(text, str) else ""


def _has_non_text(message: Any) -> bool:
    """Returns whether a message has thoughts or tool calls."""
    return isinstance(message, dict) and any(message.get(name) for name in NON_TEXT_FIELDS)


def _replace_surrogates(text: str) -> str:
    """Returns a text with "?" for unpaired surrogates, which UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def _usage(usage: Any) -> tuple[int | None, int | None, int | None]:
    """Returns the prompt, cached and completion tokens.

    All are None if the prompt or completion count is missing or impossible, or if more tokens are
    cached than the prompt has. The cost then assumes the longest answer.
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
