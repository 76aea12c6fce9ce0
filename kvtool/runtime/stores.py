"""What the runtime keeps of the past, layer by layer.

A store holds the planes of one layer for all sequences (rows). Rows are independent: each has its
own length, and what lies past it is never read. Capacity is allocated up front and grows by
doubling, so a decode step neither allocates nor copies the past.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.kernels.decode_attention import decode_attention


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
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return next(iter(self.planes.values())).shape[-2]

    def reserve(self, lengths: Sequence[int]) -> None:
        """Makes sure that row b has room for `lengths[b]` tokens."""
        if max(lengths) <= self.capacity:
            return
        capacity = self.grown(max(lengths))
        for name, plane in self.planes.items():
            larger = plane.new_empty((*plane.shape[:-2], capacity, plane.shape[-1]))
            larger[..., : plane.shape[-2], :] = plane
            self.planes[name] = larger

    def grown(self, length: int) -> int:
        """The next capacity when `length` tokens do not fit: doubling copies each token once."""
        return max(length, 2 * self.capacity)

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        """Whether a row of `stored` tokens still has what its first `length` tokens had left."""
        return True

    def join(self, before: Store) -> None:
        """Told which store the layer in front of this one has, in the same cache."""

    def snapshot(self, row: int) -> list[Tensor]:
        """Copies of what later tokens of the row overwrite."""
        return []

    def restore(self, row: int, saved: list[Tensor]) -> None:
        """Puts back what :meth:`snapshot` copied."""

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


class DenseStore(Store):
    """All rotated keys and all values of a GQA layer."""

    def __init__(self, rows: int, heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        shape = (rows, heads, capacity, head_dim)
        self.planes = {"keys": like.new_empty(shape), "values": like.new_empty(shape)}

    def attend(
        self,
        q: Tensor,
        row: int | None,
        lengths: Sequence[int],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Attention of the newest tokens over everything stored, themselves included.

        Args:
            q: `[B, Q, T, D]`, rotated; T > 1 only with a single `row`.
            lengths: Tokens per row, the new ones included.
            window: Sliding window of the layer, if it has one.

        Returns:
            `[B, Q, T, D]`.
        """
        keys, values = self.planes["keys"], self.planes["values"]
        if row is not None:
            keys, values = keys[row : row + 1], values[row : row + 1]
        if q.shape[2] > 1 or window is not None:
            parts = [
                causal_attention(
                    q[b : b + 1], keys[b : b + 1, :, :n], values[b : b + 1, :, :n], scaling, window
                )
                for b, n in enumerate(lengths)
            ]
            return torch.cat(parts)
        return decode_attention(q[:, :, 0], keys, values, lengths, scaling)[:, :, None]


class LatentStore(Store):
    """The latent and the rotated shared key of an MLA layer, side by side in one plane."""

    def __init__(self, rows: int, capacity: int, rank: int, rope_dim: int, like: Tensor) -> None:
        self.planes = {"latents": like.new_empty((rows, capacity, rank + rope_dim))}
