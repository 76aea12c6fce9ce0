"""Few bits for the latent of an MLA layer, which serves as keys and as values at once.

What a layer keeps of a token, its latent c and its rotated shared key, is packed number by number,
each with as many bits as what it is worth asks for. As with keys of heads, N tokens share a scale
and a minimum of each number.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from kvtool.bits import Blocks
from kvtool.errors import PlanError
from kvtool.kernels.quantise import BITS, packed_bytes

_SCALES = 4  # bytes of a scale and a minimum


@dataclass(frozen=True)
class LatentPlan(Blocks):
    """How an MLA layer packs its latents.

    Attributes:
        rank, rope_dim: r and d_r, the sizes of the latent and of the shared key behind it.
        bits: `[r + d_r]`, of each number.
        group, sink, window: See :class:`~kvtool.bits.Blocks`.

    Raises:
        PlanError: The numbers are out of range.
    """

    rank: int
    rope_dim: int
    bits: tuple[int, ...]
    group: int = 64
    sink: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        self.check_blocks()
        if self.rank < 1 or len(self.bits) != self.width:
            raise PlanError(
                f"{len(self.bits)} widths for a latent of {self.rank} and a shared key of "
                f"{self.rope_dim} numbers"
            )
        if wrong := set(self.bits) - set(BITS):
            raise PlanError(f"latents have numbers of 2, 3, 4 or 8 bits, not of {min(wrong)}")

    @property
    def width(self) -> int:
        """r + d_r."""
        return self.rank + self.rope_dim

    @property
    def packed(self) -> bool:
        """Whether it has few bits."""
        return True

    @cached_property
    def order(self) -> list[int]:
        """How numbers are stored: those of the latent, then those of the shared key, by width."""
        return sorted(range(self.width), key=lambda at: (at >= self.rank, self.bits[at]))

    @cached_property
    def parts(self) -> dict[int, list[int]]:
        """By width that there is, where in that order the numbers lie that have it."""
        stored = [self.bits[at] for at in self.order]
        return {
            width: [at for at, bits in enumerate(stored) if bits == width]
            for width in sorted(set(stored))
        }

    def block_bytes(self) -> int:
        """Of N tokens, with scales and minima."""
        return sum(packed_bytes(self.group, bits) + _SCALES for bits in self.bits)

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """Of a sequence without a plan."""
        return itemsize * self.width * tokens

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Of a sequence; the room for exact tokens counts whole even if unfilled."""
        exact = itemsize * self.width * (self.sink + self.ring)
        return self.blocks(tokens) * self.block_bytes() + exact

    def token_bytes(self, itemsize: int) -> Fraction:
        """What a further token costs."""
        return Fraction(self.block_bytes(), self.group)
