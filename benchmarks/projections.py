"""All codes beside each other: KL, perplexity and recall through the cache, at measured bytes.

    python benchmarks/projections.py smollm2 -o benchmarks/results/projections.json [PLAN ...]

Makes one plan of every method (or takes the named ones, NAME=FILE), cuts each to every budget, and
measures each cut: 1536 tokens of a window are prefilled, the next 256 true ones fed through the
cache that they left; pass-keys are asked for after the context was coded. A prompt is read densely,
so its keys and values are the same for all plans: one dense reading fills the stores of all.
Prints the table, writes JSON, and draws the front beside it (.svg). Rows that are in the file
already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kvtool import slices
from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.divergence import kl_divergence
from kvtool.errors import PlanError
from kvtool.evaluate.retrieval import ANSWER_TOKENS, answer, is_exact, passkey_cases
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.rope import rotate
from kvtool.runtime import Engine
from kvtool.runtime.cache import KVCache
from kvtool.runtime.coded import Tokens
from kvtool.runtime.layers import Step
from kvtool.runtime.sparse import SparseHeads
from kvtool.runtime.split import SplitStore
from kvtool.runtime.stores import DenseStore

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
PREFILL, CONTINUATION, WINDOWS = 1536, 256, 6
LENGTHS = (2048,)
DEEP = ("aware", "xkv")
"""Codes that are worth measuring at the smallest budget too."""
METHODS: dict[str, dict[str, Any]] = {
    "pca": {"method": "pca"},
    "asvd": {"method": "asvd"},
    "palu": {"method": "palu"},
    "cskv": {"method": "cskv"},
    "xkv, 4 layers": {"method": "xkv", "together": 4},
    "aware": {"method": "aware"},
    "aware rebuilt": {"method": "aware", "read": "rebuilt"},
    "aware rebuilt, 5 layers": {"method": "aware", "read": "rebuilt", "together": 5},
}


def read(engine: Engine, ids: Tensor) -> KVCache:
    """A dense cache that has read a prompt."""
    cache = engine.new_cache(1, len(ids))
    engine.extend(cache, ids)
    return cache


def filled(engine: Engine, ids: Tensor, prompt: KVCache, room: int) -> KVCache:
    """What the engine's stores hold behind a prompt that a dense cache has read.

    Stores that rank tokens by the attention of queries read it themselves, and so do those whose
    prompt streams through them.
    """
    length, plan = prompt.lengths[0], engine.plan
    cache = engine.new_cache(1, length + room)
    ranked = plan is not None and any(x.bits and x.bits.rest for x in plan.layers)
    if ranked or (plan is not None and plan.prefill == "streamed"):
        engine.extend(cache, ids)
        return cache
    at = torch.arange(length)
    cos, sin = engine.tables(at[None])[0]
    for dense, store, attention in zip(prompt.stores, cache.stores, engine.attentions, strict=True):
        k, v = (dense.planes[name][:, :, :length] for name in ("keys", "values"))
        if isinstance(store, DenseStore):
            store.write(0, [0], {"keys": k, "values": v})
            continue
        if isinstance(store, SplitStore):
            heads = range(k.shape[1])
            rings = [head for head in heads if attention.layer.streaming[head]]
            own, full = [x[:, attention.full] for x in (k, v)], store.full
            if attention.full and isinstance(full, DenseStore):
                keys = full.ordered(own[0]) if isinstance(full, SparseHeads) else own[0]
                full.write(0, [0], {"keys": keys, "values": own[1]})
            elif attention.full:
                full.end_prompt(0, own[0][0], own[1][0])
            if store.streaming:
                store.streaming.keep_last(0, 0, k[0, rings], v[0, rings])
            continue
        tokens = Tokens(k, rotate(k, cos[:, None], -sin[:, None]), v, k, k, at[None])
        step = Step(cache.stores, 0, [0], [length], length, positions=at[None])
        store.codes.collect(store.layer, tokens, step)
        store.exact.keep_last(0, 0, k[0], v[0])
    cache.lengths = [length]
    return cache


class Cases:
    """What every plan is measured on, read once."""

    def __init__(
        self, checkpoint: Checkpoint, prefill: int = PREFILL, windows: int = WINDOWS
    ) -> None:
        self.engine, self.prefill = Engine.load(checkpoint), prefill
        corpus, tokenizer = evaluation_text(), checkpoint.tokenizer()
        length = prefill + CONTINUATION
        self.windows = []
        for ids in corpus.windows(tokenizer, length + 1, windows):
            prompt = read(self.engine, ids[:prefill])
            cache = self.copy(prompt, CONTINUATION)
            logits = self.engine.extend(cache, ids[prefill:-1], all_logits=True)
            self.windows.append((prompt, ids, logits.log_softmax(-1), cache.allocated_bytes))
        self.keys = [
            (case, read(self.engine, torch.tensor(case.context)))
            for case in passkey_cases(tokenizer, corpus.documents, LENGTHS)
        ]

    def copy(self, prompt: KVCache, room: int) -> KVCache:
        """A dense cache with the same content."""
        cache = self.engine.new_cache(1, prompt.lengths[0] + room)
        for source, target in zip(prompt.stores, cache.stores, strict=True):
            for name, plane in source.planes.items():
                target.planes[name][:, :, : prompt.lengths[0]] = plane[:, :, : prompt.lengths[0]]
        cache.lengths = list(prompt.lengths)
        return cache

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Means over the windows with standard errors, recall, and bytes as allocated."""
        kls, ratios, shares = [], [], []
        for prompt, ids, expected, native in self.windows:
            cache = filled(engine, ids[: self.prefill], prompt, CONTINUATION)
            said = engine.extend(cache, ids[self.prefill : -1], all_logits=True).log_softmax(-1)
            targets = ids[self.prefill + 1 :, None]
            kls.append(float(kl_divergence(expected, said).sum()) / len(said))
            ratios.append(float((expected.gather(1, targets) - said.gather(1, targets)).mean()))
            shares.append(cache.allocated_bytes / native)
        recall: dict[str, list[int]] = {}
        for case, prompt in self.keys:
            for question in case.questions:
                room = len(question.ids) + ANSWER_TOKENS
                cache = filled(engine, torch.tensor(case.context), prompt, room)
                text = engine.tokenizer.decode(answer(engine, cache, question.ids))
                right, all_ = recall.setdefault(str(case.length), [0, 0])
                recall[str(case.length)] = [right + is_exact(text, question.answer), all_ + 1]
        error = 1 / math.sqrt(len(kls))
        return {
            "bytes": fmean(shares),
            "kl": fmean(kls),
            "kl_error": stdev(kls) * error,
            "perplexity_ratio": math.exp(fmean(ratios)),
            "perplexity_ratio_error": math.exp(fmean(ratios)) * stdev(ratios) * error,
            "passkey": recall,
        }


def plan_of(checkpoint: Checkpoint, fields: dict[str, Any]) -> tuple[Plan, float]:
    """A plan at the largest budget, and the seconds that it took."""
    context = PREFILL + CONTINUATION
    options = ProjectionOptions(context=context, **fields)
    native = Plan(base_of(checkpoint), whole_layers(checkpoint)).native_bytes(context, 2)
    budget = int(SHARES[1] * native)
    started = time.perf_counter()
    plan = calibrate_projections(checkpoint, options, budget, 2)
    return plan, time.perf_counter() - started


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per method, one column per budget."""
    lines = ["| code | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |"]
    lines.append("|---" * (len(SHARES) + 1) + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for share in SHARES:
            found = [x for x in rows if x["name"] == name and x["share"] == share]
            keys = "".join(f", {right}/{n}" for x in found for right, n in x["passkey"].values())
            cells += [f"{x['kl']:.4f}, x{x['perplexity_ratio']:.3f}{keys}" for x in found] or ["-"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """KL against bytes, one line per method."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ends = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((x["bytes"], x["kl"]) for x in rows if x["name"] == name)
        (line,) = axes.plot(*zip(*own, strict=True), marker="o", markersize=4)
        ends.append((own[0][1], own[0][0], name, line.get_color()))
    placed: list[tuple[float, float]] = []
    for kl, share, name, colour in sorted(ends):
        near = [at for x, at in placed if abs(x - share) < 0.05]
        at = max([kl, *(1.28 * other for other in near)])  # names must not lie on each other
        placed.append((share, at))
        axes.text(share - 0.01, at, name, ha="right", va="center", fontsize=8, color=colour)
    axes.set(xlabel="cache bytes, measured, share of bf16 keys and values", yscale="log")
    axes.set_ylabel("KL(original || coded), nats per token")
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    axes.set_xlim(-0.12, 0.8)
    axes.set_xticks([0.125, 0.25, 0.375, 0.5, 0.75])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("plans", nargs="*", help="NAME=FILE, measured instead of all methods")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    kept = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    rows: list[dict[str, Any]] = kept.get("rows", [])
    wanted = [argument.split("=", 1) for argument in arguments.plans] or [[x] for x in METHODS]
    cases = None
    for name, *file in wanted:
        if any(x["name"] == name for x in rows):
            continue
        if file:
            plan, seconds = Plan.read(Path(file[0])), None
        else:
            plan, seconds = plan_of(checkpoint, METHODS[name])
        cases = cases or Cases(checkpoint)
        context = PREFILL + CONTINUATION
        for share in SHARES if name.startswith(DEEP) else SHARES[:-1]:
            try:
                own = slices.cut(plan, int(share * plan.native_bytes(context, 2)), context, 2)
            except PlanError as error:
                print(f"{name} {share:.1%}: {error}", file=sys.stderr)
                continue
            if own.cache_bytes(context, 2) < (share - 0.02) * plan.native_bytes(context, 2):
                continue  # a trained plan ends at its own budget
            measured = cases.measure(Engine.load(checkpoint, plan=own))
            (made,) = plan.provenance
            rows.append({"name": name, "share": share, "seconds": seconds, "made": made} | measured)
            print(name, share, {k: measured[k] for k in ("bytes", "kl", "perplexity_ratio")},
                  measured["passkey"], flush=True)  # fmt: skip
            document = {
                "model": arguments.model,
                "command": "python benchmarks/projections.py smollm2",
                "prefill": PREFILL,
                "continuation": CONTINUATION,
                "windows": WINDOWS,
                "dtype": "float32",
                "environment": environment(torch.device("cpu"), torch.float32),
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))
    draw(rows, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
