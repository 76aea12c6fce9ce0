"""A hybrid behind the length that it was taught: KL and perplexity by position, up to 4096 tokens.

    python benchmarks/receptive_field.py hybrid smollm2 --taught 1024 \
        -o benchmarks/results/receptive_field.json

Every eighth prediction of texts that are read from their start, fp32, in the original, the hybrid,
and the hybrid with the plans of `calibrate receptive-field`, also with other bounds of what is a
global head.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate import receptive_field
from kvtool.calibrate.bit_options import QuantizationOptions
from kvtool.calibrate.quantization import everything
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.divergence import kl_divergence
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine

LENGTH, BUCKET, EVERY = 4096, 512, 8
BOUNDS = (1e-3, 1e-6)


@torch.inference_mode()
def predictions(engine: Engine, ids: Tensor) -> Tensor:
    """Log-probabilities `[LENGTH / EVERY, V]`."""
    cache = engine.new_cache(1, LENGTH)
    logits = engine.extend(cache, ids[:-1], all_logits=True, every=EVERY, chunk=1024)
    return logits.log_softmax(-1)


def buckets(expected: Tensor, said: Tensor, ids: Tensor) -> list[dict[str, float]]:
    """KL and perplexity ratio to the original by position."""
    size, come = BUCKET // EVERY, ids[1::EVERY, None]
    found = []
    for start in range(0, len(come), size):
        own = slice(start, start + size)
        p, q = expected[own], said[own]
        ratio = float((p.gather(1, come[own]) - q.gather(1, come[own])).mean())
        kl = float(kl_divergence(p.double(), q.double()).sum()) / len(p)
        found.append({"until": (start + size) * EVERY, "kl": kl, "nats": ratio})
    return found


def plans(checkpoint: Checkpoint, taught: int, tokens: int) -> dict[str, Plan | None]:
    """By name; None for the hybrid as it is."""
    start = everything(checkpoint, base_of(checkpoint), QuantizationOptions())
    found: dict[str, Plan | None] = {"hybrid": None}
    for bound in BOUNDS:
        receptive_field.GLOBAL = bound
        made = receptive_field.calibrate_receptive_field(
            checkpoint, start, taught, LENGTH, None, tokens, 0
        )
        heads = made.provenance[-1]["global_heads"]
        found[f"global above {bound:g}: {heads} heads"] = made
    return found


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("original")
    parser.add_argument("--taught", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration.")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    checkpoint, original = Checkpoint.open(args.model), Checkpoint.open(args.original)
    texts = evaluation_text().windows(checkpoint.tokenizer(), LENGTH + 1, args.windows)
    engine = Engine.load(original)
    expected = [predictions(engine, ids) for ids in texts]
    del engine
    rows: list[dict[str, Any]] = []
    for name, plan in plans(checkpoint, args.taught, args.tokens).items():
        engine = Engine.load(checkpoint, plan=plan)
        each = [
            buckets(p, predictions(engine, ids), ids)
            for p, ids in zip(expected, texts, strict=True)
        ]
        positions = [
            {
                "until": group[0]["until"],
                "kl": fmean(x["kl"] for x in group),
                "perplexity_ratio": math.exp(fmean(x["nats"] for x in group)),
            }
            for group in zip(*each, strict=True)
        ]
        rows.append({"name": name, "positions": positions})
        print(json.dumps(rows[-1]), flush=True)
    document = {
        "model": original.source,
        "environment": environment(torch.device("cpu"), torch.float32),
        "taught": args.taught,
        "windows": args.windows,
        "rows": rows,
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
