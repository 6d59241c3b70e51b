"""Client of an OpenAI-compatible endpoint, which returns failures as replies too."""

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

from dss.errors import TeacherError
from dss.teacher.reply import Reply, read_reply
from dss.teacher.request import Teacher

__all__ = ["Client", "api_key", "default_url", "retry_after"]

HIDDEN = "[API key]"  # replaces the key in replies
NO_KEY = "none"  # sent to servers that need no key
SHORTEST_KEY = 16  # characters; a shorter key may be a word of an answer and is not hidden
LONGEST_WAIT = 1e9  # seconds
MOST_BYTES = 2**24  # per reply
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPENAI_HOST = "api.openai.com"


def default_url() -> str:
    """Returns the base URL in OPENAI_BASE_URL; OpenAI's if it is not set."""
    return os.environ.get("OPENAI_BASE_URL", f"https://{OPENAI_HOST}/v1")


def api_key(variable: str, base_url: str) -> str:
    """Returns the API key in an environment variable; "none" if it is not set.

    Raises:
      TeacherError: if the key contains an impossible character, or is not set for OpenAI's
        endpoint.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise TeacherError(
            f"{variable}: contains a character that no API key has; set it to the key alone"
        )
    if not key and OPENAI_HOST in base_url:
        raise TeacherError(
            f"{variable} is not set; set it to your API key, name another variable with `key_env`, "
            "or give the `base_url` of a server that needs no key"
        )
    return key or NO_KEY


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds to wait by a reply's headers; None without a usable value.

    Args:
      headers: headers of the reply: `retry-after-ms`, or `Retry-After` in seconds or as a date
        (RFC 9110, section 10.2.3).
      now: current time, in seconds since 1970.
    """
    for name, seconds_each in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * seconds_each
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return _usable_wait(seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return _usable_wait(date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _usable_wait(seconds: float) -> float | None:
    """Returns the wait, or None if it is zero, negative or too long.

    A wait of 0 must not replace the exponential backoff.
    """
    return seconds if 0 < seconds < LONGEST_WAIT else None


class Client:
    """Client of an OpenAI-compatible endpoint. It does not retry: the caller counts attempts.

    The API key is replaced in replies that repeat it.
    """

    def __init__(self, teacher: Teacher, key: str, timeout: float):
        """Makes a client.

        Args:
          teacher: endpoint and API path.
          key: API key.
          timeout: seconds to wait for a complete reply.
        """
        self._path, self._key, self._timeout = teacher.path, key, timeout
        # Compressed replies are not accepted, as a small one may expand to gigabytes. Requests to
        # this machine bypass proxies, which would see the key.
        hooks = {"response": [_check_size]}
        is_local = urlsplit(teacher.base_url).hostname in LOOPBACK
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=teacher.base_url,
            max_retries=0,
            timeout=None,
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks, trust_env=not is_local),
        )

    async def send(self, body: Mapping[str, Any]) -> tuple[Reply, float | None]:
        """Sends a request.

        Returns:
          The reply, and the seconds to wait before the next request; None if it gives none.
        """
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(
                    self._path,
                    body=dict(body),
                    cast_to=httpx2.Response,
                    # A followed redirect becomes a GET request, without the body.
                    options={"follow_redirects": False},
                )
        except TimeoutError:
            return self._failure("timeout", f"no complete reply in {self._timeout:g} s"), None
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            status = "unreachable" if isinstance(cause, httpx2.ConnectError) else "dropped"
            return self._failure(status, f"{type(cause).__name__}: {cause}"), None
        encoding = json.detect_encoding(response.content)
        text = response.content.decode(encoding, errors="replace")
        if 300 <= response.status_code < 400:
            target = response.headers.get("location", "nowhere")
            text = f"the endpoint redirects to {target}; give that as `base_url` if you trust it"
        wait = retry_after(response.headers, time.time())
        return read_reply(response.status_code, self._hide_key(text)), wait

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _failure(self, status: str, message: str) -> Reply:
        return Reply(status=status, code=None, response=self._hide_key(message))

    def _hide_key(self, text: str) -> str:
        if len(self._key) < SHORTEST_KEY:
            return text
        with contextlib.suppress(ValueError, RecursionError):  # JSON may contain the key in escapes
            unescaped = json.dumps(json.loads(text))
            text = unescaped if self._key in unescaped else text
        return text.replace(self._key, HIDDEN)


class _LimitedStream(httpx2.AsyncByteStream):
    """The body of a reply, which raises an error beyond `MOST_BYTES`."""

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
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise httpx2.ReadError(f"a reply compressed with {encoding}, which was not requested")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _LimitedStream(response.stream)
