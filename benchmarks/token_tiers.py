"""What the parts of zipcache, mikv and gear are worth: KL of one reading with rounded keys, values.

    python benchmarks/token_tiers.py smollm2 -o benchmarks/results/token_tiers.json

A text of 1024 tokens is read once. Every query reads sinks and the last 64 tokens or more exactly
and all blocks between them as they would be packed, so one forward pass of the dense model compares
what benchmarks/quantization.py measures through the cache; KL is the mean over the last 704 tokens.
Bits are of a number in a block, scales, minima and factors included. Rows that are in the file
already are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.bits import PROBED
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.evaluate.throughput import environment
from kvtool.kernels.low_rank import low_rank
from kvtool.kernels.quantise import fake_quantise
from kvtool.runtime import Engine

LENGTH, JUDGED, SINK, WINDOW = 1024, 704, 4, 64
Packer = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""What blocks `[H, n, N, D]` of keys and values of a layer are read as; and the attention
`[H, n, N, N + WINDOW]` that each token gets from the queries up to the one it is packed with."""


class Model:
    """The dense model, whose attention reads what `packer` gives for blocks of `size` tokens."""

    packer: Packer | None = None
    size = 64

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.engine = Engine.load(checkpoint)
        for index, attention in enumerate(self.engine.attentions):
            attention.attention = self.reading(attention, index)

    def reading(self, attention: Any, index: int) -> Callable[..., Tensor]:
        """Takes the place of an attention module's `attention`."""

        def read(hidden: Tensor, step: Any, store: Any) -> Tensor:
            stages = attention.stages
            cos, sin = (x[:, None] for x in step.tables[attention.table])
            q, k, v = stages.project(hidden)
            q, k = (x[0] for x in stages.rotate(*stages.normalise(q, k), cos, sin))
            grouped, v = q.unflatten(0, (len(k), -1)) * stages.layout.scaling, v[0]
            at = torch.arange(k.shape[1])

            def masked(keys: Tensor) -> Tensor:
                return (grouped @ keys[:, None].mT).masked_fill_(at > at[:, None], -torch.inf)

            scores = masked(k)
            if self.packer is None:
                return stages.output((scores.softmax(-1) @ v[:, None]).flatten(0, 1)[None], hidden)
            keys, values = self.packed(index, k, v, scores.softmax(-1).sum(1))
            ends = (at + 1 - SINK - WINDOW).clamp_min(0) // self.size * self.size + SINK
            far = (at >= SINK) & (at < ends[:, None])
            weights = torch.where(far, masked(keys), scores).softmax(-1)
            context = (weights * far) @ values[:, None] + (weights * ~far) @ v[:, None]
            return stages.output(context.flatten(0, 1)[None], hidden)

        return read

    def packed(self, index: int, k: Tensor, v: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[H, T, D]` with all whole blocks as they are read."""
        size, keys, values = self.size, k.clone(), v.clone()
        count = (k.shape[1] - SINK - WINDOW) // size
        own = slice(SINK, SINK + count * size)
        got = [
            attention[:, first : first + size + WINDOW - 1, first : first + size].mT
            for first in range(SINK, own.stop, size)
        ]
        blocks = [x[:, own].unflatten(1, (count, size)) for x in (k, v)]
        assert self.packer is not None
        for x, read in zip(
            (keys, values), self.packer(index, *blocks, torch.stack(got, dim=1)), strict=True
        ):
            x[:, own] = read.flatten(1, 2)
        return keys, values

    def predictions(self, ids: Tensor) -> Tensor:
        cache = self.engine.new_cache(1, len(ids))
        return self.engine.extend(cache, ids, all_logits=True)[-JUDGED:].log_softmax(-1)


def by_channel(x: Tensor, bits: int) -> Tensor:
    """A scale per channel of a block `[..., N, D]`."""
    return fake_quantise(x.mT, bits, x.shape[-2]).mT


def by_token(x: Tensor, bits: int, group: int = 64) -> Tensor:
    return fake_quantise(x, bits, group)


def tiers(
    share: float, upper: tuple[int, int], lower: tuple[int, int], key_rounding: Any, ranking: str,
    key_factors: Tensor | None = None, value_factors: Tensor | None = None,
) -> Packer:  # fmt: skip
    """Two tiers by attention: of all queries, of the last eighth, or drawn."""

    def pack(index: int, k: Tensor, v: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        size, width = k.shape[2:]
        queries = torch.arange(attention.shape[-1])
        saw = (queries >= torch.arange(size)[:, None]).float()  # [N, queries]
        last = size // PROBED if ranking == "probes" else len(queries)
        saliency = attention[..., -last:].sum(-1) / saw[:, -last:].sum(-1)
        if ranking == "drawn":
            saliency = torch.rand(saliency.shape, generator=torch.Generator().manual_seed(index))
        ranked = saliency.argsort(dim=-1, descending=True)
        kc = 1.0 if key_factors is None else key_factors[index][:, None, None]
        vc = 1.0 if value_factors is None else value_factors[index][:, None, None]
        keys, values, first = k / kc, v / vc, int(share * size)
        for at, (key_bits, value_bits) in zip(
            ranked.split([first, size - first], dim=-1), (upper, lower), strict=True
        ):
            own = at[..., None].expand(*at.shape, width)
            keys = keys.scatter(2, own, key_rounding(keys.gather(2, own), key_bits))
            values = values.scatter(2, own, by_token(values.gather(2, own), value_bits))
        return keys * kc, values * vc

    return pack


def with_factors(bits: tuple[int, int], rank: int) -> Packer:
    """KIVI's codes, and of what they leave out as much as rank r holds."""

    def pack(index: int, k: Tensor, v: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x, read in ((k, by_channel(k, bits[0])), (v, by_token(v, bits[1]))):
            u, w = low_rank(x - read, max(1, rank))
            found.append(read + (u.float().mT @ w.float() if rank else 0))
        return found[0], found[1]

    return pack


def values_alone(rounding: Callable[[int, Tensor], Tensor]) -> Packer:
    return lambda index, k, v, attention: (k, rounding(index, v))


def variants(checkpoint: Checkpoint) -> Iterator[tuple[str, int, float, Packer]]:
    """Names, tokens of a block, bits per number, and the packer."""
    statistics = collect(checkpoint, StatisticsOptions())
    layers = [statistics.layer(i) for i in range(len(statistics))]
    channels = len(layers[0].rotated_keys.peak)
    width = int(checkpoint.hf_config().head_dim)
    v = torch.stack([x.joint.peak[channels:].unflatten(0, (-1, width)).sqrt() for x in layers])
    heads = v.shape[1]
    balance = torch.stack([
        (x.rotated_keys.peak.unflatten(0, (heads, -1))
         / x.rotated_queries.peak.unflatten(0, (heads, -1)).amax(1)).sqrt()
        for x in layers
    ])  # fmt: skip

    def separated(x: Tensor, bits: int, c: Tensor) -> Tensor:
        return by_token(x / c, bits) * c

    def of_block(x: Tensor) -> Tensor:
        return x.abs().amax(2, keepdim=True).sqrt().clamp_min(1e-6).half().float()

    for bits in (4, 2):
        yield (f"values alone, {bits} bits, groups of 64", 64, bits + 0.5,
               values_alone(lambda i, x, b=bits: by_token(x, b)))  # fmt: skip
        yield (f"values alone, {bits} bits, groups of 32", 64, bits + 1.0,
               values_alone(lambda i, x, b=bits: by_token(x, b, 32)))  # fmt: skip
        yield (f"values alone, {bits} bits, factors of the block", 64, bits + 0.75,
               values_alone(lambda i, x, b=bits: separated(x, b, of_block(x))))  # fmt: skip
        yield (f"values alone, {bits} bits, factors of a text", 64, bits + 0.5,
               values_alone(lambda i, x, b=bits: separated(x, b, v[i][:, None, None])))  # fmt: skip
    for upper, lower in (((4, 4), (2, 2)), ((4, 4), (4, 2))):
        name = f"K{upper[0]}V{upper[1]}/K{lower[0]}V{lower[1]}"
        for size in (64, 128):
            share = int(0.6 * size) / size
            bits = (share * sum(upper) + (1 - share) * sum(lower) + 64 / size + 0.5) / 2
            for ranking in ("probes", "all queries", "drawn") if size == 128 else ("probes",):
                yield (f"{name}, blocks of {size}, {ranking}", size, bits,
                       tiers(share, upper, lower, by_channel, ranking))  # fmt: skip
        yield (f"{name}, blocks of 128, probes, factors of a text", 128,
               (0.59375 * sum(upper) + 0.40625 * sum(lower) + 1.0) / 2,
               tiers(0.59375, upper, lower, by_channel, "probes", None, v))  # fmt: skip
        bits = (sum(upper) + sum(lower)) / 4 + 0.5
        for factors in (None, balance):
            yield (f"{name}, per token, {'not ' if factors is None else ''}balanced", 128, bits,
                   tiers(0.5, upper, lower, by_token, "probes", factors))  # fmt: skip
    for bits, ranks in ((2, (0, 2, 4)), (3, (0, 1)), (4, (0, 2))):
        for rank in ranks:
            yield (f"{bits} bits, rank {rank}", 64, bits + 0.5 + rank / 2,
                   with_factors((bits, bits), rank))  # fmt: skip


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    kept = json.loads(asked.output.read_text()) if asked.output.is_file() else {"rows": []}
    rows: list[dict[str, Any]] = kept["rows"]
    model = Model(checkpoint)
    (ids,) = evaluation_text().windows(checkpoint.tokenizer(), LENGTH, 1)
    expected = model.predictions(ids)
    for name, size, bits, packer in variants(checkpoint):
        if any(row["name"] == name for row in rows):
            continue
        model.size, model.packer = size, packer
        kl = (expected.exp() * (expected - model.predictions(ids))).sum(-1)
        rows.append({"name": name, "bits": bits, "kl": float(kl.mean())})
        print(f"| {name} | {bits:.2f} | {rows[-1]['kl']:.5f} |", flush=True)
        document = {
            "model": asked.model,
            "command": " ".join(["python", *sys.argv]),
            "tokens": LENGTH,
            "judged": JUDGED,
            "sink": SINK,
            "window": WINDOW,
            "environment": environment(torch.device("cpu"), torch.float32),
            "rows": rows,
        }
        asked.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
