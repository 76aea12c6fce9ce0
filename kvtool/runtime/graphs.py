"""Decoding in paged memory, by CUDA graphs where there is CUDA and no step waits for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtool.layout import experts_of
from kvtool.runtime.cache import KVCache
from kvtool.runtime.layers import Step
from kvtool.runtime.pages import Paged, PagedStore
from kvtool.runtime.stores import PAGE

if TYPE_CHECKING:
    from kvtool.runtime.engine import Engine

SPARE = 0
"""The row that pads a step; what else it is fed is of no account."""


def waits_for_experts(model: Any) -> bool:
    """Whether a step asks the device how many tokens each expert has, which no graph can.

    The grouped product of torch does, but for bfloat16 on Hopper and Blackwell.
    """
    if not experts_of(model):
        return False
    fast = torch.cuda.get_device_capability(model.device)[0] in (9, 10)
    return not fast or model.dtype != torch.bfloat16


class PagedMemory:
    """The planes of all layers, and the caches that share them.

    It grows when a cache needs more; what was recorded is recorded again then.

    Args:
        rows, pages: What there is room for at first.
    """

    def __init__(self, engine: Engine, rows: int, pages: int) -> None:
        self.engine = engine
        self.pages = engine.new_pages(rows, pages)
        self.stores: list[Paged] = []
        for attention in engine.attentions:
            store = attention.new_paged_store(self.pages)
            assert store is not None  # or the engine would not be paged
            self.stores.append(store)
        self._records = engine.device.type == "cuda" and not waits_for_experts(engine.model)
        self._recorded: dict[int, _Recorded] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return self.pages.page_bytes + sum(store.page_bytes for store in self.stores)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes besides its pages, in all layers."""
        return sum(store.row_bytes for store in self.stores)

    def fixed_bytes(self, rows: int) -> int:
        """What there is from the start for so many rows: the spare row and page, and tables."""
        return (rows + 1) * (self.row_bytes + self.pages.table_bytes) + self.page_bytes

    @torch.inference_mode()
    def new_cache(self, rows: int, capacity: int) -> PagedCache:
        """An empty cache for some rows, with room for `capacity` tokens each."""
        taken = [self._take_row() for _ in range(rows)]
        cache = PagedCache(self, taken)
        cache.resize(capacity)
        return cache

    @torch.inference_mode()
    def record(self, rows: int) -> None:
        """Records the steps of up to so many rows, so that no request waits for it."""
        if self._records:
            for padded in (1 << n for n in range((rows - 1).bit_length() + 1)):
                self._recorded[padded] = _Recorded(self, padded)

    def give_row(self, row: int) -> None:
        """Returns a row, its pages, and what is held of a prompt that it has not read."""
        self.pages.give_row(row)
        for store in self.stores:
            store.forget(row)

    @torch.inference_mode()
    def begin(self, row: int, prompt: int) -> None:
        """Told how long the prompt is that an empty row is fed next."""
        self.pages.begin(row, prompt)
        while missing := self.pages.resize(row, self.pages.room(row)):
            self._grow(0, missing)

    @torch.inference_mode()
    def resize(self, row: int, tokens: int) -> None:
        """Gives a row pages for so many tokens."""
        if -(-tokens // PAGE) > self.pages.table.shape[-1]:
            self._recorded.clear()
            self.pages.widen(-(-tokens // PAGE))
        while missing := self.pages.resize(row, tokens):
            self._grow(0, max(missing, self.pages.count // 2))

    def decode(self, rows: Sequence[int], starts: Sequence[int], ids: Tensor) -> Tensor:
        """One token for each of some rows; returns the logits after it, `[B, V]` fp32.

        Args:
            starts: Tokens that each row holds. It has a page for one more.
            ids: `[B]`, on the host: nobody waits for them then.
        """
        for row, start in zip(rows, starts, strict=True):
            if start == 0:
                self.begin(row, 0)
        count = len(rows)
        padded = 1 << (count - 1).bit_length()
        spare = [SPARE] * (padded - count)
        cuda = self.engine.device.type == "cuda"
        # Pinned, so that nobody waits for the copy; torch keeps it until the copy is through.
        fed = torch.tensor(
            [[*part, *spare] for part in (rows, starts, ids.tolist())], pin_memory=cuda
        )
        if not self._records:
            return self._step(*fed.to(self.engine.device, non_blocking=True))[:count]
        if padded not in self._recorded:
            self._recorded[padded] = _Recorded(self, padded)
        return self._recorded[padded].replay(fed)[:count]

    def _step(self, rows: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        """The same with all `[B]` on the device, where nothing is asked of it."""
        engine = self.engine
        place = self.pages.place(rows, positions)
        positions = positions[:, None]
        tables = engine.tables(positions)
        step = Step(self.stores, None, [], [], None, tables, place, positions=positions)
        return engine.logits(engine.run(step, ids[:, None]))[:, 0]

    def _take_row(self) -> int:
        row = self.pages.take_row()
        if row is None:
            self._grow(self.pages.rows, 0)
            row = self.pages.take_row()
            assert row is not None
        return row

    def _grow(self, rows: int, pages: int) -> None:
        self._recorded.clear()  # they know the old addresses
        self.pages.grow(rows, pages)
        for store in self.stores:
            store.grow()


class PagedCache(KVCache):
    """Some rows of a paged memory, which gets them back with the last reference to this."""

    def __init__(self, memory: PagedMemory, rows: list[int]) -> None:
        super().__init__(memory.stores, len(rows))
        self.memory, self.rows = memory, rows
        self._returns = [weakref.finalize(self, memory.give_row, row) for row in rows]

    @property
    def capacity(self) -> int:
        return min(self.memory.pages.room(row) for row in self.rows)

    @property
    def layer_bytes(self) -> list[int]:
        pages = self.memory.pages
        return [
            sum(pages.bytes_in(store, row) + store.row_bytes for row in self.rows)
            for store in self.memory.stores
        ]

    def place_of(self, row: int) -> int:
        return self.rows[row]

    def begin(self, row: int, prompt: int) -> None:
        self.memory.begin(self.rows[row], prompt)

    def release(self) -> None:
        for give in self._returns:
            give()

    def reserve(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self.rows, lengths, strict=True):
            if length > self.memory.pages.room(row):
                self.memory.resize(row, length)

    def resize(self, capacity: int) -> None:
        for row in self.rows:
            self.memory.resize(row, capacity)

    def keep_prefix(self, length: int) -> None:
        self.resize(length)
        self.lengths = [length]

    @torch.inference_mode()
    def copy_prefix(self, source: KVCache, length: int) -> None:
        assert isinstance(source, PagedCache)
        assert source.memory is self.memory
        owned, count = self.memory.pages.owned, -(-length // PAGE)
        new, old = (owned[cache.rows[0]][0][:count] for cache in (self, source))
        for store in self.stores:
            assert isinstance(store, PagedStore)
            for plane in store.planes.values():
                plane[new] = plane[old]
        self.lengths = [length]


class _Recorded:
    """A decode step of so many rows as a CUDA graph."""

    def __init__(self, memory: PagedMemory, rows: int) -> None:
        device = memory.engine.device
        self.fed = torch.zeros(3, rows, dtype=torch.long, device=device)
        # The first runs compile kernels and allocate what libraries keep; on a stream of their own,
        # as torch asks for. All rows are spare meanwhile.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                memory._step(*self.fed)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = memory._step(*self.fed)

    def replay(self, fed: Tensor) -> Tensor:
        """Runs it on other rows, positions and ids `[3, B]`, pinned; the next leaves the result."""
        self.fed.copy_(fed, non_blocking=True)
        self.graph.replay()
        return self.logits.clone()
