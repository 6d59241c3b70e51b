"""The HTTP service of a student: its own API, and OpenAI's for chat and completions."""

import contextlib
import dataclasses
import hmac
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import fastapi
import prometheus_client
from fastapi import HTTPException, responses
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as StarletteMessage

from dss import __version__
from dss.errors import DssError
from dss.evaluation.evaluator import Answer
from dss.mixtures.tasks import CONCLUSION
from dss.serving.batcher import Batcher, BusyError
from dss.serving.model import SIZES, ServedModel

__all__ = [
    "EXPLAINED",
    "ChatRequest",
    "CompletionRequest",
    "Limits",
    "Message",
    "PredictRequest",
    "PredictResponse",
    "PredictedLabel",
    "make_app",
]

EXPLAINED = "+rationale"  # suffix of the model's name for answers with the rationale
PAGE = Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the service.

    Attributes:
      batch: most inputs of a batch.
      wait: seconds that the first input of a batch waits for others.
      queue: most inputs that wait; more are answered with status 429.
      inputs: most inputs of a request.
      body: largest request in bytes; larger ones are answered with status 413.
    """

    batch: int = SIZES[-1]
    wait: float = 0.005
    queue: int = 1024
    inputs: int = 256
    body: int = 2**20

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "inputs", "body"):
            if getattr(self, name) < 1:
                raise DssError(f"`{name}={getattr(self, name)}`: give at least 1")
        if not self.wait >= 0:
            raise DssError(f"`wait={self.wait}`: give at least 0")


class PredictRequest(BaseModel):
    """Inputs to predict."""

    model_config = ConfigDict(extra="forbid")

    inputs: str | list[str]
    rationales: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None


class PredictedLabel(BaseModel):
    """A prediction."""

    label: str
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool
    rationale: str | None = None


class PredictResponse(BaseModel):
    """The predictions, in the order of the inputs."""

    model: str
    predictions: list[PredictedLabel]


class Message(BaseModel):
    """A message of a chat."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """OpenAI's chat completions; the input is the text of the last message of the user."""

    model: str
    messages: list[Message]
    stream: bool = False
    n: int = 1


class CompletionRequest(BaseModel):
    """OpenAI's completions; each prompt is an input."""

    model: str
    prompt: str | list[str]
    stream: bool = False
    n: int = 1


class _Metrics:
    """The metrics of a service, for Prometheus."""

    def __init__(self, waiting: Callable[[], int]):
        self.registry = prometheus_client.CollectorRegistry()
        options: Any = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "dss_requests", "Requests by path and status.", ("path", "status"), **options
        )
        self.seconds = prometheus_client.Histogram(
            "dss_request_seconds", "Seconds to answer a request.", ("path",), **options
        )
        self.batches = prometheus_client.Histogram(
            "dss_batch_inputs", "Inputs of a batch.", buckets=(1, 2, 4, 8, 16, 32), **options
        )
        gauge = prometheus_client.Gauge("dss_queue_inputs", "Inputs that wait.", **options)
        gauge.set_function(waiting)


def make_app(
    model: ServedModel,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> fastapi.FastAPI:
    """Returns the service of a student.

    Args:
      model: the student.
      limits: limits of the service; None for the defaults.
      key: the API key that requests need, except for /health, /metrics and the page; None for
        none.
      say: called with a message while shapes compile, and when the service is ready.
    """
    limits = limits or Limits()
    ready = threading.Event()
    metrics = _Metrics(lambda: labels.waiting + rationales.waiting)

    def batcher(run: Callable[[list[str]], Any]) -> Batcher[Any]:
        return Batcher(
            run,
            size=limits.batch,
            wait=limits.wait,
            limit=limits.queue,
            observe=metrics.batches.observe,
        )

    labels: Batcher[Answer] = batcher(model.answer)
    rationales: Batcher[str] = batcher(model.explain)

    def warm() -> None:
        model.warm(say)
        ready.set()
        say("ready")

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        labels.start()
        rationales.start()
        threading.Thread(target=warm, daemon=True).start()
        yield
        await labels.close()
        await rationales.close()

    app = fastapi.FastAPI(title=model.name, version=__version__, lifespan=lifespan)

    app.add_middleware(_Guard, limit=limits.body, metrics=metrics)

    @app.exception_handler(StarletteHTTPException)
    async def problem(_: fastapi.Request, error: Exception) -> fastapi.Response:
        assert isinstance(error, StarletteHTTPException)
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: fastapi.Request, error: Exception) -> fastapi.Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _error(422, f"{where}: {first['msg']}; the body is JSON, see /docs")

    @app.exception_handler(DssError)
    async def invalid(_: fastapi.Request, error: Exception) -> fastapi.Response:
        return _error(400, str(error))

    def check(request: fastapi.Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "wrong API key; send it as 'Authorization: Bearer KEY'")
        if not ready.is_set():
            raise HTTPException(503, "not ready: the student's programs are being compiled")

    async def answers(texts: list[str], *, explain: bool) -> tuple[list[Answer], list[str] | None]:
        if not texts or len(texts) > limits.inputs:
            raise HTTPException(400, f"{len(texts)} inputs; give 1 to {limits.inputs}")
        if explain and not model.explains:
            raise HTTPException(400, f"{model.name} was not trained to generate rationales")
        if any(not _is_unicode(text) for text in texts):
            raise HTTPException(400, "an input holds half of a surrogate pair, which is no text")
        try:
            found = await labels.submit(texts)
            return found, await rationales.submit(texts) if explain else None
        except BusyError:
            raise HTTPException(429, "too many inputs are waiting; try again later") from None

    @app.get("/", include_in_schema=False)
    def page() -> fastapi.Response:
        return responses.HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/health")
    def health() -> fastapi.Response:
        status = "ready" if ready.is_set() else "compiling"
        return responses.JSONResponse(
            {"status": status, "model": model.name}, 200 if ready.is_set() else 503
        )

    @app.get("/metrics")
    def metrics_page() -> fastapi.Response:
        content = prometheus_client.generate_latest(metrics.registry)
        return fastapi.Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.post("/predict", dependencies=[fastapi.Depends(check)])
    async def predict(request: PredictRequest) -> PredictResponse:
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        found, explanations = await answers(texts, explain=request.rationales)
        threshold = request.threshold
        return PredictResponse(
            model=model.name,
            predictions=[
                PredictedLabel(
                    label=answer.text,
                    probabilities=dict(answer.probabilities),
                    abstained=threshold is not None and answer.is_below(threshold),
                    truncated=model.is_cut(text),
                    rationale=None if explanations is None else explanations[i],
                )
                for i, (text, answer) in enumerate(zip(texts, found, strict=True))
            ],
        )

    names = [model.name, *([model.name + EXPLAINED] if model.explains else [])]

    @app.get("/v1/models", dependencies=[fastapi.Depends(check)])
    def models() -> dict[str, Any]:
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "dss"} for n in names]
        return {"object": "list", "data": data}

    async def complete(
        request: ChatRequest | CompletionRequest, texts: list[str]
    ) -> tuple[list[str], dict[str, int]]:
        if request.model not in names:
            raise HTTPException(404, f"no model {request.model!r}; known: {', '.join(names)}")
        if request.stream or request.n != 1:
            raise HTTPException(
                400, "answers are not streamed, and there is one: stream=false, n=1"
            )
        found, explanations = await answers(texts, explain=request.model != model.name)
        written = [answer.text for answer in found]
        if explanations is not None:
            pairs = zip(explanations, written, strict=True)
            written = [f"{rationale} {CONCLUSION} {label}." for rationale, label in pairs]
        counts = [
            sum(len(model.vocabulary.encode(text)) for text in side) for side in (texts, written)
        ]
        usage = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
        return written, usage | {"total_tokens": sum(counts)}

    @app.post("/v1/chat/completions", dependencies=[fastapi.Depends(check)])
    async def chat(request: ChatRequest) -> dict[str, Any]:
        contents = [m.content for m in request.messages if m.role == "user"]
        if not contents:
            raise HTTPException(400, "no message of the user")
        (text,), usage = await complete(request, [_content(contents[-1])])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return _completion("chat.completion", request.model, [choice], usage)

    @app.post("/v1/completions", dependencies=[fastapi.Depends(check)])
    async def completions(request: CompletionRequest) -> dict[str, Any]:
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        written, usage = await complete(request, texts)
        choices = [
            {"index": i, "text": text, "finish_reason": "stop", "logprobs": None}
            for i, text in enumerate(written)
        ]
        return _completion("text_completion", request.model, choices, usage)

    return app


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content or () if part.get("type") == "text"]
    texts = [part for part in parts if isinstance(part, str)]
    if not texts:
        raise HTTPException(400, "the last message of the user has no text")
    return "\n".join(texts)


def _completion(kind: str, model: str, choices: list[dict], usage: dict[str, int]) -> dict:
    return {
        "id": f"dss-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def _error(status: int, message: str) -> fastapi.Response:
    """Returns an error in the form of OpenAI's."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "code": status, "param": None}
    return responses.JSONResponse({"error": error}, status)


class _Guard:
    """Middleware that refuses bodies above a limit, and counts and times requests."""

    def __init__(self, app: ASGIApp, *, limit: int, metrics: _Metrics):
        self._app, self._limit, self._metrics = app, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, size, status = time.perf_counter(), 0, 500
        too_large = f"the request is larger than {self._limit:,} bytes"

        async def limited() -> StarletteMessage:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, too_large)
            return message

        async def observed(message: StarletteMessage) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if length.isdigit() and int(length) > self._limit:
                await _error(413, too_large)(scope, receive, observed)
            else:
                await self._app(scope, limited, observed)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
