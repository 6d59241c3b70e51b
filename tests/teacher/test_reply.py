import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dss.errors import DssError
from dss.teacher.client import api_key, retry_after
from dss.teacher.reply import read_reply

KEYS = ["choices", "message", "content", "text", "usage", "error", "code", "type"]
KEYS += ["finish_reason", "prompt_tokens", "prompt_tokens_details", "cached_tokens"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
        )
    ),
)


@given(st.integers(100, 599), JSON)
def test_any_body_is_read_and_kept(code, value):
    text = json.dumps(value)
    reply = read_reply(code, text)
    assert reply.response == text
    assert isinstance(reply.text, str)
    assert "\n" not in reply.message


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (400, "rejected"),
        (401, "denied"),
        (402, "exhausted"),
        (403, "rejected"),
        (404, "rejected"),
        (408, "failed"),
        (429, "limited"),
        (500, "failed"),
        (302, "rejected"),
        (529, "failed"),
    ],
)
def test_an_error_is_classified_by_the_http_status(code, status):
    assert read_reply(code, "").status == status


def test_an_error_in_a_reply_of_status_200_is_an_error():
    assert read_reply(200, '{"error": {"code": 429, "message": "slow"}}').status == "limited"
    assert read_reply(200, '{"error": "no"}').status == "failed"
    in_a_list = read_reply(429, '[{"error": {"code": 429, "message": "quota"}}]')
    assert (in_a_list.status, in_a_list.message) == ("limited", "HTTP 429: quota")


def test_token_counts_include_cached_tokens():
    text = (
        '{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": '
        '{"prompt_tokens": 9, "completion_tokens": 2, '
        '"prompt_tokens_details": {"cached_tokens": 4}}}'
    )
    reply = read_reply(200, text)
    assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens) == (9, 4, 2)
    assert (reply.status, reply.text, reply.finish_reason) == ("answered", "a", "stop")


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 9},
        {"completion_tokens": 9},
        {"prompt_tokens": 9, "completion_tokens": -1},
        {"prompt_tokens": 9, "completion_tokens": 2**41},
        {"prompt_tokens": 9, "completion_tokens": True},
        {
            "prompt_tokens": 9,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 10},
        },
    ],
    ids=str,
)
def test_a_missing_or_impossible_count_is_none_and_uncounted(usage):
    choice = {"message": {"content": "a"}, "finish_reason": "stop"}
    reply = read_reply(200, json.dumps({"choices": [choice], "usage": usage}))
    assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens) == (None,) * 3
    assert (reply.text, reply.is_uncounted) == ("a", True)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        (
            {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "a"}]},
            "a",
        ),
        ({"content": None, "reasoning_content": "Hm."}, ""),
        ({"content": "", "reasoning": "Hm."}, ""),
        ({"content": None, "tool_calls": [{"id": "1"}]}, ""),
    ],
    ids=str,
)
def test_text_parts_are_joined_and_thoughts_alone_are_an_empty_answer(message, text):
    body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    for mark in ("", "\ufeff"):
        reply = read_reply(200, mark + body)
        assert (reply.status, reply.text) == ("answered", text)
    empty = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]})
    assert read_reply(200, empty).status == "empty"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "300"}, 300.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:20:00 GMT"}, 200.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e18"}, None),
        ({"retry-after": "0"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_seconds_and_as_a_date(headers, seconds):
    assert retry_after(headers, now=1000.0) == seconds


def test_the_key_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(DssError, match="OPENAI_API_KEY is not set"):
        api_key("OPENAI_API_KEY", "https://api.openai.com/v1")
    assert api_key("OPENAI_API_KEY", "http://localhost:8000/v1") == "none"
    monkeypatch.setenv("MY_KEY", " k\n")
    assert api_key("MY_KEY", "https://api.openai.com/v1") == "k"
    for wrong in ("sk-a\nsk-b", "ключ"):
        monkeypatch.setenv("MY_KEY", wrong)
        with pytest.raises(DssError, match="contains a character that no API key has"):
            api_key("MY_KEY", "https://api.openai.com/v1")
