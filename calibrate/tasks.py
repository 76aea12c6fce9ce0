"""Synthetic recall tasks: contexts with something to remember, and a tail that asks for it.

Passages are tokenized one by one and never joined as text, so what is asked for has the same token
ids as what was told: induction heads match ids. The haystack is calibration text; every sample
reads on where the one before stopped.

Three kinds, because a head that retrieves can only be found where the model itself retrieves:
`ordinals` is DuoAttention's task, whose keys are told apart by counting; `names` asks for digits
under distinct names; `repetition` repeats random tokens, which every induction head can.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvtool.corpus import start_tokens
from kvtool.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["ordinals", "names", "repetition"]

# The alphabet, sentences and depths of DuoAttention (arXiv 2410.10819), without its typing error.
_ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
)
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth"
_COLOURS = "Red Blue Green Black White Brown Silver Gold Purple Orange"
WORDS, ORDINALS, NAMES = (tuple(text.split()) for text in (_ALPHABET, _ORDINALS, _COLOURS))
DEPTHS = tuple(0.05 + 0.9 * i / 999 for i in range(1000))
HEAD, TAIL = "This is a very long story book: <book> ", " </book>.\n\n"
NEEDLE = "Remember this sequence of words, it's the {name} passkey to the vault: "
QUESTION = "Based on the content of the book, what is the {name} passkey to the vault?\nPasskey: "
CODE = "The code of {name} is"
TOKENS_PER_KEY, MAX_KEYS = 256, 5


@dataclass(frozen=True)
class RecallSample:
    """One context and the questions behind it, answers included.

    Attributes:
        context: `[C]` token ids.
        tail: `[M]` token ids: for each key a question, its answer and a separator.
        source: `[M]` int64: for tokens of an answer their position in the context, else -1.
        first: `[M]` bool: answer tokens that only the question tells, as no answer token precedes.
        spans: `[M, 2]` int64: for answer tokens where in the context what they answer starts and
            ends, else -1.
    """

    context: Tensor
    tail: Tensor
    source: Tensor
    first: Tensor
    spans: Tensor

    @property
    def answers(self) -> Tensor:
        """`[A]`: indices into the tail of the tokens to be recalled."""
        return (self.source >= 0).nonzero()[:, 0]


class RecallTask:
    """A stream of samples of one kind.

    Args:
        documents: Haystack texts.
        words: Words, digits or tokens per key.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[str],
        kind: Kind = "ordinals",
        *,
        words: int = 8,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.kind, self.words = tokenizer, kind, words
        self.random = random.Random(seed)
        self.haystack = self._ids("\n\n".join(documents))
        self.position = self.random.randrange(len(self.haystack))
        self.lead = start_tokens(tokenizer)

    def sample(self, length: int) -> RecallSample:
        """A sample of `length` tokens, context and tail together, with a key per 256 of them.

        Raises:
            UsageError: The keys and questions alone are longer than that.
        """
        keys = min(max(length // TOKENS_PER_KEY, 1), MAX_KEYS)
        separator = self._ids("\n\n")
        needles, tail = [], _Tail()
        for told, asked, secret in self._facts(keys):
            needles.append((len(separator) + len(told), separator + told + secret + separator))
            tail.questions.append((asked, secret, separator))
        head = self.lead + (self._ids(HEAD) if self.kind == "ordinals" else [])
        end = self._ids(TAIL) if self.kind == "ordinals" else []
        room = length - len(head) - len(end) - tail.length - sum(len(n) for _, n in needles)
        if room < 2 * keys:
            raise UsageError(
                f"{length} tokens are too short for a recall task",
                hint=f"use at least {length - room + 16 * keys} tokens",
            )
        context, starts = list(head), []
        filler, done = self._take(room), 0
        depths = sorted(self.random.sample(DEPTHS, keys))
        for depth, (offset, needle) in zip(depths, needles, strict=True):
            cut = int(depth * room)
            context += filler[done:cut]
            starts.append(len(context) + offset)
            context += needle
            done = cut
        context += filler[done:] + end
        return tail.sample(context, starts)

    def _facts(self, keys: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """For every key: what is told before it, what is asked for it, and the key itself."""
        choose = self.random
        names = choose.sample(NAMES, keys)
        for i in range(keys):
            if self.kind == "ordinals":
                secret = " ".join(choose.choice(WORDS) for _ in range(self.words))
                told, asked = (text.format(name=ORDINALS[i]) for text in (NEEDLE, QUESTION))
                yield self._ids(told), self._ids(asked), self._ids(secret)
            elif self.kind == "names":
                code = "".join(choose.choice("0123456789") for _ in range(self.words))
                told = asked = CODE.format(name=names[i])
                yield self._ids(told), self._ids(asked), self._ids(f" {code}")
            else:
                # Ids from the middle of the vocabulary: neither special tokens nor rare bytes.
                size = len(self.tokenizer)
                block = [choose.randrange(size // 4, size // 2) for _ in range(4 + self.words)]
                yield block[:4], block[:4], block[4:]

    def _take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            part = self.haystack[self.position : self.position + count - len(taken)]
            taken += part
            self.position = (self.position + len(part)) % len(self.haystack)
        return taken

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class _Tail:
    """The questions of a sample, put together once it is known where their answers were told."""

    def __init__(self) -> None:
        self.questions: list[tuple[list[int], list[int], list[int]]] = []

    @property
    def length(self) -> int:
        return sum(len(part) for parts in self.questions for part in parts)

    def sample(self, context: list[int], starts: Sequence[int]) -> RecallSample:
        ids: list[int] = []
        source: list[int] = []
        first: list[bool] = []
        spans: list[tuple[int, int]] = []
        for (asked, secret, separator), start in zip(self.questions, starts, strict=True):
            end = start + len(secret)
            assert context[start:end] == secret, "a needle is not where it was put"
            ids += asked + secret + separator
            source += [-1] * len(asked) + list(range(start, end)) + [-1] * len(separator)
            first += [False] * len(asked) + [True] + [False] * (len(secret) - 1 + len(separator))
            spans += [(-1, -1)] * len(asked) + [(start, end)] * len(secret)
            spans += [(-1, -1)] * len(separator)
        return RecallSample(
            torch.tensor(context),
            torch.tensor(ids),
            torch.tensor(source),
            torch.tensor(first),
            torch.tensor(spans),
        )
