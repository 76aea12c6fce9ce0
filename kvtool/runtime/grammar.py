"""Answers that obey a grammar: JSON after a schema, a regular expression, one of some texts.

Which tokens may come next is computed by llguidance; here it becomes a mask of the logits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kvtool.errors import UsageError

Kind = Literal["json", "regex", "choice", "grammar"]
_WHITESPACE = r"[ \n]{0,40}"  # without an end, a small model may write nothing else


class Grammars:
    """Makes grammars for one vocabulary.

    Args:
        tokenizer: A fast one of transformers.
        vocab_size: V, of the logits.
        stops: The tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stops: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.stops = tokenizer, vocab_size, list(stops)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def make(self, kind: Kind, said: Any) -> Grammar:
        """A grammar; takes milliseconds, and the first one about a second.

        Args:
            said: A JSON schema, a regular expression, a list of texts, or a grammar of Lark or in
                GBNF.

        Raises:
            UsageError: It is none, or too large.
        """
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json":
                options: Any = {"whitespace_pattern": _WHITESPACE}
                text = LLMatcher.grammar_from_json_schema(said, defaults=options)
            else:
                text = grammar_from(kind, json.dumps(said) if kind == "choice" else said)
        except ValueError as error:
            raise UsageError(f"no grammar can be made of this {kind}: {error}") from error
        matcher = LLMatcher(self._vocabulary(), text, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise UsageError(f"no grammar can be made of this {kind}: {reason}")
        return Grammar(matcher, self.vocab_size, self.stops)

    def _vocabulary(self) -> Any:
        from llguidance import hf

        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = hf.from_tokenizer(self.tokenizer, self.vocab_size, self.stops)
                except ValueError as error:
                    raise UsageError(f"the tokenizer knows no grammars: {error}") from error
            return self._tokens


class Grammar:
    """What may come next in one answer."""

    def __init__(self, matcher: Any, vocab_size: int, stops: Sequence[int]) -> None:
        self._matcher, self.vocab_size, self.stops = matcher, vocab_size, stops
        self._taken = 0  # tokens of the answer that the matcher has seen

    def fresh(self) -> Grammar:
        """The same for another answer."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, self.vocab_size, self.stops)

    def mask(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        """`scores [1, V]` with -inf for what may not come behind an answer.

        An answer that gets too large for its grammar can only end.
        """
        self._matcher.consume_tokens(list(answer[self._taken :]))
        self._taken = len(answer)
        allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
        if self._matcher.is_error():
            allowed[self.stops] = True
        else:
            bits = torch.zeros(-(-self.vocab_size // 32), dtype=torch.int32)
            self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.nbytes)
            each = bits[:, None] >> torch.arange(32, dtype=torch.int32) & 1
            allowed |= each.flatten()[: self.vocab_size].bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)
