"""`kvtool serve-local` as its clients see it: real sockets, the openai package, and raw bytes."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import matplotlib.colors
import matplotlib.image
import openai
import psutil
import pytest
import schemathesis
import torch
from _server_tools import HELLO, TOOL, TOOL_TEMPLATE, Running, serving, wait_until
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command, serve
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine, Sampling
from kvtool.runtime.memory import give_back
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.server import app, chat, schema
from kvtool.server import worker as worker_module
from kvtool.server.service import Service

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Plain letters and spaces, whatever the model would rather say.
TOKENIZER = make_tokenizer()
WORDS = {str(token): 100 for token in TOKENIZER("The quick brown fox jumps")["input_ids"]}


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Engine:
    return Engine.load(Checkpoint.open(str(tiny("llama"))))


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


def greedy(engine: Engine, ids: list[int], new: int) -> str:
    """What the scheduler draws when asked directly."""
    scheduler = Scheduler(engine, 2**24, piece=16, share_prefixes=False)
    request = Request(ids, new)
    scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    return TOKENIZER.decode(request.tokens, skip_special_tokens=True)


def events(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# ------------------------------------------------------------------------------------ answers


def test_chat_of_the_openai_client_is_the_greedy_text(server, engine):
    ids = TOKENIZER.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    expected = greedy(engine, ids, 12)
    options = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 12, "temperature": 0}
    answer = server.client().chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
    again = server.client().chat.completions.create(**options)
    assert again.choices[0].message.content == expected
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) // 16 * 16
    assert again.timings["cache_n"] == len(ids) // 16 * 16
    stream = server.client().chat.completions.create(**options, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_stream_has_the_form_that_clients_expect(server):
    body = {
        "model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True, "user": "ignored",
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        first, *middle, last, usage = events(response.read().decode())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["choices"][0]["finish_reason"] is None for c in [first, *middle])
    assert all(c["choices"][0]["delta"]["content"] for c in middle)
    assert last["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"
    }  # fmt: skip
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    for chunk in [first, *middle, last]:
        assert chunk["usage"] is None
        assert chunk["object"] == usage["object"] == "chat.completion.chunk"
        assert (chunk["id"], chunk["created"]) == (usage["id"], usage["created"])
    assert "usage" not in events(server.post("/v1/chat/completions", {
        "messages": HELLO, "max_tokens": 2, "stream": True
    }).text)[0]  # fmt: skip


def test_many_async_streams_interleave_and_are_what_they_are_alone(server, engine):
    prompts = [TOKENIZER("The quick brown fox " * n)["input_ids"] for n in range(1, 9)]

    async def text(client: openai.AsyncOpenAI, ids: list[int]) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=ids, max_tokens=20, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(text(client, ids) for ids in prompts))

    assert asyncio.run(together()) == [greedy(engine, ids, 20) for ids in prompts]
    wait_until(lambda: not server.kv()["running"])


def test_a_stop_string_across_tokens_ends_the_text_before_it(server):
    options: dict[str, Any] = {
        "model": "tiny", "prompt": "A", "max_tokens": 40, "seed": 3, "logit_bias": WORDS
    }  # fmt: skip
    client = server.client()
    free = client.completions.create(**options)
    text = free.choices[0].text
    assert free.choices[0].finish_reason == "length"
    stop = text[9:15]
    expected = text[: text.index(stop)]
    cut = client.completions.create(**options, stop=["never", stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    assert cut.usage.completion_tokens < 40
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = TOKENIZER(text)["input_ids"]
    by_token = client.completions.create(**options, extra_body={"stop_token_ids": [tokens[5]]})
    assert by_token.choices[0].finish_reason == "stop"
    assert TOKENIZER.decode([tokens[5]]) not in by_token.choices[0].text


def test_seeds_choices_and_penalties(server):
    client = server.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 12, "n": 3}
    first = client.completions.create(**options, seed=5, temperature=1.5)
    again = client.completions.create(**options, seed=5, temperature=1.5)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == len(TOKENIZER("The")["input_ids"])
    token = str(TOKENIZER("q")["input_ids"][0])
    always: dict[str, Any] = {
        "model": "tiny", "prompt": "q", "max_tokens": 4, "temperature": 0,
        "logit_bias": {token: 100},
    }  # fmt: skip
    assert client.completions.create(**always).choices[0].text == "qqqq"
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, n=2, seed=1, stream=True
    )
    ended = [c.choices[0].index for c in chat if c.choices[0].finish_reason]
    assert sorted(ended) == [0, 1]


def test_echo_and_logprobs_tell_the_likelihood_of_given_tokens(server):
    ids = TOKENIZER("The lazy dog")["input_ids"]
    for prompt in (ids, [ids, ids[:4]], ["The lazy dog"]):
        body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
        choices = server.post("/v1/completions", body).json()["choices"]
        logprobs = choices[0]["logprobs"]
        assert choices[0]["text"].startswith("The lazy dog")
        assert len(logprobs["tokens"]) == len(ids) + 1 == len(logprobs["text_offset"])
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        assert "".join(logprobs["tokens"]) == choices[0]["text"]
        best = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
        assert all(a <= b for a, b in zip(logprobs["token_logprobs"][1:], best, strict=True))
        assert len(choices) == (2 if isinstance(prompt[0], list) else 1)
    alone = server.post("/v1/completions", body | {"max_tokens": 0}).json()["choices"][0]
    assert alone["text"] == "The lazy dog"
    assert alone["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    streamed = events(server.post("/v1/completions", body | {"stream": True}).text)
    pieces = [piece["choices"][0] for piece in streamed]
    assert "".join(piece["text"] for piece in pieces) == choices[0]["text"]
    given = [value for piece in pieces for value in piece["logprobs"]["token_logprobs"]]
    assert given == logprobs["token_logprobs"]


def test_chat_logprobs_name_the_likeliest_tokens(server):
    answer = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob
        assert one.bytes == list(one.token.encode())
        assert len(one.top_logprobs) == 3


def test_what_transformers_chat_sends_is_understood(server):
    loaded = server.post("/load_model", {"model": "tiny"})
    assert json.loads(loaded.text.removeprefix("data: "))["status"] == "ready"
    assert server.post("/load_model", {"model": "other"}).status_code == 404
    config = {"max_new_tokens": 3, "do_sample": False, "top_k": 50, "eos_token_id": None}
    body = {"messages": HELLO, "generation_config": json.dumps(config)}
    first, second = (server.post(CHAT, body).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] == 3
    assert first["choices"] == second["choices"]
    assert server.post(CHAT, body | {"generation_config": "["}).status_code == 400


def test_a_last_turn_of_the_assistant_is_continued_and_parts_are_one_text(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "The quick"}]}]
    plain = [{"role": "user", "content": "The quick"}]
    counts = [
        server.post("/tokenize", {"messages": messages}).json()["tokens"]
        for messages in (parts, plain, [*plain, {"role": "assistant", "content": "br"}])
    ]
    assert counts[0] == counts[1]
    assert TOKENIZER.decode(counts[2]).endswith("br")


# ----------------------------------------------------------------------------------- defaults

RECOMMENDED = {
    "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, RECOMMENDED),
        (dict.fromkeys(RECOMMENDED), RECOMMENDED),
        ({"temperature": 0.0}, RECOMMENDED | {"temperature": 0.0}),
        ({"top_k": -1, "top_p": 1.0}, RECOMMENDED | {"top_k": 0, "top_p": 1.0}),
        ({"frequency_penalty": 0.5}, RECOMMENDED | {"frequency_penalty": 0.5}),
        ({"generation_config": '{"top_k": 5}'}, RECOMMENDED | {"top_k": 5}),
    ],
)
def test_a_request_wins_field_by_field_and_null_says_nothing(said, expected):
    defaults = schema.Generation.model_validate(RECOMMENDED)
    asked = schema.Generation.model_validate(said)
    assert asked.sampling(defaults) == Sampling(**expected)


def test_what_a_model_recommends_is_drawn_as_if_the_client_had_asked_for_it(server, engine):
    defaults = schema.Generation.model_validate(RECOMMENDED)
    with serving(engine, defaults=defaults) as recommending:
        for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "The quick"})):
            body |= {"max_tokens": 16, "seed": 4, "ignore_eos": True, "n": 2}
            choices = [
                one.post(path, body | said).json()["choices"]
                for one, said in (
                    (server, RECOMMENDED), (recommending, {}), (server, {}),
                    (recommending, RECOMMENDED | {"temperature": 1.9}),
                )
            ]  # fmt: skip
            assert choices[0] == choices[1]
            assert choices[1] not in choices[2:]


def test_a_recommended_length_is_the_default_of_chats_where_there_is_room(engine):
    defaults = schema.Generation.model_validate({"max_tokens": 30})
    with serving(engine, defaults=defaults) as server:

        def length(path: str, **said: Any) -> int:
            answer = server.post(path, {"ignore_eos": True, **said}).json()
            return answer["usage"]["completion_tokens"]

        assert length(CHAT, messages=HELLO) == length(CHAT, messages=HELLO, max_tokens=None) == 30
        assert length(CHAT, messages=HELLO, max_tokens=40) == 40
        assert length(CHAT, messages=HELLO, max_completion_tokens=3) == 3
        assert length(CHAT, messages=HELLO, min_tokens=35) == 35
        assert length(TEXT, prompt="The") == 16
        assert length(TEXT, prompt="The", min_tokens=20) == 20
        long = [{"role": "user", "content": "\n".join("x" * 240)}]
        prompt = server.post("/tokenize", {"messages": long}).json()["count"]
        assert length(CHAT, messages=long) == 512 - prompt < 30


Start = Callable[..., tuple[int, Service | None]]


@pytest.fixture
def start(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`start(file, *options)`: how `serve-local` of a model with such a generation_config.json
    ends before it waits for requests, and what would answer them.
    """
    services: list[Service] = []
    monkeypatch.setattr(app, "create_app", lambda service, **_: services.append(service))
    monkeypatch.setattr(serve, "_run", lambda app, worker, listener, drain: listener.close())

    def started(file: str, *options: str) -> tuple[int, Service | None]:
        model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
        (model / "generation_config.json").write_text(file)
        code = run_command(["serve-local", str(model), "--port", "0", *options])
        return code, services[0] if services else None

    return started


@pytest.mark.parametrize(
    ("file", "defaults"),
    [
        ({}, None),
        ({"temperature": None, "do_sample": None, "top_k": None}, None),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 99},
            {"temperature": 0.7, "top_k": 20, "max_tokens": 99},
        ),
        ({"do_sample": False, "temperature": None}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.9}, {"temperature": 0.0}),
        ({"top_p": 0.8}, {"top_p": 0.8}),
    ],
    ids=["empty", "nothing", "all", "greedy", "greedy whatever else", "no word of sampling"],
)
def test_what_the_file_of_a_model_recommends_is_told(start: Start, capfd, file, defaults) -> None:
    code, service = start(json.dumps(file | {"eos_token_id": 1}))
    said = capfd.readouterr().err
    assert code == 0
    assert service is not None
    assert service.model_card()["kvtool"].get("defaults") == defaults
    told = ", ".join(f"{name} {value}" for name, value in sorted((defaults or {}).items()))
    found = re.findall(r"defaults of requests: (.*) \(generation_config\.json\)", said)
    assert [", ".join(sorted(one.split(", "))) for one in found] == ([told] if told else [])
    assert "not followed" not in said


def test_a_plan_with_which_turns_are_not_shared_says_so(
    start: Start, tiny, tmp_path, capfd
) -> None:
    checkpoint, path = Checkpoint.open(str(tiny("llama"))), tmp_path / "plan"
    layers = (LayerPlan((True, False), 4, 8), *whole_layers(checkpoint)[1:])
    Plan(base_of(checkpoint), layers).write(path)
    assert start("{}", "--plan", str(path))[0] == 0
    said = f"every prompt is read from its start: {path} was made with --prefill dense"
    assert said in capfd.readouterr().err


def test_what_no_request_could_say_is_named_and_not_followed(start: Start, capfd) -> None:
    nothing = {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "typical_p": 1.0}
    code, _ = start(json.dumps(nothing | {"no_repeat_ngram_size": 3, "stop_strings": ["x"]}))
    assert code == 0
    named = "generation_config.json also says stop_strings, no_repeat_ngram_size, which is not"
    assert named in capfd.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ('{"temperature": "hot"}', ": temperature: Input should be a valid number"),
        ('{"top_p": 7}', ": top_p: Input should be less than or equal to 1"),
        ('{"top_k": NaN}', ": top_k: Input should be a finite number"),
        ('{"max_new_tokens": -1}', ": max_new_tokens: Input should be greater than or equal"),
        ("{", " is not readable JSON"),
        ("[]", " holds a JSON list instead of an object"),
    ],
)
def test_a_recommendation_that_no_request_may_make_is_refused_in_one_sentence(
    start: Start, capfd, file, message
) -> None:
    code, _ = start(file)
    said = capfd.readouterr().err
    assert code == 1
    assert f"generation_config.json{message}" in said
    loads = "max_new_tokens" not in file and file not in ("{", "[]")
    assert ("--generation-config none" in said) == loads  # nothing helps the others


def test_generation_config_none_leaves_all_to_requests(start: Start, capfd) -> None:
    code, service = start('{"temperature": "hot", "num_beams": 4}', "--generation-config", "none")
    assert code == 0
    assert service is not None
    assert "defaults" not in service.model_card()["kvtool"]
    assert "generation_config.json" not in capfd.readouterr().err


# -------------------------------------------------------------------------------------- tools


class Script:
    """In the place of the stream of text: a fixed answer, three letters per token."""

    text = 'Sure. <tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'

    def __init__(self, tokenizer: Any) -> None:
        self.at = 0

    def push(self, token: int) -> str:
        self.at += 3
        return self.text[self.at - 3 : self.at]

    def flush(self) -> str:
        return ""


def test_tool_calls_are_parsed_whole_and_streamed(engine, monkeypatch):
    monkeypatch.setattr(worker_module, "TextStream", Script)
    monkeypatch.setattr(engine.tokenizer, "chat_template", TOOL_TEMPLATE)
    with serving(engine) as server:
        options: dict[str, Any] = {
            "model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 40,
            "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        answer = server.client().chat.completions.create(**options).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == "Sure. "
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Bern"}
        chunks = list(server.client().chat.completions.create(**options, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "Sure. "
        (streamed,) = [call for delta in deltas for call in delta.tool_calls or ()]
        assert streamed.function.name == "weather"
        assert streamed.id != call.id
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        none = server.client().chat.completions.create(**options, tool_choice="none")
        assert none.choices[0].message.tool_calls is None


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {}, 400, "messages"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": HELLO, "temperature": 3}, 400, "temperature"),
        (CHAT, {"messages": HELLO, "n": 0}, 400, "n"),
        (CHAT, {"messages": HELLO, "stop": list("abcde")}, 400, None),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, None),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, 400, None),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, 400, None),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, None),
        (CHAT, {"messages": HELLO, "tools": [TOOL]}, 400, "tools"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": False}}, 400, None),
        (CHAT, {"messages": HELLO, "max_tokens": 600}, 400, "max_tokens"),
        (CHAT, {"messages": HELLO, "logit_bias": {"300": 1}}, 400, "logit_bias"),
        (CHAT, {"messages": HELLO, "model": "gpt-4o"}, 404, "model"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 600}]}, 400, None),
        (TEXT, {"prompt": ""}, 400, None),
        (TEXT, {"prompt": []}, 400, None),
        (TEXT, {"prompt": [[]]}, 400, "prompt"),
        (TEXT, {"prompt": [300]}, 400, "prompt"),
        (TEXT, {"prompt": "x", "suffix": "y"}, 400, None),
        (TEXT, {"prompt": "x", "best_of": 3}, 400, None),
        (TEXT, [], 400, None),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/tokenize", {}, 400, None),
        ("/nothing", {}, 404, None),
        ("/health", {}, 405, None),
    ],
)
def test_errors_have_openais_shape_and_the_right_status(server, path, body, status, param):
    response = server.post(path, body)
    assert response.status_code == status
    error = response.json()["error"]
    too_long = "the model's context is 512" in error["message"]
    assert error["code"] == ("context_length_exceeded" if too_long else status)
    assert error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": HELLO, "stop": list("abcde")}, "stop: List should have at most 4"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice names no tool"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type: the model reads text, and no part of type 'image_url'",
        ),
        ("/v1/embeddings", {"input": "a"}, "Not Found: POST /v1/embeddings"),
        (CHAT, [], "the body is no JSON object, sent as application/json"),
    ],
)
def test_errors_say_what_is_wrong_in_one_sentence(server, path, body, message):
    assert server.post(path, body).json()["error"]["message"].startswith(message)


def test_both_numbers_are_said_when_the_context_is_too_short(server):
    with pytest.raises(openai.BadRequestError, match=r"1 prompt tokens and 600 .*512"):
        server.client().completions.create(model="tiny", prompt=[5], max_tokens=600)


@pytest.mark.parametrize(
    "field", ["functions", "function_call", "guided_json", "guided_regex", "guided_choice"]
)
def test_what_has_another_name_here_is_refused_and_not_ignored(server, field):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert server.post(CHAT, body | {field: None}).status_code == 200
    refused = server.post(CHAT, body | {field: "x"})
    assert refused.status_code == 400
    assert f"{field} is not known here: use " in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b'{"model": "\\ud800", "messages": [{"role": "user"}]}', b'{"logit_bias": {"\\ud800": 1}}'],
)
def test_half_a_character_in_a_request_is_no_error_of_the_server(server, body):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{CHAT}", content=body, headers=headers)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["type"] in ("invalid_request_error", "not_found_error")


def test_a_body_that_is_no_json_is_refused(server):
    for content in (b"{", b"\xff", b"[" * 100_000):
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}{CHAT}", content=content, headers=headers)
        assert response.status_code == 400, content[:5]
        assert response.json()["error"]["type"] == "invalid_request_error"
    for content, kind, message in (
        (b"", "application/json", "the body is empty"),
        (b"a=b", "application/x-www-form-urlencoded", "the body is no JSON object"),
    ):
        headers = {"content-type": kind}
        response = httpx.post(f"{server.url}{CHAT}", content=content, headers=headers)
        assert response.json()["error"]["message"].startswith(message)
    headers = {"content-type": "application/json"}
    broken = httpx.post(f"{server.url}{CHAT}", content=b'{"a": }', headers=headers)
    assert broken.json()["error"]["message"] == (
        "the body is no JSON: Expecting value (character 6)"
    )


def test_the_key_opens_everything_and_health_needs_none(engine):
    with serving(engine, api_key="secret", max_body=2000) as server:
        for path in ("/v1/models", "/metrics", "/", "/kv", "/ready", "/openapi.json"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                response = httpx.get(f"{server.url}{path}", headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{server.url}/health").status_code == 200
        # A browser asks its user for the key.
        challenge = httpx.get(server.url).headers["www-authenticate"]
        assert challenge.startswith("Basic ")
        assert httpx.get(server.url, auth=("anyone", "secret")).status_code == 200
        assert httpx.get(server.url, auth=("secret", "wrong")).status_code == 401
        broken = {"Authorization": "Basic secret!"}
        assert httpx.get(server.url, headers=broken).status_code == 401
        assert [model.id for model in server.client(api_key="secret").models.list()] == ["tiny"]
        headers = {"Authorization": "Bearer secret", "content-type": "application/json"}
        large = json.dumps({"prompt": "x" * 3000}).encode()
        chunked = (large[at : at + 500] for at in range(0, len(large), 500))
        for content in (large, chunked):
            response = httpx.post(f"{server.url}{TEXT}", content=content, headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == 413


@contextmanager
def held(server: Running) -> Iterator[None]:
    """Lets no step begin, so that what was sent before is there until the end."""
    step, now = server.worker.scheduler.step, threading.Event()
    server.worker.scheduler.step = lambda: (now.wait(60), step())[1]
    try:
        yield
    finally:
        now.set()
        server.worker.scheduler.step = step


def test_a_full_queue_says_when_to_come_again_before_anything_is_tokenized(engine, monkeypatch):
    chats = {"messages": HELLO, "n": 2}
    with serving(engine, max_running=1, max_waiting=1) as server:
        first = {"prompt": "x", "max_tokens": 2, "stream": True}
        with (
            held(server),
            httpx.stream("POST", f"{server.url}{TEXT}", json=first, timeout=60),
            monkeypatch.context() as patched,
        ):
            patched.setattr(Service, "answers", None)
            patched.setattr(chat, "render", None)
            for path, body in ((TEXT, {"prompt": "x", "n": 2}), (CHAT, chats)):
                refused = server.post(path, body)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "overloaded_error"
        fits = {"prompt": "x", "n": 2, "max_tokens": 2}
        wait_until(lambda: server.post(TEXT, fits).status_code == 200)


def test_more_answers_than_could_ever_wait_are_refused_for_good_and_at_once(engine):
    with serving(engine, max_running=1, max_waiting=1) as server:
        for path, body, count in (
            (TEXT, {"prompt": ["a"] * 8000, "n": 64}, 512_000),
            (CHAT, {"messages": HELLO, "n": 3}, 3),
        ):
            begin = time.monotonic()
            response = server.post(path, body)
            assert response.status_code == 400
            message = f"{count} answers at once are asked for, but at most 2 can be"
            assert response.json()["error"]["message"].startswith(message)
            assert time.monotonic() - begin < 2, "nothing is tokenized before"


def test_an_engine_that_fails_ends_its_requests_and_goes_on(engine, monkeypatch, capfd):
    with serving(engine) as server:
        step = server.worker.scheduler.step
        body = {"prompt": "The", "max_tokens": 5}

        def fail() -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(server.worker.scheduler, "step", fail)
        response = server.post(TEXT, body)
        assert response.status_code == 500
        assert "out of luck" in response.json()["error"]["message"]
        streamed = server.post(TEXT, body | {"stream": True})
        assert json.loads(streamed.text.removeprefix("data: "))["error"]["code"] == 500
        monkeypatch.setattr(server.worker.scheduler, "step", step)
        assert server.post(TEXT, body).status_code == 200
        assert server.kv()["running"] == []


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of luck")


def test_a_closed_stderr_does_not_end_the_engine(engine, monkeypatch):
    with serving(engine) as server:
        body = {"prompt": "The", "max_tokens": 2}
        with monkeypatch.context() as patched, Path(os.devnull).open("w") as closed:
            closed.close()
            patched.setattr(worker_module.sys, "stderr", closed)
            patched.setattr(server.worker.scheduler, "step", refuse)
            assert server.post(TEXT, body).status_code == 500
        assert server.post(TEXT, body).status_code == 200


def test_an_engine_that_ends_leaves_nobody_waiting(engine, monkeypatch, capfd):
    """Neither who is being answered, nor who has just asked, nor who asks later."""
    begun, now = threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        now.wait(60)
        refuse()

    with serving(engine) as server:
        monkeypatch.setattr(server.worker.scheduler, "step", step)
        monkeypatch.setattr(server.worker.scheduler, "forget_prefixes", refuse)
        body = {"prompt": "The", "max_tokens": 5, "stream": True}
        with httpx.stream("POST", f"{server.url}{TEXT}", json=body, timeout=20) as running:
            assert begun.wait(20)
            with httpx.stream("POST", f"{server.url}{TEXT}", json=body, timeout=20) as queued:
                now.set()
                for response in (running, queued):
                    last = response.read().decode().removeprefix("data: ")
                    assert json.loads(last)["error"]["code"] == 500
                    assert "out of luck" in last
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        for path, more in ((TEXT, {"prompt": "The"}), (CHAT, {"messages": HELLO})):
            refused = server.post(path, more)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "the engine has stopped"


@pytest.mark.parametrize("said_by", ["torch", "others"])
def test_an_accelerator_that_fails_ends_the_engine_for_good(engine, monkeypatch, capfd, said_by):
    """Its errors stay with the process; kernels that torch did not start raise other errors."""

    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fail_in_kernel() -> None:
        monkeypatch.setattr(engine, "device", torch.device("cuda"))
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with serving(engine) as server:
        step = fail if said_by == "torch" else fail_in_kernel
        monkeypatch.setattr(server.worker.scheduler, "step", step)
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        response = server.post(TEXT, {"prompt": "The", "max_tokens": 5})
        assert response.status_code == 500
        assert "illegal memory access" in response.json()["error"]["message"]
        for path in ("/health", "/ready"):
            wait_until(lambda path=path: httpx.get(f"{server.url}{path}").status_code == 503)
        assert server.post(TEXT, {"prompt": "The"}).status_code == 503


def test_a_choice_that_is_refused_late_ends_the_others_of_its_request(engine, monkeypatch, capfd):
    with serving(engine) as server:
        add, added = server.worker.scheduler.add, []

        def add_one(request: Request) -> None:
            if added:
                refuse()
            add(request)
            added.append(request)

        body = {"prompt": "The", "n": 3, "max_tokens": 2, "stream": True}
        with monkeypatch.context() as patched:
            patched.setattr(server.worker.scheduler, "add", add_one)
            failed = server.post(TEXT, body).text
        assert json.loads(failed.removeprefix("data: "))["error"]["code"] == 500
        text = httpx.get(f"{server.url}/metrics").text
        assert 'request_success_total{finished_reason="error",model_name="tiny"} 3.0' in text
        latency = re.search(r"e2e_request_latency_seconds_sum\S* (\S+)", text)
        assert latency is not None
        assert float(latency[1]) < 60
        assert len(events(server.post(TEXT, body).text)) >= 3


# ------------------------------------------------------------------------------ memory and life


def test_a_client_that_leaves_frees_its_memory(server):
    body = {"prompt": "The", "max_tokens": 500, "ignore_eos": True}
    server.worker.scheduler.forget_prefixes()
    for stream in (True, False):
        with httpx.Client(base_url=server.url) as client:
            try:
                with client.stream("POST", TEXT, json=body | {"stream": stream}, timeout=0.3) as r:
                    next(r.iter_lines())
            except httpx.ReadTimeout:
                assert not stream
        wait_until(lambda: not server.kv()["running"])
        assert server.kv()["used_bytes"] == server.kv()["shared_prefix_bytes"]
    text = httpx.get(f"{server.url}/metrics").text
    assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in text


def test_requests_wait_for_memory_and_all_are_answered(engine):
    row = Scheduler(engine, 2**24).memory
    with serving(engine, memory=2 * row.holding(128, 1)) as server:

        async def ask(client: httpx.AsyncClient, n: int) -> int:
            body = {"prompt": [5 + n], "max_tokens": 100, "ignore_eos": True}
            answer = await client.post(TEXT, json=body)
            return answer.json()["usage"]["completion_tokens"]

        async def together() -> list[int]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(ask(client, n) for n in range(6)))

        assert asyncio.run(together()) == [100] * 6
        assert server.kv()["used_bytes"] == 0


def test_an_idle_server_gives_memory_back_once(engine, monkeypatch):
    by: list[threading.Thread] = []  # other servers of this process are idle too
    monkeypatch.setattr(worker_module, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "give_back", lambda: by.append(threading.current_thread()))
    with serving(engine) as server:
        wait_until(lambda: server.worker in by)
        for count in (2, 3):
            assert server.post(TEXT, {"prompt": "x", "max_tokens": 2}).status_code == 200
            wait_until(lambda count=count: by.count(server.worker) == count)
            time.sleep(0.2)
            assert by.count(server.worker) == count


def test_freed_memory_goes_back_to_the_system():
    process = psutil.Process()
    # Small pieces lie on the heap; the last one keeps what was freed below it.
    pieces = [bytearray(60_000) for _ in range(2000)]
    del pieces[:-1]
    before = process.memory_info().rss
    give_back()
    assert process.memory_info().rss < before - 50_000_000


def test_metrics_have_the_names_of_vllm(engine):
    with serving(engine, metric_prefixes=("kvtool", "vllm")) as server:
        assert server.post(TEXT, {"prompt": "The quick", "max_tokens": 3}).status_code == 200
        text = httpx.get(f"{server.url}/metrics").text
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    names = [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "request_success_total",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "cache_config_info",
    ]
    for prefix in ("kvtool", "vllm"):
        assert {f"{prefix}:{name}" for name in names} <= families
    assert 'vllm:generation_tokens_total{model_name="tiny"} 3.0' in text
    own = [
        "kv_bytes_allocated",
        "kv_bytes_used",
        "kv_bytes_per_token",
        "kv_compression_ratio",
        "kv_evicted_tokens_total",
        "decode_bandwidth_bytes_per_second",
    ]
    assert {f"kvtool:{name}" for name in own} <= families
    assert 'kvtool:kv_bytes_used{model_name="tiny"} 0.0' in text


def test_the_first_token_is_counted_when_it_comes(engine):
    def count(server: Running, name: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.search(rf"^kvtool:{name}_seconds_count\S* (\S+)", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    with serving(engine) as server:
        step, drawn = server.worker.scheduler.step, threading.Event()

        def step_once() -> Any:
            return [] if drawn.is_set() else (drawn.set(), step())[1]

        body = {"prompt": "The", "max_tokens": 4, "ignore_eos": True, "stream": True}
        server.worker.scheduler.step = step_once
        try:
            with httpx.stream("POST", f"{server.url}{TEXT}", json=body, timeout=60) as response:
                lines = response.iter_lines()
                wait_until(lambda: count(server, "time_to_first_token") == 1)
                assert count(server, "e2e_request_latency") == 0
                server.worker.scheduler.step = step
                assert [line for line in lines if line][-1] == "data: [DONE]"
        finally:
            server.worker.scheduler.step = step
        assert count(server, "time_to_first_token") == 1
        assert count(server, "inter_token_latency") == 3
        # Nothing is drawn of a request for no tokens.
        assert server.post(TEXT, {"prompt": "The", "max_tokens": 0}).status_code == 200
        assert count(server, "e2e_request_latency") == 2
        assert count(server, "time_to_first_token") == 1


def test_the_status_page_needs_nothing_from_elsewhere(server):
    response = httpx.get(server.url)
    assert response.headers["content-type"].startswith("text/html")
    page = response.text
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    assert "&lt;all of it&gt;" in page
    for word in ("Memory", "Saved", "tokens/s", "Uncompressed"):
        assert word in page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_chromium_shows_the_status_page(server, tmp_path):
    assert CHROMIUM is not None
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    browser += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    body = {"prompt": "The", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 3}
    with httpx.stream("POST", f"{server.url}{TEXT}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        with held(server):
            shown = subprocess.run(
                [*browser, "--dump-dom", server.url], capture_output=True, text=True, check=True
            )
            picture = tmp_path / "page.png"
            subprocess.run([*browser, f"--screenshot={picture}", server.url], check=True)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert "<strong>3 running</strong>" in shown.stdout
    assert "CONSOLE" not in shown.stderr, "nothing is refused or broken"
    blue = matplotlib.colors.to_rgb("#2a78d6")
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert (abs(pixels - blue).max(axis=-1) < 0.01).sum() > 1000, "the bars have their colour"


@pytest.mark.parametrize("route", ["/tokenize", TEXT])
def test_half_of_a_character_is_the_fault_of_the_request(server: Running, route: str) -> None:
    as_json = {"content-type": "application/json"}
    answer = httpx.post(server.url + route, content=rb'{"prompt": "half \ud83e"}', headers=as_json)
    assert answer.status_code == 400
    assert "half of one" in answer.json()["error"]["message"]


def test_a_model_is_as_long_as_the_memory_holds(engine):
    with serving(engine, memory=300 * 768) as server:
        longest = server.client().models.retrieve("tiny").max_model_len
        assert longest < engine.max_context
        assert server.post("/tokenize", {"prompt": "a"}).json()["max_model_len"] == longest
        prompt = {"model": "tiny", "prompt": [5] * (longest - 1)}
        assert server.post(TEXT, {**prompt, "max_tokens": 1}).status_code == 200
        assert server.post(TEXT, {**prompt, "max_tokens": 2}).status_code == 400


@pytest.mark.parametrize(
    ("room", "longest"),
    [
        pytest.param(lambda n: max(0, 300 - n), 300, id="every token costs the same"),
        pytest.param(lambda n: max(0, 100 - n // 4), 400, id="a quarter of a prompt is kept"),
        pytest.param(lambda n: 450 - n if n <= 200 else 0, 450, id="prompts are read densely"),
        pytest.param(lambda n: max(0, 512 - n), 512, id="the context is the limit"),
    ],
)
def test_the_longest_sequence_is_behind_the_prompt_that_leaves_most(room, longest):
    scheduler = SimpleNamespace(room=room, engine=SimpleNamespace(max_context=512))
    scheduler.roomiest = Scheduler.roomiest.func(scheduler)
    assert Scheduler.longest.fget(scheduler) == longest


def test_facts_about_model_and_tokenizer(server):
    client = server.client()
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    tokens = server.post("/tokenize", {"prompt": "naïve 🤖"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "naïve 🤖"}
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert {"<|bos|>", "<|eos|>"} == {info["bos_token"], info["eos_token"]}
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert "version" in httpx.get(f"{server.url}/version").json()


def _takes_ctrl_c() -> None:
    """A shell starts what runs behind it with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _serving_alone(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve-local` in a process of its own that has told its address, and that address."""
    command = [sys.executable, "-m", "kvtool", "serve-local", str(model), "--port", "0", *options]
    command += ["--kv-memory", "64MiB", "--served-model-name", "tiny"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=_takes_ctrl_c
    ) as process:
        assert process.stderr is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
        assert url is not None
        yield process, url[0]


def test_sigterm_lets_running_streams_end(tiny):
    with _serving_alone(tiny("llama")) as (process, url):
        body = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}{TEXT}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert process.wait(30) == 0


@pytest.mark.parametrize("ending", ["a second Ctrl-C", "the end of --drain"])
def test_what_a_server_waits_for_is_told_and_cut_off_without_a_traceback(tiny, ending):
    drain = "0" if ending == "the end of --drain" else "60"
    with _serving_alone(tiny("llama"), "--drain", drain) as (process, url):
        process.stderr.readline()
        body = {"prompt": "The", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}{TEXT}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            if ending == "a second Ctrl-C":
                told = "waiting up to 60 s for 1 running request; Ctrl-C cuts them off\n"
                assert process.stderr.readline() == told
                process.send_signal(signal.SIGINT)
            answer = [line for line in lines if line]
            rest = process.stderr.read()
        assert "the server was stopped before the answer was complete" in answer[-1]
        assert rest.strip() == "interrupted"
        assert process.wait(30) == 130


def test_what_runs_ends_well_where_nobody_reads_what_the_server_waits_for(tiny):
    with _serving_alone(tiny("llama")) as (process, url):
        body = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}{TEXT}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.stderr.close()
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.wait(30)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-memory", "lots"], 2, "--kv-memory 'lots' is not a size"),
        (["--kv-memory", "50%"], 2, "--kv-memory '50%' is not a size"),
        (["--kv-memory", "1KB"], 5, "does not hold a single token"),
        (["--api-key", ""], 2, "the API key is empty"),
        (["--chat-template", "/nowhere"], 2, "--chat-template /nowhere cannot be read"),
        (["--host", "not a host"], 1, "cannot listen on not a host"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(tiny, capfd, arguments, code, message):
    assert run_command(["serve-local", str(tiny("llama")), "--port", "0", *arguments]) == code
    error = capfd.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "--port 0" not in error


def test_a_port_that_is_taken_is_known_before_the_weights_are_loaded(tiny, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run_command(["serve-local", str(tiny("llama")), "--port", port]) == 1
    err = capfd.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}" in err
    assert "hint: --port 0" in err


def test_whatever_the_document_allows_is_answered_without_a_500(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answered(case: Any) -> None:
            response = case.call(timeout=30)
            assert response.status_code < 500, (case.method, case.path, case.body, response.text)

        answered()
    wait_until(lambda: not server.kv()["running"])
