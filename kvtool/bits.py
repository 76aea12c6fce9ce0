"""Few bits per number: how the heads of a layer that keep every token pack keys and values.

The first `sink` tokens and the last ones are exact. All between them lies in blocks of N tokens,
each packed once, when `window` tokens have come behind it, and never again.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from kvtool.attention import rotate
from kvtool.codes import CodeKind
from kvtool.errors import PlanError
from kvtool.kernels.hadamard import WIDEST, hadamard
from kvtool.kernels.quantise import BITS, fake_quantise, groups_of, packed_bytes

Axis = Literal["channel", "token"]
"""Which keys share a scale: a channel in N tokens (KIVI, arXiv 2402.02750), or N channels of a
token. Values always share it within a token."""
Turned = Literal["none", "values", "both"]
"""What is stored behind a Hadamard transform of each head, which spreads single large channels."""
GROUPS = (16, 32, 64)
"""Sizes of a block: planes are allocated in whole pages of 64 tokens."""


class Blocks:
    """Which tokens of a sequence are packed.

    Attributes:
        group: N, the tokens of a block.
        sink, window: Tokens that are exact: the first, and at least so many of the last, the
            current one included.
    """

    group: int
    sink: int
    window: int

    def check_blocks(self) -> None:
        """Raises PlanError if the numbers are out of range."""
        if self.group not in GROUPS:
            raise PlanError(f"numbers share a scale by 16, 32 or 64, not by {self.group}")
        if self.sink < 0 or self.window < 1:
            raise PlanError(
                f"{self.sink} exact sinks and a window of {self.window} tokens are impossible: the "
                "window holds at least the current token"
            )

    @property
    def ring(self) -> int:
        """Tokens that there is exact room for behind the sinks."""
        return self.window + self.group

    def blocks(self, tokens: int) -> int:
        """Blocks that are packed of a sequence of so many tokens."""
        return max(0, tokens - self.sink - self.window) // self.group


@dataclass(frozen=True)
class Bits(Blocks):
    """How many bits the numbers of a layer have, and what shares a scale.

    Attributes:
        keys, values: Bits of a number.
        group: N, the tokens of a block: of one scale where it is per channel; and the channels of
            one scale where it is per token.
        axis: Of the keys.
        kind: Whether keys are stored after RoPE, or before it: then they are rebuilt and rotated
            whenever they are read, where otherwise the query reads them as they are.
        hadamard: What is stored transformed.
        order: `[H][D]`, in which order the (transformed) channels of each KV head's keys lie.
        key_clip, value_clip: Share of a group's range that codes are spread over.
        sink, window: Tokens that are exact: the first, and at least so many of the last, the
            current one included.

    Raises:
        PlanError: The numbers are out of range.
    """

    keys: int
    values: int
    group: int = 64
    axis: Axis = "channel"
    kind: CodeKind = "rotated"
    hadamard: Turned = "none"
    order: tuple[tuple[int, ...], ...] | None = None
    key_clip: float = 1.0
    value_clip: float = 1.0
    sink: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        for part, bits in (("keys", self.keys), ("values", self.values)):
            if bits not in BITS:
                raise PlanError(f"{part} have numbers of 2, 3, 4 or 8 bits, not of {bits}")
        self.check_blocks()
        if not 0 < min(self.key_clip, self.value_clip) <= max(self.key_clip, self.value_clip) <= 1:
            raise PlanError("codes are spread over a share of a range above 0, up to 1")
        for order in self.order or ():
            if sorted(order) != list(range(len(order))):
                raise PlanError("an order of channels names each of them once")

    def block_bytes(self, head_dim: int) -> int:
        """Of one head, with scales and minima."""
        return self.key_bytes(head_dim) + self.value_bytes(head_dim)

    def key_bytes(self, head_dim: int) -> int:
        """The same of the keys alone."""
        if self.axis == "channel":
            return head_dim * (packed_bytes(self.group, self.keys) + 4)
        return self._per_token(head_dim, self.keys)

    def value_bytes(self, head_dim: int) -> int:
        """The same of the values alone."""
        return self._per_token(head_dim, self.values)

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        """Of one head of a sequence; the room for exact tokens counts whole even if unfilled."""
        exact = 2 * itemsize * head_dim * (self.sink + self.ring)
        return self.blocks(tokens) * self.block_bytes(head_dim) + exact

    def token_bytes(self, head_dim: int) -> Fraction:
        """What a further token costs a head."""
        return Fraction(self.block_bytes(head_dim), self.group)

    def _per_token(self, head_dim: int, bits: int) -> int:
        return self.group * (packed_bytes(head_dim, bits) + 4 * groups_of(head_dim, self.group))


def turn(x: Tensor) -> Tensor:
    """The Hadamard transform of the channels `[..., D]`, in the largest blocks that D has."""
    width = min(x.shape[-1] & -x.shape[-1], WIDEST)
    return hadamard(x.unflatten(-1, (-1, width))).flatten(-2)


def to_stored(x: Tensor, bits: Bits, order: Tensor | None) -> Tensor:
    """Keys `[H, n, D]`, or queries that read them, as keys are stored.

    Args:
        order: `[H, D]`, of these heads.
    """
    if bits.hadamard == "both":
        x = turn(x)
    return x if order is None else x.gather(-1, order[:, None].expand(x.shape))


def from_stored(x: Tensor, bits: Bits, order: Tensor | None) -> Tensor:
    """The inverse of :func:`to_stored`."""
    if order is not None:
        x = torch.empty_like(x).scatter_(-1, order[:, None].expand(x.shape), x)
    return turn(x) if bits.hadamard == "both" else x


def read_keys(
    keys: Tensor, bits: Bits, order: Tensor | None, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """What whole blocks of keys are read as.

    Args:
        keys: `[H, n · N, D]` after RoPE, fp32.
        cos, sin: `[n · N, D]`, of their positions.
        scale: The factor on cos and sin.
    """
    if bits.kind == "unrotated":
        keys = rotate(keys, cos, -sin) / scale**2
    x = to_stored(keys, bits, order)
    if bits.axis == "channel":
        blocks = x.unflatten(1, (-1, bits.group)).mT
        x = fake_quantise(blocks, bits.keys, bits.group, bits.key_clip).mT.flatten(1, 2)
    else:
        x = fake_quantise(x, bits.keys, bits.group, bits.key_clip)
    x = from_stored(x, bits, order)
    return rotate(x, cos, sin) if bits.kind == "unrotated" else x


def read_values(values: Tensor, bits: Bits) -> Tensor:
    """What values `[H, n, D]` are read as."""
    turned = bits.hadamard != "none"
    x = turn(values) if turned else values
    x = fake_quantise(x, bits.values, bits.group, bits.value_clip)
    return turn(x) if turned else x
