"""Tokens as text while they come: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtool.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_text(text: str) -> str:
    """The text itself, if it can be tokenized.

    Raises:
        UsageError: It holds half of a character: bytes of a terminal, or an escape of JSON, that
            are no Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is no Unicode: character {error.start} is half of one"
        ) from error
    return text


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not complete.

    A character may span several tokens, and how a token reads may depend on the one before, so
    the text of the last few tokens is decoded twice, with and without the new one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: one shown piece before what is still held back
        self._shown = 0  # tokens whose text has been handed out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):  # the decoder's mark for bytes that are no character yet
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        text = self._pending()
        self._start = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class StopText:
    """Ends a text before the first of some strings, holding back what may become one.

    Attributes:
        stopped: Whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is new and sure to be shown."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, whatever the pieces are
            shown, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper head of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
