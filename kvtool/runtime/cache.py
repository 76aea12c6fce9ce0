"""What the runtime keeps of some sequences, all layers together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool.runtime.stores import whole_pages


@dataclass(frozen=True)
class Snapshot:
    """A row of a cache as it was: its length, and per layer what later tokens overwrite."""

    length: int
    saved: list[list[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for layer in self.saved for copy in layer)


class KVCache:
    """What the runtime keeps of `len(lengths)` sequences: one store per layer."""

    def __init__(self, stores: Sequence[Any], rows: int) -> None:
        self.stores = list(stores)
        self.lengths = [0] * rows
        for index, store in enumerate(self.stores):
            store.join(self.stores[:index])

    @property
    def capacity(self) -> int:
        """Tokens per row that memory is allocated for."""
        least: int = min(store.capacity for store in self.stores)
        return least

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes that each layer keeps, as allocated."""
        return [store.allocated_bytes for store in self.stores]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of everything that all layers keep, as allocated."""
        return sum(self.layer_bytes)

    @property
    def keeps_all(self) -> bool:
        """Whether every layer can go back to any prefix of a row, however long that got."""
        return all(store.can_crop(self.place_of(0), sys.maxsize, 1) for store in self.stores)

    def place_of(self, row: int) -> int:
        """Where a row lies in the stores."""
        return row

    def begin(self, row: int, prompt: int) -> None:
        """Told how long the prompt is that an empty row is fed next."""

    def bytes_per_token(self) -> float:
        """Allocated bytes per token of one row."""
        return self.allocated_bytes / (len(self.lengths) * self.capacity)

    def release(self) -> None:
        """Returns its memory now; without it, that returns with the last reference."""

    def reserve(self, lengths: Sequence[int]) -> None:
        """Makes sure that row b has room for `lengths[b]` tokens."""
        for store in self.stores:
            store.reserve(lengths)

    def resize(self, capacity: int) -> None:
        """Gives every row exactly room for `capacity` tokens."""
        for store in self.stores:
            store.resize(capacity)

    @torch.inference_mode()
    def copy_prefix(self, source: KVCache, length: int) -> None:
        """Fills this cache of one row with the first `length` tokens of another.

        What later tokens overwrite comes from a snapshot that was made there, see :meth:`restore`.
        """
        for store, other in zip(self.stores, source.stores, strict=True):
            store.copy_prefix(other, length)
        self.lengths = [length]

    def keep_prefix(self, length: int) -> None:
        """Gives up what :meth:`copy_prefix` of this one row does not take over."""
        for store in self.stores:
            store.keep_prefix(whole_pages(length))
        self.lengths = [length]

    def crop(self, row: int, length: int) -> None:
        """Forgets everything of a row behind its first `length` tokens.

        Where a layer has dropped something that those tokens had left, the row starts over: its
        length is 0 then, and the caller feeds it again from there.
        """
        stored = self.lengths[row]
        if length >= stored:
            return
        exact = all(store.can_crop(self.place_of(row), stored, length) for store in self.stores)
        self.lengths[row] = length if exact else 0

    @torch.inference_mode()
    def snapshot(self, row: int) -> Snapshot:
        """What :meth:`restore` needs to come back to here; valid until the row is cropped."""
        saved = [store.snapshot(self.place_of(row)) for store in self.stores]
        return Snapshot(self.lengths[row], saved)

    @torch.inference_mode()
    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Forgets everything that a row was fed since the snapshot of it was taken."""
        for store, saved in zip(self.stores, snapshot.saved, strict=True):
            store.restore(self.place_of(row), saved)
        self.lengths[row] = snapshot.length
