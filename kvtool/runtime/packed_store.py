"""Planes that keep every token, most of them as integers of few bits.

The first tokens and the last are exact, in a ring. When `window` tokens have come behind N others,
these are packed as one block, from the exact numbers, and never again. Whatever the calls were that
brought the tokens, the same are packed after as many of them; in a call with several tokens, each
reads what would have been exact had it come alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvtool.bits import Blocks
from kvtool.kernels.quantise import groups_of, packed_bytes, quantise
from kvtool.runtime.dropping import DroppingHeads
from kvtool.runtime.layers import Step
from kvtool.runtime.pages import Pages, enlarge
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import PAGE, Store, whole_pages


class PackedStore(DroppingHeads):
    """A ring of exact tokens, and planes `[B, H, blocks, ...]` of codes and of their scales.

    Attributes:
        parts: The planes of the ring into which a token goes, in order.
        bits: Which tokens are packed.
        tokens: That there is room for.
    """

    parts: tuple[str, ...]
    exact: StreamingHeads
    bits: Blocks
    dense_prompt: bool
    tokens: int

    def attend(
        self, q: Tensor, exact: Sequence[Tensor], row: int, start: int, *, new: bool = True
    ) -> Tensor:
        """One softmax in fp32 over exact tokens and the blocks of a row.

        Args:
            q: `[Q, T, D]`, from position `start` on; all see the same blocks.
            exact: `[H, C, ·]` each; the last T are of the queries' own tokens.
            new: Whether these tokens are being added; else another layer reads them once more.

        Returns:
            `[Q, T, ·]`.
        """
        raise NotImplementedError  # pragma: no cover

    def pack(self, row: int, first: int, exact: Sequence[Tensor]) -> None:
        """Packs tokens `[H, n · N, ·]` as the blocks from `first` on."""
        raise NotImplementedError  # pragma: no cover

    def add_planes(self, part: str, bits: int, numbers: int, shape: tuple[int, ...]) -> None:
        """Planes of codes with so many bits, and of their scales, for rows of `numbers`."""
        groups, like = groups_of(numbers, self.bits.group), next(iter(self.exact.planes.values()))
        codes = like.new_empty((*shape, packed_bytes(numbers, bits)), dtype=torch.uint8)
        scales = like.new_empty((*shape, groups, 2), dtype=torch.float16)
        self.planes |= {part: codes, f"{part} scales": scales}

    @property
    def capacity(self) -> int:
        return self.tokens

    def grown(self, length: int) -> int:
        return whole_pages(super().grown(length))

    def resize(self, capacity: int) -> None:
        self.tokens, blocks = capacity, self.bits.blocks(capacity)
        for name, plane in self.planes.items():
            other = plane.new_empty((*plane.shape[:2], blocks, *plane.shape[3:]))
            kept = min(blocks, plane.shape[2])
            other[:, :, :kept] = plane[:, :, :kept]
            self.planes[name] = other

    def copy_prefix(self, source: Store, length: int) -> None:
        blocks = self.bits.blocks(length)
        for name, plane in self.planes.items():
            plane[:, :, :blocks] = source.planes[name][:, :, :blocks]

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return stored - self.bits.ring <= self.first_exact(length)

    def add_tokens(self, q: Tensor, new: Sequence[Tensor], step: Step) -> Tensor:
        """Stores new tokens `[B, H, T, ·]`; returns what queries `[B, Q, T, D]` read."""
        rows = range(len(step.starts)) if step.row is None else [step.row]
        contexts = []
        for b, (row, start) in enumerate(zip(rows, step.starts, strict=True)):
            own = [x[b] for x in new]
            contexts.append(self.read(q[b], self.with_exact(own, row, start), row, start, new=True))
            if q.shape[2] == 1:
                slot, named = self.exact.slot(start), zip(self.parts, own, strict=True)
                self.exact.write(row, [slot], {name: x[None] for name, x in named})
            else:
                self.exact.keep_last(row, start, *own)
        return torch.stack(contexts)

    def with_exact(self, new: Sequence[Tensor], row: int, start: int) -> list[Tensor]:
        """New tokens `[H, T, ·]` behind those of a row that are exact when they come."""
        past = self.exact_tokens(row, start)
        return [torch.cat(pair, dim=1) for pair in zip(past, new, strict=True)]

    def read(
        self, q: Tensor, exact: Sequence[Tensor], row: int, start: int, *, new: bool
    ) -> Tensor:
        """What queries `[Q, T, D]` from position `start` on read, `[Q, T, ·]`.

        Args:
            exact: `[H, C, ·]` each, in their order: what each of them sees exactly, and in front of
                that what has been packed meanwhile; the last T are of the queries' own tokens.
            new: Whether these are added: with some of them a block is packed.
        """
        parts, end = [], start + q.shape[1]
        for run in self.runs(start, end):
            if new:
                self.pack_due(row, range(run.start, run.start + 1), exact, end)
            asked = q[:, run.start - start : run.stop - start]
            seen = self.seen_exactly(run, exact, end)
            parts.append(self.attend(asked, seen, row, run.start, new=new))
        return torch.cat(parts, dim=1)

    def pack_due(self, row: int, new: range, exact: Sequence[Tensor], end: int) -> None:
        """Packs the blocks that tokens at positions `new` make complete.

        Args:
            exact: See :meth:`read`; end: the position behind its last token.
        """
        before, done = self.bits.blocks(new.start), self.bits.blocks(new.stop)
        if done > before:
            shift = exact[0].shape[1] - end  # from a position behind the sinks to its place there
            own = slice(self.first_of(before) + shift, self.first_of(done) + shift)
            self.pack(row, before, [x[:, own] for x in exact])

    def seen_exactly(self, run: range, exact: Sequence[Tensor], end: int) -> list[Tensor]:
        """Of `exact` what comes up to the end of a run, and is in no block that it reads."""
        sink, shift = self.bits.sink, exact[0].shape[1] - end
        first, stop = self.first_exact(run.start + 1) + shift, run.stop + shift
        return [
            x[:, :stop] if first == sink else torch.cat((x[:, :sink], x[:, first:stop]), 1)
            for x in exact
        ]

    def end_prompt(self, row: int, *tokens: Tensor) -> None:
        own = slice(self.bits.sink, self.first_exact(tokens[0].shape[1]))
        self.pack(row, 0, [x[:, own] for x in tokens])
        self.exact.keep_last(row, 0, *tokens)

    def first_of(self, block: int) -> int:
        """Its first position."""
        return self.bits.sink + block * self.bits.group

    def first_exact(self, length: int) -> int:
        """The first token behind the blocks of a row with `length` tokens."""
        return self.first_of(self.bits.blocks(length))

    def runs(self, start: int, end: int) -> Iterator[range]:
        """Positions of the tokens of a call, by the blocks that they read."""
        while start < end:
            stop = min(end, self.bits.packed_at(self.bits.blocks(start + 1)))
            yield range(start, stop)
            start = stop

    def exact_tokens(self, row: int, length: int) -> list[Tensor]:
        """What there is of a row with `length` tokens, `[H, C, ·]` each, in their order."""
        sinks = range(min(self.bits.sink, length))
        slots = [self.exact.slot(p) for p in (*sinks, *range(self.first_exact(length), length))]
        return [self.exact.planes[name][row][:, slots] for name in self.parts]

    def put_blocks(
        self, part: str, row: int, first: int, x: Tensor, bits: int, clip: float
    ) -> tuple[Tensor, Tensor]:
        """Packs numbers `[H, n, lines, ·]` as the blocks from `first` on; codes and scales."""
        own = slice(first, first + x.shape[1])
        codes, scales = quantise(x, bits, self.bits.group, clip)
        self.write_blocks(part, row, own, codes)
        self.write_blocks(f"{part} scales", row, own, scales)
        return codes, scales

    def blocks_of(self, part: str, row: int, first: int, end: int) -> Sequence[Tensor]:
        """Codes `[H, blocks, ...]` and their scales."""
        return [self.read_blocks(name, row, first, end) for name in (part, f"{part} scales")]

    def read_blocks(self, name: str, row: int, first: int, end: int) -> Tensor:
        """Of a plane, `[H, blocks, ...]`."""
        return self.planes[name][row, :, first:end]

    def write_blocks(self, name: str, row: int, own: slice, packed: Tensor) -> None:
        """The other way round."""
        self.planes[name][row, :, own] = packed


class PagedBlocks(PackedStore):
    """The ring per row, and planes `[pages, H, blocks of a page, ...]`."""

    pages: Pages

    @property
    def page_bytes(self) -> int:
        """Of a page's blocks."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    @property
    def row_bytes(self) -> int:
        """Of a ring."""
        return sum(plane[0].nbytes for plane in self.exact.planes.values())

    @property
    def capacity(self) -> int:
        return (self.pages.count - 1) * PAGE

    def grow(self) -> None:
        """Takes as many pages and rows as there are now."""
        enlarge(self.planes, self.pages.count)
        enlarge(self.exact.planes, self.pages.rows)

    def _at(self, row: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Pages in which blocks of a row lie, and where there."""
        table = self.pages.of(row)
        block = torch.arange(first, end, device=table.device)
        each = PAGE // self.bits.group
        return table[block // each].long(), block % each

    def read_blocks(self, name: str, row: int, first: int, end: int) -> Tensor:
        page, within = self._at(row, first, end)
        return self.planes[name].movedim(1, 2)[page, within].movedim(0, 1)

    def write_blocks(self, name: str, row: int, own: slice, packed: Tensor) -> None:
        page, within = self._at(row, own.start, own.stop)
        self.planes[name].movedim(1, 2)[page, within] = packed.movedim(0, 1)
