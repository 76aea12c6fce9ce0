"""Feature codes: the few numbers that are stored of a token instead of its keys and values.

One code serves one layer, or several neighbours together: the keys and values that a token leaves
in neighbouring layers come from almost the same hidden state. Layers with a sliding window or a
state have no code, and those that share one may have such layers between them. A code is linear,
and exact at full width. What distinguishes the methods is where it sits (keys before or after
RoPE), what shares it, and what it is fitted for; see `calibrate/`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from kvtool.errors import PlanError, UsageError
from kvtool.kernels.grouped_linear import grouped_linear
from kvtool.kernels.quantise import BITS, groups_of, packed_bytes
from kvtool.rope import Rope, rotate

CodeKind = Literal["rotated", "unrotated"]
"""Whether the code of a key is taken after RoPE, or before it."""

Part = Literal["keys", "values", "joint"]
"""What a projection codes: all keys of its layers, all values, or both together."""


@dataclass(frozen=True)
class CodePlan:
    """How some neighbouring layers code a token together.

    Attributes:
        kind: Where the code sits.
        layers: How many layers share it.
        widths: Numbers per token: of the code of the keys and of that of the values, or of the one
            code that both are read from.
        sink, window: Tokens that each layer also keeps exactly: the first and the last, the current
            one included.
        bits: Of each number of the code (`kernels/quantise`); None keeps them in the model's dtype.
        group: Numbers of a part that share a scale, where there are bits.

    Raises:
        PlanError: The numbers are out of range.
    """

    kind: CodeKind
    layers: int
    widths: tuple[int, ...]
    sink: int = 4
    window: int = 64
    bits: int | None = None
    group: int = 32

    def __post_init__(self) -> None:
        if self.layers < 1 or len(self.widths) not in (1, 2) or min(self.widths) < 1:
            said = " + ".join(map(str, self.widths))
            raise PlanError(f"a code of {said or 'no'} numbers for {self.layers} layers is none")
        if self.sink < 0 or self.window < 1:
            raise PlanError(
                f"{self.sink} exact sinks and a window of {self.window} tokens are impossible: the "
                "window holds at least the current token"
            )
        if self.bits not in (None, *BITS):
            raise PlanError(f"a code has numbers of 2, 3, 4 or 8 bits, not of {self.bits}")
        if self.group < 1:
            raise PlanError(f"a scale for groups of {self.group} numbers is none")

    @property
    def exact(self) -> int:
        """The first and last tokens of a sequence that each layer has exact room for."""
        return self.sink + self.window

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is coded by itself, in the order in which the numbers lie."""
        return ("joint",) if len(self.widths) == 1 else ("keys", "values")

    @property
    def width(self) -> int:
        """Numbers stored per token."""
        return sum(self.widths)

    def full_width(self, channels: int) -> int:
        """Numbers that a part stands for, of layers with K `channels` of keys and of values."""
        return self.layers * channels * (2 if self.parts == ("joint",) else 1)

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of the code of one token, with `itemsize` bytes per number if it has no bits."""
        return sum(self.part_bytes(width, itemsize) for width in self.widths)

    def part_bytes(self, width: int, itemsize: int) -> int:
        """The same of one part of that width: with bits, its scales and minima count."""
        if self.bits is None:
            return itemsize * width
        return packed_bytes(width, self.bits) + 4 * groups_of(width, self.group)

    def cache_bytes(self, tokens: int, channels: int, itemsize: int) -> int:
        """Bytes of a sequence; rings count whole even if unfilled."""
        exact = self.layers * 2 * channels * (self.sink + self.window)
        return self.token_bytes(itemsize) * tokens + itemsize * exact


def layers_of(codes: Sequence[CodePlan], layers: Sequence[int]) -> list[list[int]]:
    """By code, which of the `layers` that have codes share it: the first, the next, and so on."""
    left = iter(layers)
    return [list(islice(left, code.layers)) for code in codes]


def code_shapes(
    index: int, code: CodePlan, channels: int, rows: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the code with this index.

    A part stands for W numbers of a token: keys, values or both, of all layers of the code, layer
    behind layer (keys first). R `rows` of it are stored, at least as many as its width, so that a
    narrower code is a slice: `encode [R, W]`, `decode [W, R]`, `mean [W]`, `spectrum [R]`.
    """
    full = code.full_width(channels)
    found: dict[str, tuple[int, ...]] = {}
    for part, stored in zip(code.parts, rows, strict=True):
        shapes: dict[str, tuple[int, ...]] = {"encode": (stored, full), "decode": (full, stored)}
        shapes |= {"mean": (full,), "spectrum": (stored,)}
        found |= {f"codes.{index}.{part}.{name}": shape for name, shape in shapes.items()}
    return found


@dataclass(frozen=True)
class Projection:
    """x is stored as `encode (x - mean)` and read as `decode z + mean`.

    Rows are in the order in which they are kept: the first r of them are the code of width r.

    Attributes:
        encode: `[R, W]`.
        decode: `[W, R]`.
        mean: `[W]`.
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
    """A projection, with what each of its rows is worth.

    Attributes:
        spectrum: `[R]`, what is lost without a row, in the measure of the method; not rising
            where a budget goes by it.
    """

    projection: Projection
    spectrum: Tensor

    def tensors(self, index: int, part: Part) -> dict[str, Tensor]:
        """As a plan holds them, fp32."""
        parts = {**vars(self.projection), "spectrum": self.spectrum}
        return {f"codes.{index}.{part}.{n}": tensor.float() for n, tensor in parts.items()}


class Positions:
    """Cos and sin of a RoPE at positions 0, 1, ..., computed once for all layers that have it."""

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
    """The code of some layers, ready to encode tokens.

    Args:
        projections: By part, at the widths of the plan.
        heads: H of a layer.
        positions: Of each of its layers.
    """

    def __init__(
        self,
        plan: CodePlan,
        projections: Mapping[Part, Projection],
        heads: int,
        positions: Sequence[Positions],
    ) -> None:
        self.plan, self.projections = plan, projections
        self.heads, self.positions = heads, positions

    def encode(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is stored of tokens, by part `[B, T, R]`.

        Args:
            keys, values: Of every layer `[B, H, T, D]`; keys after RoPE if the code is rotated.
        """
        flat = {
            name: torch.cat([x.transpose(1, 2).flatten(2) for x in tensors], dim=-1)
            for name, tensors in (("keys", keys), ("values", values))
        }
        if "joint" in self.projections:
            flat = {"joint": torch.cat((flat["keys"], flat["values"]), dim=-1)}
        return {part: (flat[part] - p.mean) @ p.encode.T for part, p in self.projections.items()}

    def reader(self, layer: int) -> Reader:
        """How one of its layers reads it."""
        return Reader(self, layer)


class Reader:
    """What one layer makes of a code.

    Attributes:
        rotated: Whether a query reads the keys in the code as they are. If not, all keys are
            rebuilt and rotated whenever they are read.
    """

    def __init__(self, code: Code, layer: int) -> None:
        self.rotated, self.positions = code.plan.kind == "rotated", code.positions[layer]
        self.heads = code.heads
        keys, self._key_mean = self._part(code, "keys", layer)
        values, self._value_mean = self._part(code, "values", layer)
        self._key_decode = keys if self.rotated else keys.flatten(0, 1).T.contiguous()
        self._value_decode = values.mT.contiguous()  # [H, R, D]

    def _part(self, code: Code, part: Part, layer: int) -> tuple[Tensor, Tensor | None]:
        """Its decoder `[H, D, R]` in this layer and its mean `[H, D]`, if any."""
        shared = "joint" in code.projections
        projection = code.projections["joint" if shared else part]
        layers = code.plan.layers
        place = layer + layers if shared and part == "values" else layer
        channels = len(projection.mean) // (2 * layers if shared else layers)
        own = slice(place * channels, (place + 1) * channels)
        decode = projection.decode[own].unflatten(0, (self.heads, -1)).contiguous()
        mean = projection.mean[own].unflatten(0, (self.heads, -1))
        return decode, mean if bool(mean.any()) else None

    def scores(self, q: Tensor, z: Tensor, first: int) -> Tensor:
        """Unscaled scores `[B, Q, T, S]` of queries against stored tokens.

        Args:
            q: `[B, Q, T, D]`, after RoPE.
            z: `[B, S, R]`, what keys are read from, at positions `first`, `first + 1`, ...
        """
        grouped = q.unflatten(1, (self.heads, -1))  # [B, H, g, T, D]
        if self.rotated:
            absorbed = torch.matmul(grouped.flatten(2, 3), self._key_decode)  # [B, H, g·T, R]
            scored = _products(absorbed.view(*q.shape[:3], -1), z)
            if self._key_mean is not None:
                # The same for every stored key, but not for the exact keys beside them.
                mean = self._key_mean[:, None, None]
                scored += (grouped * mean).sum(dim=-1, keepdim=True).flatten(1, 2)
            return scored
        keys = torch.matmul(z, self._key_decode).unflatten(-1, (self.heads, -1))  # [B, S, H, D]
        if self._key_mean is not None:
            keys += self._key_mean
        keys = keys.transpose(1, 2)
        cos, sin = self.positions.tables(first, first + keys.shape[2])
        rebuilt: Tensor = torch.matmul(grouped, rotate(keys, cos, sin)[:, :, None].mT)
        return rebuilt.flatten(1, 2)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries `[B, Q, D]` after RoPE as rotated codes meet them, `[B, Q, R]`."""
        return grouped_linear(q, self._key_decode)

    def add_key_mean(self, mass: Tensor, q: Tensor, scaling: float) -> Tensor:
        """The log-sum-exp `[B, Q]` of scores of :meth:`absorb`, with what the mean adds to each."""
        if self._key_mean is None:
            return mass
        added = grouped_linear(q, self._key_mean[..., None])[..., 0]
        return torch.add(mass, added, alpha=scaling)

    def decode(self, mixed: Tensor) -> Tensor:
        """What weights that sum to 1 made of codes, `[B, Q, R]`, as values `[B, Q, D]`."""
        return grouped_linear(mixed, self._value_decode, self._value_mean)

    def read(self, weights: Tensor, z: Tensor) -> Tensor:
        """Values summed with `weights [B, Q, T, S]`, which need not sum to 1: `[B, Q, T, D]`.

        Args:
            z: `[B, S, R]`, what values are read from.
        """
        mixed = _sums(weights, z).unflatten(1, (self.heads, -1))
        read = torch.matmul(mixed.flatten(2, 3), self._value_decode).view(*weights.shape[:3], -1)
        if self._value_mean is not None:
            mass = weights.sum(dim=-1, keepdim=True).unflatten(1, (self.heads, -1))
            read += (mass * self._value_mean[:, None, None]).flatten(1, 2)
        return read


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


def load_code(
    index: int,
    plan: CodePlan,
    tensors: Mapping[str, Tensor],
    heads: int,
    positions: Sequence[Positions],
) -> Code:
    """The code with this index of a plan's tensors, on the device and in the dtype of `positions`.

    Args:
        positions: Of each of its layers.

    Raises:
        PlanError: It holds numbers that the dtype does not.
    """
    projections: dict[Part, Projection] = {}
    for part, width in zip(plan.parts, plan.widths, strict=True):
        names = (f"codes.{index}.{part}.{name}" for name in ("encode", "decode", "mean"))
        own = Projection(*(tensors[name] for name in names)).cut(width).to(positions[0].like)
        if not all(bool(x.isfinite().all()) for x in (own.encode, own.decode, own.mean)):
            raise PlanError(f"code {index}: its {part} are too large for this dtype")
        projections[part] = own
    return Code(plan, projections, heads, positions)


# --------------------------------------------------------------------------------------- budgets

Allocation = Literal["even", "spectrum"]
"""How codes share a budget: the same number per layer, or by what each number is worth."""
STEP = 8
"""Rows that a budget takes together where it goes by the spectra."""


def share_budget(
    codes: Sequence[CodePlan],
    spectra: Sequence[Sequence[Tensor]],
    allocation: Allocation,
    budget: int,
    itemsize: int = 1,
) -> tuple[CodePlan, ...]:
    """The widest codes that take at most so many bytes per token, all layers together.

    `even`: every layer the same; keys keep their share. `spectrum`: of all codes together the rows
    that are worth most; that is optimal where losses add up. A larger budget never takes one away.

    Args:
        spectra: `[R]` by code and part, not rising; R rows are there to choose from.
        budget: In bytes, or in numbers where no code has bits and `itemsize` is 1.
        itemsize: Bytes of a number of a code without bits.

    Raises:
        UsageError: There is no room for the narrowest codes of all.
    """
    layers = sum(code.layers for code in codes)
    if allocation == "even":
        return tuple(
            _evenly(code, [len(x) for x in own], budget // layers * code.layers, itemsize)
            for code, own in zip(codes, spectra, strict=True)
        )
    parts = [(code, x) for code, own in zip(codes, spectra, strict=True) for x in own]
    widths = [min(STEP, len(x)) for _, x in parts]
    left = budget - sum(
        code.part_bytes(width, itemsize) for (code, _), width in zip(parts, widths, strict=True)
    )
    if left < 0:
        raise UsageError(f"the narrowest codes of all store {sum(widths)} numbers per token")
    further = [
        (-float(rows.mean()), part, len(rows))
        for part, (_, x) in enumerate(parts)
        for rows in x.double().split(STEP)[1:]
    ]
    for _, part, rows in sorted(further, key=lambda step: step[0]):  # stable: rows stay in order
        code, width = parts[part][0], widths[part]
        cost = code.part_bytes(width + rows, itemsize) - code.part_bytes(width, itemsize)
        if cost > left:
            break
        widths[part] += rows
        left -= cost
    chosen = iter(widths)
    return tuple(replace(x, widths=tuple(next(chosen) for _ in x.widths)) for x in codes)


def fit_codes(
    codes: Sequence[CodePlan],
    spectra: Sequence[Sequence[Tensor]],
    allocation: Allocation,
    budget_bytes: int,
    context: int,
    channels: int,
    itemsize: int = 1,
    bounded: int = 0,
) -> tuple[CodePlan, ...]:
    """The widest codes whose cache of a sequence takes at most so many bytes.

    Args:
        spectra: See :func:`share_budget`.
        context: Tokens of that sequence.
        channels: K of a layer.
        itemsize: Bytes of a number that has no bits.
        bounded: Bytes of that sequence in layers with a sliding window or a state.

    Raises:
        UsageError: Windows, states, exact tokens and the narrowest codes take more than the budget.
    """
    exact = sum(code.cache_bytes(0, channels, itemsize) for code in codes)
    per_token = max(0, budget_bytes - bounded - exact) // context
    try:
        return share_budget(codes, spectra, allocation, per_token, itemsize)
    except UsageError as error:
        ring = codes[0]
        others = f"windows and states take {bounded}, " if bounded else ""
        raise UsageError(
            f"a budget of {budget_bytes} bytes at {context} tokens is too small: {others}the first "
            f"{ring.sink} and last {ring.window} tokens, kept exactly, take {exact}, and {error}"
        ) from error


def _evenly(code: CodePlan, rows: Sequence[int], budget: int, itemsize: int) -> CodePlan:
    def widths_of(numbers: int) -> tuple[int, ...]:
        first = min(numbers * code.widths[0] // code.width, rows[0])
        if len(set(code.widths)) == 1:  # an odd number does not make them differ
            return (min(first, *rows),) * len(rows)
        return (first, min(numbers - first, rows[1]))

    def taken(numbers: int) -> int:
        return sum(code.part_bytes(width, itemsize) for width in widths_of(numbers))

    widths = widths_of(bisect_right(range(sum(rows) + 1), budget, key=taken) - 1)
    if min(widths) < 1:
        raise UsageError(f"the narrowest codes of all store {len(rows)} numbers per token and code")
    return replace(code, widths=widths)
