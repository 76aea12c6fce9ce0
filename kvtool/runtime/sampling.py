"""How the next token is drawn from the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvtool.runtime.grammar import Grammar


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; `temperature` 0 is greedy.

    Attributes:
        presence_penalty, frequency_penalty: Taken off the logits of the tokens of the answer so
            far, once or as often as they were drawn; the prompt does not count.
        logit_bias: Added to the logits of tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def processors(self, prompt: int = 0) -> list[Any]:
        """Logits processors, transformers' own in the order in which its `generate` applies them.

        Args:
            prompt: Tokens of the text that are not of the answer.
        """
        from transformers.generation import logits_process as g

        chain: list[Any] = []
        if self.logit_bias:
            chain.append(LogitBias(self.logit_bias))
        if self.presence_penalty or self.frequency_penalty:
            chain.append(AnswerPenalty(prompt, self.presence_penalty, self.frequency_penalty))
        if self.repetition_penalty != 1.0:
            chain.append(g.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0.0:
            return chain
        if self.temperature != 1.0:
            chain.append(g.TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            chain.append(g.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chain.append(g.TopPLogitsWarper(self.top_p))
        if self.min_p > 0.0:
            chain.append(g.MinPLogitsWarper(self.min_p))
        return chain


GREEDY = Sampling()


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens, self.bias = list(bias), list(bias.values())

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += scores.new_tensor(self.bias)
        return scores


class AnswerPenalty:
    """logit - presence · [count > 0] - frequency · count, with the counts of the answer so far."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, self.prompt :], minlength=scores.shape[-1]).to(scores.dtype)
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Sampler:
    """Draws the tokens of one text, from a generator of its own.

    Args:
        prompt: Tokens of the text that are not of the answer.
        least: Tokens of the answer before one of `stops` may be drawn.
        grammar: What the answer obeys.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int | None,
        device: torch.device,
        *,
        prompt: int = 0,
        least: int = 0,
        stops: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.processors = sampling.processors(prompt)
        # The others look at the logits alone.
        penalties = sampling.presence_penalty, sampling.frequency_penalty
        self._reads_text = sampling.repetition_penalty != 1.0 or any(penalties)
        self.prompt, self.least, self.stops = prompt, least, list(stops)
        self.grammar = grammar
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0.0:
            self.generator = torch.Generator(device)
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)

    def is_greedy(self, *text: Sequence[int]) -> bool:
        """Whether the token after a text, in parts, is the likeliest, whatever that is."""
        masked = self.grammar is not None or self._must_go_on(text)
        return self.generator is None and not self.processors and not masked

    def __call__(self, logits: Tensor, *text: Sequence[int]) -> int:
        """The token after a text, in parts, whose logits are `[V]`."""
        scores = logits[None]
        if self._must_go_on(text):
            scores = scores.clone()
            scores[:, self.stops] = -torch.inf
        if self.grammar is not None:
            scores = self.grammar.mask(scores, self._answer(text))
        seen = [token for part in text for token in part] if self._reads_text else []
        ids = torch.tensor([seen], dtype=torch.long, device=logits.device)
        for process in self.processors:
            scores = process(ids, scores)
        if self.generator is None:
            return int(scores.argmax())
        weights = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def _answer(self, text: Sequence[Sequence[int]]) -> list[int]:
        """What lies behind the prompt; a prompt may be long."""
        answer, skipped = list[int](), self.prompt
        for part in text:
            answer += part[skipped:]
            skipped = max(0, skipped - len(part))
        return answer

    def _must_go_on(self, text: Sequence[Sequence[int]]) -> bool:
        return bool(self.stops) and sum(map(len, text)) - self.prompt < self.least


def draw(
    samplers: Sequence[Sampler], logits: Tensor, texts: Sequence[tuple[Sequence[int], ...]]
) -> list[int]:
    """The next token of each of several texts, whose logits are `[B, V]`.

    Greedy ones are taken together, so that a device is waited for once.
    """
    greedy = [sampler.is_greedy(*text) for sampler, text in zip(samplers, texts, strict=True)]
    likeliest: list[int] = logits.argmax(-1).tolist() if any(greedy) else [0] * len(greedy)
    rows = zip(samplers, logits, texts, greedy, likeliest, strict=True)
    return [best if take else sampler(row, *text) for sampler, row, text, take, best in rows]
