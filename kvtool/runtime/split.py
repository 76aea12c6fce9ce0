"""A layer whose heads keep different parts of the past.

A plan sorts the KV heads of a layer into three kinds. Once, when the model is loaded, they are put
in this order, so that each kind is a view of queries, keys and values:

* **full** heads keep every token, in planes that grow by whole pages (and may read few of them:
  `sparse.py`);
* **streaming** heads keep the first `sink` tokens and the last `window`, in a ring that never
  grows (DuoAttention, arXiv 2410.10819, section 2.4);
* **budgeted** heads keep the best tokens of the prompt, as many as their budget, and all that come
  later.

Keys are rotated at their true positions, and the softmax does not ask in which order they lie: no
step moves or gathers the past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.kernels.decode_attention import Run, decode_attention, decode_runs, fits
from kvtool.kernels.sink_logits import softmax
from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.runtime.dropping import DroppingHeads
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.pages import PagedHeads
from kvtool.runtime.selection import Selector, keep
from kvtool.runtime.stores import DenseStore, KVHeads, Seen, Store, whole_pages

if TYPE_CHECKING:
    from kvtool.runtime.floats import FloatHeads
    from kvtool.runtime.packed import PackedHeads


class FullHeads(DenseStore):
    """Heads that keep every token."""

    def grown(self, length: int) -> int:
        return whole_pages(super().grown(length))

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        self.write(step.row, step.starts, {"keys": new.k, "values": new.v})
        return self.attend(new.q, step.row, step.lengths)

    @staticmethod
    def add_together(stores: Sequence[FullHeads], new: NewTokens, step: Step) -> Tensor:
        return _decode_together(stores, new, step.starts, step.lengths)


class StreamingHeads(DroppingHeads):
    """Heads that keep the first `sink` tokens and the last `window`, the current one included.

    Position t lies in slot t if t < sink, else in slot `sink + (t - sink) % window`.
    """

    def __init__(
        self, heads: KVHeads, rows: int, sink: int, window: int, dense_prompt: bool = False
    ) -> None:
        super().__init__(heads, dense_prompt)
        self.planes = heads.planes(rows, sink + window)
        self.sink, self.window = sink, window

    @property
    def room(self) -> int:
        """Tokens of a row that it keeps."""
        return self.sink + self.window

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return stored <= self.room  # nothing was overwritten yet

    def copy_prefix(self, source: Store, length: int) -> None:
        """Nothing: later tokens have overwritten it."""

    def keep_prefix(self, capacity: int) -> None:
        self.resize(0)

    def snapshot(self, row: int) -> list[Tensor]:
        return [plane[row].clone() for plane in self.planes.values()]

    def restore(self, row: int, saved: list[Tensor]) -> None:
        for plane, copy in zip(self.planes.values(), saved, strict=True):
            kept = min(plane.shape[2], copy.shape[1])  # of a ring that grows, either may be longer
            plane[row, :, :kept] = copy[:, :kept]

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        if step.row is None or new.q.shape[2] == 1:
            slots = [self.slot(start) for start in step.starts]
            self.write(step.row, slots, {"keys": new.k, "values": new.v})
            rows = slice(None) if step.row is None else slice(step.row, step.row + 1)
            return self._read_newest(new.q, rows, step.lengths)
        seen = self.seen_later(new, step)
        self.keep_last(step.row, step.starts[0], new.k[0], new.v[0])
        return self.lend_later(new.q, step, seen)

    def seen_later(self, new: NewTokens, step: Step) -> Seen:
        assert step.row is not None
        pairs = zip(self.past(step.row, step.starts[0]), (new.k, new.v), strict=True)
        keys, values = (torch.cat(pair, dim=2) for pair in pairs)
        return keys, values

    def lend_later(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        if seen is None:
            return self._read_newest(q, slice(None), step.lengths)
        return streaming_attention(
            q, *seen, self.sink, self.window, self.scaling, step.starts[0],
            sink_logits=self.sink_logits,
        )  # fmt: skip

    def _read_newest(self, q: Tensor, rows: slice, lengths: Sequence[int]) -> Tensor:
        """What the newest tokens of some rows read, `q [B, Q, 1, D]`, once they lie here."""
        keys, values = self.planes["keys"][rows], self.planes["values"][rows]
        filled, logits = [min(n, self.room) for n in lengths], self.sink_logits
        return decode_attention(q[:, :, 0], keys, values, filled, self.scaling, logits)[:, :, None]

    @staticmethod
    def add_together(stores: Sequence[StreamingHeads], new: NewTokens, step: Step) -> Tensor:
        ring = stores[0]
        slots = [ring.slot(start) for start in step.starts]
        return _decode_together(stores, new, slots, [min(n, ring.room) for n in step.lengths])

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        self.keep_last(row, 0, keys, values)

    def slot(self, position: int) -> int:
        """Where a position lies."""
        if position < self.sink:
            return position
        return self.sink + (position - self.sink) % self.window

    def seen(self, start: int) -> list[int]:
        """Stored positions that position `start` sees, in order."""
        recent = range(max(self.sink, start - self.window + 1), start)
        return [*range(min(self.sink, start)), *recent]

    def past(self, row: int, start: int) -> list[Tensor]:
        """Their keys and values `[1, H, s, D]`."""
        slots = [self.slot(position) for position in self.seen(start)]
        return [plane[row : row + 1][:, :, slots] for plane in self.planes.values()]

    def newest(self, row: int, length: int) -> Seen:
        """What there is of a row with so many tokens, in any order."""
        filled = min(length, self.room)
        keys, values = (x[row : row + 1, :, :filled] for x in self.planes.values())
        return keys, values

    def keep_last(self, row: int, start: int, *tokens: Tensor) -> None:
        """Writes those of the tokens `[H, T, ·]` from `start` on that will not be overwritten.

        Args:
            tokens: What goes into each plane, of which there may be more.
        """
        end = start + tokens[0].shape[1]
        sinks = range(start, min(end, self.sink))
        recent = range(max(start, end - self.window, self.sink), end)
        kept = [*sinks, *recent]
        slots = [self.slot(position) for position in kept]
        columns = [position - start for position in kept]
        for plane, new in zip(self.planes.values(), tokens, strict=False):
            plane[row][:, slots] = new[:, columns]


@dataclass(frozen=True)
class Kept:
    """What budgeted heads kept of one row's prompt, head behind head without padding.

    Attributes:
        prompt: Tokens of the prompt.
        counts: Tokens kept per head.
        keys, values: `[sum of counts, D]`.
    """

    prompt: int
    counts: tuple[int, ...]
    keys: Tensor
    values: Tensor

    @cached_property
    def run(self) -> Run:
        """As kernels read it."""
        starts = torch.tensor([0, *accumulate(self.counts)])
        return Run(self.keys, self.values, max(self.counts), starts)


class BudgetedHeads(DroppingHeads):
    """Heads that keep the best tokens of the prompt, and in growing tails all that come later."""

    selector: Selector | None = None

    def __init__(
        self, heads: KVHeads, rows: int, budgets: Sequence[int],
        new_selector: Callable[[], Selector],
    ) -> None:  # fmt: skip
        super().__init__(heads, dense_prompt=True)
        self.planes = heads.planes(rows, 0)
        nothing = heads.like.new_empty((0, heads.head_dim))
        self.nothing = Kept(0, (0,) * heads.count, nothing, nothing)
        self.kept = [self.nothing] * rows
        self.budgets, self.new_selector = budgets, new_selector

    @property
    def allocated_bytes(self) -> int:
        kept = sum(row.keys.nbytes + row.values.nbytes for row in self.kept)
        return super().allocated_bytes + kept

    def grown(self, length: int) -> int:
        return whole_pages(length)  # tails are short beside what was kept

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return length >= self.kept[row].prompt

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None:
            if step.starts[0] == 0:
                self.selector = self.new_selector()
            assert self.selector is not None
            self.selector.see(new.q[0], new.unrotated[0], step.starts[0])
            return self.read_prompt(new, step)
        return self.add_later(new, step)

    def forget(self, row: int) -> None:
        if self.prompt_row == row:
            self.selector = None
        super().forget(row)

    def add_later(self, new: NewTokens, step: Step) -> Tensor:
        """The same of tokens behind the prompt."""
        rows = range(len(self.kept)) if step.row is None else [step.row]
        for row, start in zip(rows, step.starts, strict=True):
            if start == 0:
                self.kept[row] = self.nothing
        prompts = [self.kept[row].prompt for row in rows]
        lengths = [n - prompt for n, prompt in zip(step.lengths, prompts, strict=True)]
        self.reserve(lengths)
        starts = [n - new.k.shape[2] for n in lengths]
        self.write(step.row, starts, {"keys": new.k, "values": new.v})
        if new.q.shape[2] == 1 and fits(new.q, *self.planes.values()):
            keys, values = self.planes.values()
            read = [
                [self.kept[row].run, Run(keys[row], values[row], n)]
                for row, n in zip(rows, lengths, strict=True)
            ]
            asked = new.q[:, :, 0]
            found, _ = decode_runs(asked, read, self.kv_heads, self.scaling, self.sink_logits)
            return found[:, :, None]
        contexts = []
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            keys, values = (plane[row, :, :n] for plane in self.planes.values())
            past = self.kept[row], keys, values
            contexts.append(_attend_both(new.q[b], *past, self.scaling, self.sink_logits))
        return torch.stack(contexts)

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        assert self.selector is not None
        scores = self.selector.scores(keys, values)
        self.selector = None
        chosen = [keep(score, n) for score, n in zip(scores, self.budgets, strict=True)]
        self.keep(row, chosen, keys, values)

    def keep(self, row: int, chosen: Sequence[Tensor], keys: Tensor, values: Tensor) -> None:
        """Keeps those tokens of a prompt `[H, n, D]` that were chosen head by head."""
        self.kept[row] = Kept(
            keys.shape[1],
            tuple(len(columns) for columns in chosen),
            torch.cat([k[columns] for k, columns in zip(keys, chosen, strict=True)]),
            torch.cat([v[columns] for v, columns in zip(values, chosen, strict=True)]),
        )


def _attend_both(
    q: Tensor,
    kept: Kept,
    tail_keys: Tensor,
    tail_values: Tensor,
    scaling: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of the newest tokens of one row over `[kept ; tail]`, head by head.

    Args:
        q: `[Q, T, D]`.
        tail_keys, tail_values: `[H, t, D]`, the T newest tokens last.

    Returns:
        `[Q, T, D]`.
    """
    heads, _, width = tail_keys.shape
    if len(set(kept.counts)) == 1:
        shape = (heads, kept.counts[0], width)
        keys, values = kept.keys.view(shape), kept.values.view(shape)
        return _attend_segments(q, keys, values, tail_keys, tail_values, scaling, sink_logits)
    logits = [None] * heads if sink_logits is None else sink_logits.chunk(heads)
    parts = zip(
        q.chunk(heads),
        (keys[None] for keys in kept.keys.split(kept.counts)),
        (values[None] for values in kept.values.split(kept.counts)),
        tail_keys.split(1),
        tail_values.split(1),
        [scaling] * heads,
        logits,
        strict=True,
    )
    return torch.cat([_attend_segments(*part) for part in parts])


def _attend_segments(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    scaling: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """`q [Q, T, D]` over `[keys ; tail_keys]`, both `[H, ·, D]`; they are not joined for T = 1."""
    if q.shape[1] > 1:
        k = torch.cat((keys, tail_keys), dim=1)[None]
        v = torch.cat((values, tail_values), dim=1)[None]
        return causal_attention(q[None], k, v, scaling, sink_logits=sink_logits)[0]
    grouped = (q * scaling).view(keys.shape[0], -1, q.shape[-1]).mT  # [H, D, Q/H]
    scores = torch.cat((torch.matmul(keys, grouped), torch.matmul(tail_keys, grouped)), dim=1)
    weights = softmax(scores.mT.contiguous(), sink_logits)  # [H, Q/H, m + t]
    old, new = weights.split([keys.shape[1], tail_keys.shape[1]], dim=-1)
    context = torch.matmul(old, values) + torch.matmul(new, tail_values)
    return context.flatten(0, 1)[:, None]


def _decode_together(
    stores: Sequence[FullHeads | StreamingHeads],
    new: NewTokens,
    slots: Sequence[int],
    filled: Sequence[int],
) -> Tensor:
    """One token of each of several rows, written into its slot; reads the filled ones."""
    for store, slot, k, v in zip(stores, slots, new.k.split(1), new.v.split(1), strict=False):
        store.planes["keys"].narrow(2, slot, 1).copy_(k)
        store.planes["values"].narrow(2, slot, 1).copy_(v)
    return DenseStore.attend_together(stores, new.q, filled)


class SplitStore(Store):
    """The three kinds of heads of one layer, in the order in which they lie."""

    def __init__(
        self,
        full: FullHeads | PackedHeads | FloatHeads | PagedHeads,
        streaming: StreamingHeads | None,
        budgeted: BudgetedHeads | None = None,
    ) -> None:
        self.full, self.streaming, self.budgeted = full, streaming, budgeted
        self.parts = [part for part in (full, budgeted, streaming) if part is not None]
        self.counts = [part.kv_heads for part in self.parts]

    @property
    def allocated_bytes(self) -> int:
        return sum(part.allocated_bytes for part in self.parts)

    @property
    def capacity(self) -> int:
        return self.full.capacity

    def reserve(self, lengths: Sequence[int]) -> None:
        """Only full heads are sure to need the room: rings never grow, tails when written to."""
        self.full.reserve(lengths)

    def resize(self, capacity: int) -> None:
        """Of the full heads; rings never change, and tails grow when written to."""
        self.full.resize(capacity)

    def copy_prefix(self, source: Store, length: int) -> None:
        assert isinstance(source, SplitStore)
        for part, other in zip(self.parts, source.parts, strict=True):
            part.copy_prefix(other, length)

    def keep_prefix(self, capacity: int) -> None:
        for part in self.parts:
            part.keep_prefix(capacity)

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        return all(part.can_crop(row, stored, length) for part in self.parts)

    def forget(self, row: int) -> None:
        for part in self.parts:
            part.forget(row)

    def snapshot(self, row: int) -> list[Tensor]:
        return [saved for part in self.parts for saved in part.snapshot(row)]

    def restore(self, row: int, saved: list[Tensor]) -> None:
        own = 2 if self.streaming else 0  # the planes of the ring, behind those of full heads
        self.full.restore(row, saved[: len(saved) - own])
        if self.streaming:
            self.streaming.restore(row, saved[-own:])

    @property
    def lender(self) -> Any:
        """Its heads, where they are all of one kind: only such are read by other layers."""
        (lender,) = (x for x, n in zip(self.parts, self.counts, strict=True) if n)
        return lender

    def seen_by(self, new: NewTokens, step: Step) -> Seen | None:
        seen: Seen | None = self.lender.seen_by(new, step)
        return seen

    def lend(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        read: Tensor = self.lender.lend(q, step, seen)
        return read

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if len(self.parts) == 1:
            return self.full.add(new, step)
        contexts = [
            part.add(heads, step)
            for part, count, heads in zip(
                self.parts, self.counts, new.split(self.counts), strict=True
            )
            if count
        ]
        return torch.cat(contexts, dim=1)

    @staticmethod
    def add_together(stores: Sequence[SplitStore], new: NewTokens, step: Step) -> Tensor:
        counts = stores[0].counts
        contexts = []
        for part, (count, heads) in enumerate(zip(counts, new.split(counts), strict=True)):
            if count:
                parts: list[Any] = [store.parts[part] for store in stores]
                contexts.append(parts[0].add_together(parts, heads, step))
        return torch.cat(contexts, dim=1)
