"""Answers that obey a grammar: JSON after a schema, a regular expression, one of some texts.

Which tokens may come next is computed by llguidance; here it becomes a mask of the logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvtool.errors import UsageError

Kind = Literal["json", "regex", "choice", "grammar"]
_WHITESPACE = r"[ \n]{0,40}"  # without an end, a small model may write nothing else
_MOST_CHARACTERS = 2**17
_MOST_SECONDS = 20.0  # on a busy machine; see _try_grammar.py


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
        """A grammar; a new one takes a tenth of a second, and the first one about a second.

        Args:
            said: A JSON schema, a regular expression, a list of texts, or a grammar of Lark or in
                GBNF.

        Raises:
            UsageError: It is none, too large, or nothing can obey it.
        """
        from llguidance import LLMatcher, grammar_from

        try:
            written = said if isinstance(said, str) else json.dumps(said)
            if len(written) > _MOST_CHARACTERS:
                raise ValueError(f"its {len(written):,} characters exceed {_MOST_CHARACTERS:,}")
            if kind == "json":
                options: Any = {"whitespace_pattern": _WHITESPACE}
                text = LLMatcher.grammar_from_json_schema(said, defaults=options)
            else:
                text = grammar_from(kind, written)
            _try(text)
        except (ValueError, RecursionError) as error:
            reason = _reason(str(error))
            raise UsageError(f"no grammar can be made of this {kind}: {reason}") from error
        matcher = LLMatcher(self._vocabulary(), text, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # shows whether there is a first token
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            raise UsageError(f"no grammar can be made of this {kind}: {reason}")
        return Grammar(matcher, self.vocab_size)

    def _vocabulary(self) -> Any:
        from llguidance import hf

        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = hf.from_tokenizer(self.tokenizer, self.vocab_size, self.stops)
                except ValueError as error:
                    raise UsageError(f"the tokenizer knows no grammars: {error}") from error
            return self._tokens


@lru_cache(maxsize=64)
def _try(text: str) -> None:
    """Compiles a grammar elsewhere: llguidance has limits, but of some grammars few words take
    hours (`allOf` of patterns) or all memory (`multipleOf` a large number).

    Raises:
        ValueError: This is one of them.
    """
    script = [sys.executable, "-P", str(Path(__file__).with_name("_try_grammar.py"))]
    try:
        done = subprocess.run(
            script, input=text.encode(), capture_output=True, timeout=_MOST_SECONDS
        )
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise ValueError("it takes too much time or memory")


def _reason(error: str) -> str:
    """The line of llguidance's message that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown"]
    last = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (last or lines)[0]
    return "no answer could obey it" if reason.startswith("NoExtension") else reason[:300]


class Grammar:
    """What may come next in one answer.

    Attributes:
        gave_up: The answer got too large for its grammar, so that it could only end.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self.vocab_size = matcher, vocab_size
        self.gave_up = False
        self._taken = 0  # tokens of the answer that the matcher has seen

    def fresh(self) -> Grammar:
        """The same for another answer."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, self.vocab_size)

    def mask(self, scores: Tensor, answer: Sequence[int]) -> Tensor:
        """`scores [1, V]` with -inf for what may not come behind an answer."""
        self._matcher.consume_tokens(list(answer[self._taken :]))
        self._taken = len(answer)
        bits = torch.zeros(-(-self.vocab_size // 32), dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.nbytes)
        self.gave_up = self._matcher.is_error()
        each = bits[:, None] >> torch.arange(32, dtype=torch.int32) & 1
        allowed = each.flatten()[: self.vocab_size].bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)
