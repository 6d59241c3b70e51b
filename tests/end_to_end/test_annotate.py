"""`dss annotate` as a process: killed, interrupted, over real data, and with a real server."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dss.data.datasets import Dataset
from dss.data.equations import plain_equation
from dss.data.examples import read_teacher_outputs
from dss.data.metrics import is_readable
from dss.testing import FakeEndpoint, FakeReply, chat_reply, last_question
from tests.conftest import write_jsonl
from tests.teacher.conftest import PROMPT, numbers_file
from tests.teacher.test_annotate import attempts, right

DSS = (sys.executable, "-c", "import sys; from dss.cli.main import main; sys.exit(main())")
KILLED = (sys.executable, str(Path(__file__).parent / "annotate_killed.py"))


def command(folder: Path, url: str, *options: str) -> list[str]:
    prompt = folder / "prompt.yaml"
    prompt.write_text(PROMPT)
    given = ("--input", folder / "numbers.jsonl", "--prompt", prompt, "--teacher", "m")
    return ["annotate", *map(str, given), "--base-url", url, *options]


def run(*args: str, **changes) -> subprocess.CompletedProcess:
    return subprocess.run([*DSS, *args], capture_output=True, text=True, **changes)


def outputs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "numbers.m.jsonl").read_text().splitlines()]


def test_killed_at_any_moment_nothing_is_lost_torn_or_paid_twice(tmp_path):
    count, concurrency = 2000, 16
    numbers_file(tmp_path, count)
    chance = random.Random(0)
    at_writes = [
        ("describe", 1, "before"),
        ("describe", 1, "after"),
        ("add", 1, "before"),
        ("add", 1, "after"),
        ("add", 3, "before"),
        ("add", 8, "after"),
        ("add", 12, "before"),
        ("add", 12, "after"),
    ]
    at_random = [("random", chance.randrange(100), "") for _ in range(7)]
    at_export = [
        ("write_jsonl", 1, "before"),
        ("fsync", 1, "before"),
        ("replace", 1, "before"),
        ("replace", 1, "after"),
        ("set_export", 1, "before"),
    ]
    kills = [*at_writes, *at_random, *at_export]
    assert len(kills) == 20
    with FakeEndpoint(lambda body: slow(right(body))) as endpoint:
        args = command(tmp_path, endpoint.url, f"--concurrency={concurrency}")
        for write, number, when in kills:
            if write == "random":
                process = subprocess.Popen([*DSS, *args], stdout=subprocess.DEVNULL)
                until = endpoint.count + number
                while endpoint.count < until:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0.0, 0.02))
                process.kill()
                assert process.wait() == -signal.SIGKILL
            else:
                done = subprocess.run(
                    [*KILLED, write, str(number), when, *args], stdout=subprocess.DEVNULL
                )
                assert done.returncode == -signal.SIGKILL, (write, number, when)
        done = run(*args)
    assert done.returncode == 0, done.stderr
    assert count <= endpoint.count <= count + len(kills) * concurrency
    lines = outputs_of(tmp_path)
    assert [line["id"] for line in lines] == [f"n{i}" for i in range(count)]
    assert {line["status"] for line in lines} == {"ok"}
    assert [line["rationale"] for line in lines] == [f"It is {i}." for i in range(count)]
    assert not list(tmp_path.glob("*.partial"))


def slow(reply: FakeReply) -> FakeReply:
    """A reply after 20 ms, so that requests are in flight when the process is killed."""
    return FakeReply(body=reply.body, headers=reply.headers, delay=0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_finishes_what_is_in_flight(tmp_path, number):
    numbers_file(tmp_path, 2000)
    with FakeEndpoint(lambda body: slow(right(body))) as endpoint:
        args = command(tmp_path, endpoint.url)
        process = subprocess.Popen(
            [*DSS, *args],
            stdout=subprocess.PIPE,
            text=True,
            # The suite itself may run under nohup.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
        while endpoint.count < 50:
            time.sleep(0.01)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "finishing the requests in flight" in out
        assert "interrupted; run the same command again to resume" in out
        assert len(outputs_of(tmp_path)) == endpoint.count < 2000
        assert attempts_in(tmp_path) == endpoint.count
        assert run(*args).returncode == 0
    assert endpoint.count == len(outputs_of(tmp_path)) == 2000


def test_a_second_interrupt_leaves_at_once(tmp_path):
    numbers_file(tmp_path, 50)
    with FakeEndpoint(lambda _: FakeReply(delay=60.0)) as endpoint:
        process = subprocess.Popen(
            [*DSS, *command(tmp_path, endpoint.url)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while endpoint.count < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "dss: interrupted\n"


def test_an_interrupt_ends_a_long_wait_at_once(tmp_path):
    numbers_file(tmp_path, 20)
    wait = FakeReply(code=429, headers={"Retry-After": "1000"}, body=b"{}")
    with FakeEndpoint(lambda _: wait) as endpoint:
        process = subprocess.Popen(
            [*DSS, *command(tmp_path, endpoint.url)], stdout=subprocess.PIPE, text=True
        )
        while endpoint.count < 1:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "with Retry-After: waiting 1000 s" in out


def attempts_in(folder: Path) -> int:
    class Job:
        journal_path = folder / "journal.sqlite"

    return attempts(Job).total()


def sha256(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def test_released_texts_come_through_the_chain_as_the_released_parse(
    shared, data_root, vocab_path, tmp_path
):
    """Annotate SVAMP with a teacher that says what PaLM said, then train the tiny student."""
    source = Dataset.released("svamp").source
    texts = {
        example.input: output.raw
        for example, output in zip(
            source.examples("train"), source.outputs("train", "palm"), strict=True
        )
    }

    def answer(body):
        question = last_question(body).removeprefix("Q: ").removesuffix("\nA:")
        return chat_reply(texts[question], finish_reason="length")

    folder = tmp_path / "svamp_replayed"
    with FakeEndpoint(answer, keep=False) as endpoint:
        done = run(
            *("annotate", "--dataset", "svamp", "--data-root", str(data_root)),
            *("--teacher", "replay", "--base-url", endpoint.url, "--output", str(folder)),
        )
    assert done.returncode == 0, done.stderr
    assert endpoint.count == len(texts)
    outputs = read_teacher_outputs(folder / "train.replay.jsonl", "replay")
    expected = json.loads((shared / "fixtures" / "released_teacher_outputs.json").read_text())
    expected = expected["svamp/train"]
    examples = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert sha256([example["input"] for example in examples]) == expected["sha256_inputs"]
    assert sha256([example["label"] for example in examples]) == expected["sha256_gold"]
    # The released code keeps equations that nothing can evaluate, such as (some - 8).
    released = [(output.label or "").strip() for output in source.outputs("train", "palm")]
    assert sha256([label or " " for label in released]) == expected["sha256_teacher_labels"]
    readable = [plain_equation(t) if is_readable("equation", t) else "" for t in released]
    assert [output.label or "" for output in outputs] == readable
    assert sum(map(bool, released)) - sum(map(bool, readable)) == 16
    # It writes a blank for what it does not find.
    rationales = [output.rationale or " " for output in outputs]
    assert sha256(rationales) == expected["sha256_rationales"]

    macros = {
        "MIXTURE_OR_TASK_NAME": "svamp_replayed_step_by_step_replay",
        "MODEL_DIR": tmp_path / "run",
        "DATASET_PATH": folder,
        "VOCABULARY": vocab_path,
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 3,
        "EVAL_PERIOD": 3,
        "Experiment.eval_examples": 8,
        "DataConfig.metric": "equation",
    }
    flags = [f"--gin.{name}={value}" for name, value in macros.items()]
    done = run("train", "--gin_file=students/tiny.gin", *flags)
    assert done.returncode == 0, done.stderr
    assert "step 3 done" in done.stdout


@pytest.mark.parametrize("name", ["svamp", "asdiv"])
def test_a_teacher_of_a_released_dataset_may_lie_beside_it(small_root, tmp_path, name):
    """Without --output a dataset's own mixtures get the new teacher."""

    root = tmp_path / "data"
    shutil.copytree(small_root / name, root / name)

    def answer(_):
        return chat_reply("Because. The answer is (1 + 1).")

    with FakeEndpoint(answer) as endpoint:
        done = run(
            *("annotate", f"--dataset={name}", f"--data-root={root}", "--teacher=gpt-x"),
            *("--base-url", endpoint.url),
        )
    assert done.returncode == 0, done.stderr
    assert (root / name / f"{name}_train.gpt-x.jsonl").is_file()
    done = run("inspect", f"{name}_step_by_step_gpt_x", f"--gin.DATA_ROOT={root}")
    assert done.returncode == 0, done.stderr
    assert f"{name}_rationale_gpt_x" in done.stdout
    assert "18 ok" in done.stdout


LETTERS = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'()-\n"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)


def tiny_llama(folder: Path) -> Path:
    """Makes a random Llama over characters that `transformers serve` can chat with."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16384,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def served(tmp_path):
    """(model, base URL) of a `transformers serve` on this machine."""
    folder = tiny_llama(tmp_path / "model")
    (tmp_path / "home" / "hub").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)),
                *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
            ],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
                time.sleep(0.5)
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.exhaustive
def test_a_real_server_answers_500_questions_of_cqa(served, data_root, tmp_path):
    model, url = served
    examples = itertools.islice(Dataset.released("cqa").source.examples("train"), 500)
    rows = [{"id": e.id, "input": e.input, "label": e.label} for e in examples]
    source = write_jsonl(tmp_path / "asked" / "questions.jsonl", rows)
    args = [
        *("annotate", "--input", str(source), "--prompt", "cqa", "--teacher", model),
        *("--base-url", url, "--concurrency", "16", "--name", "tiny"),
        *("--param", "max_tokens=8", "--param", "temperature=1.0"),
    ]
    done = run(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(t) for t in (source.parent / "questions.tiny.jsonl").open()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert len({line["raw"] for line in lines}) > 100  # it samples
    assert attempts_in(source.parent) >= 500
    again = run(*args)
    assert again.returncode == 0
    assert "unchanged" in again.stdout
