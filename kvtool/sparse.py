"""Heads that keep every token and read few of them (Double Sparsity, arXiv 2408.07092).

Which tokens a query reads is decided by r label channels of their keys, chosen offline. It saves
reading, not memory: everything is kept, and labels are not kept twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.errors import PlanError

Channels = tuple[tuple[int, ...], ...]
"""`[H][r]`, of each KV head."""


@dataclass(frozen=True)
class SparseReading:
    """How the heads of a layer that keep every token are read.

    Attributes:
        channels: The label channels of each KV head, the best first.
        tokens: k, that a query reads, itself included; all if there are not more.
        sink, window: The first of them and the last, which every query reads.

    Raises:
        PlanError: The numbers are out of range.
    """

    channels: Channels
    tokens: int
    sink: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        if len({len(row) for row in self.channels}) != 1 or not self.channels[0]:
            raise PlanError("every KV head has as many label channels as the others, at least one")
        if any(len(set(row)) < len(row) for row in self.channels):
            raise PlanError("a label channel is named twice")
        if self.sink < 0 or self.window < 1:
            raise PlanError(
                f"{self.sink} sinks and a window of {self.window} tokens are impossible: a query "
                "reads at least its own token"
            )
        if self.tokens < self.sink + self.window:
            raise PlanError(
                f"{self.tokens} tokens are too few to read: the first {self.sink} and the last "
                f"{self.window} are always among them"
            )

    @property
    def labels(self) -> int:
        """r."""
        return len(self.channels[0])

    def orders(self, head_dim: int) -> list[list[int]]:
        """`[H][D]`, the channels of each KV head, those of labels first."""
        return [
            [*row, *(channel for channel in range(head_dim) if channel not in row)]
            for row in self.channels
        ]

    def read_numbers(self, tokens: int, head_dim: int) -> int:
        """Of one KV head behind so many tokens, by one query: labels of all, k keys and values."""
        if tokens <= self.tokens:
            return 2 * head_dim * tokens
        return self.labels * tokens + 2 * head_dim * self.tokens
