"""Few bits per number: how the heads of a layer that keep every token pack keys and values.

The first `sink` tokens and the last ones are exact. All between them lies in blocks of N tokens,
each packed once, when `window` tokens have come behind it, and never again. The tokens of a block
may fall into two tiers, by the attention that they got until then: the upper one has more bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from kvtool.codes import CodeKind
from kvtool.errors import PlanError, UsageError
from kvtool.kernels.hadamard import turn
from kvtool.kernels.quantise import BITS, fake_quantise, groups_of, packed_bytes
from kvtool.kernels.sparse_values import compress, decompress, sparse_bytes
from kvtool.rope import rotate

Axis = Literal["channel", "token"]
"""Which keys share a scale: a channel in N tokens (KIVI, arXiv 2402.02750), or N channels of a
token. Values always share it within a token."""
Turned = Literal["none", "values", "both"]
"""What is stored behind a Hadamard transform of each head, which spreads single large channels."""
GROUPS = (16, 32, 64, 128)
"""Sizes of a block."""
PROBED = 8
"""One query in so many is a probe, whose attention says which tokens of a block matter."""

Factors = tuple[tuple[float, ...], ...]
"""`[H][D]`, one per channel of each KV head."""


@dataclass(frozen=True)
class Tier:
    """Some tokens of each block, and the bits of their numbers."""

    tokens: int
    keys: int
    values: int


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
            raise PlanError(f"numbers share a scale by 16, 32, 64 or 128, not by {self.group}")
        if self.sink < 0 or self.window < 1:
            raise PlanError(
                f"{self.sink} exact sinks and a window of {self.window} tokens are impossible: the "
                "window holds at least the current token"
            )

    def check_windows(self, tokens: int) -> None:
        """Raises UsageError if a text of so many tokens has no block."""
        if tokens < self.sink + self.group:
            raise UsageError(
                f"a sink of {self.sink} tokens leaves no block of {self.group} in the windows of "
                f"{tokens} tokens that are measured"
            )

    @property
    def ring(self) -> int:
        """Tokens that there is exact room for behind the sinks."""
        return self.window + self.group

    def blocks(self, tokens: int) -> int:
        """Blocks that are packed of a sequence of so many tokens."""
        return max(0, tokens - self.sink - self.window) // self.group

    def whole_blocks(self, tokens: int) -> slice:
        """The tokens of a text that lie in blocks, were it to go on."""
        count = (tokens - self.sink) // self.group
        return slice(self.sink, self.sink + self.group * count)

    def packed_at(self, block: int) -> int:
        """Position of the token with which a block is packed, before that token is read."""
        return self.sink + self.window + (block + 1) * self.group - 1


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
        rest: The tokens of each block, and their bits, that are not worth `keys` and `values` bits
            to a KV head; None if all are.
        key_balance, value_balance: What keys and values are divided by when they are packed, and
            multiplied by when they are read: large channels do not coarsen the codes of small ones.
        rank: r, of two factors per block and head, `[r, N]` and `[r, D]` in fp16, that hold what
            codes left out of its keys; and of two of its values.
        kept: c, of the numbers of a value those of largest magnitude, which are stored as fp16
            (`values` is 16) beside a bitmap, and all others read as 0. None: values have codes.

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
    rest: Tier | None = None
    key_balance: Factors | None = None
    value_balance: Factors | None = None
    rank: int = 0
    kept: int | None = None

    def __post_init__(self) -> None:
        for tier in self.tiers:
            for part, bits in (("keys", tier.keys), ("values", tier.values)):
                if bits not in BITS and (part == "keys" or self.kept is None):
                    raise PlanError(f"{part} have numbers of 2, 3, 4 or 8 bits, not of {bits}")
        self.check_blocks()
        if self.rest is not None and not 0 < self.rest.tokens < self.group:
            raise PlanError(
                f"{self.rest.tokens} tokens of a block of {self.group} have fewer bits: it must be "
                "some and not all"
            )
        if self.rest is not None and self.kind == "unrotated":
            raise PlanError("tokens of two tiers lie out of order, so their keys cannot be rotated")
        if not 0 <= self.rank <= self.group:
            raise PlanError(f"a block of {self.group} tokens has no factors of rank {self.rank}")
        if self.rank and self.rest is not None:
            raise PlanError("blocks with factors of what codes left out have one tier of tokens")
        if self.kept is not None and (self.kept < 1 or self.values != 16):
            raise PlanError(
                f"{self.kept} numbers of {self.values} bits are not what is kept of a value: it is "
                "some, of 16"
            )
        if self.kept is not None and (self.rest or self.rank or self.value_clip != 1):
            raise PlanError(
                "values of which the largest numbers are kept have no tiers, factors or clipped "
                "codes"
            )
        for row in (*(self.key_balance or ()), *(self.value_balance or ())):
            if not all(0 < x < math.inf for x in row):
                raise PlanError("what channels are divided by is above 0 and finite")
        if not 0 < min(self.key_clip, self.value_clip) <= max(self.key_clip, self.value_clip) <= 1:
            raise PlanError("codes are spread over a share of a range above 0, up to 1")
        for order in self.order or ():
            if sorted(order) != list(range(len(order))):
                raise PlanError("an order of channels names each of them once")

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Of the tokens of a block, those with more attention first."""
        if self.rest is None:
            return (Tier(self.group, self.keys, self.values),)
        return Tier(self.group - self.rest.tokens, self.keys, self.values), self.rest

    @property
    def probes(self) -> int:
        """Queries, the last before a block is packed, that say which of its tokens matter."""
        return 0 if self.rest is None else self.group // PROBED

    def block_bytes(self, head_dim: int) -> int:
        """Of one head, with scales and minima."""
        return self.key_bytes(head_dim) + self.value_bytes(head_dim)

    def key_bytes(self, head_dim: int) -> int:
        """The same of the keys alone."""
        if self.axis == "token":
            codes = sum(self._per_token(head_dim, x.tokens, x.keys) for x in self.tiers)
        else:
            codes = sum(head_dim * (packed_bytes(x.tokens, x.keys) + 4) for x in self.tiers)
        return codes + self._factors(head_dim)

    def value_bytes(self, head_dim: int) -> int:
        """The same of the values alone."""
        if self.kept is not None:
            return self.group * sparse_bytes(head_dim, self.kept)
        codes = sum(self._per_token(head_dim, x.tokens, x.values) for x in self.tiers)
        return codes + self._factors(head_dim)

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        """Of one head of a sequence; the room for exact tokens counts whole even if unfilled.

        With two tiers, every token of the next block has its attention so far, 4 bytes.
        """
        exact = 2 * itemsize * head_dim * (self.sink + self.ring)
        exact += 0 if self.rest is None else 4 * self.group
        return self.blocks(tokens) * self.block_bytes(head_dim) + exact

    def token_bytes(self, head_dim: int) -> Fraction:
        """What a further token costs a head."""
        return Fraction(self.block_bytes(head_dim), self.group)

    def _per_token(self, head_dim: int, tokens: int, bits: int) -> int:
        return tokens * (packed_bytes(head_dim, bits) + 4 * groups_of(head_dim, self.group))

    def _factors(self, head_dim: int) -> int:
        return 2 * self.rank * (self.group + head_dim)


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
    if bits.kept is None:
        x = fake_quantise(x, bits.values, bits.group, bits.value_clip)
    else:
        x = decompress(*compress(x, bits.kept), x.shape[-1])
    return turn(x) if turned else x
