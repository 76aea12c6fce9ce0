"""Latents of MLA layers, most of them as integers of few bits (`kvtool/latent_bits.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.kernels.packed_attention import Ring, channel_scores, channel_sums
from kvtool.kernels.packed_latents import Blocks, fits, pack_latents, packed_latent_attention
from kvtool.latent import LatentAttention
from kvtool.latent_bits import LatentPlan
from kvtool.rope import rotate
from kvtool.runtime.layers import LatentRuntimeAttention, Step
from kvtool.runtime.packed_store import PackedStore, PagedBlocks
from kvtool.runtime.pages import Pages, Place
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import PAGE, LatentStore


class NewLatents(NamedTuple):
    """What a layer makes of new tokens: absorbed queries `[B, Q, T, R]`, latents `[B, T, R]`.

    Queries are in the order of the plan.
    """

    q: Tensor
    latents: Tensor


class LatentRing(StreamingHeads):
    """The first tokens and the last: one plane `[B, 1, sink + window, R]`."""

    def __init__(self, rows: int, sink: int, window: int, width: int, like: Tensor) -> None:
        self.planes = {"latents": like.new_empty((rows, 1, sink + window, width))}
        self.sink, self.window = sink, window


class PackedLatents(PackedStore):
    """Latents of a layer: one head, of which the first r numbers are its values.

    They are kept in the order of the plan; what is read of them is in that order, too.
    """

    parts = ("latents",)
    bits: LatentPlan
    prompt: LatentStore | None = None  # type: ignore[assignment]

    def __init__(
        self, rows: int, capacity: int, like: Tensor, scaling: float, bits: LatentPlan,
        dense_prompt: bool,
    ) -> None:  # fmt: skip
        self.exact = self.new_exact(rows, like, bits)
        self.bits, self.scaling, self.dense_prompt = bits, scaling, dense_prompt
        self.order = torch.tensor(bits.order, device=like.device)
        self.tokens, self.planes = capacity, {}
        room = (rows, 1, bits.blocks(capacity))
        self.widths = {
            width: torch.tensor(own, device=like.device) for width, own in bits.parts.items()
        }
        for width, own in self.widths.items():
            self.add_planes(f"{width} bits", width, bits.group, (*room, len(own)))

    def new_exact(self, rows: int, like: Tensor, bits: LatentPlan) -> LatentRing:
        """An empty ring."""
        return LatentRing(rows, bits.sink, bits.ring, bits.width, like)

    def add(self, new: NewLatents, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, r]`."""
        return self.add_tokens(new.q, (new.latents[:, None, :, self.order],), step)

    def hold(self, latents: Tensor, step: Step) -> Tensor:
        """Takes a piece `[1, T, R]` of a prompt, packs it at its end; returns all of it so far."""
        assert step.row is not None
        assert step.prompt is not None
        if step.starts[0] == 0:
            self.prompt = LatentStore(
                1, step.prompt, self.bits.rank, self.bits.rope_dim, latents, self.scaling
            )
            self.prompt_row = step.row
        assert self.prompt is not None
        self.prompt.write(0, step.starts, {"latents": latents})
        whole = self.prompt.gather("latents", 0, 0, step.lengths[0])
        if step.lengths[0] == step.prompt:
            self.prompt = None
            self.end_prompt(step.row, whole[..., self.order])
        return whole

    def attend(
        self, q: Tensor, exact: Sequence[Tensor], row: int, start: int, *, new: bool = True
    ) -> Tensor:
        (latents,), bits, blocks = exact, self.bits, self.bits.blocks(start + 1)
        x, near = latents[0].float(), latents.shape[1]
        queries = (q.float() * self.scaling).flatten(0, 1)  # rows of one product: there is one head
        scores = torch.matmul(queries, x.mT)
        if q.shape[1] > 1:
            future = torch.ones(q.shape[1], near, dtype=torch.bool, device=q.device)
            hidden = future.triu(near - q.shape[1] + 1).repeat(q.shape[0], 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        packed: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for width, own in self.widths.items() if blocks else ():
            codes, scales = self.blocks_of(f"{width} bits", row, 0, blocks)
            packed.append((width, own, codes, scales[..., 0, :]))
        if packed:
            far = [
                channel_scores(queries[None, :, own], codes, scales, width, bits.group)
                for width, own, codes, scales in packed
            ]
            scores = torch.cat((scores, torch.cat(far).sum(dim=0)), dim=-1)
        weights = torch.softmax(scores, dim=-1)
        context = torch.matmul(weights[:, :near], x[:, : bits.rank])
        for width, own, codes, scales in packed:
            values = own[own < bits.rank]  # they lie in front of those of the shared key
            these = slice(0, len(values))
            context[:, values] += channel_sums(
                weights[None, :, near:], codes[:, :, these], scales[:, :, these], width, bits.group
            )[0]
        return context.view(*q.shape[:2], -1).to(q.dtype)

    def pack(self, row: int, first: int, exact: Sequence[Tensor]) -> None:
        (latents,) = exact
        if latents.shape[1] < self.bits.group:
            return
        blocks = latents.float().unflatten(1, (-1, self.bits.group)).mT  # [1, n, R, N]
        for width, own in self.widths.items():
            self.put_blocks(f"{width} bits", row, first, blocks[:, :, own], width, 1.0)


class PagedPackedLatents(PagedBlocks, PackedLatents):
    """The same in shared pages."""

    def __init__(
        self, pages: Pages, like: Tensor, scaling: float, bits: LatentPlan, dense_prompt: bool
    ) -> None:
        self.pages = pages
        room = bits.sink + bits.window + PAGE
        super().__init__(pages.count, room, like, scaling, bits, dense_prompt)
        self.places = self.order.argsort()  # of each number
        self.values = tuple(sum(at < bits.rank for at in own) for own in bits.parts.values())

    def new_exact(self, rows: int, like: Tensor, bits: LatentPlan) -> LatentRing:
        return super().new_exact(self.pages.rows, like, bits)

    def step(self, q: Tensor, states: Tensor, at: Place) -> Tensor:
        """Stores a latent per row, `[B, r + d_r]`; returns what `q [B, Q, r + d_r]` reads of all.

        Queries and the result, `[B, Q, r]`, are in the order of the plan.
        """
        bits, latents = self.bits, self.exact.planes["latents"]
        _, slots, _ = at.ring(bits.sink, bits.ring)
        latents.view(-1, bits.width)[slots[:, None], self.places] = states
        ring = Ring(latents, latents[..., : bits.rank], at.rows, bits.sink, bits.window)
        names = [f"{width} bits" for width in self.widths]
        blocks = Blocks(
            tuple(self.planes[name] for name in names),
            tuple(self.planes[f"{name} scales"] for name in names),
            tuple(self.widths), self.values, at.table,
        )  # fmt: skip
        pack_latents(ring, blocks, at.lengths)
        return packed_latent_attention(q, ring, blocks, at.lengths, self.scaling)


class PackedLatentAttention(LatentRuntimeAttention):
    """Latent attention over packed latents; a prompt that is read densely is expanded."""

    def __init__(
        self, stages: LatentAttention, index: int, scale: float, plan: LatentPlan,
        dense_prompt: bool,
    ) -> None:  # fmt: skip
        super().__init__(stages, index, scale)
        self.plan, self.dense_prompt = plan, dense_prompt
        # Queries and what they read have the plan's order at no cost.
        order = torch.tensor(plan.order, device=self.absorb_value.device)
        values = order[: stages.rank]
        self.absorb_query[..., : stages.rank] = self.absorb_query[..., values]
        self.absorb_value = self.absorb_value[:, values]
        self.rotated = order.argsort()[stages.rank :]

    def new_store(  # type: ignore[override]
        self, rows: int, capacity: int
    ) -> PackedLatents:
        stages = self.stages
        return PackedLatents(
            rows, capacity, stages.value_up, stages.scaling, self.plan, self.dense_prompt,
        )  # fmt: skip

    def new_paged_store(  # type: ignore[override]
        self, pages: Pages
    ) -> PagedPackedLatents | None:
        stages, plan = self.stages, self.plan
        if not fits(plan.rank, plan.group):
            return None
        return PagedPackedLatents(pages, stages.value_up, stages.scaling, plan, self.dense_prompt)

    def attention(  # type: ignore[override]
        self, hidden: Tensor, step: Step, store: PackedLatents | PagedPackedLatents
    ) -> Tensor:
        stages = self.stages
        q, c, k_pe = stages.query_and_compress(hidden)
        cos, sin = step.tables[self.table]
        latents = torch.cat((c, rotate(k_pe, cos, sin)), dim=-1)
        if step.place is not None:
            assert isinstance(store, PagedPackedLatents)
            read = partial(store.step, states=latents[:, 0], at=step.place)
            return stages.output(self._absorbed(q[:, 0], cos, sin, read))
        if step.prompt is not None and self.dense_prompt:
            c, k_pe = store.hold(latents, step).split([stages.rank, stages.rope_dim], dim=-1)
            return stages.output(stages.attend_expanded(q, c, k_pe, cos, sin))
        attend = partial(self._attend, store=store, latents=latents, step=step)
        cos, sin = (x.expand(len(q), -1, -1).flatten(0, 1)[:, None] for x in (cos, sin))
        context = self._absorbed(q.flatten(0, 1), cos, sin, attend)  # [B · T, 1, Q, d_v]
        return stages.output(context.view(*q.shape[:3], -1))

    def _attend(self, q: Tensor, store: PackedLatents, latents: Tensor, step: Step) -> Tensor:
        """Absorbed queries `[B · T, Q, R]`, to what they read, `[B · T, Q, r]`."""
        batched = q.unflatten(0, latents.shape[:2]).transpose(1, 2)
        read = store.add(NewLatents(batched, latents), step)
        return read.transpose(1, 2).flatten(0, 1)
