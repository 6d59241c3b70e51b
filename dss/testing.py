"""Fakes for tests: a local OpenAI-compatible endpoint with programmable replies."""

import asyncio
import collections
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FakeEndpoint", "FakeReply", "chat_reply", "completion_reply", "last_question"]

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 429: "Too Many Requests"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeReply:
    """The endpoint's reply to a request.

    Attributes:
      code: HTTP status.
      body: body of the reply.
      headers: headers of the reply, besides the content length.
      delay: seconds before the reply.
      lost: whether the connection breaks in the middle of the body.
    """

    code: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delay: float = 0.0
    lost: bool = False


def chat_reply(
    text: str | None, *, finish_reason: str = "stop", prompt_tokens: int = 100, **changes: Any
) -> FakeReply:
    """Returns a chat reply with one choice; `changes` are additional fields of its message."""
    message = {"role": "assistant", "content": text, **changes}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return _reply("chat.completion", choice, prompt_tokens, text)


def completion_reply(text: str, *, finish_reason: str = "stop") -> FakeReply:
    """Returns a plain completion reply with one choice."""
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return _reply("text_completion", choice, 100, text)


def _reply(kind: str, choice: dict[str, Any], prompt_tokens: int, text: str | None) -> FakeReply:
    tokens = len((text or "").split())
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
    body = {"id": "fake", "object": kind, "choices": [choice], "usage": usage}
    return FakeReply(body=json.dumps(body).encode(), headers={"content-type": "application/json"})


def last_question(body: Mapping[str, Any]) -> str:
    """Returns the final text of a request: its last message, or its prompt."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


class FakeEndpoint:
    """An endpoint in a separate thread, as a context manager.

    Attributes:
      url: base URL.
      bodies: decoded requests in order of arrival; empty unless `keep`.
      headers: headers of the requests; empty unless `keep`.
      count: number of requests.
      asked: number of requests by their final text; empty unless `keep`.
      busy: number of requests being answered.
      at_once: maximum of `busy` so far.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], FakeReply], *, keep: bool = True):
        """Makes an endpoint.

        Args:
          answer: function from a decoded request to its reply, called in the endpoint's thread.
          keep: whether to keep the requests.
        """
        self._answer, self._keep = answer, keep
        self.url = ""
        self.count = self.at_once = self.busy = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.asked: collections.Counter[str] = collections.Counter()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "FakeEndpoint":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        starting = asyncio.start_server(self._connection, "127.0.0.1", 0)
        server = self._loop.run_until_complete(starting)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer_request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has disconnected, or the test is over
        finally:
            writer.close()

    async def _answer_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers a request; returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(
            line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line
        )
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        self.count += 1
        if self._keep:
            self.bodies.append(body)
            self.headers.append(head)
            self.asked[last_question(body)] += 1
        self.busy += 1
        self.at_once = max(self.at_once, self.busy)
        reply = self._answer(body)
        if reply.delay:
            await asyncio.sleep(reply.delay)
        self.busy -= 1
        lines = [f"HTTP/1.1 {reply.code} {REASONS.get(reply.code, 'Other')}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        lines += [f"content-length: {len(reply.body)}", "", ""]
        content = reply.body[: len(reply.body) // 2] if reply.lost else reply.body
        writer.write("\r\n".join(lines).encode() + content)
        await writer.drain()
        return not reply.lost
