"""What one layer keeps of the past: all tokens of a head or some, as they are or in few bits; or,
without KV heads, a state or a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvtool.bits import Bits
from kvtool.errors import PlanError
from kvtool.fp8 import Scales
from kvtool.latent_bits import LatentPlan
from kvtool.sharing import SharedPlan
from kvtool.sparse import SparseReading
from kvtool.states import StatePlan
from kvtool.windows import WindowPlan


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Layers that mean the same are equal: without a streaming head `sink` and `window` become 0, and
    a `budget` without any number becomes `None`.

    Attributes:
        streaming: Per KV head, whether it keeps only the first `sink` tokens and the last `window`.
        sink, window: In tokens; the window counts the current one. Both 0 where no head streams.
        budget: Tokens of the prompt that each KV head keeps after it, chosen by the plan's policy;
            `None` for a head that keeps everything, and for a streaming one.
        bits: How the heads that keep everything pack it; None for the dtype of the model.
        kept: What a layer without KV heads keeps, or one whose heads have a sliding window anyway
            or share their past with other layers; `streaming` is empty then. Heads whose past other
            layers read may have few bits.
        sparse: How few tokens a query reads of the heads that keep everything; None for all.
        scales: Of the heads that keep everything in e4m3, a byte per number; None for the dtype of
            the model.

    Raises:
        PlanError: The numbers are out of range or do not belong together.
    """

    streaming: tuple[bool, ...]
    sink: int = 0
    window: int = 0
    budget: tuple[int | None, ...] | None = None
    bits: Bits | None = None
    kept: StatePlan | LatentPlan | WindowPlan | SharedPlan | None = None
    sparse: SparseReading | None = None
    scales: Scales | None = None

    def __post_init__(self) -> None:
        if self.kept is not None and (self.streaming or (self.packed and not self.heads)):
            raise PlanError(
                "a layer that keeps a state, a latent, a sliding window or a shared past has no KV "
                "heads to plan; only those that others read can be packed"
            )
        if self.sparse is not None:
            self._check_sparse()
        if self.scales is not None and self.bits is not None:
            raise PlanError("heads in fp8 have no other bits")
        if self.scales is not None and len(self.scales.keys) != self.heads:
            raise PlanError(f"scales of {len(self.scales.keys)} heads for {self.heads}")
        for what, rows in by_head(self.bits):
            if len(rows) != self.heads:
                raise PlanError(f"{len(rows)} {what} of channels for {self.heads} heads")
        if not any(self.streaming):
            object.__setattr__(self, "sink", 0)
            object.__setattr__(self, "window", 0)
        elif self.sink < 0 or self.window < 1:
            raise PlanError(
                f"a head that streams with {self.sink} sinks and a window of {self.window} tokens "
                "is impossible: the window holds at least the current token"
            )
        if self.budget is None:
            return
        if len(self.budget) != len(self.streaming):
            raise PlanError(f"{len(self.budget)} budgets for {len(self.streaming)} heads")
        for head, (streams, budget) in enumerate(zip(self.streaming, self.budget, strict=True)):
            if budget is not None and streams:
                raise PlanError(f"head {head} streams, so it cannot have a token budget too")
            if budget is not None and budget < 1:
                raise PlanError(f"head {head} has a budget of {budget} tokens; it must keep one")
        if all(budget is None for budget in self.budget):
            object.__setattr__(self, "budget", None)

    def _check_sparse(self) -> None:
        assert self.sparse is not None
        if len(self.sparse.channels) != len(self.streaming):
            raise PlanError(
                f"label channels of {len(self.sparse.channels)} heads for {len(self.streaming)}"
            )
        if self.packed or any(budget is not None for budget in self.budgets):
            raise PlanError("heads with few bits or a token budget are not read sparsely")

    @property
    def heads(self) -> int:
        """KV heads that see the whole past, and store it here."""
        return self.kept.heads if isinstance(self.kept, SharedPlan) else len(self.streaming)

    @property
    def packed(self) -> bool:
        """Whether the heads that keep everything take the same bytes in any dtype."""
        return self.bits is not None or self.scales is not None

    @property
    def plain(self) -> bool:
        """Whether every head keeps everything as it is, and reads it."""
        some = any(self.streaming) or self.sparse is not None or self.budget is not None
        return not (some or self.packed or (self.kept is not None and self.kept.packed))

    @property
    def exact(self) -> int:
        """The first and last tokens of a sequence that there is exact room for: in the ring of
        heads that stream, or beside what is packed.
        """
        blocks = self.kept if isinstance(self.kept, LatentPlan) else self.bits
        room = 0 if blocks is None else blocks.sink + blocks.ring
        return max(self.sink + self.window, room, 0 if self.scales is None else self.scales.window)

    @property
    def full_heads(self) -> list[int]:
        """The heads that keep everything."""
        if self.kept is not None:
            return list(range(self.heads))
        pairs = enumerate(zip(self.streaming, self.budgets, strict=True))
        return [head for head, (streams, budget) in pairs if not streams and budget is None]

    @property
    def budgets(self) -> tuple[int | None, ...]:
        """One entry per head, also where `budget` is `None`."""
        return self.budget or (None,) * len(self.streaming)

    def tokens(self, prompt: int) -> int:
        """Tokens that all heads together keep of a prompt; a ring counts whole even if unfilled."""
        kept = 0
        for streams, budget in zip(self.streaming, self.budgets, strict=True):
            if streams:
                kept += self.sink + self.window
            else:
                kept += prompt if budget is None else min(prompt, budget)
        return kept

    def cache_bytes(self, prompt: int, head_dim: int, itemsize: int) -> int:
        """Bytes that the layer takes after a prompt, see :meth:`Plan.cache_bytes`."""
        if self.kept is not None:
            if not self.packed:
                return self.kept.cache_bytes(prompt, itemsize)
            return self.heads * self._packed_bytes(prompt, head_dim, itemsize)
        exact, packed = self.tokens(prompt), 0
        if self.packed:
            exact -= len(self.full_heads) * prompt
            packed = len(self.full_heads) * self._packed_bytes(prompt, head_dim, itemsize)
        return 2 * itemsize * head_dim * exact + packed

    def _packed_bytes(self, prompt: int, head_dim: int, itemsize: int) -> int:
        how = self.scales if self.bits is None else self.bits
        assert how is not None
        return how.cache_bytes(prompt, head_dim, itemsize)

    def unread_bytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        """Bytes of what is kept of so many tokens that a query does not read."""
        if self.sparse is None:
            return 0
        numbers = 2 * head_dim * tokens - self.sparse.read_numbers(tokens, head_dim)
        return itemsize * numbers * len(self.full_heads)

    def native_bytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        """Bytes that the layer takes without a plan."""
        if self.kept is not None:
            return self.kept.native_bytes(tokens, itemsize)
        return 2 * itemsize * head_dim * len(self.streaming) * tokens

    def token_bytes(self, head_dim: int, itemsize: int) -> Fraction:
        """Bytes that every further token costs the layer: streaming heads overwrite."""
        if self.kept is not None and not self.packed:
            return self.kept.token_bytes(itemsize)
        exact, packed = self.heads - sum(self.streaming), Fraction(0)
        if self.packed:
            exact -= len(self.full_heads)
            each = Fraction(2 * head_dim) if self.bits is None else self.bits.token_bytes(head_dim)
            packed = len(self.full_heads) * each
        return 2 * itemsize * head_dim * exact + packed


def by_head(bits: Bits | None) -> list[tuple[str, Sequence[Sequence[float]]]]:
    """What bits say of every channel of every head, and its name."""
    if bits is None:
        return []
    named = (
        ("orders", bits.order),
        ("balances", bits.key_balance),
        ("balances", bits.value_balance),
    )
    return [(what, rows) for what, rows in named if rows is not None]
