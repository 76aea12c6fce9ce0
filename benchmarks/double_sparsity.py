"""Few tokens read of a cache that keeps all: recall of attention, KL, pass-keys, decode speed.

    kvtool calibrate retrieval-heads smollm2 --length 1024 --samples 4 -o heads.plan
    python benchmarks/double_sparsity.py smollm2 -o benchmarks/results/double_sparsity.json

and the last again with `--heads heads.plan`, and with `--speed`: each adds its part to the file.

Recall is the share of a query's attention, in windows of 4096 tokens, that lies on the tokens that
labels choose for it, mean over heads, layers and every 32nd query of the second half: channels
ranked by `calibrate double-sparsity`, by the paper's rule and others, and scores of query heads
joined in several ways. KL, perplexity and pass-keys are measured as in `quantization.py`: 3840
tokens are prefilled, the next 256 true ones decoded. Steps are timed in turn, from caches of random
numbers, in processor time of the one thread there is; bytes are what a step reads of the cache of
a bf16 model, beside what that keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from projections import Cases
from torch import Tensor

from kvtool.calibrate.double_sparsity import label_orders, labelled
from kvtool.calibrate.layer_sums import Seen, watched
from kvtool.calibrate.projections import text_windows
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.evaluate.throughput import environment
from kvtool.kernels.decode_attention import decode_attention
from kvtool.kernels.sparse_reading import sparse_attention
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.runtime.cache import KVCache
from kvtool.runtime.split import SplitStore
from kvtool.sparse import SparseReading

CONTEXT, CONTINUATION, WINDOWS = 4096, 256, 3
LABELS, TOKENS = (4, 8, 16, 32), (64, 128, 256, 512)
EVERY = 32
QUALITY = ((16, 256), (16, 128), (16, 512), (8, 256), (32, 256), (64, 256))
LENGTHS, STEPS = (1024, 2048, 4096, 8100), 36
SHAPES = {"smollm2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
"""Of the attention alone: query heads, KV heads, head size."""
OURS, PAPER = "calibrate double-sparsity", "the paper's, E|qk| of a token"
SINK, WINDOW = SparseReading.sink, SparseReading.window

Orders = dict[str, list[Tensor]]
"""By the name of a ranking, the channels `[H, D]` of every layer."""


def in_pairs(scores: Tensor) -> Tensor:
    """Channels in order of what the two halves of their RoPE pair have together."""
    half = scores.shape[-1] // 2
    pairs = scores.unflatten(-1, (2, half)).sum(-2).argsort(-1, descending=True)
    return torch.stack((pairs, pairs + half), dim=-1).flatten(-2)


def alone(statistics: LayerStatistics, heads: int) -> Tensor:
    """E[q_c²] Var(k_c) `[H, D]`: what channels err, without what they have in common."""
    queries, keys = statistics.rotated_queries, statistics.rotated_keys
    asked = (queries.second.diagonal(dim1=-2, dim2=-1) / queries.tokens).unflatten(0, (heads, -1))
    return asked.sum(1) * keys.covariance.diagonal().unflatten(0, (heads, -1))


class Recall:
    """How much attention chosen tokens hold."""

    def __init__(self, checkpoint: Checkpoint, tokens: int) -> None:
        self.stream = LayerStream(checkpoint)
        self.layout = self.stream.layouts[0]
        self.statistics = collect(checkpoint, StatisticsOptions())
        self.read = text_windows(checkpoint, None, tokens, 0)
        texts = evaluation_text().windows(checkpoint.tokenizer(), CONTEXT, 2)
        self.judged = self.stream.embed(texts)
        self.held: dict[tuple[str, str, int, int], list[float]] = {}

    @torch.inference_mode()
    def measure(self) -> Orders:
        """Goes through all layers once."""
        ids, offsets = self.read
        calibration, starts = self.stream.embed(ids), torch.tensor(offsets)
        orders: Orders = {}
        for index in range(len(self.stream)):
            layer = self.stream.layer(index)
            same = torch.zeros(self.layout.kv_heads, self.layout.head_dim)
            for row, start in zip(calibration.split(1), starts.split(1), strict=True):
                seen: list[Seen] = []
                row.copy_(layer(row, watched(self.stream, layer, start, seen)))
                same += self._same_token(seen[0])
            found = self._rankings(index, same)
            for name, order in found.items():
                orders.setdefault(name, []).append(order)
            for row in self.judged.split(1):
                seen = []
                row.copy_(layer(row, watched(self.stream, layer, torch.zeros(1).long(), seen)))
                self._judge(found, seen[0])
            print(f"layer {index}", file=sys.stderr, flush=True)
        return orders

    def _same_token(self, seen: Seen) -> Tensor:
        """Σ |q_c k_c| of the same token, over tokens behind the sinks and query heads `[H, D]`."""
        q = seen.q_rotated[0].unflatten(0, (self.layout.kv_heads, -1))
        return (q * seen.k_rotated[0][:, None]).abs()[:, :, SINK:].sum((1, 2))

    def _rankings(self, index: int, same: Tensor) -> dict[str, Tensor]:
        statistics, heads = self.statistics.layer(index), self.layout.kv_heads
        own = alone(statistics, heads)
        return {
            OURS: label_orders(statistics, heads),
            "E[q²] Var(k)": own.argsort(-1, descending=True),
            "E[q²] Var(k), pairs": in_pairs(own),
            PAPER: same.argsort(-1, descending=True),
            "the paper's, pairs": in_pairs(same),
        }

    def _judge(self, rankings: dict[str, Tensor], seen: Seen) -> None:
        heads, scaling = self.layout.kv_heads, self.layout.scaling
        at, now = torch.arange(CONTEXT), torch.arange(CONTEXT // 2 + EVERY - 1, CONTEXT, EVERY)
        keys = seen.k_rotated[0][:, None]  # [H, 1, T, D]
        asked = seen.q_rotated[0].unflatten(0, (heads, -1))[:, :, now] * scaling
        future = at > now[:, None]
        always = ((at < SINK) | (at > now[:, None] - WINDOW)) & ~future

        def scores(order: Tensor, labels: int) -> Tensor:
            q, k = (
                x.gather(-1, order[:, None, None].expand(x.shape))[..., :labels]
                for x in (asked, keys)
            )
            return (q @ k.mT).masked_fill(future, -torch.inf)

        def hold(name: str, joined: str, labels: int, shares: Tensor) -> None:
            shares = shares.masked_fill(always, torch.inf)
            for tokens in TOKENS:
                top = shares.topk(tokens).indices[:, None].expand(-1, attention.shape[1], -1, -1)
                held = float(attention.gather(-1, top).sum(-1).mean())
                self.held.setdefault((name, joined, labels, tokens), []).append(held)

        size = self.layout.head_dim
        whole = scores(next(iter(rankings.values())), size)
        attention = whole.softmax(-1)
        hold("all channels", "sum of shares", size, attention.sum(1))
        for name, order in rankings.items():
            for labels in LABELS:
                found = scores(order, labels)
                hold(name, "sum of shares", labels, found.softmax(-1).sum(1))
                if name == OURS and labels == 16:
                    hold(name, "largest share", labels, found.softmax(-1).amax(1))
                    hold(name, "largest score", labels, found.amax(1))
                    hold(name, "mean score", labels, found.mean(1))

    def rows(self) -> list[dict[str, Any]]:
        """Means over layers and windows."""
        return [
            {"channels": name, "joined": joined, "labels": r, "tokens": k, "held": fmean(each)}
            for (name, joined, r, k), each in self.held.items()
        ]


def everything(checkpoint: Checkpoint) -> Plan:
    """The plan that all is kept and read."""
    return Plan(base_of(checkpoint), whole_layers(checkpoint))


def quality(checkpoint: Checkpoint, orders: Orders) -> list[dict[str, Any]]:
    """KL, perplexity ratio and pass-keys."""
    cases, start = Cases(checkpoint, CONTEXT - CONTINUATION, WINDOWS), everything(checkpoint)
    asked = [(OURS, r, k) for r, k in QUALITY]
    asked += [(name, 16, 256) for name in orders if name != OURS]
    asked.append((PAPER, 8, 256))
    rows = []
    for name, labels, tokens in asked:
        made = labelled(start, [order[:, :labels] for order in orders[name]], tokens)
        found = cases.measure(Engine.load(checkpoint, plan=made))
        rows.append({"channels": name, "labels": labels, "tokens": tokens, **found, **size(made)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def streaming(checkpoint: Checkpoint, heads: Plan, orders: list[Tensor]) -> list[dict[str, Any]]:
    """The same where heads stream, and the others are read whole or sparsely."""
    cases = Cases(checkpoint, CONTEXT - CONTINUATION, WINDOWS)
    sparse, rows = labelled(heads, [order[:, :16] for order in orders], 256), []
    for name, plan in (("read whole", heads), ("16 labels, 256 tokens", sparse)):
        found = cases.measure(Engine.load(checkpoint, plan=plan))
        rows.append({"others": name, "streaming": plan.streaming_heads, **found, **size(plan)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def size(plan: Plan, context: int = CONTEXT) -> dict[str, int]:
    """Bytes of a bf16 model: kept, and read by a step."""
    kept, read = plan.cache_bytes(context, 2), plan.read_bytes(context, 2)
    return {"bytes_kept": kept, "bytes_read": read, "native_bytes": plan.native_bytes(context, 2)}


def filled(engine: Engine, length: int) -> KVCache:
    """A cache that holds so many tokens of random numbers."""
    cache = engine.new_cache(1, length + STEPS + 1)
    for store in cache.stores:
        for part in store.parts if isinstance(store, SplitStore) else [store]:
            for plane in part.planes.values():
                plane.normal_()
    cache.lengths = [length]
    return cache


def medians(steps: dict[str, Callable[[], Any]], rounds: int = STEPS) -> dict[str, float]:
    """Seconds of the processor for each, taken in turn; the first rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn >= 4:
                taken[name].append(time.process_time() - started)
    return {name: median(each) for name, each in taken.items()}


def speeds(checkpoint: Checkpoint, orders: list[Tensor]) -> list[dict[str, Any]]:
    """Decode steps of one sequence."""
    start = everything(checkpoint)
    plans = {
        (r, k): labelled(start, [order[:, :r] for order in orders], k)
        for r, k in ((16, 256), (8, 256), (16, 128))
    }
    dense = Engine.load(checkpoint)
    engines = {key: Engine.load(checkpoint, plan=plan) for key, plan in plans.items()}
    token, rows = torch.tensor([5]), []
    for length in LENGTHS:
        steps = {"dense": partial(dense.decode, filled(dense, length), token)}
        steps |= {
            str(key): partial(engine.decode, filled(engine, length), token)
            for key, engine in engines.items()
        }
        taken = medians(steps)
        for (labels, tokens), plan in plans.items():
            seconds = taken[str((labels, tokens))]
            row = {"context": length, "labels": labels, "tokens": tokens}
            row |= {"milliseconds": 1000 * seconds, "dense_milliseconds": 1000 * taken["dense"]}
            rows.append({**row, "ratio": taken["dense"] / seconds, **size(plan, length)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _dense(q: Tensor, caches: Iterator[Tensor], length: int) -> Tensor:
    k, v = next(caches)
    return decode_attention(q[None], k[None], v[None], [length], q.shape[1] ** -0.5)


def _sparse(q: Tensor, caches: Iterator[Tensor], length: int, labels: int) -> Tensor:
    k, v = next(caches)
    return sparse_attention(q, k, v, length, labels, 256, SINK, WINDOW, q.shape[1] ** -0.5)


def _labels(q: Tensor, caches: Iterator[Tensor], labels: int) -> Tensor:
    """Their product as it is: rows lie as far apart as whole keys."""
    keys = next(caches)[0]
    return torch.bmm(q[:, :labels].view(len(keys), -1, labels), keys[..., :labels].mT)


def _labels_in_a_plane(q: Tensor, planes: Iterator[Tensor], labels: int) -> Tensor:
    """And as it would be if labels lay behind each other."""
    plane = next(planes)
    return torch.bmm(q[:, :labels].view(len(plane), -1, labels), plane.mT)


@torch.inference_mode()
def attention_alone() -> list[dict[str, Any]]:
    """One layer's attention of a new token, from caches that are in no cache of the processor."""
    rows = []
    for shape, (queries, heads, width) in SHAPES.items():
        for length in (2048, 4096, 8192, 16384):
            copies = max(2, 2**28 // (8 * heads * width * length))
            caches = cycle(torch.randn(copies, 2, heads, length, width))
            q, labels = torch.randn(queries, width), width // 4
            plane = cycle(torch.randn(8 * copies, heads, length, labels))
            steps = {
                "dense": partial(_dense, q, caches, length),
                "sparse": partial(_sparse, q, caches, length, labels),
                "labels": partial(_labels, q, caches, labels),
                "labels_in_a_plane": partial(_labels_in_a_plane, q, plane, labels),
            }
            taken = medians(steps)
            row = {"shape": shape, "context": length, "labels": labels, "tokens": 256}
            for name, seconds in taken.items():
                row[f"{name}_microseconds"] = 1e6 * seconds
            rows.append({**row, "ratio": taken["dense"] / taken["sparse"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--heads", type=Path, help="Measure a plan of heads instead.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration, the paper's.")
    parser.add_argument("--speed", action="store_true", help="Measure speeds instead.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    document = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    statistics, heads = collect(checkpoint, StatisticsOptions()), base_of(checkpoint).kv_heads
    orders = [label_orders(statistics.layer(i), heads) for i in range(len(statistics))]
    if asked.speed:
        document |= {"decode": speeds(checkpoint, orders), "attention": attention_alone()}
    elif asked.heads is not None:
        document["streaming"] = streaming(checkpoint, Plan.read(asked.heads), orders)
    else:
        recall = Recall(checkpoint, asked.tokens)
        ranked = recall.measure()
        document["recall"] = recall.rows()
        document["quality"] = quality(checkpoint, ranked)
    document |= {
        "model": asked.model,
        "commands": sorted({*document.get("commands", []), " ".join(["python", *sys.argv])}),
        "context": CONTEXT,
        "continuation": CONTINUATION,
        "windows": WINDOWS,
        "dtype": "float32; bytes as of a bfloat16 model",
        "environment": environment(torch.device("cpu"), torch.float32),
        "threads": torch.get_num_threads(),
    }
    asked.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
