"""What layers keep of keys and values that several of them read."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvtool.errors import PlanError
from kvtool.layout import AttentionLayout


@dataclass(frozen=True)
class SharedPlan:
    """All tokens of all heads of a layer that sees the whole past: later layers read them, too. Or
    nothing, of one that reads an earlier layer. A plan may have the heads pack what they keep, but
    not drop any of it.

    Attributes:
        heads: H, and 0 of a layer that reads another.
        head_dim: D.

    Raises:
        PlanError: The numbers are out of range.
    """

    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.heads < 0 or self.head_dim < 1:
            raise PlanError(f"{self} of a shared layer are impossible")

    def __str__(self) -> str:
        return f"{self.heads} heads x {self.head_dim}"

    @classmethod
    def of(cls, layout: AttentionLayout) -> SharedPlan | None:
        """Of a layer; None of one that shares nothing, or whose window says what it keeps."""
        if layout.reads is not None:
            return cls(0, layout.head_dim)
        if layout.read and layout.sliding_window is None:
            return cls(layout.kv_heads, layout.head_dim)
        return None

    @property
    def packed(self) -> bool:
        """Whether it has few bits: the plan of the layer says so."""
        return False

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of a sequence of so many tokens."""
        return 2 * itemsize * self.heads * self.head_dim * tokens

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """The same without a plan."""
        return self.cache_bytes(tokens, itemsize)

    def token_bytes(self, itemsize: int) -> Fraction:
        """Bytes that every further token costs."""
        return Fraction(self.cache_bytes(1, itemsize))
