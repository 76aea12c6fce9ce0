"""Heads that keep every token, in the blocks of `packed_store.py` (`kvtool/bits.py`).

Where a block has two tiers of tokens, those with more attention have more bits, head by head, as in
ZipCache (arXiv 2405.14256). Each tier has planes of its own: behind RoPE a softmax does not ask in
which order tokens lie, so nothing of the past is gathered. Attention is that of probes, the N / 8
last queries before the block is packed, divided by how many of them come behind a token. ZipCache
takes a tenth, half of them at random, for all tokens of a text together, and packs everything anew
after every 100 tokens, from what was packed before; here a block is ranked and packed once.

What codes leave out of a block may be held nearly, in thin factors per head (`kernels/low_rank`),
as GEAR does (arXiv 2403.05527): two thin products add it to scores and to sums. GEAR's sparse
outliers are left out, as in its own variant GEAR-L: 2 % of the numbers with an fp16 value and the
least index that finds them, 12 bits in a block of 64 x 64, are 0.56 bits per number.

Values may be sparse instead of having codes (`kernels/sparse_values`), as in Mustafar (arXiv
2505.22913): of each the numbers of largest magnitude, and a bitmap. In the paper keys are so as
well; here they have codes.

What is stored as it is read is not rebuilt (`kernels/packed_attention`): values, and keys behind
RoPE. Keys that are stored before it are rebuilt and rotated a tile at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.attention import causal_attention
from kvtool.bits import Bits, from_stored, to_stored
from kvtool.codes import Positions
from kvtool.kernels.hadamard import turn
from kvtool.kernels.low_rank import low_rank, low_rank_scores, low_rank_sums
from kvtool.kernels.native import use_native
from kvtool.kernels.packed_attention import (
    Blocks,
    Ring,
    channel_scores,
    fits_sizes,
    packed_attention,
    token_scores,
    value_sums,
)
from kvtool.kernels.quantise import dequantise
from kvtool.kernels.sink_logits import softmax
from kvtool.kernels.sparse_values import bitmap_bytes, compress, sparse_sums
from kvtool.rope import rotate
from kvtool.runtime.layers import NewTokens, Step
from kvtool.runtime.packed_store import PackedStore
from kvtool.runtime.split import StreamingHeads
from kvtool.runtime.stores import KVHeads, Seen

_BLOCKS = 16  # whose keys are rebuilt at once
_MANY = 16  # queries, for which blocks are rebuilt
_PREFIXES = ("", "rest ")  # of the planes of the tiers
_FACTORS = (" tokens", " channels")  # behind the name of what codes left out
_SPARSE = ("bitmap", "numbers")  # of values without codes


class PackedHeads(PackedStore):
    """Heads that keep every token.

    A block has a row per channel with the numbers of a tier's keys where their scales are per
    channel, and else a row per token with D numbers. Sparse values have a bitmap and numbers per
    token. Beside the ring lies, with two tiers, the attention `[B, H, N]` that the tokens of the
    next block got from its probes so far: those of this layer, as other layers that read it are
    spared most tokens of a prompt.

    Args:
        order: `[H, D]`, the order of the channels of keys; None for their own.
        positions: RoPE in fp32.
        balances: `[H, 1, D]` for keys and for values, see :class:`Bits`; None for
            ones.
    """

    parts = ("keys", "values")
    bits: Bits

    def __init__(
        self, heads: KVHeads, rows: int, capacity: int, bits: Bits, order: Tensor | None,
        positions: Positions, dense_prompt: bool,
        balances: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:  # fmt: skip
        super().__init__(heads, dense_prompt)
        like, head_dim = heads.like, heads.head_dim
        self.exact = self.new_exact(rows, bits)
        if bits.rest is not None:
            attention = like.new_zeros((rows, heads.count, bits.group), dtype=torch.float32)
            self.exact.planes["attention"] = attention
        self.bits, self.order, self.positions = bits, order, positions
        sizes = fits_sizes(head_dim, bits.group, like.dtype)
        self.fused = self.read_as_stored(bits) and sizes and use_native(like)
        self.key_balance, self.value_balance = balances
        self.tokens, self.planes = capacity, {}
        for prefix, tier in zip(_PREFIXES, bits.tiers, strict=False):
            per_channel = (head_dim, tier.tokens)
            key_block = per_channel if bits.axis == "channel" else per_channel[::-1]
            for part, width, (lines, numbers) in (
                ("keys", tier.keys, key_block),
                ("values", tier.values, per_channel[::-1]),
            ):
                shape = (rows, heads.count, bits.blocks(capacity), lines)
                if part == "keys" or bits.kept is None:
                    self.add_planes(prefix + part, width, numbers, shape)
        if bits.kept is not None:
            tokens = (rows, heads.count, bits.blocks(capacity), bits.group)
            bitmap = like.new_empty((*tokens, bitmap_bytes(head_dim)), dtype=torch.uint8)
            kept = like.new_empty((*tokens, bits.kept), dtype=torch.float16)
            self.planes |= dict(zip(_SPARSE, (bitmap, kept), strict=True))
        if bits.rank:
            for part in ("keys", "values"):
                for factor, lines in zip(_FACTORS, (bits.group, head_dim), strict=True):
                    thin = (rows, heads.count, bits.blocks(capacity), bits.rank, lines)
                    self.planes[part + factor] = like.new_empty(thin, dtype=torch.float16)

    def new_exact(self, rows: int, bits: Bits) -> StreamingHeads:
        """An empty ring."""
        return StreamingHeads(self.heads, rows, bits.sink, bits.ring)

    def can_crop(self, row: int, stored: int, length: int) -> bool:
        if self.bits.probes and length > self._first_probe(self.bits.blocks(length)):
            return False  # later probes cannot be taken off the sums again
        return stored - self.bits.ring <= self.first_exact(length)

    @staticmethod
    def read_as_stored(bits: Bits) -> bool:
        """Whether kernels read blocks of this kind."""
        rotated = bits.kind == "rotated" and bits.axis == "channel"
        more = (bits.order, bits.rest, bits.key_balance, bits.value_balance, bits.kept)
        plain = bits.hadamard != "both" and not bits.rank and all(x is None for x in more)
        return rotated and plain

    def add(self, new: NewTokens, step: Step) -> Tensor:
        """Stores new tokens and returns what they read, `[B, Q, T, D]`."""
        if step.prompt is not None and self.dense_prompt:
            return self.read_prompt(new, step)
        if self.fused and new.q.shape[2] == 1:
            return self._add_newest(new, step)
        return self.add_tokens(new.q, (new.k, new.v), step)

    def _add_newest(self, new: NewTokens, step: Step) -> Tensor:
        """The same of one token per row."""
        rows = range(len(step.starts)) if step.row is None else [step.row]
        slots = [self.exact.slot(start) for start in step.starts]
        self.exact.write(step.row, slots, {"keys": new.k, "values": new.v})
        for row, start in zip(rows, step.starts, strict=True):
            if self.bits.blocks(start + 1) > (block := self.bits.blocks(start)):
                own = range(self.first_of(block), self.first_of(block + 1))
                due = [self.exact.slot(position) for position in own]
                self.pack(row, block, [plane[row][:, due] for plane in self.exact.planes.values()])
        return self._read_newest(new.q, rows, step.lengths)

    def _read_newest(self, q: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """What the newest tokens of some rows read, `q [B, Q, 1, D]`, once they lie here."""
        places, counts = torch.tensor(rows), torch.tensor(lengths, dtype=torch.int32)
        ring, blocks = self.stored(places, places.int()[:, None])
        scaling, logits = self.scaling, self.sink_logits
        return packed_attention(q[:, :, 0], ring, blocks, counts, scaling, logits)[:, :, None]

    def stored(self, rows: Tensor, table: Tensor) -> tuple[Ring, Blocks]:
        """What kernels read, of rings and pages of some rows."""
        bits, planes, exact = self.bits, self.planes, self.exact.planes
        ring = Ring(exact["keys"], exact["values"], rows, bits.sink, bits.window)
        blocks = Blocks(
            planes["keys"], planes["keys scales"], planes["values"], planes["values scales"],
            table, bits.keys, bits.values, bits.key_clip, bits.value_clip,
            bits.hadamard == "values",
        )  # fmt: skip
        return ring, blocks

    def watch_prompt(self, q: Tensor, start: int) -> None:
        if self.bits.rest is None:
            return
        assert self.prompt is not None
        planes, heads = self.prompt.planes, self.prompt.planes["keys"].shape[1]
        if start == 0:
            length = planes["keys"].shape[2]
            planes["attention"] = q.new_zeros((1, heads, length, 1), dtype=torch.float32)
        end = start + q.shape[1]
        for block in range(self.bits.blocks(start + 1), self.bits.blocks(end) + 1):
            first, stop = self._first_probe(block), self.bits.packed_at(block)
            begin, stop = max(start, first), min(end, stop)
            if begin < stop:
                asked = q[:, begin - start : stop - start]
                weights = self._weights(asked, planes["keys"][0, :, :stop])
                own = slice(self.first_of(block), self.first_of(block + 1))
                got = weights[..., own].sum(dim=(1, 2))  # [H, N], fewer at the end
                planes["attention"][0, :, own, 0][:, : got.shape[1]] += got

    def end_prompt(self, row: int, *tokens: Tensor) -> None:
        first, end = self.bits.sink, self.first_exact(tokens[0].shape[1])
        attention = None
        if self.bits.rest is not None:
            assert self.prompt is not None
            read = self.prompt.planes["attention"][0, ..., 0]
            attention, pending = read[:, first:end], read[:, end : end + self.bits.group]
            self.exact.planes["attention"][row, :, : pending.shape[1]] = pending
        self.pack(row, 0, [x[:, first:end] for x in tokens], attention)
        self.exact.keep_last(row, 0, *tokens)

    def _first_probe(self, block: int) -> int:
        """Its position; the others follow it, up to the token with which the block is packed."""
        return self.bits.packed_at(block) - self.bits.probes

    def seen_later(self, new: NewTokens, step: Step) -> Seen:
        assert step.row is not None
        keys, values = self.with_exact((new.k[0], new.v[0]), step.row, step.starts[0])
        return keys[None], values[None]

    def lend_later(self, q: Tensor, step: Step, seen: Seen | None) -> Tensor:
        rows = range(len(q)) if step.row is None else [step.row]
        if self.fused and seen is None:
            return self._read_newest(q, rows, step.lengths)
        contexts = []
        for b, (row, end) in enumerate(zip(rows, step.lengths, strict=True)):
            exact = self.exact_tokens(row, end) if seen is None else [x[0] for x in seen]
            contexts.append(self.read(q[b], exact, row, end - q.shape[2], new=False))
        return torch.stack(contexts)

    def read(
        self, q: Tensor, exact: Sequence[Tensor], row: int, start: int, *, new: bool
    ) -> Tensor:
        count, bits = q.shape[1], self.bits
        if count < _MANY or bits.rest is not None or bits.kept is not None:
            return super().read(q, exact, row, start, new=new)
        # For so many queries blocks are made numbers first, in the dtype of exact ones.
        end, turned = start + count, bits.hadamard != "none"
        if new:
            self.pack_due(row, range(start, end), exact, end)
        keys, values = exact
        near, blocks = (keys, turn(values) if turned else values), bits.blocks(end)
        far = [x.to(keys.dtype) for x in (self._keys(row, 0, blocks), self._values(row, blocks))]
        parts = []
        for run in self.runs(start, end):
            read = bits.blocks(run.start + 1) * bits.group
            both = zip(far, self.seen_exactly(run, near, end), strict=True)
            k, v = (torch.cat((x[:, :read], y), dim=1)[None] for x, y in both)
            asked = q[None, :, run.start - start : run.stop - start]
            parts.append(causal_attention(asked, k, v, self.scaling, sink_logits=self.sink_logits))
        context = torch.cat(parts, dim=2)[0]
        return turn(context) if turned else context

    def attend(
        self, q: Tensor, exact: Sequence[Tensor], row: int, start: int, *, new: bool = True
    ) -> Tensor:
        keys, values = exact
        near, blocks = keys.shape[1], self.bits.blocks(start + 1)
        weights = self._weights(q, keys, row, blocks)
        if new and self.bits.rest is not None:
            self._watch(weights, row, start)
        flat = weights.flatten(1, 2)
        context = torch.matmul(flat[..., :near], values.float())
        if blocks:
            read = self._sums(flat[..., near:], row, blocks)
            if self.value_balance is not None:
                read *= self.value_balance
            context += read if self.bits.hadamard == "none" else turn(read)
        found: Tensor = context.unflatten(1, weights.shape[1:3]).flatten(0, 1).to(q.dtype)
        return found

    def _watch(self, weights: Tensor, row: int, start: int) -> None:
        """Adds what probes among queries from `start` on pay to the tokens of the next block.

        Args:
            weights: `[H, g, T, C + ...]`, exact tokens in front.
        """
        done, sink = self.bits.blocks(start + 1), self.bits.sink
        first, stop = self._first_probe(done), self.bits.packed_at(done)
        if start + weights.shape[2] <= first:
            return
        probes = slice(max(0, first - start), stop - start)
        exact = start + weights.shape[2] - done * self.bits.group  # how many there are
        own = slice(sink, min(sink + self.bits.group, exact))
        sums = self.exact.planes["attention"][row]
        if start <= first:
            sums.zero_()
        got = weights[:, :, probes, own].sum(dim=(1, 2))
        sums[:, : got.shape[-1]] += got

    def _weights(self, q: Tensor, keys: Tensor, row: int = 0, blocks: int = 0) -> Tensor:
        """Attention `[H, g, T, C + blocks · N]` of queries `[Q, T, D]` over exact keys `[H, C, D]`,
        of which the last T are their own, and the first blocks of a row.
        """
        heads, exact = keys.shape[:2]
        grouped = (q.float() * self.scaling).unflatten(0, (heads, -1))  # [H, g, T, D]
        flat = grouped.flatten(1, 2)
        scores = torch.matmul(flat, keys.float().mT).unflatten(1, grouped.shape[1:3])
        if q.shape[1] > 1:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(future.triu(exact - q.shape[1] + 1), -torch.inf)
        if blocks:
            far = self._scores(flat, row, blocks).unflatten(1, grouped.shape[1:3])
            scores = torch.cat((scores, far), dim=-1)
        return softmax(scores, self.sink_logits)

    def _scores(self, q: Tensor, row: int, blocks: int) -> Tensor:
        """Queries `[H, n, D]` fp32 against packed keys, `[H, n, blocks · N]`, tier by tier."""
        bits = self.bits
        if bits.kind == "unrotated":
            parts = [
                torch.matmul(q, self._keys(row, first, min(first + _BLOCKS, blocks)).mT)
                for first in range(0, blocks, _BLOCKS)
            ]
            return torch.cat(parts, dim=-1)
        turned, parts = to_stored(q, bits, self.order), []
        if self.key_balance is not None:
            turned = turned * self.key_balance
        for prefix, tier in zip(_PREFIXES, bits.tiers, strict=False):
            codes, scales = self.blocks_of(prefix + "keys", row, 0, blocks)
            if bits.axis == "channel":
                found = channel_scores(turned, codes, scales[..., 0, :], tier.keys, tier.tokens)
            else:
                codes, scales = codes.flatten(1, 2), scales.flatten(1, 2)
                found = token_scores(turned, codes, scales, tier.keys, bits.group)
            parts.append(found)
        scores = torch.cat(parts, dim=-1)
        if bits.rank:
            scores += low_rank_scores(turned, *self._thin("keys", row, 0, blocks))
        return scores

    def _sums(self, weights: Tensor, row: int, blocks: int) -> Tensor:
        """Packed values summed with weights `[H, n, blocks · N]`, tier by tier: `[H, n, D]`."""
        bits = self.bits
        if bits.kept is not None:
            bitmap, numbers = (self.read_blocks(x, row, 0, blocks).flatten(1, 2) for x in _SPARSE)
            return sparse_sums(weights, bitmap, numbers, self.heads.head_dim)
        parts = weights.split([blocks * tier.tokens for tier in bits.tiers], dim=-1)
        sums = weights.new_zeros((*weights.shape[:2], self.heads.head_dim))
        for prefix, tier, own in zip(_PREFIXES, bits.tiers, parts, strict=False):
            read = self.blocks_of(prefix + "values", row, 0, blocks)
            codes, scales = (x.flatten(1, 2) for x in read)
            sums += value_sums(own, codes, scales, self.heads.head_dim, tier.values, bits.group)
        if bits.rank:
            sums += low_rank_sums(weights, *self._thin("values", row, 0, blocks))
        return sums

    def _keys(self, row: int, first: int, end: int) -> Tensor:
        """Rotated keys `[H, (end - first) · N, D]` fp32 of blocks with one tier."""
        bits = self.bits
        codes, scales = self.blocks_of("keys", row, first, end)
        per_channel = bits.axis == "channel"
        width = bits.group if per_channel else self.heads.head_dim
        stored = dequantise(codes, scales, width, bits.keys, bits.group)
        keys = stored.mT if per_channel else stored
        if bits.rank:
            tokens, channels = self._thin("keys", row, first, end)
            keys = keys + tokens.float().mT @ channels.float()
        keys = keys.flatten(1, 2)
        if self.key_balance is not None:
            keys = keys * self.key_balance
        keys = from_stored(keys, bits, self.order)
        if bits.kind == "rotated":
            return keys
        start = self.first_of(first)
        cos, sin = self.positions.tables(start, start + keys.shape[1])
        return rotate(keys, cos, sin)

    def _values(self, row: int, blocks: int) -> Tensor:
        """Values `[H, blocks · N, D]` fp32 of the first blocks, turned where they are stored so."""
        bits = self.bits
        codes, scales = self.blocks_of("values", row, 0, blocks)
        values = dequantise(codes, scales, self.heads.head_dim, bits.values, bits.group)
        if bits.rank:
            tokens, channels = self._thin("values", row, 0, blocks)
            values = values + tokens.float().mT @ channels.float()
        values = values.flatten(1, 2)
        return values if self.value_balance is None else values * self.value_balance

    def pack(
        self, row: int, first: int, exact: Sequence[Tensor], attention: Tensor | None = None
    ) -> None:
        """Packs rotated keys and values `[H, n · N, D]` as the blocks from `first` on.

        Args:
            attention: `[H, n · N]`, what their probes paid to them, where there are two tiers; None
                for what lies beside the ring.
        """
        if self.bits.rest is not None and attention is None:
            attention = self.exact.planes["attention"][row]
        bits = self.bits
        keys, values = (x.float() for x in exact)
        count = keys.shape[1] // bits.group
        if not count:
            return
        if bits.kind == "unrotated":
            start = self.first_of(first)
            cos, sin = self.positions.tables(start, start + keys.shape[1])
            keys = rotate(keys, cos, -sin) / self.positions.rope.scale**2
        keys = to_stored(keys, bits, self.order)
        keys = keys if self.key_balance is None else keys / self.key_balance
        values = values if bits.hadamard == "none" else turn(values)
        values = values if self.value_balance is None else values / self.value_balance
        keys, values = (x.unflatten(1, (count, -1)) for x in (keys, values))  # [H, n, N, D]
        for prefix, tier, at in zip(_PREFIXES, bits.tiers, self._chosen(attention), strict=False):
            k, v = keys, values
            if at is not None:
                places = at[..., None].expand(*at.shape, self.heads.head_dim)
                k, v = (x.gather(2, places) for x in (k, v))
            for part, x, width, clip in (
                ("keys", k.mT if bits.axis == "channel" else k, tier.keys, bits.key_clip),
                ("values", v, tier.values, bits.value_clip),
            ):
                if part == "values" and bits.kept is not None:
                    for name, found in zip(_SPARSE, compress(x, bits.kept), strict=True):
                        self.write_blocks(name, row, slice(first, first + count), found)
                    continue
                codes, scales = self.put_blocks(prefix + part, row, first, x, width, clip)
                if bits.rank:
                    left = x - dequantise(codes, scales, x.shape[-1], width, bits.group)
                    left = left.mT if part == "keys" and bits.axis == "channel" else left
                    for factor, found in zip(_FACTORS, low_rank(left, bits.rank), strict=True):
                        self.write_blocks(part + factor, row, slice(first, first + count), found)

    def _chosen(self, attention: Tensor | None) -> Sequence[Tensor | None]:
        """Which tokens of each block `[H, n, tokens]` are in a tier; None for all.

        A token's saliency is p_i = Σ_k A_ki / |{k >= i}| over the probes k and the query heads of
        a KV head (ZipCache): the last tokens may be behind some of the probes.
        """
        if attention is None:
            return [None]
        size = self.bits.group
        probes = torch.arange(-self.bits.probes, 0, device=attention.device)
        probes += size + self.bits.window - 1  # from the start of a block
        saw = probes[:, None] >= torch.arange(size, device=attention.device)
        saliency = attention.unflatten(1, (-1, size)) / saw.sum(dim=0)
        ranked = saliency.argsort(dim=-1, descending=True, stable=True)
        parts = ranked.split([tier.tokens for tier in self.bits.tiers], dim=-1)
        return [part.sort(dim=-1).values for part in parts]

    def _thin(self, part: str, row: int, first: int, end: int) -> Sequence[Tensor]:
        """The factors of what codes left out of blocks, `[H, blocks, r, N or D]`."""
        return [self.read_blocks(part + factor, row, first, end) for factor in _FACTORS]
