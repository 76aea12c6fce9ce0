"""Feature codes: the few numbers that a layer stores of a token instead of its keys and values.

A code is linear in keys and values, and exact at full width. What distinguishes the methods is
where it sits (keys before or after RoPE) and what it is fitted for; see `calibrate/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.attention import Rope, rotate
from kvtool.errors import PlanError
from kvtool.plan import Plan


class Tokens(NamedTuple):
    """What a layer makes of some tokens.

    Attributes:
        q, k, v: `[B, Q or H, T, D]`, normed but not rotated.
        q_rotated, k_rotated: The same queries and keys after RoPE.
        positions: `[B, T]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Projection:
    """x is stored as `encode (x - mean)` and read as `decode z + mean`.

    With K = H·D, keys or values of all heads are one vector. Per-head codes are block-diagonal.
    Rows are in the order in which they are kept: the first r of them are the code of width r.

    Attributes:
        encode: `[R, K]`.
        decode: `[K, R]`.
        mean: `[K]`.
    """

    encode: Tensor
    decode: Tensor
    mean: Tensor

    @property
    def width(self) -> int:
        """R, numbers per token."""
        return self.encode.shape[0]

    def cut(self, width: int) -> Projection:
        """The code of the first `width` rows."""
        return Projection(self.encode[:width], self.decode[:, :width], self.mean)

    def to(self, like: Tensor) -> Projection:
        """On the device and in the dtype of `like`."""
        return Projection(*(x.to(like).contiguous() for x in (self.encode, self.decode, self.mean)))


@dataclass(frozen=True)
class Fitted:
    """A projection of full width, with what each of its rows is worth.

    Attributes:
        spectrum: `[K]`, what is lost without a row, in the measure of the method.
    """

    projection: Projection
    spectrum: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As a plan holds them, fp32."""
        parts = {**vars(self.projection), "spectrum": self.spectrum}
        return {f"{name}.{part}": tensor.float() for part, tensor in parts.items()}


class Positions:
    """Cos and sin of a model's RoPE at positions 0, 1, ..., computed once for all layers."""

    def __init__(self, rope: Rope, like: Tensor) -> None:
        self.rope, self.like = rope, like
        self.cos = self.sin = like.new_empty(0, 0)

    def tables(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """At positions `first` to `end - 1`, `[n, D]` each."""
        if end > len(self.cos):
            at = torch.arange(max(end, 2 * len(self.cos)), device=self.like.device)
            self.cos, self.sin = (table.to(self.like) for table in self.rope.tables(at))
        return self.cos[first:end], self.sin[first:end]


class Code:
    """A projection of the keys beside one of the values.

    Args:
        rotated: Whether keys are stored after RoPE, where a query reads the code as it is, or
            before, where all keys are rebuilt and rotated whenever they are read.

    Attributes:
        width: Numbers stored per token.
    """

    def __init__(
        self,
        keys: Projection,
        values: Projection,
        heads: int,
        positions: Positions,
        rotated: bool,
    ) -> None:
        self.keys, self.values, self.positions, self.rotated = keys, values, positions, rotated
        self.heads, self.width = heads, keys.width + values.width

    def encode(self, new: Tokens) -> Tensor:
        """What is stored of tokens, `[B, T, width]`."""
        kept = new.k_rotated if self.rotated else new.k
        parts = [
            (x.transpose(1, 2).flatten(2) - projection.mean) @ projection.encode.T
            for x, projection in ((kept, self.keys), (new.v, self.values))
        ]
        return torch.cat(parts, dim=-1)

    def scores(self, new: Tokens, states: Tensor, first: int) -> Tensor:
        """Unscaled scores `[B, Q, T, S]` of queries against stored tokens.

        Args:
            states: `[B, S, width]`, of the tokens at positions `first`, `first + 1`, ...
        """
        z = states[..., : self.keys.width]
        q = new.q_rotated.unflatten(1, (self.heads, -1))  # [B, H, g, T, D]
        if self.rotated:
            decode = self.keys.decode.unflatten(0, (self.heads, -1))  # [H, D, R]
            absorbed = torch.einsum("bhgtd,hdr->bhgtr", q, decode).flatten(1, 2)
            # The mean gives every stored key the same score, but not the keys beside them.
            mean = self.keys.mean.view(1, self.heads, 1, 1, -1)
            constant = (q * mean).sum(dim=-1, keepdim=True).flatten(1, 2)
            scored: Tensor = _products(absorbed, z) + constant
            return scored
        keys = z @ self.keys.decode.T + self.keys.mean
        keys = keys.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, S, D]
        cos, sin = self.positions.tables(first, first + keys.shape[2])
        rebuilt: Tensor = torch.matmul(q, rotate(keys, cos, sin)[:, :, None].mT)
        return rebuilt.flatten(1, 2)

    def read(self, weights: Tensor, states: Tensor) -> Tensor:
        """Values summed with `weights [B, Q, T, S]`, which need not sum to 1: `[B, Q, T, D]`."""
        z = states[..., self.keys.width :]
        mixed = _sums(weights, z).unflatten(1, (self.heads, -1))
        decode = self.values.decode.unflatten(0, (self.heads, -1))  # [H, D, R]
        read = torch.einsum("bhgtr,hdr->bhgtd", mixed, decode)
        mass = weights.sum(dim=-1, keepdim=True).unflatten(1, (self.heads, -1))
        mean = self.values.mean.view(1, self.heads, 1, 1, -1)
        result: Tensor = (read + mass * mean).flatten(1, 2)
        return result


def _products(queries: Tensor, states: Tensor) -> Tensor:
    """Scores `[B, Q, T, S]` of `[B, Q, T, W]` against states `[B, S, W]` that all heads share."""
    # Tokens are the rows: on the CPU this order reads the states at memory speed.
    scores = torch.matmul(states, queries.flatten(1, 2).mT).mT
    split: Tensor = scores.unflatten(1, queries.shape[1:3])
    return split


def _sums(weights: Tensor, states: Tensor) -> Tensor:
    """`[B, Q, T, W]`: states `[B, S, W]` summed with `weights [B, Q, T, S]`."""
    sums = torch.matmul(weights.flatten(1, 2), states)
    split: Tensor = sums.unflatten(1, weights.shape[1:3])
    return split


def code_of(plan: Plan, index: int, positions: Positions) -> Code:
    """The code that a plan gives a layer, on the device and in the dtype of the positions."""
    kept = plan.layers[index].code
    assert kept is not None
    start = f"layers.{index}."
    parts = {n.removeprefix(start): t for n, t in plan.tensors.items() if n.startswith(start)}

    def projection(name: str, width: int) -> Projection:
        full = Projection(*(parts[f"{name}.{part}"] for part in ("encode", "decode", "mean")))
        own = full.cut(width).to(positions.like)
        if not all(bool(x.isfinite().all()) for x in (own.encode, own.decode, own.mean)):
            raise PlanError(f"layer {index}: the code of its {name} is too large for this dtype")
        return own

    keys, values = projection("keys", kept.keys), projection("values", kept.values)
    return Code(keys, values, plan.base.kv_heads, positions, kept.kind == "rotated")
