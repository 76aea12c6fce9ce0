"""Mamba-2 layers of a hybrid checkpoint: a state of fixed size instead of keys and values.

A state is a sum over the text, from which no token can be taken out again: a row cannot be cropped,
only started over, and a prefix cannot be shared once it has been read past.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvtool.mamba import Mixer, Past, Projected
from kvtool.runtime.layers import RuntimeAttention, Step
from kvtool.runtime.pages import Pages, Place, enlarge
from kvtool.runtime.stores import Store


class StateStore(Store):
    """What a mixer remembers of every row: `conv [B, C, K - 1]` and `state [B, H, P, N]` fp32."""

    def __init__(self, mixer: Mixer, rows: int) -> None:
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
        """Refuses: a state does not say what it was at an earlier token."""
        raise NotImplementedError("a state has no prefix")

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return length >= stored

    def snapshot(self, row: int) -> list[Tensor]:
        return [plane[row].clone() for plane in self.planes.values()]

    def restore(self, row: int, saved: list[Tensor]) -> None:
        for plane, kept in zip(self.planes.values(), saved, strict=True):
            plane[row] = kept

    def add(self, new: Projected, step: Step) -> Tensor:
        """Takes up T new tokens and returns y `[B, T, H, P]`."""
        rows = slice(None) if step.row is None else slice(step.row, step.row + 1)
        past = Past(self.planes["conv"][rows], self.planes["state"][rows])
        for b, start in enumerate(step.starts):
            if start == 0:
                past.conv[b], past.state[b] = 0, 0
        if new.dt.shape[1] == 1:
            return self.mixer.step(new, past)
        y, after = self.mixer.scan(new, past)
        for plane, values in zip(past, after, strict=True):
            plane.copy_(values)
        return y


class PagedStates(StateStore):
    """The same for the rows of a paged memory, which take no pages here."""

    def __init__(self, mixer: Mixer, pages: Pages) -> None:
        super().__init__(mixer, pages.rows)
        self.pages = pages

    @property
    def page_bytes(self) -> int:
        """States have no pages."""
        return 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a state."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    def grow(self) -> None:
        """Takes as many rows as there are now."""
        enlarge(self.planes, self.pages.rows)

    def step(self, new: Projected, at: Place) -> Tensor:
        """Takes up a new token per row and returns y `[B, 1, H, P]`."""
        past = Past(*(plane[at.rows] for plane in self.planes.values()))
        for values in past:  # of a row that begins here
            values.masked_fill_((at.positions == 0).view(-1, *[1] * (values.dim() - 1)), 0)
        y = self.mixer.step(new, past)
        for plane, values in zip(self.planes.values(), past, strict=True):
            plane[at.rows] = values
        return y


class RuntimeMixer(RuntimeAttention):
    """A Mamba-2 mixer over a store of states.

    Args:
        inv_freq, scale: Of the model's RoPE, which it does not use.
    """

    def __init__(self, stages: Mixer, index: int, inv_freq: Tensor, scale: float) -> None:
        super().__init__()
        self.stages, self.layer_index = stages, index
        self.inv_freq, self.scale = inv_freq, scale

    def new_store(self, rows: int, capacity: int) -> StateStore:
        return StateStore(self.stages, rows)

    def new_paged_store(self, pages: Pages) -> PagedStates:
        return PagedStates(self.stages, pages)

    def attention(self, hidden: Tensor, step: Step, store: Any) -> Tensor:
        stages = self.stages
        z, new = stages.project(hidden)
        y = store.add(new, step) if step.place is None else store.step(new, step.place)
        output: Tensor = stages.out_proj(stages.gate(y, z))
        return output

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, cache_params: Step, **_: Any
    ) -> Tensor:
        """The signature under which transformers' hybrid layers call their mixer."""
        return self.attention(hidden_states, cache_params, cache_params.stores[self.layer_index])


def keeps_states(stores: Sequence[Store]) -> bool:
    """Whether some layer of a cache cannot go back by a token."""
    return not all(store.can_crop(0, 2, 1) for store in stores)
