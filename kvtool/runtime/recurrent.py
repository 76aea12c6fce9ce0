"""Layers of a hybrid checkpoint with a state of fixed size instead of keys and values.

A state is a sum over the text, from which no token can be taken out again: a row cannot be cropped,
only started over or taken back to where a snapshot was made.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kvtool._transformers import cache_argument
from kvtool.delta_net import DeltaNet
from kvtool.kernels.quantise import dequantise_rows, packed_bytes, quantise_rows
from kvtool.kernels.ssd import ssd_chunked
from kvtool.mamba import CHUNK, Mixer, Past, Projected
from kvtool.rope import Rope
from kvtool.runtime.layers import RuntimeAttention, Step
from kvtool.runtime.pages import Pages, PerRow, Place
from kvtool.runtime.stores import Store
from kvtool.states import StatePlan

Stages = Mixer | DeltaNet


class StateStore(Store):
    """What a mixer remembers of every row: `conv [B, C, K - 1]` and `state [B, H, P, N]` fp32."""

    def __init__(self, mixer: Stages, rows: int) -> None:
        shape, like = mixer.shape, mixer.in_proj.weight
        states = (rows, shape.heads, shape.head_dim, shape.state)
        self.mixer = mixer
        self.planes = {
            "conv": like.new_zeros((rows, shape.convolved, shape.taps - 1)),
            "state": like.new_zeros(states, dtype=torch.float32),
        }

    @property
    def capacity(self) -> int:
        """Any number of tokens."""
        return sys.maxsize

    def resize(self, capacity: int) -> None:
        """Nothing grows."""

    def copy_prefix(self, source: Store, length: int) -> None:
        """Nothing: a state does not say what it was at an earlier token."""

    def keep_prefix(self, capacity: int) -> None:
        self.planes = {name: plane.new_empty(0) for name, plane in self.planes.items()}

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return length >= stored

    def snapshot(self, row: int) -> list[Tensor]:
        return [plane[row].clone() for plane in self.planes.values()]

    def restore(self, row: int, saved: list[Tensor]) -> None:
        for plane, kept in zip(self.planes.values(), saved, strict=True):
            plane[row] = kept

    def add(self, new: Any, step: Step) -> Tensor:
        """Takes up T new tokens and returns y `[B, T, H, P]`.

        Args:
            new: What the mixer projects of them.
        """
        rows = slice(None) if step.row is None else slice(step.row, step.row + 1)
        past = Past(self.planes["conv"][rows], self.planes["state"][rows])
        for b, start in enumerate(step.starts):
            if start == 0:
                past.conv[b], past.state[b] = 0, 0
        if new[0].shape[1] == 1:
            return self.mixer.step(new, past)
        y, after = self.mixer.scan(new, past)
        for plane, values in zip(past, after, strict=True):
            plane.copy_(values)
        return y


class PagedStates(PerRow, StateStore):
    """The same for the rows of a paged memory, which take no pages here."""

    def __init__(self, mixer: Stages, pages: Pages) -> None:
        super().__init__(mixer, pages.rows)
        self.pages = pages

    def step(self, new: Any, at: Place) -> Tensor:
        """Takes up a new token per row and returns y `[B, 1, H, P]`."""
        past = Past(*(plane[at.rows] for plane in self.planes.values()))
        for values in past:  # of a row that begins here
            values.masked_fill_((at.positions == 0).view(-1, *[1] * (values.dim() - 1)), 0)
        y = self.mixer.step(new, past)
        for plane, values in zip(self.planes.values(), past, strict=True):
            plane[at.rows] = values
        return y


class PackedStates(StateStore):
    """States as integers of few bits, and what the tokens since the last packing write.

    Attributes:
        planes: `conv [B, C, K - 1]`; `codes [B, H, P, ·]` and `scales [B, H, P]` of the state
            behind the last whole chunk; of up to C - 1 tokens behind that, `x [B, C - 1, H, P]`,
            `dt [B, C - 1, H]` fp32 and `b [B, C - 1, G, N]`.
    """

    mixer: Mixer

    def __init__(self, mixer: Mixer, rows: int, plan: StatePlan) -> None:
        assert plan.bits is not None
        self.mixer, self.plan, self.bits = mixer, plan, plan.bits
        shape, like, room = mixer.shape, mixer.in_proj.weight, (rows, plan.chunk - 1)
        states = (rows, shape.heads, shape.head_dim)
        size = packed_bytes(shape.state, plan.bits)
        self.planes = {
            "conv": like.new_zeros((rows, shape.convolved, shape.taps - 1)),
            "codes": like.new_empty((*states, size), dtype=torch.uint8),
            "scales": like.new_empty(states, dtype=torch.bfloat16),
            "x": like.new_empty((*room, shape.heads, shape.head_dim)),
            "dt": like.new_empty((*room, shape.heads), dtype=torch.float32),
            "b": like.new_empty((*room, shape.groups, shape.state)),
        }

    def add(self, new: Projected, step: Step) -> Tensor:
        """Takes up T new tokens and returns y `[B, T, H, P]`."""
        first = 0 if step.row is None else step.row
        parts = [
            self._add(Projected(*(x[b : b + 1] for x in new)), first + b, start)
            for b, start in enumerate(step.starts)
        ]
        return torch.cat(parts)

    def _add(self, new: Projected, row: int, start: int) -> Tensor:
        """The same for one row with `start` tokens."""
        size, own = self.plan.chunk, slice(row, row + 1)
        conv = self.planes["conv"][own]
        if start == 0:
            conv.zero_()
        written = self.mixer.convolve(new, conv)
        conv.copy_(written.conv)
        held = start % size
        x, dt, b = (
            torch.cat((self.planes[name][own, :held], part), dim=1)
            for name, part in (("x", written.x), ("dt", written.dt), ("b", written.b))
        )
        c = torch.cat((torch.zeros_like(b[:, :held]), written.c), dim=1)  # y of these is known
        state = self._unpacked(own) if start >= size else None
        parts = []
        chunks = (part.split(size, dim=1) for part in (x, dt, b, c))
        for x_, dt_, b_, c_ in zip(*chunks, strict=True):
            y, after = ssd_chunked(x_, dt_, self.mixer.decay, b_, c_, state, CHUNK)
            parts.append(y)
            if y.shape[1] == size:
                self.planes["codes"][own], self.planes["scales"][own] = quantise_rows(
                    after, self.bits
                )
                state = self._unpacked(own)
        if left := x.shape[1] % size:
            for name, part in (("x", x), ("dt", dt), ("b", b)):
                self.planes[name][own, :left] = part[:, -left:]
        return self.mixer.skip(torch.cat(parts, dim=1)[:, held:], written.x)

    def _unpacked(self, rows: slice) -> Tensor:
        """`[B, H, P, N]` fp32."""
        codes, scales = self.planes["codes"][rows], self.planes["scales"][rows]
        return dequantise_rows(codes, scales, self.mixer.shape.state, self.bits)


class RuntimeMixer(RuntimeAttention):
    """A mixer over a store of states.

    Args:
        plan: How it keeps them; None for fp32.
        rope: The model's, which it does not use.
    """

    def __init__(
        self, stages: Stages, index: int, rope: Rope,
        plan: StatePlan | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stages, self.layer_index = stages, index
        self.rope = rope
        self.packed = plan if plan is not None and plan.packed else None
        self.receptive: tuple[int, Tensor] | None = None
        if plan is not None and plan.taught is not None:
            self.receptive = plan.taught, stages.dt_bias.new_tensor(plan.least)

    def new_store(self, rows: int, capacity: int) -> StateStore:
        if self.packed is not None:
            assert isinstance(self.stages, Mixer)
            return PackedStates(self.stages, rows, self.packed)
        return StateStore(self.stages, rows)

    def new_paged_store(self, pages: Pages) -> PagedStates | None:
        return PagedStates(self.stages, pages) if self.packed is None else None

    def attention(self, hidden: Tensor, step: Step, store: Any) -> Tensor:
        stages = self.stages
        z, new = stages.project(hidden)
        if self.receptive is not None:
            assert isinstance(new, Projected)
            new = Projected(new.xbc, self._taken_up(new.dt, step, *self.receptive))
        y = store.add(new, step) if step.place is None else store.step(new, step.place)
        output: Tensor = stages.out_proj(stages.gate(y, z))
        return output

    def _taken_up(self, raw: Tensor, step: Step, taught: int, least: Tensor) -> Tensor:
        """Δ' `[B, T, H]`, of which Δ = 0 comes where a head passes a token over."""
        if step.place is not None:
            first = step.place.positions
        else:
            spare = [0] * (len(raw) - len(step.starts))
            first = torch.tensor([*step.starts, *spare], device=raw.device)
        ahead = torch.arange(raw.shape[1], device=raw.device)
        late = first.view(-1, 1, 1) + ahead[:, None] >= taught
        assert isinstance(self.stages, Mixer)
        return raw.masked_fill(late & (self.stages.steps(raw) < least), -torch.inf)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **given: Any
    ) -> Tensor:
        """The signature under which transformers' hybrid layers call their mixer."""
        step: Step = given[cache_argument("cache_params")]
        return self.attention(hidden_states, step, step.stores[self.layer_index])
