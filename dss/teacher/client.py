"""Sends a request and returns the reply, whatever happens to it on the way."""

import asyncio
import contextlib
import email.utils
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from dss.errors import UserError
from dss.teacher.reply import Reply, read_reply
from dss.teacher.request import Teacher

__all__ = ["Client", "api_key", "retry_after"]

HIDDEN = "[API key]"
NO_KEY = "none"  # what a server that asks for no key is sent
SHORTEST_KEY = 16  # characters; a shorter one is a word, which a teacher may write
LONGEST_WAIT = 1e9  # seconds
MOST_BYTES = 2**24  # of a reply
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPENAI_HOST = "api.openai.com"


def api_key(variable: str, base_url: str) -> str:
    """Returns the key in an environment variable.

    Raises:
      UserError: it cannot be one, or is not set and the endpoint is one that surely needs it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{variable}: holds a character that no key has; is it the whole key alone?"
        )
    if not key and OPENAI_HOST in base_url:
        raise UserError(
            f"{variable} is not set; put your key there, or name the variable it is in with "
            "--key-env, or give --base-url of a server that needs none"
        )
    return key or NO_KEY


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds that a reply asks to wait; None where it asks nothing.

    Args:
      headers: of the reply: `retry-after-ms`, or `Retry-After` in seconds or as a date
        (RFC 9110, section 10.2.3).
      now: seconds since 1970.
    """
    for name, seconds_each in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * seconds_each
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return _told(seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return _told(date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _told(seconds: float) -> float | None:
    """Returns a wait that can be meant; one of no time says nothing of when to try again."""
    return seconds if 0 < seconds < LONGEST_WAIT else None


class Client:
    """An OpenAI-compatible endpoint. Retries nothing: that is decided where attempts are counted.

    The key is in no reply: where an endpoint repeats it, it is blotted out.
    """

    def __init__(self, teacher: Teacher, key: str, timeout: float):
        """Makes a client.

        Args:
          teacher: says where, and what path.
          key: of the endpoint.
          timeout: seconds for a whole reply.
        """
        self._path, self._key, self._timeout = teacher.path, key, timeout
        # What is packed small may unpack to gigabytes, and a key is not shown to a proxy on the
        # way to this machine.
        hooks = {"response": [_check_size]}
        own = urlsplit(teacher.base_url).hostname in LOOPBACK
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=teacher.base_url,
            max_retries=0,
            timeout=None,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks, trust_env=not own),
        )

    async def send(self, body: Mapping[str, Any]) -> tuple[Reply, float | None]:
        """Returns the reply, and the seconds that it asks to wait before another request."""
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(
                    self._path,
                    body=dict(body),
                    cast_to=httpx2.Response,
                    # A redirect would be followed by a GET, without the question.
                    options={"follow_redirects": False},
                )
        except TimeoutError:
            return self._lost("timeout", f"no whole reply in {self._timeout:g} s"), None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            status = "unreachable" if isinstance(cause, httpx2.ConnectError) else "dropped"
            return self._lost(status, f"{type(cause).__name__}: {cause}"), None
        encoding = json.detect_encoding(response.content)
        text = response.content.decode(encoding, errors="replace")
        if 300 <= response.status_code < 400:
            target = response.headers.get("location", "nowhere")
            text = f"the endpoint redirects to {target}; give that as --base-url if you trust it"
        wait = retry_after(response.headers, time.time())
        return read_reply(response.status_code, self._hide(text)), wait

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _lost(self, status: str, what: str) -> Reply:
        return Reply(status=status, code=None, response=self._hide(what))

    def _hide(self, text: str) -> str:
        if len(self._key) < SHORTEST_KEY:
            return text
        with contextlib.suppress(ValueError, RecursionError):  # JSON may write it in escapes
            plain = json.dumps(json.loads(text))
            text = plain if self._key in plain else text
        return text.replace(self._key, HIDDEN)


class _LimitedStream(httpx2.AsyncByteStream):
    """A reply's body, which ends with an error where it is too long."""

    def __init__(self, stream: httpx2.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in self._stream:
            count += len(chunk)
            if count > MOST_BYTES:
                raise httpx2.ReadError(f"a reply of more than {MOST_BYTES:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _check_size(response: httpx2.Response) -> None:
    packed = response.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise httpx2.ReadError(f"a reply packed with {packed}, which was not asked for")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _LimitedStream(response.stream)
