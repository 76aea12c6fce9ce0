"""Chat: which replies end, what is read out, and what is asked of a model without a template."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.evaluate.chat import PROMPTS, SAMPLES, chat_ids, converse, greedy_replies
from kvtool.evaluate.evaluation import Settings, evaluate
from kvtool.runtime import Engine

DOCUMENTS = ["The quick brown fox jumps over the lazy dog. " * 20]


@pytest.fixture
def engine(tiny: Callable[..., Path]) -> Engine:
    return Engine.load(Checkpoint.open(str(tiny("llama"))))


@pytest.mark.parametrize("stops", [True, False])
def test_a_reply_has_ended_where_a_stop_token_came_in_time(engine: Engine, stops: bool) -> None:
    ids = [[5, 6, 7], [8, 9]]
    free = greedy_replies(engine, ids, 4)
    (tokens, *_) = zip(*engine.generate(ids, max_new_tokens=4), strict=True)
    assert not any(reply.ended for reply in free)
    assert free[0].text == engine.tokenizer.decode(list(tokens))
    assert tokens[2] is not None
    engine.eos_ids = {tokens[2]} if stops else set()
    for allowed in (3, 4):  # the stop token may be the last that is allowed
        assert greedy_replies(engine, ids, allowed)[0].ended is stops


def test_every_prompt_is_asked_of_both_models_and_three_are_read_out(engine: Engine) -> None:
    chat, samples = converse(
        engine, engine, DOCUMENTS, prompts=5, max_new_tokens=6, max_context=512
    )
    assert chat is not None
    assert chat.max_new_tokens == 6
    assert [(one.language, one.prompt) for one in chat.prompts] == list(PROMPTS[:5])
    assert all(one.ended == one.base_ended for one in chat.prompts)
    assert [sample.prompt for sample in samples] == [text for _, text in PROMPTS[:SAMPLES]]
    assert all(sample.text == sample.base for sample in samples)


def test_without_an_original_nothing_is_said_of_it(engine: Engine) -> None:
    chat, samples = converse(engine, None, DOCUMENTS, prompts=2, max_new_tokens=3, max_context=512)
    assert chat is not None
    assert [one.base_ended for one in chat.prompts] == [None, None]
    assert [sample.base for sample in samples] == [None, None]


def test_a_question_is_rendered_by_the_template_up_to_where_the_answer_begins(
    engine: Engine,
) -> None:
    ids = chat_ids(engine.tokenizer, ["Hi"])
    assert ids is not None
    assert engine.tokenizer.decode(ids[0]) == "<|bos|>user\nHi<|eos|>\n<|bos|>assistant\n"


def test_the_same_is_asked_on_any_day(engine: Engine) -> None:
    engine.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    ids = chat_ids(engine.tokenizer, ["Hi"])
    assert ids is not None
    assert engine.tokenizer.decode(ids[0]) == "1 January 2025: Hi"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ raise_exception('no lone questions') }}",
        "{{ messages[0].content + 1 }}",
        {"tool_use": "{{ messages[0].content }}"},
    ],
    ids=["none", "empty", "refuses", "type", "named"],
)
def test_without_a_template_that_takes_a_question_samples_continue_the_text(
    engine: Engine, template: str | dict[str, str] | None
) -> None:
    engine.tokenizer.chat_template = template
    chat, samples = converse(
        engine, engine, DOCUMENTS, prompts=5, max_new_tokens=6, max_context=512
    )
    assert chat is None
    assert len(samples) == SAMPLES
    assert all(sample.prompt in DOCUMENTS[0] for sample in samples)
    assert len({sample.prompt for sample in samples}) == SAMPLES
    assert all(sample.text == sample.base for sample in samples)


def test_replies_shrink_to_the_context_and_without_room_nothing_is_asked(engine: Engine) -> None:
    ids = chat_ids(engine.tokenizer, [text for _, text in PROMPTS])
    assert ids is not None
    longest = max(map(len, ids))
    some, nothing = (
        converse(engine, None, DOCUMENTS, prompts=len(PROMPTS), max_new_tokens=9, max_context=room)
        for room in (longest + 4, longest)
    )
    assert some[0] is not None
    assert some[0].max_new_tokens == 4
    assert nothing == (None, [])


def test_a_report_notes_that_there_was_nobody_to_chat_with(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    settings = Settings(
        windows=1, prefill=8, continuation=8, passkey_lengths=(200,), needle_lengths=(200,),
        chat_new_tokens=2, speed=False,
    )  # fmt: skip
    report = evaluate(checkpoint, None, evaluation_text(), settings=settings)
    assert report.chat is None
    assert report.chat_share is None
    assert len(report.samples) == SAMPLES
    assert [note for note in report.notes if "chat template" in note]
    left_out = evaluate(checkpoint, None, evaluation_text(), settings=replace(settings, chat=False))
    assert left_out.samples == []
    assert not [note for note in left_out.notes if "chat" in note]


def test_prompts_are_short_mostly_english_and_not_only() -> None:
    languages = [language for language, _ in PROMPTS]
    assert len(PROMPTS) == len(set(PROMPTS)) == 16
    assert languages.count("en") > len(languages) / 2
    assert {"de", "fr", "es", "zh"} < set(languages)
    assert Settings.quick().chat_prompts < Settings().chat_prompts == len(PROMPTS)
