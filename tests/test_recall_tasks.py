"""Recall tasks: what is asked for was told, token by token, and nothing is left to chance."""

import re
from typing import get_args

import pytest
import torch
from conftest import make_tokenizer
from tokenizers.processors import TemplateProcessing

from kvtool.calibrate.tasks import (
    DEPTHS,
    NAMES,
    ORDINALS,
    TOKENS_PER_KEY,
    WORDS,
    Kind,
    RecallSample,
    RecallTask,
)
from kvtool.errors import UsageError

KINDS: tuple[Kind, ...] = get_args(Kind)
TOKENIZER = make_tokenizer()
# Numbered, so that a piece of it says where it was taken from.
DOCUMENTS = [" ".join(f"{i}," for i in range(n, n + 400)) for n in (1000, 2000)]
SEPARATOR = TOKENIZER("\n\n")["input_ids"]


def task(kind: Kind, **options) -> RecallTask:
    return RecallTask(TOKENIZER, DOCUMENTS, kind, **options)


def needles(sample: RecallSample) -> list[tuple[int, int]]:
    """Where the secrets lie in the context, in the order in which they are asked for."""
    spans = sample.spans[sample.first].tolist()
    return [(start, end) for start, end in spans]


def same(a: RecallSample, b: RecallSample) -> bool:
    return torch.equal(a.context, b.context) and torch.equal(a.tail, b.tail)


@pytest.mark.parametrize("length", [400, 767, 768, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_asked_length_and_a_key_per_256_tokens(kind, length):
    sample = task(kind).sample(length)
    assert len(sample.context) + len(sample.tail) == length
    assert len(needles(sample)) == min(length // TOKENS_PER_KEY, 5)
    rows = {len(x) for x in (sample.tail, sample.source, sample.first, sample.spans)}
    assert rows == {len(sample.tail)}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_very_tokens_of_their_sources(kind):
    for sample in map(task(kind).sample, (400, 1500)):
        answers, source = sample.answers, sample.source
        assert torch.equal(sample.tail[answers], sample.context[source[answers]])
        begin, end = sample.spans[answers].unbind(1)
        assert bool(((begin <= source[answers]) & (source[answers] < end)).all())
        told = [range(*span) for span in needles(sample)]
        assert source[answers].tolist() == [position for span in told for position in span]
        asked = source < 0
        assert bool((sample.spans[asked] == -1).all())
        assert not bool(sample.first[asked].any())
        assert not bool(asked[answers].any())


@pytest.mark.parametrize("kind", KINDS)
def test_first_marks_answers_that_follow_no_answer(kind):
    sample = task(kind).sample(1500)
    follows_answer = torch.cat((torch.tensor([False]), sample.source[:-1] >= 0))
    assert torch.equal(sample.first, (sample.source >= 0) & ~follows_answer)
    assert not bool(sample.first[0])


def test_every_ordinal_is_asked_for_what_the_context_told_of_it():
    sample = task("ordinals").sample(1500)
    told = re.findall(
        r"\n\nRemember this sequence of words, it's the (\w+) passkey to the vault: ([a-z ]+)\n\n",
        TOKENIZER.decode(sample.context),
    )
    asked = re.findall(
        r"Based on the content of the book, what is the (\w+) passkey to the vault\?\n"
        r"Passkey: ([a-z ]+)\n\n",
        TOKENIZER.decode(sample.tail),
    )
    assert [name for name, _ in told] == list(ORDINALS[:5])
    assert asked == told
    for _, secret in told:
        assert len(secret.split()) == 8
        assert set(secret.split()) <= set(WORDS)
    text = TOKENIZER.decode(sample.context)
    assert text.startswith("This is a very long story book: <book> ")
    assert text.endswith(" </book>.\n\n")


def test_names_are_asked_for_the_digits_that_the_context_told_of_them():
    sample = task("names", words=6).sample(1500)
    codes = r"The code of (\w+) is (\d+)\n\n"
    told = re.findall(codes, TOKENIZER.decode(sample.context))
    assert re.findall(codes, TOKENIZER.decode(sample.tail)) == told
    assert len({name for name, _ in told}) == 5
    assert {name for name, _ in told} <= set(NAMES)
    assert all(len(code) == 6 for _, code in told)


def test_repetition_repeats_tokens_from_the_middle_of_the_vocabulary():
    sample = task("repetition").sample(1500)
    size = len(TOKENIZER)
    for index, (start, end) in enumerate(needles(sample)):
        block = sample.context[start - 4 : end]
        assert len(block) == 4 + 8
        assert bool(((block >= size // 4) & (block < size // 2)).all())
        repeated = len(block) + len(SEPARATOR)
        assert torch.equal(sample.tail[index * repeated :][: len(block)], block)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_samples_and_another_changes_them(kind):
    first, second = task(kind, seed=3), task(kind, seed=3)
    one, two = first.sample(600), first.sample(600)
    assert same(one, second.sample(600))
    assert same(two, second.sample(600))
    assert not same(one, two)
    assert not same(one, task(kind, seed=4).sample(600))


def filler(sample: RecallSample) -> list[list[int]]:
    """The pieces of haystack before, between and behind the keys of a sample of `repetition`."""
    pieces, done = [], 0
    for start, end in needles(sample):
        pieces.append(sample.context[done : start - 4 - len(SEPARATOR)].tolist())
        done = end + len(SEPARATOR)
    return [*pieces, sample.context[done:].tolist()]


def test_samples_read_on_in_the_haystack_and_start_again_at_its_end():
    repetition = task("repetition")
    haystack = TOKENIZER("\n\n".join(DOCUMENTS), verbose=False)["input_ids"]
    position, read = repetition.position, []
    for length in (300, 2000, 2000, 1500):
        for piece in filler(repetition.sample(length)):
            read += piece
    assert len(read) > len(haystack)
    assert read == (haystack[position:] + haystack * 2)[: len(read)]


def test_keys_lie_in_order_between_5_and_95_percent_of_the_haystack():
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[-1]) == (1000, 0.05, pytest.approx(0.95))
    repetition, depths = task("repetition"), []
    for _ in range(40):
        pieces = [len(piece) for piece in filler(repetition.sample(1500))]
        depths += [sum(pieces[: i + 1]) / sum(pieces) for i in range(len(pieces) - 1)]
    assert 0.049 < min(depths) < 0.1
    assert 0.9 < max(depths) < 0.951


@pytest.mark.parametrize("kind", KINDS)
def test_too_short_a_text_is_refused_and_the_hint_is_long_enough(kind):
    with pytest.raises(UsageError, match="20 tokens are too short") as caught:
        task(kind).sample(20)
    needed = re.search(r"\d+", caught.value.hint or "")
    assert needed is not None
    assert len(needles(task(kind).sample(int(needed[0])))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_starts_as_the_tokenizer_starts_one(kind):
    starting = make_tokenizer()
    bos = starting.bos_token_id
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert starting("a")["input_ids"][0] == bos
    with_bos = RecallTask(starting, DOCUMENTS, kind).sample(600)
    without = task(kind).sample(600)
    assert with_bos.context[0] == bos
    assert not bool((with_bos.context[1:] == bos).any())
    assert not bool((with_bos.tail == bos).any())
    assert len(with_bos.context) == len(without.context)
    assert not bool((without.context == bos).any())
    answers = with_bos.answers
    assert torch.equal(with_bos.tail[answers], with_bos.context[with_bos.source[answers]])
