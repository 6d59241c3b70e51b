"""The service over HTTP, with an engine that computes nothing."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
import urllib.request

import numpy as np
import openai
import pytest
import uvicorn

from dss.cli.main import main
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.evaluation.evaluator import Answer, Engine
from dss.mixtures.methods import named_mixture
from dss.serving.app import Limits, make_app
from dss.serving.model import ServedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Engine):
    """Says yes to texts of even length, after `gate` is set."""

    gate: threading.Event

    def generate(self, inputs, *, max_length, start=0):
        return [f"{len(ids)} tokens" for ids in inputs]

    def choose(self, inputs, candidates):
        self.gate.wait(60)
        scores = [np.array([1.0, 0.0] if len(ids) % 2 == 0 else [0.0, 3.0]) for ids in inputs]
        return [Answer.of(c, s) for c, s in zip(candidates, scores, strict=True)]


@contextlib.contextmanager
def served(toy, *, mixture="toy_step_by_step_rules", is_open=True, **options):
    gate = threading.Event()
    if is_open:
        gate.set()
    engine = Parity(vocabulary=load_vocabulary("bytes"), gate=gate)
    model = ServedModel("student", (engine,) * 3, named_mixture(mixture, [toy]), 64)
    server = uvicorn.Server(
        uvicorn.Config(make_app(model, **options), port=0, log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield port, gate
    finally:
        gate.set()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def call(port, path, body=None, headers=(), method=None):
    """Returns the status and the JSON or text of a reply."""
    data = json.dumps(body) if isinstance(body, dict | list) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", **dict(headers)}
    connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    is_json = reply.headers["content-type"].startswith("application/json")
    return reply.status, json.loads(text) if is_json else text


def test_predictions_have_probabilities_rationales_and_marks(toy):
    with served(toy) as (port, _):
        asked = {"inputs": ["ab", "abc", "x" * 80], "rationales": True, "threshold": 0.9}
        status, found = call(port, "/predict", asked)
        one = call(port, "/predict", {"inputs": "ab"})
    assert status == 200
    assert found["model"] == "student"
    rows = found["predictions"]
    assert [row["label"] for row in rows] == ["yes", "no", "yes"]
    assert rows[0]["probabilities"] == pytest.approx({"yes": 0.731, "no": 0.269}, abs=1e-3)
    assert [row["abstained"] for row in rows] == [True, False, True]
    assert [row["truncated"] for row in rows] == [False, False, True]
    assert rows[0]["rationale"] == "12 tokens"  # "explain: ab" and EOS
    assert one == (
        200,
        {"model": "student", "predictions": [rows[0] | {"abstained": False, "rationale": None}]},
    )


def test_the_openai_client_reads_labels_and_rationales(toy):
    with served(toy, key="secret") as (port, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        assert [m.id for m in client.models.list()] == ["student", "student+rationale"]
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
        chat = client.chat.completions.create(model="student", messages=messages)
        assert chat.choices[0].message.content == "yes"
        assert chat.usage.total_tokens == 5
        messages[1]["content"] = [{"type": "text", "text": "abc"}]
        chat = client.chat.completions.create(model="student+rationale", messages=messages)
        assert chat.choices[0].message.content == "13 tokens So the answer is no."
        done = client.completions.create(model="student", prompt=["ab", "abc"])
        assert [choice.text for choice in done.choices] == ["yes", "no"]
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'; known: student"):
            client.completions.create(model="gpt", prompt="ab")
        with pytest.raises(openai.BadRequestError, match="not streamed"):
            client.completions.create(model="student", prompt="ab", stream=True)
        wrong = openai.OpenAI(base_url=client.base_url, api_key="guess")
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            wrong.models.list()
        assert call(port, "/health") == (200, {"status": "ready", "model": "student"})
        status, page = call(port, "/")
        assert (status, "<textarea" in page) == (200, True)
        assert call(port, "/openapi.json")[1]["info"]["title"] == "student"


def test_a_student_is_a_teacher_for_annotate(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.jsonl").write_text('{"id": "1", "input": "ab"}\n{"id": "2", "input": "abc"}\n')
    (tmp_path / "student.yaml").write_text(
        "labels: ['yes', 'no']\nform:\n  question: '{{ input }}'\n"
        "  answer: '{{ rationale }} So the answer is {{ label }}.'\n"
        "  pattern: '(?P<rationale>.*?) So the answer is (?P<label>.*?)\\.?$'\nexemplars: []\n"
    )
    with served(toy) as (port, _):
        options = ("--input=new.jsonl", "--prompt=student.yaml", "--teacher=student+rationale")
        status = main(["annotate", *options, f"--base-url=http://127.0.0.1:{port}/v1"])
    assert status == 0, capsys.readouterr().err
    (file,) = tmp_path.glob("new.student*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["label"], row["rationale"]) for row in rows] == [
        ("yes", "12 tokens"),
        ("no", "13 tokens"),
    ]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/predict", {"inputs": []}, 400, "0 inputs; give 1 to 4"),
        ("/predict", {"inputs": ["a"] * 5}, 400, "5 inputs; give 1 to 4"),
        ("/predict", "{", 422, None),
        ("/predict", {"inputs": 3}, 422, "body.inputs.str: Input should be a valid string"),
        ("/predict", {"inputs": "a", "treshold": 0.5}, 422, None),
        ("/predict", {"inputs": "a", "threshold": 2}, 422, None),
        ("/predict", '{"inputs": "a", "threshold": NaN}', 422, None),
        ("/predict", r'{"inputs": "\ud800"}', 400, "half of a surrogate pair"),
        ("/predict", {"inputs": "x" * 3000}, 413, "larger than 2,000 bytes"),
        ("/predict", {"inputs": "a", "rationales": True}, 400, "was not trained to generate"),
        ("/v1/chat/completions", {"model": "student", "messages": []}, 400, "no message of"),
        ("/nowhere", {}, 404, None),
    ],
)
def test_requests_that_cannot_be_answered(toy, path, body, status, message):
    limits = Limits(inputs=4, body=2000)
    with served(toy, mixture="toy_finetune", limits=limits) as (port, _):
        found, reply = call(port, path, body)
        assert found == status
        if message is not None:
            assert message in reply["error"]["message"]
        assert call(port, "/predict", {"inputs": "ab"})[0] == 200


def test_a_chunked_body_is_limited_and_a_small_one_read(toy):
    with served(toy, limits=Limits(body=2000)) as (port, _):
        small = json.dumps({"inputs": "ab"}).encode()
        chunked = {"Transfer-Encoding": "chunked"}

        def chunks(body):
            return (
                b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:5], body[5:])) + b"0\r\n\r\n"
            )

        assert call(port, "/predict", chunks(small), chunked, "POST")[0] == 200
        assert call(port, "/predict", chunks(b"x" * 9000), chunked, "POST")[0] == 413


def test_a_full_queue_is_429_and_metrics_count(toy):
    with served(toy, is_open=False, limits=Limits(queue=2, batch=1)) as (port, gate):
        replies = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(call(port, "/predict", {"inputs": "ab"})[0])
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while replies.count(429) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join(60)
        assert sorted(replies) == [200] * 3 + [429] * 3
        text = call(port, "/metrics")[1]
    assert 'dss_requests_total{path="/predict",status="200"} 3.0' in text
    assert 'dss_requests_total{path="/predict",status="429"} 3.0' in text
    assert "dss_batch_inputs_count 3.0" in text


def test_clients_that_disconnect_disturb_nobody(toy):
    with served(toy, is_open=False) as (port, gate):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as client:
                body = json.dumps({"inputs": "ab"})
                client.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
                )
        gate.set()
        assert call(port, "/predict", {"inputs": "ab"})[0] == 200


def test_it_is_not_ready_before_its_programs_are_compiled(toy, monkeypatch):
    opened = threading.Event()
    monkeypatch.setattr(ServedModel, "warm", lambda self, say: opened.wait(60))
    said = []
    with served(toy, say=said.append) as (port, _):
        assert call(port, "/health")[0] == 503
        status, reply = call(port, "/predict", {"inputs": "ab"})
        assert (status, "being compiled" in reply["error"]["message"]) == (503, True)
        opened.set()
        while urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") and not said:
            time.sleep(0.01)
        assert call(port, "/health")[0] == 200
    assert said == ["ready"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "`batch=0`: give at least 1"), ({"wait": float("nan")}, "`wait=nan`")],
)
def test_limits_are_checked(options, message):
    with pytest.raises(DssError, match=message):
        Limits(**options)
