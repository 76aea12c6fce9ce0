"""What prompts have read, for others that start alike.

Prompts are cut at fixed positions, and what is shared are whole pieces. A cache that keeps every
token gives the head of it away. A ring of the last tokens or a state cannot go back: those are
shared from marks, copies that are made while a prompt is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvtool.runtime.cache import KVCache, Snapshot


class Reader(Protocol):
    """Who has read the tokens `ids`, or is reading them, and can be started from."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def cache(self) -> KVCache: ...

    @property
    def marks(self) -> list[Snapshot]: ...


@dataclass(eq=False)
class Prefix:
    """The head of a prompt whose request has ended.

    Attributes:
        held: Bytes of the cache.
        marks: Where others can start from, in order.
    """

    ids: list[int]
    cache: KVCache
    held: int
    marks: list[Snapshot]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.held + size(self.marks)


class Start(NamedTuple):
    """Where a prompt begins to be read.

    Attributes:
        length: Tokens in front of it, which `source` has read.
        mark: What `source` was there, if it cannot go back.
        branch: Tokens, in whole pieces, that some other prompt begins with as well.
    """

    length: int = 0
    source: Reader | None = None
    mark: Snapshot | None = None
    branch: int = 0


class Prefixes(list[Prefix]):
    """Those that are kept for later, least recently used first.

    Args:
        piece: Where prompts are cut.
        by_marks: Caches cannot go back, so that marks are what is shared.
        most: How many are kept; None for as many as there is memory for.
    """

    def __init__(self, piece: int, *, by_marks: bool, most: int | None) -> None:
        super().__init__()
        self.piece, self.by_marks, self.most = piece, by_marks, most

    def shareable(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that another may have read: the last one's logits are needed."""
        return (len(prompt) - 1) // self.piece * self.piece

    def find(self, prompt: Sequence[int], running: Iterable[Reader]) -> Start:
        """The most tokens of the start, in whole pieces, that another request has read."""
        ids, best = list(prompt), Start()
        most, branch = self.shareable(ids), 0
        readers: list[Reader] = [*self, *running]
        for other in readers:
            shared = 0
            while shared < most:
                piece = slice(shared, shared + self.piece)
                if [*other.ids[piece]] != ids[piece]:
                    break
                shared = piece.stop
            branch = max(branch, shared)
            mark = next((x for x in reversed(other.marks) if x.length <= shared), None)
            if self.by_marks:
                shared = 0 if mark is None else mark.length
            if shared > best.length:
                best = Start(shared, other, mark)
        return best._replace(branch=branch)

    def use(self, source: Reader | None) -> None:
        """Makes one that was started from the most recently used."""
        if isinstance(source, Prefix):
            self.remove(source)
            self.append(source)

    def keep(self, prompt: Sequence[int], stored: int, reader: Reader) -> bool:
        """Keeps the whole pieces of a prompt, unless a longer one is there already.

        Of several that are one prompt the first mark and the last stay, as of one request.

        Args:
            stored: Tokens that the reader has behind it.
        """
        marks = reader.marks
        length = len(prompt) // self.piece * self.piece
        if self.by_marks:
            length = marks[-1].length if marks else 0
        if not length or stored < length:
            return False
        ids = list(prompt[:length])
        for other in self:
            if other.ids[:length] == ids:
                other.marks = _ends([*marks, *other.marks])
                return False
        shorter = [prefix for prefix in self if prefix.ids == ids[: len(prefix.ids)]]
        for prefix in shorter:
            self.remove(prefix)
        marks = _ends([mark for prefix in shorter for mark in prefix.marks] + marks)
        reader.cache.keep_prefix(length)
        self.append(Prefix(ids, reader.cache, reader.cache.allocated_bytes, marks))
        if self.most is not None and len(self) > self.most:
            del self[0]
        return True


def size(marks: Sequence[Snapshot]) -> int:
    """Bytes of some marks."""
    return sum(mark.nbytes for mark in marks)


def _ends(marks: Sequence[Snapshot]) -> list[Snapshot]:
    """The first of them and the last, in order."""
    by_length = {mark.length: mark for mark in marks}
    return [by_length[n] for n in sorted({min(by_length), max(by_length)})] if marks else []
