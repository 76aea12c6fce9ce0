"""Decode speed of what plans keep beside the full cache: where does the smaller one become faster?

    kvtool calibrate retrieval-heads smollm2 -o heads.plan
    kvtool calibrate quantization smollm2 --bits auto --kv-budget 28% -o bits.plan
    kvtool calibrate quantization smollm2 --bits fp8 -o fp8.plan
    kvtool calibrate projections smollm2 --kv-budget 50% --context 8192 -o half.plan
    python benchmarks/decode_plans.py smollm2 heads.plan bits.plan fp8.plan half.plan -o FILE

One token at a time in one process, full cache and plans in turn, medians over the steps. Only the
lengths count, so the caches hold random numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from kvtool.checkpoint import Checkpoint
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan
from kvtool.runtime import Engine
from kvtool.runtime.cache import KVCache
from kvtool.runtime.split import SplitStore

LENGTHS = (512, 1024, 2048, 4096, 6144, 8100)
STEPS = 40


def filled(engine: Engine, length: int) -> KVCache:
    """A cache that holds so many tokens of random numbers."""
    cache = engine.new_cache(1, length + STEPS + 1)
    for store in cache.stores:
        for part in store.parts if isinstance(store, SplitStore) else [store]:
            for held in (part, getattr(part, "exact", None) or part):
                for plane in held.planes.values():
                    if plane.dtype == torch.uint8:
                        plane.random_(120)  # codes of any width; in e4m3, numbers up to 240
                    else:
                        plane.normal_()
    cache.lengths = [length]
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    engines = {"full": Engine.load(checkpoint)}
    for path in arguments.plans:
        engines[path.stem] = Engine.load(checkpoint, plan=Plan.read(path))
    rows = []
    for length in LENGTHS:
        caches = {name: filled(engine, length) for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for step in range(STEPS):
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.decode(caches[name], torch.tensor([5]))
                if step >= 4:
                    seconds[name].append(time.perf_counter() - started)
        full = median(seconds["full"])
        for name, times in seconds.items():
            speed, ratio = 1 / median(times), full / median(times)
            size = caches[name].allocated_bytes
            row = {"context": length, "cache": name, "tokens_per_second": speed, "ratio": ratio}
            rows.append(row | {"bytes": size})
            print(f"{length:6} {name:12} {speed:7.1f} tokens/s {ratio:6.2f}x", flush=True)
    document = {
        "model": arguments.model,
        "steps": STEPS,
        "environment": environment(torch.device("cpu"), torch.float32),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
