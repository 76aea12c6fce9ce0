"""Stores at fixed addresses, for devices whose decode steps are recorded once and replayed.

All rows of all caches share the planes of a layer: tokens lie in pages of :data:`PAGE`, and what
has a fixed size, such as a ring, in a place per row. Which page holds what is one table for all
layers, on the device, so a step takes no other input than tokens, positions and rows, and asks the
device for nothing. That is what lets a CUDA graph replay it for any lengths.

Prompts are read row by row, as by the stores that these take the place of; a decode step calls
`step` instead.

Page 0 and row 0 belong to nobody: steps are padded with rows that write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.kernels.append import append
from kvtool.kernels.decode_attention import paged_decode_attention
from kvtool.kernels.latent_attention import paged_latent_attention
from kvtool.runtime.stores import PAGE, KVHeads, Seen, Store, whole_pages

if TYPE_CHECKING:
    from kvtool.runtime.layers import NewTokens, Step


WIDEST = 1024
"""Of what a kernel sums up for all query heads at once, in numbers."""


class Pages:
    """Which pages belong to which row, the same in all layers.

    A row may have several lists of pages, see `head_pages.py`. Here it has one.

    Attributes:
        table: `[rows, lists, most]` int32, on the device: what is stored at place p of a list lies
            in its page `p // PAGE`.
        owned: The same on the host, by row and list.
    """

    def __init__(
        self, rows: int, pages: int, most: int, device: torch.device, lists: int = 1
    ) -> None:
        self.table = torch.zeros((rows + 1, lists, most), dtype=torch.int32, device=device)
        self.owned: list[list[list[int]]] = [[[] for _ in range(lists)] for _ in range(rows + 1)]
        self.count = pages + 1
        self._free_pages = list(range(pages, 0, -1))
        self._free_rows = list(range(rows, 0, -1))

    @property
    def rows(self) -> int:
        """All rows, the spare one included."""
        return len(self.owned)

    @property
    def page_bytes(self) -> int:
        """Bytes that a page takes here: none, its tokens lie in the stores of the layers."""
        return 0

    @property
    def table_bytes(self) -> int:
        """Bytes that a row takes here."""
        return self.table[0].nbytes

    def of(self, row: int) -> Tensor:
        """The pages of a row that has one list, `[most]`."""
        return self.table[row, 0]

    def room(self, row: int) -> int:
        """Tokens that a row has room for."""
        return len(self.owned[row][0]) * PAGE

    def bytes_in(self, store: Paged, row: int) -> int:
        """Bytes of the pages that a row has in a layer."""
        return len(self.owned[row][0]) * store.page_bytes

    def take_row(self) -> int | None:
        """A row that nobody has, if there is one."""
        return self._free_rows.pop() if self._free_rows else None

    def give_row(self, row: int) -> None:
        """Returns a row and its pages."""
        self.resize(row, 0)
        self._free_rows.append(row)

    def begin(self, row: int, prompt: int) -> None:
        """Told how long the prompt is that an empty row is fed next."""

    def wanted(self, row: int, tokens: int) -> list[int]:
        """How many pages each list of a row needs for so many tokens."""
        return [whole_pages(tokens) // PAGE]

    def resize(self, row: int, tokens: int) -> int:
        """Gives a row pages for so many tokens; returns how many pages there are too few."""
        owned, wanted = self.owned[row], self.wanted(row, tokens)
        for pages, count in zip(owned, wanted, strict=True):
            while len(pages) > count:
                self._free_pages.append(pages.pop())
        new = [
            (i, column)
            for i, (pages, count) in enumerate(zip(owned, wanted, strict=True))
            for column in range(len(pages), count)
        ]
        if len(new) > len(self._free_pages):
            return len(new) - len(self._free_pages)
        if new:
            taken = [self._free_pages.pop() for _ in new]
            for (i, _), page in zip(new, taken, strict=True):
                owned[i].append(page)
            lists, columns = torch.tensor(new).T.to(self.table.device)
            pages_there = torch.tensor(taken, dtype=torch.int32).to(self.table.device)
            self.table[row, lists, columns] = pages_there
        return 0

    def widen(self, most: int) -> None:
        """Makes room for so many pages per list."""
        wider = self.table.new_zeros((*self.table.shape[:2], most))
        wider[..., : self.table.shape[-1]] = self.table
        self.table = wider

    def grow(self, rows: int, pages: int) -> None:
        """Makes room for as many more."""
        self._free_pages += range(self.count + pages - 1, self.count - 1, -1)
        self.count += pages
        if rows:
            lists = self.table.shape[1]
            more = self.table.new_zeros((rows, *self.table.shape[1:]))
            self.table = torch.cat((self.table, more))
            self._free_rows += range(self.rows + rows - 1, self.rows - 1, -1)
            self.owned += [[[] for _ in range(lists)] for _ in range(rows)]

    def place(self, rows: Tensor, positions: Tensor) -> Place:
        """Where the new tokens `[B]` of some rows `[B]` go, and what they read."""
        table = self.table[rows, 0]
        page = table.gather(1, (positions // PAGE)[:, None])[:, 0].long()
        slots = page * PAGE + positions % PAGE
        return Place(rows, positions, table, slots, (positions + 1).int())


@dataclass
class Place:
    """Where each row of a decode step reads and writes; all on the device.

    Attributes:
        rows: `[B]` int64.
        positions: `[B]` int64, of the new tokens.
        table: `[B, most]` int32.
        slots: `[B]` int64, where in the pages the new tokens go.
        lengths: `[B]` int32, tokens with the new one.
    """

    rows: Tensor
    positions: Tensor
    table: Tensor
    slots: Tensor
    lengths: Tensor
    _rings: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _beside: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _before: dict[int, Tensor] = field(default_factory=dict)

    def ring(self, sink: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same three of a ring per row, whose first `sink` places are never overwritten.

        Layers with such rings share them, as all that is computed here.
        """
        if (sink, window) not in self._rings:
            capacity, at = sink + window, self.positions
            within = torch.where(at < sink, at, sink + (at - sink) % window)
            slots, lengths = self.rows * capacity + within, (at + 1).clamp(max=capacity).int()
            self._rings[sink, window] = self.rows.int()[:, None], slots, lengths
        return self._rings[sink, window]

    def beside_ring(self, paged: int, heads: int, sink: int, window: int) -> Tensor:
        """`[B, heads]` int32, tokens of each head; the first `paged` keep all, others a ring."""
        kind = heads, sink, window
        if kind not in self._beside:
            both = torch.stack((self.lengths, self.ring(sink, window)[2]), dim=1)
            self._beside[kind] = both.repeat_interleave(heads, dim=1, output_size=2 * heads)
        return self._beside[kind][:, heads - paged :][:, :heads]  # a view for all layers

    def before(self, window: int) -> Tensor:
        """`[B]` int32, tokens of each row before its last `window`; may be negative."""
        if window not in self._before:
            self._before[window] = self.lengths - window
        return self._before[window]


class PagedStore(Store):
    """Planes `[pages, ..., PAGE, width]` of a layer."""

    def __init__(self, pages: Pages, shapes: dict[str, tuple[int, ...]], like: Tensor) -> None:
        """Makes planes of `shapes`: what lies between pages and places, and the width."""
        self.pages = pages
        self.planes = {
            name: like.new_empty((pages.count, *shape[:-1], PAGE, shape[-1]))
            for name, shape in shapes.items()
        }

    @property
    def capacity(self) -> int:
        """Tokens that fit into all pages."""
        return (self.pages.count - 1) * PAGE

    def write(self, row: int | None, starts: Sequence[int], states: dict[str, Tensor]) -> None:
        """Writes new tokens of one row, `[1, ..., T, width]`."""
        assert row is not None
        for name, new in states.items():
            plane = self.planes[name]
            at = torch.arange(starts[0], starts[0] + new.shape[-2], device=plane.device)
            page = self.pages.of(row)[at // PAGE].long()
            plane.movedim(-2, 1)[page, at % PAGE] = new[0].movedim(-2, 0)

    def gather(self, name: str, row: int, start: int, end: int) -> Tensor:
        """Tokens of one row of a plane, side by side: `[1, ..., end - start, width]`."""
        first = start // PAGE
        own = self.pages.of(row)[first : -(-end // PAGE)].long()
        found = self.planes[name][own]  # [n, ..., PAGE, width]
        joined = found.movedim(0, -3).flatten(-3, -2)
        return joined[None, ..., start - first * PAGE : end - first * PAGE, :]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes besides its pages."""
        return 0

    def grow(self) -> None:
        """Takes as many pages as there are now."""
        enlarge(self.planes, self.pages.count)


class PerRow:
    """What has a place per row in planes, and no pages."""

    pages: Pages
    planes: dict[str, Tensor]

    @property
    def page_bytes(self) -> int:
        """None."""
        return 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a place."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    def grow(self) -> None:
        """Takes as many rows as there are now."""
        enlarge(self.planes, self.pages.rows)


class PagedHeads(PagedStore):
    """Rotated keys and values of heads that keep every token."""

    def __init__(self, heads: KVHeads, pages: Pages) -> None:
        self.pages, self.planes = pages, heads.planes(pages.count, PAGE)
        self.scaling, self.sink_logits = heads.scaling, heads.sink_logits

    def stored(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Pages of keys and of values; and if they lie in e4m3 what they are multiplied by, `[H]`
        fp32 each.
        """
        return self.planes["keys"], self.planes["values"], None

    def attend(self, q: Tensor, row: int | None, lengths: Sequence[int]) -> Tensor:
        """Attention of the newest tokens of one row over everything stored, `[1, Q, T, D]`."""
        assert row is not None
        keys, values = (self.gather(name, row, 0, lengths[0]) for name in self.planes)
        return causal_attention(q, keys, values, self.scaling, sink_logits=self.sink_logits)

    def lend(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        """See :meth:`Store.lend`."""
        return self.attend(q, step.row, step.lengths)

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens of one row and returns what they read, `[1, Q, T, D]`."""
        self.write(step.row, step.starts, {"keys": new.k, "values": new.v})
        return self.attend(new.q, step.row, step.lengths)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Stores a new token per row and returns what it reads.

        Args:
            q, k: `[B, Q or H, D]`, before RoPE; v: `[B, H, D]`.
            cos, sin: `[B, D]`.
            out: `[B, Q, D]` for the result, which may be a part of the heads of a larger one.

        Returns:
            `[B, Q, D]`.
        """
        keys, values, scales = self.stored()
        turned = append(k, v, cos, sin, keys, values, at.slots, q, scales=scales)
        assert turned is not None
        return self.read_step(turned, at, out)

    def read_step(self, q: Tensor, at: Place, out: Tensor | None = None) -> Tensor:
        """What queries `[B, Q, D]` behind RoPE read, once their tokens are stored, `[B, Q, D]`."""
        keys, values, scales = self.stored()
        return paged_decode_attention(
            q, keys, values, at.lengths, self.scaling, at.table, out=out,
            sink_logits=self.sink_logits, scales=scales,
        )[0]  # fmt: skip


class Paged(Protocol):
    """What every store of a paged memory has."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes besides its pages."""

    def grow(self) -> None:
        """Takes as many pages and rows as there are now."""

    def forget(self, row: int) -> None:
        """Told that a row is given up."""


class PagedLatents(PagedStore):
    """The latents of an MLA layer, each with its rotated shared key."""

    def __init__(self, pages: Pages, rank: int, rope: int, like: Tensor, scaling: float) -> None:
        super().__init__(pages, {"latents": (rank + rope,)}, like)
        self.rank, self.scaling = rank, scaling

    def step(
        self, q: Tensor, c: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor, at: Place
    ) -> Tensor:
        """Stores a latent per row and returns what queries read of all.

        Args:
            q: `[B, Q, r + d_r]`, absorbed; what lies behind r is rotated in place.
            c: `[B, r]`; k_pe: `[B, d_r]`, before RoPE.
            cos, sin: `[B, d_r]`.

        Returns:
            `[B, Q, r]`.
        """
        plane, rank = self.planes["latents"], self.rank
        contents, shared = plane[:, None].split([rank, plane.shape[-1] - rank], dim=-1)
        asked = q[..., rank:]
        append(k_pe[:, None], c[:, None], cos, sin, shared, contents, at.slots, asked, out=asked)
        return paged_latent_attention(q, plane, rank, at.lengths, self.scaling, at.table)[0]


def enlarge(planes: dict[str, Tensor], count: int) -> None:
    """Puts larger planes in the place of some, with the same in front."""
    for name, plane in planes.items():
        if len(plane) == count:
            continue
        larger = plane.new_empty((count, *plane.shape[1:]))
        larger[: len(plane)] = plane
        planes[name] = larger
