"""Calibration and evaluation text never meet, and windows are the same every time."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from kvtool import corpus as corpus_module
from kvtool.checkpoint import Checkpoint
from kvtool.cli.generate import chat_ids
from kvtool.corpus import (
    Corpus,
    calibration_text,
    can_chat,
    chat_tokens,
    evaluation_text,
    training_text,
)
from kvtool.errors import UnsupportedModelError, UsageError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def starting_with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def paragraphs(corpus: Corpus) -> set[str]:
    parts = (" ".join(p.split()) for d in corpus.documents for p in re.split(r"\n\s*\n", d))
    return {part for part in parts if len(part) >= 40}


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts))
    return str(path)


def test_the_default_texts_share_no_paragraph() -> None:
    calibration, evaluation = calibration_text(), evaluation_text()
    assert not paragraphs(calibration) & paragraphs(evaluation)
    sizes = [sum(map(len, corpus.documents)) for corpus in (calibration, evaluation)]
    assert sizes[0] > 200_000
    assert sizes[1] > 80_000


def test_the_default_training_text_is_longer_and_shares_no_paragraph_with_the_judged_one() -> None:
    training, calibration = training_text(), calibration_text()
    assert training.documents[: len(calibration.documents)] == calibration.documents
    sizes = [sum(map(len, corpus.documents)) for corpus in (calibration, training)]
    assert sizes[1] > 3 * sizes[0]
    repeated = len([d for d in training.documents if d in set(calibration.documents)])
    assert 0.4 < repeated / len(calibration.documents) * sizes[0] / sizes[1] < 0.6
    assert not paragraphs(training) & paragraphs(evaluation_text())


def test_training_text_of_ones_own_is_the_calibration_text(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"Paragraph {i}." for i in range(40)))
    assert training_text(str(path)) == calibration_text(str(path))


def test_training_text_does_without_source_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_docstrings", lambda: [])
    assert training_text().documents == calibration_text().documents


def test_a_text_file_is_cut_into_two_disjoint_parts(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph number {i} says something of its own, {i}." for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    first, last = (
        calibration_text(str(tmp_path / "a.txt")),
        evaluation_text(str(tmp_path / "a.txt")),
    )
    assert not paragraphs(first) & paragraphs(last)
    assert "\n\n".join([*first.documents, *last.documents]) == text
    share = sum(map(len, first.documents)) / len(text)
    assert 0.7 < share < 0.95


def test_a_short_text_file_still_gives_both_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    assert calibration_text(str(tmp_path / "a.txt")).documents == ["one\n\ntwo\n\nthree"]
    assert evaluation_text(str(tmp_path / "a.txt")).documents == ["four"]


def test_jsonl_documents_stay_whole_and_repeated_ones_are_held_out_once(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(20)]
    data = write_jsonl(tmp_path / "a.jsonl", [*texts, "document 3"])
    first, last = calibration_text(data), evaluation_text(data)
    assert first.documents + last.documents == texts


@pytest.mark.parametrize(
    "content", ["[1]", '{"text": 1}', "not json", '{"body": "x"}', "[" * 99999], ids=range(5)
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + content + "\n")
    with pytest.raises(UsageError, match="Line 3 of"):
        calibration_text(str(path))


def test_half_a_character_in_a_jsonl_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83d of one"}\n')
    with pytest.raises(UsageError, match=r"Line 2 of .*: character 5 is half of one"):
        calibration_text(str(path))


def test_what_is_no_text_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "empty.txt").write_text("")
    for data in ("missing.txt", "owner/missing.jsonl", "nothing"):
        with pytest.raises(UsageError, match="no text at"):
            calibration_text(data)
    with pytest.raises(UsageError, match="UTF-8"):
        calibration_text(str(tmp_path / "a.txt"))
    with pytest.raises(UsageError, match="neither"):
        calibration_text(str(tmp_path / "a.csv"))
    with pytest.raises(UsageError, match="too short"):
        evaluation_text(str(tmp_path / "empty.txt"))


def test_a_hub_data_set_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="datasets") as caught:
        calibration_text("owner/name:config")
    assert "kvtool[data]" in (caught.value.hint or "")


def test_the_id_follows_the_content() -> None:
    assert calibration_text().id == calibration_text().id
    assert calibration_text().id != evaluation_text().id
    assert Corpus("a", ["xy", "z"]).id != Corpus("a", ["x", "yz"]).id
    assert re.fullmatch(r"python-docs/calibration-[0-9a-f]{12}", calibration_text().id)


def test_windows_are_deterministic_and_follow_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = evaluation_text()
    first = corpus.windows(tokenizer, 64, 8, seed=1)
    assert first.shape == (8, 64)
    assert first.dtype == torch.int64
    assert torch.equal(first, corpus.windows(tokenizer, 64, 8, seed=1))
    assert not torch.equal(first, corpus.windows(tokenizer, 64, 8, seed=2))
    # More windows of the same seed begin with the same ones.
    assert torch.equal(first, corpus.windows(tokenizer, 64, 12, seed=1)[:8])


def test_windows_are_disjoint_pieces_of_the_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("numbers", [" ".join(str(1000 * d + i) for i in range(300)) for d in range(5)])
    windows = corpus.windows(tokenizer, 100, 20)
    text = tokenizer.decode(windows.flatten())
    numbers = re.findall(r"\b\d{3,}\b", text)
    assert len(numbers) == len(set(numbers)) > 300
    assert text.split("\n\n")[0] in corpus.documents


def test_each_window_starts_as_the_tokenizer_starts_a_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    corpus = evaluation_text()
    plain = corpus.windows(tokenizer, 63, 2)
    bos = starting_with_bos(make_tokenizer())
    windows = corpus.windows(bos, 64, 2)
    assert windows[:, 0].tolist() == [bos.bos_token_id] * 2
    assert torch.equal(windows[:, 1:], plain)


def test_too_little_text_says_how_much_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("tiny", ["abc"])
    available = len(tokenizer("abc\n\n").input_ids)
    with pytest.raises(UsageError, match=rf"tiny has {available} tokens, fewer than the 128"):
        corpus.windows(tokenizer, 64, 2)


# ------------------------------------------------------------------------------- conversations

SYSTEM = "{% if loop.first %}<|pad|>Be kind.<|eos|>{% endif %}"
TURN = "[{{ message.role }}]{{ message.content }}{{ eos_token }}"
HI = [{"role": "user", "content": "Hi"}]
LOOP = "{%% for message in messages %%}%s{%% endfor %%}"


def numbers(documents: int = 20, each: int = 400) -> Corpus:
    """Paragraphs of ten numbers of five digits, each number once."""
    texts = []
    for document in range(documents):
        first = 10_000 + each * document
        rows = [range(i, i + 10) for i in range(first, first + each, 10)]
        texts.append("\n\n".join(" ".join(map(str, row)) for row in rows))
    return Corpus("numbers", texts)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_without_conversations_windows_are_those_of_earlier_versions(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = [
        f"Document {d}.\n\n" + "\n\n".join(f"Paragraph {p} of document {d}." for p in range(30))
        for d in range(20)
    ]
    windows = Corpus("c", documents).windows(tokenizer, 50, 60, seed=2)
    assert hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16] == "9badcbe6d2855152"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_the_first_windows_have_the_share_of_conversations_that_all_have(
    tokenizer: PreTrainedTokenizerFast, share: float
) -> None:
    windows = numbers().windows(tokenizer, 100, 50, chat=share)
    assert windows.shape == (50, 100)
    talks = windows[:, 0] == tokenizer.bos_token_id
    assert torch.equal(talks, (windows == tokenizer.bos_token_id).any(dim=1))
    read = torch.arange(1, 51)
    assert ((talks.cumsum(0) - share * read).abs() <= 0.5 + 1e-6).all()


def test_a_conversation_is_what_the_template_makes_of_its_turns(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    windows = calibration_text().windows(tokenizer, 2000, 4, chat=1.0)
    for window in windows.tolist():
        # This template begins every turn alike, so that all turns of a window are one conversation.
        turns = tokenizer.decode(window).split("<|bos|>")[1:]
        messages = []
        for turn in turns:
            role, content = turn.split("\n", 1)
            assert role == ("assistant" if len(messages) % 2 else "user")
            messages.append({"role": role, "content": content.removesuffix("<|eos|>\n")})
        messages[-1]["content"] = messages[-1]["content"].split("<|eos|>")[0]
        rendered = tokenizer.apply_chat_template(messages, return_dict=False)
        cut = len(messages) - 1  # the window ends somewhere in the last turn
        whole = tokenizer.apply_chat_template(messages[:cut], return_dict=False)
        assert window[: len(whole)] == whole == rendered[: len(whole)]
        assert window.count(tokenizer.eos_token_id) - cut in (0, 1)
        assert len(messages) >= 4


@pytest.mark.parametrize(("answer", "end"), [(False, ""), (True, "<|bos|>assistant\n")])
def test_a_conversation_ends_behind_its_last_turn_or_where_the_answer_begins(
    tokenizer: PreTrainedTokenizerFast, answer: bool, end: str
) -> None:
    ids = chat_tokens(tokenizer, HI, answer=answer)
    assert tokenizer.decode(ids) == "<|bos|>user\nHi<|eos|>\n" + end


def test_windows_of_conversations_begin_with_the_system_prompt(smollm2: Checkpoint) -> None:
    tokenizer = smollm2.tokenizer()
    windows = calibration_text().windows(tokenizer, 256, 8, chat=0.25)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    talks = (windows == end).any(dim=1)
    assert talks.sum() == 2
    assert not (windows[~talks] == start).any()
    for window in windows[talks]:
        text = tokenizer.decode(window)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
        assert re.match(r".*?<\|im_end\|>\n<\|im_start\|>user\n.*?<\|im_end\|>\n", text, re.DOTALL)
        assert text.count("<|im_start|>") - text.count("<|im_end|>") in (0, 1)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_no_text_is_read_twice(tokenizer: PreTrainedTokenizerFast, share: float) -> None:
    corpus = numbers()
    windows = corpus.windows(tokenizer, 200, 60, seed=3, chat=share)
    read = [n for window in windows for n in re.findall(r"\b\d{5}\b", tokenizer.decode(window))]
    assert len(read) == len(set(read)) > 1000
    assert set(read) <= set(" ".join(corpus.documents).split())


def test_conversations_are_the_same_every_time(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = calibration_text()
    first = corpus.windows(tokenizer, 128, 12, seed=1, chat=0.25)
    assert torch.equal(first, corpus.windows(tokenizer, 128, 12, seed=1, chat=0.25))
    talks = first[:, 0] == tokenizer.bos_token_id
    other = corpus.windows(tokenizer, 128, 12, seed=2, chat=0.25)
    assert torch.equal(talks, other[:, 0] == tokenizer.bos_token_id)
    assert not (first == other).all(dim=1).any()


@pytest.mark.parametrize("template", ["{{ bos_token }}" + LOOP % TURN, LOOP % TURN])
def test_a_window_has_the_bos_token_once(template: str) -> None:
    tokenizer = starting_with_bos(with_template(template))
    windows = numbers().windows(tokenizer, 1500, 4, chat=0.5)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 4
    texts = [tokenizer.decode(window) for window in windows]
    talks = [text.startswith("<|bos|>[user]") for text in texts]
    assert talks == [True, False, True, False]
    assert not any("<|bos|><|bos|>" in text for text in texts)
    # Further conversations in a window begin as the template says.
    again = texts[0][7:].count("<|bos|>")
    assert again == texts[0].count("<|eos|><|bos|>[user]")
    assert (again > 0) == (template != LOOP % TURN)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ messages",
        LOOP
        % ("{% if message.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + TURN),
        LOOP % "{{ message.content + 1 }}",
        {"tool_use": LOOP % TURN},
    ],
    ids=["none", "empty", "syntax", "refuses", "type", "named"],
)
def test_a_tokenizer_that_cannot_chat_gives_the_plain_windows(template: str | None) -> None:
    tokenizer = with_template(template)
    assert not can_chat(tokenizer)
    corpus = numbers()
    plain = corpus.windows(tokenizer, 64, 8)
    assert torch.equal(corpus.windows(tokenizer, 64, 8, chat=0.5), plain)


def test_a_text_that_the_template_refuses_is_left_out() -> None:
    refuse = "{% if '12345' in message.content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = with_template(LOOP % (refuse + TURN))
    windows = numbers().windows(tokenizer, 4000, 8, chat=1.0)
    text = "".join(tokenizer.decode(window) for window in windows)
    assert "12345" not in text
    assert "12300" in text


def test_a_template_that_names_the_day_gives_the_same_tokens_on_any_day() -> None:
    tokenizer = with_template("Today is {{ strftime_now('%d %b %Y') }}." + LOOP % TURN)
    text = tokenizer.decode(numbers().windows(tokenizer, 64, 1, chat=1.0)[0])
    assert text.startswith("Today is 1 January 2025.[user]")


def test_a_person_is_told_what_day_it_is() -> None:
    tokenizer = with_template("{{ strftime_now('%Y') }}" + LOOP % TURN)
    year, said = tokenizer.decode(chat_ids(tokenizer, HI, "MODEL")).split("[", 1)
    assert int(year) > 2025
    assert said == "user]Hi<|eos|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template is there"),
        ("{{ raise_exception('only poems') }}", "does not take this conversation: only poems"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation: can only conc"),
        ("{{ '' }}", "makes nothing of this conversation"),
    ],
)
def test_a_conversation_that_a_template_does_not_take_is_refused_with_its_reason(
    template: str | None, why: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^MODEL: .*{why}"):
        chat_ids(with_template(template), HI, "MODEL")


@pytest.mark.parametrize("length", [64, 256])
def test_conversations_need_no_more_text_than_prose(smollm2: Checkpoint, length: int) -> None:
    tokenizer, corpus = smollm2.tokenizer(), Corpus("part", calibration_text().documents[-30:])
    tokens = len(tokenizer("\n\n".join(corpus.documents), verbose=False).input_ids)
    count = int(0.94 * tokens) // length
    assert len(corpus.windows(tokenizer, length, count, chat=0.25)) == count > 15


@pytest.mark.parametrize("chat", [0.0, 0.25])
def test_far_too_many_windows_are_refused_before_any_is_made(
    tokenizer: PreTrainedTokenizerFast, chat: float
) -> None:
    with pytest.raises(UsageError, match=r"has \d+ tokens.* fewer than"):
        numbers(1).windows(tokenizer, 512, 2**62, chat=chat)


def test_too_little_text_for_conversations_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = numbers(1)
    with pytest.raises(
        UsageError, match=r"numbers has \d+ tokens beside conversations, fewer than"
    ):
        corpus.windows(tokenizer, 512, 20, chat=0.25)
    with pytest.raises(UsageError, match=r"fills \d windows of 512 with conversations, fewer than"):
        corpus.windows(tokenizer, 512, 20, chat=1.0)


@given(
    st.lists(st.text("ab \n.。", max_size=200), max_size=8),
    st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    st.integers(1, 40),
)
def test_text_is_shared_out_without_loss(documents: list[str], share: float, size: int) -> None:
    parts = list(corpus_module._shared(documents, share, size))
    assert [first + "".join(rest) for first, rest in parts] == documents
    longest = max((len(p) for d in documents for p in corpus_module._passages(d, size)), default=0)
    total = given_away = 0
    for document, (_, rest) in zip(documents, parts, strict=True):
        total += len(document)
        given_away += sum(map(len, rest))
        assert 0 <= share * total - given_away + 1e-9 < longest + 1e-6
