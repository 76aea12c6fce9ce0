"""What a model says: whether its answers end, and a few of them to read.

A model that lost little of its next-token predictions may still have lost the stop token, which a
corpus of prose never shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtool.corpus import chat_tokens, start_tokens
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.evaluate.retrieval import Filler
from kvtool.progress import Progress, silent, telling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvtool.runtime import Engine

SAMPLES = 3
CONTINUED = 64  # tokens of text that a sample without a chat template continues

# A model of 135 million parameters ends all of these within 60 tokens: a prompt that the original
# does not end tells nothing. The first ones are read as samples, and the quick protocol asks the
# first half.
PROMPTS = (
    ("en", "Write one sentence about rain."),
    ("en", "What is the capital of France?"),
    ("fr", "Quelle est la capitale de l'Italie ?"),
    ("en", "Name three colors."),
    ("de", "Was ist die Hauptstadt von Deutschland?"),
    ("es", "Di hola en español."),
    ("en", "Say hello."),
    ("en", "How many days does a week have?"),
    ("en", "Is the number 7 even or odd?"),
    ("en", "Give me a synonym for 'happy'."),
    ("zh", "你好"),
    ("en", "Translate 'good morning' into Spanish."),
    ("en", "Write one sentence about the sea."),
    ("de", "Schreibe einen Satz über den Winter."),
    ("en", "Write a title for a story about a lost dog."),
    ("fr", "Comment dit-on 'chat' en anglais ?"),
)


@dataclass(frozen=True)
class ChatPrompt:
    """One question, and whether a stop token ended the answer in time."""

    language: str
    prompt: str
    ended: bool
    base_ended: bool | None


@dataclass(frozen=True)
class Chat:
    """Greedy answers of at most `max_new_tokens`."""

    max_new_tokens: int
    prompts: list[ChatPrompt]


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt by both models."""

    prompt: str
    base: str | None
    text: str


@dataclass(frozen=True)
class Reply:
    """What a model said, and whether it came to a stop token."""

    text: str
    ended: bool


def converse(
    engine: Engine,
    base: Engine | None,
    documents: Sequence[str],
    *,
    prompts: int,
    max_new_tokens: int,
    max_context: int,
    report: Progress = silent,
) -> tuple[Chat | None, list[Sample]]:
    """Ask both models the first few of `PROMPTS`.

    Without a chat template the samples continue the documents, and there is no :class:`Chat`;
    without room in the context there are no samples either.
    """
    tokenizer = engine.tokenizer
    asked = PROMPTS[:prompts]
    texts = [text for _, text in asked]
    rendered = chat_ids(tokenizer, texts)
    ids = rendered
    if ids is None:
        lead, filler = start_tokens(tokenizer), Filler(tokenizer, documents)
        ids = [lead + filler.take(CONTINUED) for _ in range(SAMPLES)]
        texts = [_text(tokenizer, row) for row in ids]
    max_new_tokens = min(max_new_tokens, max_context - max(map(len, ids)))
    if max_new_tokens < 1:
        return None, []
    engines = [engine] if base is None else [engine, base]
    sides = telling(report, "chat", engines, len(engines))
    replies = [greedy_replies(one, ids, max_new_tokens) for one in sides]
    ours = replies[0]
    theirs = [None] * len(ours) if base is None else replies[1]
    samples = [
        Sample(text, b.text if b else None, a.text)
        for text, a, b in zip(texts[:SAMPLES], ours, theirs, strict=False)
    ]
    if rendered is None:
        return None, samples
    results = [
        ChatPrompt(language, text, a.ended, b.ended if b else None)
        for (language, text), a, b in zip(asked, ours, theirs, strict=True)
    ]
    return Chat(max_new_tokens, results), samples


def chat_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]] | None:
    """Each question as the model was trained to read it, ending where the answer begins.

    Returns:
        None where there is no chat template, or one that refuses a lone question.
    """
    asked = [[{"role": "user", "content": text}] for text in texts]
    try:
        return [chat_tokens(tokenizer, messages, answer=True) for messages in asked]
    except UnsupportedModelError:
        return None


def greedy_replies(
    engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Reply]:
    """Greedy continuations of all prompts, in one batch; a model that gives NaN says nothing."""
    try:
        steps = list(engine.generate(prompts, max_new_tokens=max_new_tokens))
    except CheckpointError:  # a report is of damaged models too
        return [Reply("", False)] * len(prompts)
    replies = []
    for row in zip(*steps, strict=True):
        tokens = [token for token in row if token is not None]
        replies.append(Reply(_text(engine.tokenizer, tokens), tokens[-1] in engine.eos_ids))
    return replies


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
