"""What the runtime keeps of the past, layer by layer.

A store holds the planes of one layer for all sequences (rows). Rows are independent: each has its
own length, and what lies past it is never read. Capacity is allocated up front and grows by
doubling, so a decode step neither allocates nor copies the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.kernels.decode_attention import decode_attention, decode_rows
from kvtool.kernels.latent_attention import latent_decode_attention, latent_decode_rows

Seen = tuple[Tensor, Tensor]
"""Keys and values `[1, H, ·, D]`, the newest last."""

PAGE = 64
"""Planes that outgrow what they were made for grow by whole pages of this many tokens."""


def whole_pages(tokens: int) -> int:
    """The next multiple of :data:`PAGE`."""
    return -(-tokens // PAGE) * PAGE


class Store:
    """The planes of one layer; every plane is `[B, ..., capacity, width]`.

    This class keeps every token, so that a row can go back to any shorter length by forgetting the
    others. A store that drops tokens says how far it can go back.
    """

    planes: dict[str, Tensor]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all planes, as allocated."""
        return sum(plane.numel() * plane.element_size() for plane in self.planes.values())

    @property
    def kv_heads(self) -> int:
        """Of which it stores the keys, `[B, H, capacity, D]`."""
        return self.planes["keys"].shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return next(iter(self.planes.values())).shape[-2]

    def reserve(self, lengths: Sequence[int]) -> None:
        """Makes sure that row b has room for `lengths[b]` tokens."""
        if max(lengths) <= self.capacity:
            return
        self.resize(self.grown(max(lengths)))

    def resize(self, capacity: int) -> None:
        """Gives every row exactly room for `capacity` tokens; what lies beyond is forgotten."""
        for name, plane in self.planes.items():
            kept = min(capacity, plane.shape[-2])
            if plane.shape[-2] == capacity:
                continue
            other = plane.new_empty((*plane.shape[:-2], capacity, plane.shape[-1]))
            other[..., :kept, :] = plane[..., :kept, :]
            self.planes[name] = other

    def copy_prefix(self, source: Store, length: int) -> None:
        """Takes over what another store of this layer keeps of its first `length` tokens; not what
        later tokens overwrite, see :meth:`snapshot`.
        """
        for name, plane in self.planes.items():
            plane[..., :length, :] = source.planes[name][..., :length, :]

    def keep_prefix(self, capacity: int) -> None:
        """Gives up what :meth:`copy_prefix` of so many tokens does not take over."""
        self.resize(capacity)

    def grown(self, length: int) -> int:
        """The next capacity when `length` tokens do not fit: doubling copies each token once."""
        return max(length, 2 * self.capacity)

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        """Whether a row of `stored` tokens still has what its first `length` tokens had left."""
        return True

    def join(self, before: Sequence[Store]) -> None:
        """Told which stores the layers in front of this one have, in the same cache."""

    def forget(self, row: int) -> None:
        """Told that a row is given up, perhaps in the middle of its prompt."""

    def snapshot(self, row: int) -> list[Tensor]:
        """Copies of what later tokens of the row overwrite."""
        return []

    def restore(self, row: int, saved: list[Tensor]) -> None:
        """Puts back what :meth:`snapshot` copied."""

    def seen_by(self, new: Any, step: Any) -> Seen | None:
        """What new tokens of one row will see, as far as it will not lie here when they are added:
        later layers that read this store are told it.
        """
        return None

    def lend(self, q: Tensor, step: Any, seen: Seen | None) -> Tensor:
        """What queries `[B, Q, T, D]` of a later layer read, behind RoPE: those of the last tokens
        that were added in this step. Nothing is written.

        Args:
            seen: What :meth:`seen_by` has said of all tokens of the step; None of a step of one
                token per row.

        Returns:
            `[B, Q, T, D]`.
        """
        raise NotImplementedError  # pragma: no cover

    @staticmethod
    def add_together(stores: Sequence[Any], new: Any, step: Any) -> Tensor:
        """One new token for each of several stores of one row, `[B, ...]` in each field of `new`.

        Returns:
            What they read, `[B, Q, 1, D]`; zeros for rows of `new` that have no store.
        """
        parts = []
        for b, (store, start, n) in enumerate(zip(stores, step.starts, step.lengths, strict=True)):
            one = type(new)(*(x[b : b + 1] for x in new))
            parts.append(store.add(one, replace(step, starts=[start], lengths=[n])))
        return with_spare_rows(parts, len(new[0]))

    def write(self, row: int | None, starts: Sequence[int], states: dict[str, Tensor]) -> None:
        """Writes new tokens behind the old ones.

        Args:
            row: The one row that `states` (batch 1) belongs to, or `None` for all rows.
            starts: Tokens already stored, per row (one entry when `row` is given).
            states: Per plane `[B, ..., T, width]`.
        """
        for name, new in states.items():
            plane, tokens = self.planes[name], new.shape[-2]
            if row is not None:
                plane[row, ..., starts[0] : starts[0] + tokens, :] = new[0]
            elif len(set(starts)) == 1:
                plane[..., starts[0] : starts[0] + tokens, :] = new
            else:
                for b, start in enumerate(starts):
                    plane[b, ..., start : start + tokens, :] = new[b]

    def gather(self, name: str, row: int, start: int, end: int) -> Tensor:
        """Tokens of one row of a plane, `[1, ..., end - start, width]`."""
        return self.planes[name][row : row + 1, ..., start:end, :]


@dataclass(frozen=True)
class KVHeads:
    """Some KV heads of a layer, which one store holds.

    Attributes:
        count: How many.
        head_dim: D.
        like: A tensor of the dtype of their keys and values, where these are.
        scaling: Of scores.
        sink_logits: `[Q]`, of the query heads that read them; see `kernels/sink_logits`.
    """

    count: int
    head_dim: int
    like: Tensor
    scaling: float
    sink_logits: Tensor | None = None

    def planes(
        self, rows: int, capacity: int, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Of keys and of values, `[rows, H, capacity, D]` each; without `dtype`, of their own."""
        shape = (rows, self.count, capacity, self.head_dim)
        return {name: self.like.new_empty(shape, dtype=dtype) for name in ("keys", "values")}


class DenseStore(Store):
    """All rotated keys and all values of some heads."""

    def __init__(self, heads: KVHeads, rows: int, capacity: int) -> None:
        self.planes = heads.planes(rows, capacity)
        self.scaling, self.sink_logits = heads.scaling, heads.sink_logits

    def lend(self, q: Tensor, step: Any, seen: Seen | None) -> Tensor:
        """See :meth:`Store.lend`."""
        return self.attend(q, step.row, step.lengths)

    def attend(self, q: Tensor, row: int | None, lengths: Sequence[int]) -> Tensor:
        """Attention of the newest tokens over everything stored, themselves included.

        Args:
            q: `[B, Q, T, D]`, rotated; T > 1 only with a single `row`.
            lengths: Tokens per row, the new ones included.

        Returns:
            `[B, Q, T, D]`.
        """
        keys, values = self.planes["keys"], self.planes["values"]
        if row is not None:
            keys, values = keys[row : row + 1], values[row : row + 1]
        if q.shape[2] > 1:
            attend = partial(causal_attention, scaling=self.scaling, sink_logits=self.sink_logits)
            parts = [
                attend(q[b : b + 1], keys[b : b + 1, :, :n], values[b : b + 1, :, :n])
                for b, n in enumerate(lengths)
            ]
            return torch.cat(parts)
        context = decode_attention(
            q[:, :, 0], keys, values, lengths, self.scaling, self.sink_logits
        )
        return context[:, :, None]

    @staticmethod
    def attend_together(stores: Sequence[Any], q: Tensor, lengths: Sequence[int]) -> Tensor:
        """What the newest token of each of several stores of one row reads, `[B, Q, 1, D]`; zeros
        for rows of `q` that have no store.
        """
        keys, values = ([store.planes[name] for store in stores] for name in ("keys", "values"))
        scaling, logits = stores[0].scaling, stores[0].sink_logits
        read = decode_rows(q[: len(stores), :, 0], keys, values, lengths, scaling, logits)
        return with_spare_rows([read[:, :, None]], len(q))


class LatentStore(Store):
    """The latent and the rotated shared key of an MLA layer, side by side in one plane."""

    def __init__(
        self, rows: int, capacity: int, rank: int, rope_dim: int, like: Tensor, scaling: float
    ) -> None:
        self.planes = {"latents": like.new_empty((rows, capacity, rank + rope_dim))}
        self.rank, self.scaling = rank, scaling

    def attend(self, q: Tensor, row: int | None, lengths: Sequence[int]) -> Tensor:
        """Attention of the newest token of every row over everything stored, itself included.

        Args:
            q: Absorbed queries `[B, Q, r + d_r]`.
            lengths: Tokens per row, the new one included.

        Returns:
            `[B, Q, r]`.
        """
        latents = self.planes["latents"]
        if row is not None:
            latents = latents[row : row + 1]
        return latent_decode_attention(q, latents, self.rank, lengths, self.scaling)

    @staticmethod
    def attend_together(stores: Sequence[Any], q: Tensor, lengths: Sequence[int]) -> Tensor:
        """See :meth:`DenseStore.attend_together`; `[B, Q, r]`."""
        latents, own = [store.planes["latents"] for store in stores], stores[0]
        read = latent_decode_rows(q[: len(stores)], latents, own.rank, lengths, own.scaling)
        return with_spare_rows([read], len(q))


class Rows(Store):
    """Stores of one row each, decoded together: every row has memory of its own.

    Takes one new token per row. Where a call has more rows than there are stores, the last are
    spare: nothing is stored for them, and they read zeros.
    """

    def __init__(self, stores: Sequence[Any]) -> None:
        self.stores = stores

    def write(self, row: int | None, starts: Sequence[int], states: dict[str, Tensor]) -> None:
        for b, (store, start) in enumerate(zip(self.stores, starts, strict=True)):
            store.write(None, [start], {name: new[b : b + 1] for name, new in states.items()})

    def attend(self, q: Tensor, row: int | None, lengths: Sequence[int]) -> Tensor:
        """What each row reads of its own store, `[B, ...]`."""
        if isinstance(self.stores[0], DenseStore | LatentStore):
            return self.stores[0].attend_together(self.stores, q, lengths)
        parts = [
            store.attend(q[b : b + 1], None, [n])
            for b, (store, n) in enumerate(zip(self.stores, lengths, strict=True))
        ]
        return with_spare_rows(parts, len(q))

    def lend(self, q: Tensor, step: Any, seen: Seen | None) -> Tensor:
        """What each row of a later layer reads of its own store, `[B, Q, 1, D]`."""
        parts = [
            store.lend(q[b : b + 1], replace(step, starts=[start], lengths=[n]), None)
            for b, (store, start, n) in enumerate(
                zip(self.stores, step.starts, step.lengths, strict=True)
            )
        ]
        return with_spare_rows(parts, len(q))

    def add(self, new: Any, step: Any) -> Tensor:
        """Stores one new token per row, `[B, ...]` in each field; returns what they read."""
        read: Tensor = self.stores[0].add_together(self.stores, new, step)
        return read


def with_spare_rows(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Rows behind each other, and zeros up to so many."""
    spare = rows - sum(map(len, parts))
    if spare:
        parts = [*parts, parts[0].new_zeros((spare, *parts[0].shape[1:]))]
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
