"""What a layer with a state keeps, and few bits for that of Mamba-2.

A state is written at every token, and what is rounded stays rounded: errors add up for as long as a
head remembers, and what decays by less than half a step per token never decays at all. So it is not
packed at every token, but when a chunk of C tokens is complete, counted from the start of the text.
Until then what the chunk writes (x, B and Δ of its tokens) is held as it is, in fewer bytes than
the state. Whatever the calls were that brought the tokens, the same is rounded after as many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from kvtool.errors import PlanError
from kvtool.kernels.quantise import packed_bytes
from kvtool.mamba import MixerShape, Rule

CHUNKS = {4: 16, 8: 8}
"""By bits, after how many tokens a state is packed. On `smollm2` with 8 layers of Mamba-2, KL to
exact states behind 4096 tokens: 8 bits 0.0054 and 0.00012 after 1 and 8 tokens; 4 bits 0.012 and
0.0074 after 8 and 16."""
_SCALE, _FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class StatePlan:
    """How a layer with a mixer keeps its state [H, P, N].

    Attributes:
        heads, head_dim, groups, state, taps: H, P, G, N and K, see
            :class:`~kvtool.mamba.MixerShape`.
        bits: Of a number of the state, one scale for the N of a row; None for fp32.
        chunk: C, tokens that are taken up before the state is packed again.
        taught, least: Behind the first `taught` tokens of a text, a head takes up only those with
            Δ of at least `least[h]` (`calibrate/receptive_field.py`); None for all.
        rule: Of the mixer. States of Gated DeltaNet are fp32.

    Raises:
        PlanError: The numbers are out of range.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    bits: int | None = None
    chunk: int = 8
    taught: int | None = None
    least: tuple[float, ...] | None = None
    rule: Rule = "mamba2"

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.groups, self.state, self.taps) < 1:
            raise PlanError("a state without any number is impossible")
        if self.heads % self.groups:
            raise PlanError(f"{self.groups} groups of a mixer do not divide its {self.heads} heads")
        if self.bits is not None and self.bits not in CHUNKS:
            raise PlanError(f"states have numbers of 4 or 8 bits, not of {self.bits}")
        if self.rule == "delta" and (self.bits, self.taught) != (None, None):
            raise PlanError("states of Gated DeltaNet are kept as they are, and take up all tokens")
        if self.chunk < 1:
            raise PlanError(f"a state cannot be packed every {self.chunk} tokens")
        if (self.taught is None) != (self.least is None):
            raise PlanError("thresholds and the length from which they hold come together")
        if self.least is not None and len(self.least) != self.heads:
            raise PlanError(f"{len(self.least)} thresholds for {self.heads} heads of a mixer")

    @classmethod
    def of(cls, shape: MixerShape, bits: int | None = None) -> StatePlan:
        """The plan of a mixer."""
        chunk = CHUNKS[bits or 8]
        sizes = shape.heads, shape.head_dim, shape.groups, shape.state, shape.taps
        return cls(*sizes, bits, chunk, rule=shape.rule)

    def fits(self, shape: MixerShape) -> bool:
        """Whether the mixer has such a state."""
        plain = StatePlan.of(shape)
        return plain == replace(self, bits=None, chunk=plain.chunk, taught=None, least=None)

    @property
    def packed(self) -> bool:
        """Whether it has few bits."""
        return self.bits is not None

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """Of a sequence of any length without a plan: the state is fp32 then."""
        values = self.heads * self.head_dim * self.state
        convolved = self.heads * self.head_dim + 2 * self.groups * self.state
        return _FLOAT * values + itemsize * convolved * (self.taps - 1)

    def token_bytes(self, itemsize: int) -> Fraction:
        """What a further token costs."""
        return Fraction(0)

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Of a sequence of any length; the room for a chunk counts whole even if unfilled.

        Args:
            itemsize: Bytes of a number of the model's dtype, which x and B have; Δ is fp32.
        """
        native, rows = self.native_bytes(tokens, itemsize), self.heads * self.head_dim
        if self.bits is None:
            return native
        held = (rows + self.groups * self.state) * itemsize + _FLOAT * self.heads
        packed = rows * (packed_bytes(self.state, self.bits) + _SCALE)
        return native - _FLOAT * rows * self.state + packed + (self.chunk - 1) * held
