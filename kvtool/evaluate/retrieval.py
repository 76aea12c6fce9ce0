"""Retrieval without knowing the question: pass-key and a needle with four keys.

The context is prefilled, and so compressed, before the question is fed. Continuation KL alone
flatters methods that forget: most next tokens need only the recent past.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvtool.corpus import start_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvtool.runtime import Engine, KVCache

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
LENGTHS = (512, 1024, 2048)
NEEDLE_LENGTHS = (1400, 700)
NEEDLE_CONTEXTS = 2
ANSWER_TOKENS = 7  # five digits, a space before them and one token that must end the number

PASSKEY = "\n\nThe pass key is {code}. Remember it. {code} is the pass key.\n\n"
PASSKEY_QUESTION = "\n\nThe pass key is"
# Short and said three times: a model of 135 million parameters answers 23 of 24 of these, and only
# what the original answers can show what a compressed cache lost.
PLACES = ("Paris", "Tokyo", "Cairo", "Lima")
NEEDLE = "\n\n{place}: {code}. {place}: {code}. {place}: {code}.\n\n"
NEEDLE_QUESTION = "\n\n{place}:"


@dataclass(frozen=True)
class Question:
    """Text asked after the context is stored, and the digits that must follow it."""

    ids: list[int]
    answer: str


@dataclass(frozen=True)
class Case:
    """One context and the questions asked of the cache it leaves."""

    task: str
    length: int
    depth: float | None
    context: list[int]
    questions: list[Question]


Result = tuple[Case, list[bool], list[bool] | None]
"""A case, which of its questions were answered, and which the original answers."""


@dataclass(frozen=True)
class Recall:
    """How many questions of one task at one length were answered digit for digit.

    Attributes:
        kept: Of those that the original answers; a lucky answer does not make up for a lost one.
    """

    task: str
    length: int
    asked: int
    correct: int
    base_correct: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class PassKey:
    """One pass-key case: `length` of context and question, `depth` as a share of the context."""

    length: int
    depth: float
    correct: bool
    base_correct: bool | None


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` without the special tokens that a tokenizer puts around it."""
    # Not verbose: a tokenizer warns of every text longer than its model's context.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Filler:
    """An endless, deterministic supply of corpus tokens; consecutive cases read on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> None:
        self.ids = plain_ids(tokenizer, "\n\n".join(documents))
        self.position = 0

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            part = self.ids[self.position : self.position + count - len(taken)]
            taken += part
            self.position = (self.position + len(part)) % len(self.ids)
        return taken


def _insert(filler: list[int], pieces: Sequence[tuple[float, list[int]]]) -> list[int]:
    """Filler with each piece put in at its depth, a share of the filler's length."""
    ids: list[int] = []
    done = 0
    for depth, piece in pieces:
        cut = round(depth * len(filler))
        ids += filler[done:cut] + piece
        done = cut
    return ids + filler[done:]


def passkey_cases(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[Case]:
    """One key per context: every length (context and question together) at every depth.

    Lengths too short to hold the key and the question are left out.
    """
    numbers = random.Random(seed)
    filler = Filler(tokenizer, documents)
    lead, question = start_tokens(tokenizer), plain_ids(tokenizer, PASSKEY_QUESTION)
    cases = []
    for length in lengths:
        for depth in depths:
            code = f"{numbers.randrange(10_000, 100_000)}"
            key = plain_ids(tokenizer, PASSKEY.format(code=code))
            room = length - len(lead) - len(key) - len(question)
            if room < 1:
                continue
            context = lead + _insert(filler.take(room), [(depth, key)])
            cases.append(Case("pass-key", length, depth, context, [Question(question, code)]))
    return cases


def needle_cases(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    lengths: Sequence[int] = NEEDLE_LENGTHS,
    contexts: int = NEEDLE_CONTEXTS,
    seed: int = 0,
) -> list[Case]:
    """Four named codes spread over each context; each is asked for.

    A length is that of the context without the question. Lengths too short to hold the codes are
    left out.
    """
    numbers = random.Random(seed + 1)
    filler = Filler(tokenizer, documents)
    lead = start_tokens(tokenizer)
    cases = []
    for length in [length for length in lengths for _ in range(contexts)]:
        places = numbers.sample(PLACES, len(PLACES))
        codes = [f"{numbers.randrange(10_000, 100_000)}" for _ in places]
        needles = [
            plain_ids(tokenizer, NEEDLE.format(place=place, code=code))
            for place, code in zip(places, codes, strict=True)
        ]
        room = length - len(lead) - sum(map(len, needles))
        if room < len(needles):
            continue
        depths = [(index + 0.5) / len(needles) for index in range(len(needles))]
        context = lead + _insert(filler.take(room), list(zip(depths, needles, strict=True)))
        asked = [
            Question(plain_ids(tokenizer, NEEDLE_QUESTION.format(place=place)), code)
            for place, code in zip(places, codes, strict=True)
        ]
        cases.append(Case("4-key needle", length, None, context, asked))
    return cases


def needle_question_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest question about a needle."""
    questions = [NEEDLE_QUESTION.format(place=place) for place in PLACES]
    return max(len(plain_ids(tokenizer, question)) for question in questions)


def fit_lengths(
    task: str, lengths: Sequence[int], max_context: int, question: int = 0
) -> tuple[list[int], str | None]:
    """Keep the lengths that fit a context; one that just fits stands in for none.

    Args:
        question: Tokens of the question, where a length does not count them.

    Returns:
        The lengths, and a sentence for the report if some were dropped or replaced.
    """
    room = max_context - question - ANSWER_TOKENS
    fitting = [length for length in lengths if length <= room]
    if len(fitting) == len(lengths):
        return fitting, None
    kept = fitting or [room]
    return kept, (
        f"{task} measured at {', '.join(map(str, kept))} tokens instead of "
        f"{', '.join(map(str, lengths))}: the model's context is {max_context}"
    )


def answer(engine: Engine, cache: KVCache, question: list[int]) -> list[int]:
    """Feed a question through the cache of row 0 and decode greedily."""
    logits = engine.extend(cache, torch.tensor(question))
    token = int(logits.argmax())
    tokens: list[int] = []
    while token not in engine.eos_ids:
        tokens.append(token)
        if len(tokens) == ANSWER_TOKENS:
            break
        token = int(engine.decode(cache, torch.tensor([token]))[0].argmax())
    return tokens


def is_exact(text: str, expected: str) -> bool:
    """Whether the first number in `text` is exactly the expected digits."""
    found = re.search(r"\d+", text)
    return found is not None and found.group() == expected


def ask(engine: Engine, case: Case) -> list[bool]:
    """Prefill the context once and ask every question of the same cache: which are answered."""
    context = torch.tensor(case.context)
    longest = max(len(question.ids) for question in case.questions)
    cache = engine.new_cache(1, len(context) + longest + ANSWER_TOKENS)
    engine.extend(cache, context)
    compressed = cache.snapshot(0)
    correct = []
    for question in case.questions:
        cache.restore(0, compressed)
        text = engine.tokenizer.decode(answer(engine, cache, question.ids))
        correct.append(is_exact(str(text), question.answer))
    return correct


def run_cases(engine: Engine, base: Engine | None, cases: Sequence[Case]) -> Iterator[Result]:
    """Ask every case of both models."""
    for case in cases:
        yield case, ask(engine, case), None if base is None else ask(base, case)


def summarise(results: Sequence[Result]) -> list[Recall]:
    """Add up the cases of each task and length, in the order they were asked."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result[0].task, result[0].length), []).append(result)
    recalls = []
    for (task, length), group in groups.items():
        ours = [right for _, answers, _ in group for right in answers]
        theirs = [right for _, _, answers in group for right in answers or ()]
        recall = Recall(task, length, len(ours), sum(ours))
        if len(theirs) == len(ours):
            kept = sum(a and b for a, b in zip(ours, theirs, strict=True))
            recall = replace(recall, base_correct=sum(theirs), kept=kept)
        recalls.append(recall)
    return recalls


def passkeys(results: Sequence[Result]) -> list[PassKey]:
    """The pass-key cases one by one: they alone have a depth, and one question each."""
    return [
        PassKey(case.length, case.depth, ours[0], None if theirs is None else theirs[0])
        for case, ours, theirs in results
        if case.depth is not None
    ]
