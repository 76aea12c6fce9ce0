"""What a layer with a sliding window keeps: as much as the model itself sees."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvtool.errors import PlanError
from kvtool.layout import AttentionLayout


@dataclass(frozen=True)
class WindowPlan:
    """The last tokens of all heads of a layer, the current one included.

    Attributes:
        heads, head_dim: H and D.
        window: Tokens that the model lets the layer see.

    Raises:
        PlanError: The numbers are out of range.
    """

    heads: int
    head_dim: int
    window: int

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.window) < 1:
            raise PlanError("a sliding window without any number is impossible")

    def __str__(self) -> str:
        return f"{self.window} tokens of {self.heads} heads x {self.head_dim}"

    @classmethod
    def of(cls, layout: AttentionLayout) -> WindowPlan | None:
        """Of a layer; None if it has no such window, or keeps nothing of its own."""
        if layout.sliding_window is None or layout.reads is not None:
            return None
        return cls(layout.kv_heads, layout.head_dim, layout.sliding_window)

    @property
    def packed(self) -> bool:
        """Whether it has few bits: it has not."""
        return False

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of a sequence of so many tokens."""
        return 2 * itemsize * self.heads * self.head_dim * min(tokens, self.window)

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """The same without a plan."""
        return self.cache_bytes(tokens, itemsize)

    def token_bytes(self, itemsize: int) -> Fraction:
        """Bytes that every further token costs: the window rolls."""
        return Fraction(0)
