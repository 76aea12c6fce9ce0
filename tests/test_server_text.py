"""Text of answers: stop strings and tool calls, however the text comes in pieces."""

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.server.chat import ToolText
from kvtool.text import StopText

LETTERS = st.text("abc<{ ", max_size=12)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


def stopped_text(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    stream = StopText(stops)
    shown = "".join(stream.push(piece) for piece in pieces)
    return shown + stream.flush(), stream.stopped


@given(
    LETTERS, st.lists(st.text("abc", min_size=1, max_size=3), max_size=4), st.lists(st.integers(0))
)
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops, cuts):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert stopped_text(pieces_of(text, cuts), stops) == (expected, bool(ends))


def test_only_what_may_become_a_stop_string_is_held_back():
    stream = StopText(["END"])
    assert [stream.push(piece) for piece in ("say E", "N", "tity EN", "D.", "more")] == [
        "say ",
        "",
        "ENtity ",
        "",
        "",
    ]
    assert stream.stopped
    assert stream.flush() == ""


def split(pieces: Sequence[str]) -> tuple[str, list[dict]]:
    tools = ToolText()
    words = "".join(tools.push(piece) for piece in pieces)
    rest, calls = tools.end()
    return words + rest, calls


@pytest.mark.parametrize(
    ("text", "words", "names"),
    [
        (CALL, "", ["weather"]),
        (f"Let me see. {CALL}\n{CALL}", "Let me see. ", ["weather", "weather"]),
        ('<tool_call>[{"name": "a", "arguments": {}}, {"name": "b"}]</tool_call>', "", ["a", "b"]),
        ('{"name": "a", "parameters": {"x": 1}}', "", ["a"]),
        ("plain words", "plain words", []),
        ("a < b and <tool", "a < b and <tool", []),
        ('{"no": "call"}', '{"no": "call"}', []),
        ("<tool_call>{broken", "<tool_call>{broken", []),
        (
            '<tool_call>{"name": "a", "arguments": 3}',
            '<tool_call>{"name": "a", "arguments": 3}',
            [],
        ),
        ("", "", []),
    ],
)
@given(cuts=st.lists(st.integers(0), max_size=8))
def test_calls_are_found_and_what_does_not_parse_stays_text(text, words, names, cuts):
    found, calls = split(pieces_of(text, cuts))
    assert found == words
    assert [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_words_before_a_call_are_shown_at_once():
    tools = ToolText()
    assert tools.push("I look it up. <tool") == "I look it up. "
    assert tools.push("_call>{") == ""
