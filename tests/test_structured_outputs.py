"""Answers that obey a grammar, however unlikely the model finds them."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from _server_tools import HELLO, TOOL_TEMPLATE, Running, serving
from conftest import make_tokenizer
from pydantic import BaseModel

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.errors import UsageError
from kvtool.runtime import Engine
from kvtool.runtime.grammar import Grammars
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.server.schema import forced_call

CHAT = "/v1/chat/completions"
TOKENIZER = make_tokenizer()
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"enum": [1, 22]}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def tool(name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": arguments}}


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return Engine.load(Checkpoint.open(str(tiny("llama"))))


@pytest.fixture(scope="module")
def server(engine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def grammars(engine) -> Grammars:
    return Grammars(engine.tokenizer, engine.vocab_size, sorted(engine.eos_ids))


def asked(server: Running, **options: Any) -> Any:
    """The first choice of an answer, drawn at random where nothing else is said."""
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 120, "temperature": 1.5, **options}
    return server.client().chat.completions.create(**given).choices[0]


def schema(rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": rules}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_json_after_a_schema(server, temperature):
    for seed in range(3):
        choice = asked(server, response_format=schema(COLOUR), temperature=temperature, seed=seed)
        assert choice.finish_reason == "stop"
        said = json.loads(choice.message.content)
        assert said["colour"] in ("red", "green")
        assert said["count"] in (1, 22)
        assert len(said) == 2


def test_a_stream_obeys_as_well(server):
    chunks = server.client().chat.completions.create(
        model="tiny", messages=HELLO, response_format=schema(COLOUR), stream=True, max_tokens=120
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert set(json.loads(text)) == {"colour", "count"}


def test_a_client_gets_the_object_that_it_asked_for(server):
    class Pet(BaseModel):
        legs: bool
        wild: bool

    answer = server.client().chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Pet, max_tokens=120
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_an_object_begins_as_one(server):
    choice = asked(server, response_format={"type": "json_object"})
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        json.loads(choice.message.content)


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        ({"regex": r"[ab]{3}-[0-9][0-9]"}, r"[ab]{3}-[0-9][0-9]"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"json": COLOUR}, r"\{[^}]*\}"),
        ({"json": json.dumps(COLOUR)}, r"\{[^}]*\}"),
        ({"grammar": 'start: ("x" | "yz") "!"'}, "(x|yz)!"),
        ({"grammar": 'root ::= ("x" | "yz") "!"'}, "(x|yz)!"),
    ],
)
def test_vllms_structured_outputs(server, said, pattern):
    for path, prompt in ((CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "The"})):
        body = {**prompt, "structured_outputs": said, "max_tokens": 99, "temperature": 1.5, "n": 3}
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert re.fullmatch(pattern, text, re.S), text
            assert choice["finish_reason"] == "stop"


def test_a_call_can_be_forced(server, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", TOOL_TEMPLATE)
    where = {"type": "object", "properties": {"in": {"$ref": "#/$defs/Town"}}, "required": ["in"]}
    where |= {"$defs": {"Town": {"enum": ["Bern", "Basel"]}}, "additionalProperties": False}
    tools = [tool("weather", where), tool("stop", {**COLOUR})]
    forced = {"type": "function", "function": {"name": "weather"}}
    for choice, names in (("required", {"weather", "stop"}), (forced, {"weather"})):
        answer = asked(server, tools=tools, tool_choice=choice)
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments in ({"in": "Bern"}, {"in": "Basel"})
        assert not answer.message.content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs to"),
        ({"response_format": schema({"type": "nothing"})}, "no grammar can be made of this json"),
        ({"structured_outputs": {"regex": "(("}}, "be made of this regex: unclosed group"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "its 200,000 characters exceed 131,072"),
        ({"structured_outputs": {"regex": r"[^\s\S]"}}, "no answer could obey it"),
        ({"response_format": schema({"$ref": "#"})}, "no answer could obey it"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "no grammar can be made"),
        ({"structured_outputs": {"json": "{"}}, "no grammar can be made of this json"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {}}, "one of json, regex, choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "one of json, regex, choice"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "can obey one grammar",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "no ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 5}, "no min_tokens"),
        ({"tools": [tool("a", {})], "tool_choice": "always"}, "names no tool"),
        ({"tools": [tool("a", 5)], "tool_choice": "required"}, "a JSON schema as its parameters"),
        ({"tools": [tool(None, {})], "tool_choice": "required"}, "a function has a name"),
        (
            {
                "tools": [tool("a", {})],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "names no tool",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_one_sentence(server, options, said):
    response = server.post(CHAT, {"messages": HELLO, **options})
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert said in message
    assert "\n" not in message


def test_a_preempted_answer_goes_on_where_it_was(engine, grammars):
    """Two answers in memory for one: the second starts anew, and obeys as if it had not."""
    ids, made = list(range(5, 90)), grammars.make("regex", "([ab]c){30}")
    texts = []
    for memory in (2**24, 260 * 768):
        scheduler = Scheduler(engine, memory, piece=16, share_prefixes=False)
        requests = [Request(ids, 70, grammar=made.fresh()) for _ in range(2)]
        for request in requests:
            scheduler.add(request)
        while not scheduler.idle:
            scheduler.step()
        texts.append([TOKENIZER.decode(x.tokens, skip_special_tokens=True) for x in requests])
        preempted = scheduler.counters.preemptions
    assert preempted
    assert texts[0] == texts[1]
    assert all(re.fullmatch("([ab]c){30}", text) for text in texts[0])


def test_only_what_may_come_next_is_left(engine, grammars):
    grammar = grammars.make("choice", ["The fox", "The dog"])
    scores = torch.zeros(1, engine.vocab_size)
    start = TOKENIZER("The ")["input_ids"]
    assert not grammar.mask(scores, start)[0, TOKENIZER("f")["input_ids"][0]].isinf()
    left = grammar.mask(scores, start).isfinite().nonzero()[:, 1].tolist()
    assert {TOKENIZER.decode([token])[0] for token in left} <= {"f", "d"}
    end = TOKENIZER("The fox")["input_ids"]
    left = grammar.fresh().mask(scores, end).isfinite().nonzero()[:, 1].tolist()
    assert set(left) == engine.eos_ids


def test_a_server_that_could_not_obey_does_not_start(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert run_command(["serve-local", "nothing"]) == 2
    assert "not installed: llguidance" in " ".join(capsys.readouterr().err.split())


def test_a_slow_tokenizer_is_told(engine):
    with pytest.raises(UsageError, match="tokenizer"):
        Grammars(object(), engine.vocab_size, [1]).make("regex", "a")


def test_each_call_refers_to_its_own_definitions(engine, grammars):
    tools = [
        tool(name, {"properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"const": value}}})
        for name, value in (("a", "one"), ("b", "two"))
    ]
    made = grammars.make("json", forced_call([*tools, {"type": "other"}], "required"))
    for name, letter in (("a", "o"), ("b", "t")):
        begun = TOKENIZER(f'{{"name":"{name}","arguments":{{"x":"')["input_ids"]
        left = made.fresh().mask(torch.zeros(1, engine.vocab_size), begun)
        words = TOKENIZER.batch_decode(left.isfinite().nonzero()[:, 1:])
        assert {word[0] for word in words} == {letter}


@pytest.mark.parametrize(
    "rules",
    [
        {"type": "integer", "multipleOf": 99_999_989},
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(16)]},
    ],
)
def test_what_would_take_all_memory_or_hours_is_refused(grammars, rules):
    with pytest.raises(UsageError, match="too much time or memory"):
        grammars.make("json", rules)


def test_an_answer_that_looks_like_a_call_is_none_where_something_else_is_obeyed(
    server, engine, monkeypatch
):
    monkeypatch.setattr(engine.tokenizer, "chat_template", TOOL_TEMPLATE)
    pet = {"type": "object", "properties": {"name": {"const": "fox"}}, "required": ["name"]}
    options = {
        "response_format": schema({**pet, "additionalProperties": False}),
        "tools": [tool("weather", {})],
    }
    choice = asked(server, **options)
    assert json.loads(choice.message.content) == {"name": "fox"}
    assert not choice.message.tool_calls
    assert choice.finish_reason == "stop"
    chunks = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=120, stream=True, **options
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert json.loads(text) == {"name": "fox"}


def test_an_answer_that_its_grammar_gives_up_is_not_said_to_be_complete(server):
    dead = {"grammar": 'start: "a" more\nmore: more more'}
    choice = asked(server, extra_body={"structured_outputs": dead})
    assert choice.message.content == "a"
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("response_format", {"response_format": schema({"type": "nothing"})}),
        ("structured_outputs", {"structured_outputs": {"regex": "(("}}),
        ("tools", {"tools": [tool("a", {"$ref": "#/missing"})], "tool_choice": "required"}),
    ],
)
def test_the_field_that_cannot_be_obeyed_is_named(server, engine, monkeypatch, param, options):
    monkeypatch.setattr(engine.tokenizer, "chat_template", TOOL_TEMPLATE)
    response = server.post(CHAT, {"messages": HELLO, **options})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_clients_of_openai_are_refused_in_their_way(server):
    with pytest.raises(openai.BadRequestError, match="no grammar"):
        asked(server, response_format=schema({"type": "nothing"}))
