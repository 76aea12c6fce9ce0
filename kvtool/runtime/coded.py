"""Layers that store a code of every token, and a few tokens exactly.

Each layer reads the first `sink` tokens and the last `window` as they are, from a ring; everything
between them from the code. Both parts meet in one softmax. A token is encoded when it arrives, so
nothing is moved when it leaves the window.

Where several layers share a code, the last of them encodes what all have seen. Until then no layer
needs it: a call brings no more tokens than the window holds, but for a prompt that is read densely.
Layers with a sliding window may lie between them: these keep their own, and ask for no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.attention import GroupedQueryAttention
from kvtool.codes import Code, Part
from kvtool.kernels.append import Encoder, append
from kvtool.kernels.decode_attention import Run, decode_runs, fits, merge, paged_decode_attention
from kvtool.kernels.quantise import dequantise, groups_of, packed_bytes, quantise
from kvtool.kernels.sink_logits import softmax
from kvtool.rope import Rope
from kvtool.runtime.dropping import DroppingHeads
from kvtool.runtime.layers import GroupedAttention, NewTokens, Step, step_of
from kvtool.runtime.paged_split import PagedRings
from kvtool.runtime.pages import WIDEST, PagedStore, Pages, Place
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import Store, with_spare_rows
from kvtool.runtime.streams import at_once

_ROWS = 256  # queries whose scores are written out at once


class Tokens(NamedTuple):
    """What a layer makes of some tokens.

    Attributes:
        q, k, v: `[B, Q or H, T, D]`, normed but not rotated.
        q_rotated, k_rotated: The same queries and keys after RoPE.
        positions: `[B, T]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    positions: Tensor


class SharedCodes(Store):
    """The planes of a code, and what its layers have seen in the current call.

    Each part has a plane of its own: one that is read whole is read at memory speed. A code with
    bits is stored as integers, beside scales and minima.
    """

    def __init__(self, rows: int, capacity: int, code: Code, like: Tensor) -> None:
        self.code, self.dtype = code, like.dtype
        plan, shape = code.plan, (rows, capacity)
        self.planes = {}
        for part, width in zip(plan.parts, plan.widths, strict=True):
            if plan.bits is None:
                self.planes[part] = like.new_empty((*shape, width))
                continue
            size, scales = packed_bytes(width, plan.bits), 2 * groups_of(width, plan.group)
            self.planes[part] = like.new_empty((*shape, size), dtype=torch.uint8)
            self.planes[f"{part} scales"] = like.new_empty((*shape, scales), dtype=torch.float16)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def collect(self, layer: int, new: Tokens, step: Step) -> None:
        """Takes what a layer of the code has of new tokens; the last one has them encoded."""
        del self._seen[layer:]  # a call that was interrupted may have left some
        rotated = self.code.plan.kind == "rotated"
        self._seen.append((new.k_rotated if rotated else new.k, new.v))
        if len(self._seen) == self.code.plan.layers:
            keys, values = zip(*self._seen, strict=True)
            self._seen.clear()
            self.write(step.row, step.starts, self._stored(self.code.encode(keys, values)))

    def read(self, row: slice, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What keys and values of tokens are read from, `[B, end - start, R]` each."""
        plan = self.code.plan
        parts = []
        for part, width in zip(plan.parts, plan.widths, strict=True):
            codes = self.planes[part][row, start:end]
            if plan.bits is not None:
                scales = self.planes[f"{part} scales"][row, start:end].unflatten(-1, (-1, 2))
                codes = dequantise(codes, scales, width, plan.bits, plan.group).to(self.dtype)
            parts.append(codes)
        return parts[0], parts[-1]

    def _stored(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the planes hold of codes `[B, T, R]`, by part."""
        plan, found = self.code.plan, dict(codes)
        if plan.bits is not None:
            for part, x in codes.items():
                found[part], scales = quantise(x, plan.bits, plan.group)
                found[f"{part} scales"] = scales.flatten(-2)
        return found


class CodedStore(DroppingHeads):
    """The exact tokens of one layer, and the codes that it shares with its neighbours.

    Args:
        layer: Which of the layers of the code it is.
    """

    exact: StreamingHeads

    def __init__(
        self, layer: int, codes: SharedCodes, exact: StreamingHeads, dense_prompt: bool
    ) -> None:
        super().__init__(exact.heads, dense_prompt)
        self.layer, self.exact = layer, exact
        self.codes, self.planes = codes, codes.planes
        self.reader = codes.code.reader(layer)

    def join(self, before: Sequence[Store]) -> None:
        if self.layer:
            last = next(store for store in reversed(before) if isinstance(store, CodedStore))
            self.codes, self.planes = last.codes, last.planes

    def resize(self, capacity: int) -> None:
        if not self.layer:  # the others share its plane
            super().resize(capacity)

    def copy_prefix(self, source: Store, length: int) -> None:
        if not self.layer:
            super().copy_prefix(source, length)

    @property
    def allocated_bytes(self) -> int:
        own = self.exact.allocated_bytes + (self.prompt.allocated_bytes if self.prompt else 0)
        return own if self.layer else own + self.codes.allocated_bytes

    def add(self, new: Tokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        self.codes.collect(self.layer, new, step)
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(NewTokens(new.q_rotated, new.q, new.k_rotated, new.v), step)
        if step.row is not None and new.q.shape[2] > 1:
            return self._add_several(new, step.row, step.starts[0])
        slots = [self.exact.slot(start) for start in step.starts]
        self.exact.write(step.row, slots, {"keys": new.k_rotated, "values": new.v})
        first = 0 if step.row is None else step.row
        if self.fused(new.q_rotated):
            rows = [self._runs(first + b, n) for b, n in enumerate(step.lengths)]
            return self._read_runs(new.q_rotated, rows)
        parts = []
        for b, n in enumerate(step.lengths):
            row = slice(first + b, first + b + 1)
            keys, values = (
                plane[row, :, : min(n, self.exact.capacity)] for plane in self.exact.planes.values()
            )
            one = Tokens(*(x[b : b + 1] for x in new))
            parts.append(self._attend(one, keys, values, self._codes(row, n)))
        return torch.cat(parts)

    @staticmethod
    def add_together(stores: Sequence[CodedStore], new: Tokens, step: Step) -> Tensor:
        own = stores[0]
        if not own.fused(new.q_rotated):
            return Store.add_together(stores, new, step)
        for b, (store, start, n) in enumerate(zip(stores, step.starts, step.lengths, strict=True)):
            one = Tokens(*(x[b : b + 1] for x in new))
            store.codes.collect(store.layer, one, replace(step, starts=[start], lengths=[n]))
            slots = [store.exact.slot(start)]
            store.exact.write(None, slots, {"keys": one.k_rotated, "values": one.v})
        rows = [store._runs(0, n) for store, n in zip(stores, step.lengths, strict=True)]
        read = own._read_runs(new.q_rotated[: len(stores)], rows)
        return with_spare_rows([read], len(new.q))

    def fused(self, q: Tensor) -> bool:
        """Whether a kernel reads both as they lie, with queries `[B, Q, 1, D]`."""
        exact, parts = self.exact.planes, self.codes.code.plan.parts
        keys, values = self.planes[parts[0]], self.planes[parts[-1]]
        absorbed = q.new_empty((0, keys.shape[-1]))
        both = fits(q, exact["keys"], exact["values"]) and fits(absorbed, keys, values)
        return self.reader.rotated and both

    def _runs(self, row: int, length: int) -> tuple[Run, Run]:
        """The exact tokens of a row of so many, and the codes of those between them."""
        exact, parts = self.exact, self.codes.code.plan.parts
        keys, values = (
            self.planes[part][row, exact.sink :][None] for part in (parts[0], parts[-1])
        )
        near, filled = exact.planes, min(length, exact.capacity)
        coded = Run(keys, values, max(0, length - exact.window - exact.sink))
        return Run(near["keys"][row], near["values"][row], filled), coded

    def _read_runs(self, q: Tensor, rows: Sequence[tuple[Run, Run]]) -> Tensor:
        """What the newest token of each row reads, `q [B, Q, 1, D]`: as :meth:`PagedCoded.step`."""
        q, beside = q[:, :, 0] * self.scaling, None
        near, far = ([[run] for run in runs] for runs in zip(*rows, strict=True))
        if any(run.length for (run,) in far):
            mixed, mass = decode_runs(self.reader.absorb(q), far, 1, 1.0)
            beside = self.reader.decode(mixed), self.reader.add_key_mean(mass, q, 1.0)
        heads = self.exact.kv_heads
        return decode_runs(q, near, heads, 1.0, self.sink_logits, beside)[0][:, :, None]

    def end_prompt(self, row: int, keys: Tensor, values: Tensor) -> None:
        self.exact.keep_last(row, 0, keys, values)

    def _codes(self, row: slice, length: int) -> tuple[Tensor, Tensor]:
        """Codes of keys and values `[B, S, R]` of those of the first `length` tokens that are
        neither sinks nor in the window.
        """
        sink, last = self.exact.sink, length - self.exact.window
        return self.codes.read(row, sink, max(sink, last))

    def _add_several(self, new: Tokens, row: int, start: int) -> Tensor:
        """As if token by token: each reads what was exact when it came."""
        exact, end = self.exact, start + new.q.shape[2]
        keys, values = (
            torch.cat((past, fresh), dim=2)
            for past, fresh in zip(exact.past(row, start), (new.k_rotated, new.v), strict=True)
        )
        at = torch.tensor([*exact.seen(start), *range(start, end)], device=keys.device)
        codes = self._codes(slice(row, row + 1), end)
        coded_at = exact.sink + torch.arange(codes[0].shape[1], device=keys.device)
        exact.keep_last(row, start, new.k_rotated[0], new.v[0])
        contexts = []
        for begin in range(0, end - start, _ROWS):
            piece = slice(begin, min(begin + _ROWS, end - start))
            some = Tokens(*(x[:, :, piece] if x.dim() > 2 else x[:, piece] for x in new))
            distance = some.positions[0][:, None] - at
            near = (distance >= 0) & ((at < exact.sink) | (distance < exact.window))
            far = some.positions[0][:, None] - coded_at >= exact.window
            hidden = ~torch.cat((near, far), dim=1)
            contexts.append(self._attend(some, keys, values, codes, hidden))
        return torch.cat(contexts, dim=2)

    def _attend(
        self,
        new: Tokens,
        keys: Tensor,
        values: Tensor,
        codes: tuple[Tensor, Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """One softmax over exact tokens `[B, H, C, D]` and coded ones, see :meth:`_codes`.

        Args:
            hidden: `[T, C + S]`, what a query must not see.
        """
        coded = codes[0].shape[1]
        q = new.q_rotated * self.scaling
        grouped = q.unflatten(1, (keys.shape[1], -1))  # [B, H, g, T, D]
        scores = torch.matmul(grouped, keys[:, :, None].mT).flatten(1, 2)
        if coded:
            scores = torch.cat((scores, self.reader.scores(q, codes[0], self.exact.sink)), dim=-1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = softmax(scores, self.sink_logits, first=1)
        near, far = weights.split([keys.shape[2], coded], dim=-1)
        mixed = near.unflatten(1, (keys.shape[1], -1))
        context = torch.matmul(mixed, values[:, :, None]).flatten(1, 2)
        return context + self.reader.read(far, codes[1]) if coded else context


class PagedCodes(SharedCodes):
    """Codes of one layer, without bits."""

    def __init__(self, pages: Pages, code: Code, like: Tensor) -> None:
        super().__init__(0, 0, code, like)
        shapes: dict[str, tuple[int, ...]] = {
            part: (1, width) for part, width in zip(code.plan.parts, code.plan.widths, strict=True)
        }
        self.paged = PagedStore(pages, shapes, like)
        self.planes = self.paged.planes

    def write(self, row: int | None, starts: Sequence[int], states: dict[str, Tensor]) -> None:
        self.paged.write(row, starts, {name: new[:, None] for name, new in states.items()})

    def read(self, row: slice, start: int, end: int) -> tuple[Tensor, Tensor]:
        parts = [self.paged.gather(name, row.start, start, end)[:, 0] for name in self.planes]
        return parts[0], parts[-1]


class PagedCoded(CodedStore):
    """Exact tokens in a ring per row, and codes of all in pages, read by the query as they are."""

    exact: PagedRings
    codes: PagedCodes

    def __init__(self, codes: PagedCodes, exact: PagedRings, dense_prompt: bool) -> None:
        super().__init__(0, codes, exact, dense_prompt)
        self.encoders: dict[Part, tuple[Tensor, Tensor | None]] = {}
        for part, projection in codes.code.projections.items():
            bias = -(projection.encode @ projection.mean) if projection.mean.any() else None
            self.encoders[part] = projection.encode.T, bias

    def fused(self, q: Tensor) -> bool:
        return False  # codes lie in pages

    @property
    def page_bytes(self) -> int:
        """Of the codes."""
        return self.codes.paged.page_bytes

    @property
    def row_bytes(self) -> int:
        """Of the exact tokens."""
        return self.exact.row_bytes

    def grow(self) -> None:
        """Takes as many pages and rows as there are now."""
        self.codes.paged.grow()
        self.exact.grow()

    def step(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, at: Place) -> Tensor:
        """See :meth:`PagedHeads.step`."""
        ring, planes = self.exact, self.planes
        table, slots, lengths = at.ring(ring.sink, ring.window)
        exact = ring.planes["keys"], ring.planes["values"]
        key_code, value_code = (
            Encoder(*self.encoders[part], planes[part]) for part in ("keys", "values")
        )
        turned = append(
            k, v, cos, sin, *exact, slots, q,
            key_code=key_code, value_code=value_code, code_slots=at.slots,
        )  # fmt: skip
        assert turned is not None
        before = at.before(ring.window)
        (near, near_mass), (far, far_mass) = at_once(
            q.device,
            lambda: paged_decode_attention(
                turned, *exact, lengths, self.scaling, table, sink_logits=self.sink_logits
            ),
            lambda: paged_decode_attention(
                self.reader.absorb(turned), planes["keys"], planes["values"], before, self.scaling,
                at.table, ring.sink,
            ),
        )  # fmt: skip
        far_mass = self.reader.add_key_mean(far_mass, turned, self.scaling)
        return merge((near, self.reader.decode(far)), (near_mass, far_mass))


class CodedAttention(GroupedAttention):
    """Grouped-query attention over a coded store.

    Args:
        layer: Which of the layers of the code it is.
    """

    def __init__(
        self,
        stages: GroupedQueryAttention,
        index: int,
        rope: Rope,
        code: Code,
        layer: int,
        dense_prompt: bool,
    ) -> None:
        super().__init__(stages, index, rope)
        self.code, self.layer, self.dense_prompt = code, layer, dense_prompt
        self.most_tokens = None if code.plan.layers == 1 else code.plan.window

    def new_store(self, rows: int, capacity: int) -> CodedStore:
        heads, plan = self.heads(), self.code.plan
        exact = StreamingHeads(heads, rows, plan.sink, plan.window)
        # Layers behind the first will take over its plane, see `join`.
        codes = SharedCodes(rows, 0 if self.layer else capacity, self.code, heads.like)
        return CodedStore(self.layer, codes, exact, self.dense_prompt)

    def new_paged_store(self, pages: Pages) -> PagedCoded | None:
        heads, plan = self.heads(), self.code.plan
        read_as_stored = plan.kind == "rotated" and plan.parts == ("keys", "values")
        narrow = max(plan.widths) <= WIDEST
        if not (read_as_stored and narrow) or plan.layers > 1 or plan.bits is not None:
            return None
        exact = PagedRings(heads, pages, plan.sink, plan.window)
        return PagedCoded(PagedCodes(pages, self.code, heads.like), exact, self.dense_prompt)

    def attention(self, hidden: Tensor, step: Step, store: CodedStore) -> Tensor:
        stages = self.stages
        cos, sin = (table[:, None] for table in step.tables[self.table])
        q, k, v = stages.project(hidden)
        q, k = stages.normalise(q, k)
        q = stages.temper(q, step.positions)
        if step.place is not None:
            assert isinstance(store, PagedCoded)
            return stages.output(step_of(store, q, k, v, step, self.table), hidden)
        q_rotated, k_rotated = stages.rotate(q, k, cos, sin)
        new = Tokens(q, k, v, q_rotated, k_rotated, step.positions)
        return stages.output(store.add(new, step), hidden)
