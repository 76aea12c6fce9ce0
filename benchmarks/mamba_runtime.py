"""What a hybrid of `convert --to mamba` costs to run on a CPU: cache bytes, decoding, and the scan.

    python benchmarks/mamba_runtime.py smollm2 -o benchmarks/results/mamba/runtime.json

Bytes and speed do not depend on the weights, so mixers and caches hold random numbers. What is
compared runs in turn in one process, medians over the steps; peak memory of a scan is that of a
process of its own, beyond what it has after a short scan and with its inputs made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

from kvtool.checkpoint import Checkpoint
from kvtool.convert import granite
from kvtool.evaluate.throughput import environment
from kvtool.kernels.ssd import ssd_chunked
from kvtool.layout import describe
from kvtool.mamba import CHUNK, Mixer
from kvtool.replacements import mixer_shape
from kvtool.runtime import Engine
from kvtool.runtime.cache import KVCache

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STEPS, WARM = 32, 4
BYTES_AT = (1024, 8192)
TOKENS = 2048
"""Of a scan."""
SHAPES = {"smollm2": (9, 64, 64), "wide": (32, 128, 128)}
"""Heads, their size, and that of their states; a group per head."""
SCANS: dict[str, tuple[str, int]] = {
    "kvtool": ("kvtool", CHUNK),
    "transformers": ("transformers", 256),
    "transformers, equal chunk": ("transformers", CHUNK),
}
REPEATS = 9


@torch.no_grad()
def write_hybrid(checkpoint: Checkpoint, layers: Collection[int], folder: Path) -> None:
    """The model with random mixers in some layers."""
    config = checkpoint.hf_config()
    layout = describe(config)[0]
    taken = granite.other_tensors(checkpoint.tensors, layers)
    tensors = {name: granite.reader(checkpoint.read, parts)() for name, parts in taken.items()}
    for index in layers:
        mixer = Mixer(mixer_shape(layout), linear=True)
        for name, tensor in granite.stock_mixer(mixer, config.rms_norm_eps).items():
            tensors[f"model.layers.{index}.mamba.{name}"] = tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    stock = granite.stock_config(config, layout, layers, "float32")
    (folder / "config.json").write_text(json.dumps(stock))
    checkpoint.copy_side_files(folder)


def filled(engine: Engine, length: int) -> KVCache:
    """A cache of random numbers in which the last step stores token `length`."""
    cache = engine.new_cache(1, length)
    for store in cache.stores:
        for plane in store.planes.values():
            plane.normal_()
    cache.lengths = [length - STEPS]
    return cache


def decoding(engines: dict[str, Engine]) -> list[dict[str, Any]]:
    """Tokens per second by length, and the hybrid's relative to the original's."""
    rows = []
    for length in LENGTHS:
        caches = {name: filled(engine, length) for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for step in range(STEPS):
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.decode(caches[name], torch.tensor([5]))
                if step >= WARM:
                    seconds[name].append(time.perf_counter() - started)
        times = {name: median(found) for name, found in seconds.items()}
        row = {
            "context": length,
            "tokens_per_second": {name: 1 / found for name, found in times.items()},
            "ratio": times["original"] / times["hybrid"],
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def crossover(rows: list[dict[str, Any]]) -> list[int] | None:
    """The last length measured at which the original is faster, and the next."""
    slower = [i for i, row in enumerate(rows) if row["ratio"] < 1]
    if not slower or slower[-1] == len(rows) - 1:
        return None
    return [rows[slower[-1]]["context"], rows[slower[-1] + 1]["context"]]


def cache_bytes(engines: dict[str, Engine], layers: Collection[int]) -> list[dict[str, int]]:
    """What the stores of the layers in question, and of all, take."""
    rows = []
    for length in BYTES_AT:
        row = {"tokens": length}
        for name, engine in engines.items():
            stores = engine.new_cache(1, length).stores
            row[f"{name}_replaced_layers"] = sum(stores[i].allocated_bytes for i in layers)
            row[f"{name}_all_layers"] = sum(store.allocated_bytes for store in stores)
        print(row, flush=True)
        rows.append(row)
    return rows


def scans(shape: str, tokens: int = TOKENS) -> dict[str, Callable[[], Tensor]]:
    """Ways to scan a text of random numbers."""
    heads, size, state = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, tokens, heads, *sizes, generator=generator)

    x, b, c, dt = normal(size), normal(state), normal(state), normal().exp()
    rate = -torch.logspace(-3, 0, heads)

    def ours(chunk: int) -> Tensor:
        return ssd_chunked(x, dt, rate, b, c, chunk=chunk)[0]

    def theirs(chunk: int) -> Tensor:
        result: Tensor = mamba2_chunk_scan(
            x, dt, rate, b, c, chunk_size=chunk, return_final_states=True
        )[0]
        return result

    of = {"kvtool": ours, "transformers": theirs}
    return {name: partial(of[who], chunk) for name, (who, chunk) in SCANS.items()}


def scanning(shape: str) -> dict[str, Any]:
    """Seconds and peak bytes of every scan; all of them agree."""
    ways = scans(shape)
    expected = ways["kvtool"]()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    rows = {}
    for name, times in seconds.items():
        command = [sys.executable, __file__, "--peak", shape, name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows[name] = {
            "chunk": SCANS[name][1],
            "seconds": median(times),
            "fastest_seconds": min(times),
            "peak_bytes": int(out),
        }
    ours = rows["kvtool"]
    for row in rows.values():
        row["times_kvtool"] = row["seconds"] / ours["seconds"]
        row["memory_of_kvtool"] = row["peak_bytes"] / ours["peak_bytes"]
        print(shape, row, flush=True)
    return {"sizes": SHAPES[shape], "tokens": TOKENS, "scans": rows}


def peak(shape: str, name: str) -> int:
    """Bytes that a scan takes beyond what is there before it. Linux only."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(field))

    scans(shape, 300)[name]()
    scan = scans(shape)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = resident("VmRSS")
    scan()
    return resident("VmHWM") - before


@torch.inference_mode()
def main() -> None:
    """Measures everything, or the peak of one scan."""
    if sys.argv[1] == "--peak":
        print(peak(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    document: dict[str, Any] = {
        "model": args.model,
        "environment": environment(torch.device("cpu"), torch.float32),
        "scan": {shape: scanning(shape) for shape in SHAPES},
    }
    checkpoint = Checkpoint.open(args.model)
    layers = range(0, checkpoint.hf_config().num_hidden_layers, 2)
    with tempfile.TemporaryDirectory() as folder:
        write_hybrid(checkpoint, layers, Path(folder))
        engines = {
            "original": Engine.load(checkpoint, dtype=torch.float32),
            "hybrid": Engine.load(Checkpoint.open(folder), dtype=torch.float32),
        }
    rows = decoding(engines)
    document |= {
        "replaced_layers": list(layers),
        "cache_bytes": cache_bytes(engines, layers),
        "decode": {"steps": STEPS - WARM, "rows": rows, "crossover_between": crossover(rows)},
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
