"""What a scheduler is asked for, and what one of its steps draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvtool.runtime.grammar import Grammar
from kvtool.runtime.sampling import GREEDY, Sampler, Sampling

Finish = Literal["stop", "length"]


class Scored(NamedTuple):
    """A token, its log-probability under the model, and the likeliest ones with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        stop_ids: Tokens that end it, besides the model's own.
        ignore_eos: Go on after one of the model's own.
        logprobs: Likeliest tokens to report for each drawn one; None for no report.
        prompt_logprobs: The same for the prompt's tokens, the first of which has none.
        grammar: What the answer obeys.
        tokens: Drawn so far.
        scored: Of the prompt, where asked for.
        sampler: What draws them, made when the request is added.
        cached: Tokens of the prompt that another request had read.
        added, admitted, answered: When it came, left the queue, and drew its first token, by
            `perf_counter`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    min_new_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    tokens: list[int] = field(default_factory=list, init=False)
    scored: list[Scored] = field(default_factory=list, init=False)
    sampler: Sampler | None = field(default=None, init=False)
    cached: int = field(default=0, init=False)
    added: float = field(default=0.0, init=False)
    admitted: float | None = field(default=None, init=False)
    answered: float | None = field(default=None, init=False)


class Drawn(NamedTuple):
    """What a step did for a request: its next token, and how it ended if it did.

    A request for no tokens ends without one.
    """

    request: Request
    token: int | None
    scored: Scored | None
    finish: Finish | None


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log-probabilities of `tokens`, each under one row of `logits [T, V]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    own = logprobs.gather(1, index[:, None])[:, 0].tolist()
    best = torch.topk(logprobs, top, dim=-1) if top else None
    likeliest: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if best is not None:
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        likeliest = [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return [Scored(*item) for item in zip(tokens, own, likeliest, strict=True)]
