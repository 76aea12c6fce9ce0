"""Calibration and evaluation text never meet, and windows are the same every time."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerFast

from kvtool.corpus import Corpus, calibration_text, evaluation_text
from kvtool.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


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


@pytest.mark.parametrize("content", ["[1]", '{"text": 1}', "not json", '{"body": "x"}'])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + content + "\n")
    with pytest.raises(UsageError, match="Line 3 of"):
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
    from tokenizers import processors

    corpus = evaluation_text()
    plain = corpus.windows(tokenizer, 63, 2)
    bos = make_tokenizer()
    bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos.bos_token_id)]
    )
    windows = corpus.windows(bos, 64, 2)
    assert windows[:, 0].tolist() == [bos.bos_token_id] * 2
    assert torch.equal(windows[:, 1:], plain)


def test_too_little_text_says_how_much_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("tiny", ["abc"])
    available = len(tokenizer("abc\n\n").input_ids)
    with pytest.raises(UsageError, match=rf"tiny has {available} tokens, fewer than the 128"):
        corpus.windows(tokenizer, 64, 2)
