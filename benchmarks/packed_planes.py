"""Few bits for what is not heads: states of Mamba-2 layers, and latents of MLA layers.

    kvtool convert smollm2 --to mla --kv-budget 50% --tokens 8192 -o mla
    python benchmarks/packed_planes.py latents mla smollm2 \
        -o benchmarks/results/packed_latents.json
    python benchmarks/packed_planes.py states hybrid smollm2 \
        -o benchmarks/results/packed_states.json

Models run in fp32, and bytes are those of a bf16 model, as allocated. Of latents, a prompt is read
and packed, and the next true tokens are fed through the cache. Of states, a text is fed from its
start, so that errors add up, and predictions are judged behind so many tokens; what a state is
packed to depends on how many tokens have come, and not on the calls.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate import latents
from kvtool.calibrate.bit_options import QuantizationOptions
from kvtool.calibrate.projections import text_windows
from kvtool.calibrate.quantization import calibrate_quantization, everything, with_states
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.divergence import kl_divergence
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.runtime.cache import KVCache
from kvtool.states import StatePlan

CONTEXT = 4096
PREFILL, CONTINUATION, WINDOWS = 1792, 256, 2
BEHIND = ((0, 64), (448, 512), (3584, 4096))
"""Tokens behind which predictions are judged in a text."""
STATES = ((8, 1), (8, 8), (4, 8), (4, 16))
"""Bits, and after how many tokens a state is packed."""
STEPS = 24


def compared(expected: Tensor, said: Tensor, ids: Tensor) -> dict[str, float]:
    """Of logits `[C, V]` in front of the tokens `[C]` that came."""
    p, q = expected.log_softmax(-1), said.log_softmax(-1)
    come = ids[:, None]
    ratio = float((p.gather(1, come) - q.gather(1, come)).mean())
    return {
        "kl": float(kl_divergence(p.double(), q.double()).sum()) / len(ids),
        "perplexity_ratio": math.exp(ratio),
    }


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Over windows."""
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def allocated(checkpoint: Checkpoint, plan: Plan | None) -> int:
    """Bytes of a cache for one sequence of a bf16 model."""
    engine = Engine.load(checkpoint, dtype=torch.bfloat16, plan=plan)
    return engine.new_cache(1, CONTEXT).allocated_bytes


# ------------------------------------------------------------------------------- of latents


def packed(engine: Engine, prompt: KVCache) -> KVCache:
    """What the stores of an engine with a plan hold behind a prompt that was read without one."""
    cache = engine.new_cache(1, PREFILL + CONTINUATION)
    for exact, store in zip(prompt.stores, cache.stores, strict=True):
        store.end_prompt(0, exact.planes["latents"][:, :PREFILL])
    cache.lengths = [PREFILL]
    return cache


@torch.inference_mode()
def of_latents(checkpoint: Checkpoint, original: Checkpoint, tokens: int) -> dict[str, Any]:
    """Rows by bits, those that all numbers have, and those that are shared by harm."""
    plain, first = Engine.load(checkpoint), Engine.load(original)
    texts = evaluation_text().windows(checkpoint.tokenizer(), PREFILL + CONTINUATION + 1, WINDOWS)
    prompts, exact, source = [], [], []
    for ids in texts:
        for engine, logits in ((plain, exact), (first, source)):
            cache = engine.new_cache(1, PREFILL + CONTINUATION)
            engine.extend(cache, ids[:PREFILL])
            if engine is plain:
                prompts.append(KVCache(cache.stores, 1))
                saved = [x.planes["latents"][:, :PREFILL].clone() for x in cache.stores]
            logits.append(engine.extend(cache, ids[PREFILL:-1], all_logits=True))
            if engine is plain:
                for store, plane in zip(cache.stores, saved, strict=True):
                    store.planes["latents"] = plane
    targets = [ids[PREFILL + 1 :] for ids in texts]
    native, latent = allocated(original, None), allocated(checkpoint, None)
    rows = [
        {
            "name": "not packed",
            "bytes": latent,
            "share_of_native": latent / native,
            "to_the_original": mean(
                [compared(*x) for x in zip(source, exact, targets, strict=True)]
            ),
        }
    ]
    print(rows[-1], flush=True)
    for name, plan in latent_plans(checkpoint, tokens):
        engine, said = Engine.load(checkpoint, plan=plan), []
        for ids, prompt in zip(texts, prompts, strict=True):
            said.append(engine.extend(packed(engine, prompt), ids[PREFILL:-1], all_logits=True))
        size = allocated(checkpoint, plan)
        assert size == plan.cache_bytes(CONTEXT, 2)
        kept = latents.latents_of(plan)
        rows.append(
            {
                "name": name,
                "bits_of_latents": fmean(n for x in kept for n in x.bits[: x.rank]),
                "bits_of_shared_keys": fmean(n for x in kept for n in x.bits[x.rank :]),
                "bytes": size,
                "share_of_latents": size / latent,
                "share_of_native": size / native,
                "bytes_per_token": plan.bytes_per_token(2),
                "to_the_latents": mean(
                    [compared(*x) for x in zip(exact, said, targets, strict=True)]
                ),
                "to_the_original": mean(
                    [compared(*x) for x in zip(source, said, targets, strict=True)]
                ),
            }
        )
        print(rows[-1], flush=True)
    return {"native_bytes": native, "prefill": PREFILL, "windows": WINDOWS, "rows": rows}


def latent_plans(checkpoint: Checkpoint, tokens: int) -> Iterator[tuple[str, Plan]]:
    """Names and plans; harm is measured once for all of them."""
    options = QuantizationOptions(tokens=tokens)
    start = everything(checkpoint, base_of(checkpoint), options)
    with torch.inference_mode(False):
        windows, offsets = text_windows(checkpoint, None, tokens, options.seed)
        harm = latents.harms(checkpoint, start, windows, offsets, options.seed, lambda *_: None)
    for bits in (8, 4, 3, 2.5, 2):
        same = latents.alike(start, math.ceil(bits))
        if bits == math.ceil(bits):
            yield f"{bits} bits for every number", same
        if bits not in (2, 8):
            numbers = sum(x.width for x in latents.latents_of(start))
            less = round((math.ceil(bits) - bits) * numbers * options.group / 8)
            allowed = sum(x.block_bytes() for x in latents.latents_of(same)) - less
            yield f"{bits} bits in the mean, by harm", latents.shared(start, harm, allowed)[0]


# -------------------------------------------------------------------------------- of states


@torch.inference_mode()
def fed(engine: Engine, ids: Tensor) -> list[Tensor]:
    """Logits behind the tokens of :data:`BEHIND`."""
    cache, found, start = engine.new_cache(1, CONTEXT), [], 0
    for first, end in BEHIND:
        if first > start:
            engine.extend(cache, ids[start:first])
        found.append(engine.extend(cache, ids[first:end], all_logits=True))
        start = end
    return found


def of_states(checkpoint: Checkpoint, original: Checkpoint, tokens: int) -> dict[str, Any]:
    """Rows by bits and chunk, and one whose heads have few bits, too."""
    plain = Engine.load(checkpoint)
    ids = evaluation_text().windows(checkpoint.tokenizer(), CONTEXT + 1, 1)[0]
    expected = fed(plain, ids)
    targets = [ids[first + 1 : end + 1] for first, end in BEHIND]
    source = fed(Engine.load(original), ids)
    start = everything(checkpoint, base_of(checkpoint), QuantizationOptions())
    states = [x.kept for x in start.layers if isinstance(x.kept, StatePlan)]
    exact, native = allocated(checkpoint, None), allocated(original, None)
    result: dict[str, Any] = {
        "layers_with_states": len(states),
        "bytes": exact,
        "share_of_native": exact / native,
        "state_bytes_per_layer": states[0].native_bytes(CONTEXT, 2),
        "exact_to_the_original": judged(source, expected, targets),
        "rows": [],
    }
    print(result, flush=True)

    def add(name: str, plan: Plan) -> None:
        engine = Engine.load(checkpoint, plan=plan)
        size = allocated(checkpoint, plan)
        assert size == plan.cache_bytes(CONTEXT, 2)
        one = next(x.kept for x in plan.layers if isinstance(x.kept, StatePlan))
        said = fed(engine, ids)
        result["rows"].append(
            {
                "name": name,
                "state_bytes_per_layer": one.cache_bytes(CONTEXT, 2),
                "bytes": size,
                "share_of_exact": size / exact,
                "share_of_native": size / native,
                "behind": judged(expected, said, targets),
                "to_the_original": judged(source, said, targets)[-1],
            }
        )
        print(result["rows"][-1], flush=True)

    for bits, chunk in STATES:
        plan = with_states(start, bits)
        layers = (
            x if x.kept is None else replace(x, kept=replace(x.kept, chunk=chunk))
            for x in plan.layers
        )
        add(f"{bits} bits, every {chunk} tokens", replace(plan, layers=tuple(layers)))
    options = QuantizationOptions(tokens=tokens)
    plan = calibrate_quantization(checkpoint, options, start, None, 2)
    add("states 8 bits, heads 4 in the mean", plan)
    result["decode"] = speed(checkpoint, start)
    return result


def judged(
    expected: list[Tensor], said: list[Tensor], targets: list[Tensor]
) -> list[dict[str, Any]]:
    """One entry for each of :data:`BEHIND`."""
    return [
        {"tokens": end, **compared(p, q, ids)}
        for (_, end), p, q, ids in zip(BEHIND, expected, said, targets, strict=True)
    ]


def speed(checkpoint: Checkpoint, start: Plan) -> dict[str, float]:
    """Milliseconds of a decode step behind 512 tokens, medians of steps taken in turn."""
    engines = {"fp32": Engine.load(checkpoint)}
    for bits in (8, 4):
        engines[f"{bits} bits"] = Engine.load(checkpoint, plan=with_states(start, bits))
    caches, taken = {}, {}
    for name, engine in engines.items():
        caches[name], taken[name] = engine.new_cache(1, CONTEXT), []
        engine.extend(caches[name], torch.arange(512))
    for _ in range(STEPS):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.decode(caches[name], torch.tensor([5]))
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: median(x[2:]) for name, x in taken.items()}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["latents", "states"])
    parser.add_argument("model", help="An MLA checkpoint, or a hybrid.")
    parser.add_argument("original", help="What it was converted from.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    checkpoint, original = Checkpoint.open(args.model), Checkpoint.open(args.original)
    measure = of_latents if args.what == "latents" else of_states
    document = {
        "model": original.source,
        "environment": environment(torch.device("cpu"), torch.float32),
        "context": CONTEXT,
        **measure(checkpoint, original, args.tokens),
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
