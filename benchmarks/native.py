"""Decode attention in C against plain torch on a processor, and both against a copy of memory.

    python -m benchmarks.native --out FILE

Each result is checked against its contract in float32 before it is timed. What is read lies in
memory: it is taken in turn from copies that no cache holds. Times are medians, of both in turn.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch

from kvtool.kernels.decode_attention import decode_attention, decode_attention_e4m3, reference
from kvtool.kernels.decode_attention.e4m3 import decode_attention_e4m3 as plain_e4m3
from kvtool.kernels.decode_attention.e4m3 import widen
from kvtool.kernels.latent_attention import latent_decode_attention
from kvtool.kernels.latent_attention import reference as latent_reference
from kvtool.kernels.native import compiler
from kvtool.kernels.packed_attention import (
    Blocks,
    Ring,
    channel_scores,
    packed_attention,
    value_sums,
)
from kvtool.kernels.packed_attention.paged import packed_attention as plain_packed
from kvtool.kernels.quantise import quantise

SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128)}
"""KV heads, query heads of each, D."""

LENGTHS = (1024, 4096, 16384)
HELD = 256 * 2**20  # bytes that no cache holds
SINK, WINDOW, SIZE = 4, 64, 64

Case = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], float]
"""In C, in plain torch, and how far the first is from the contract in float32."""


def rms_ratio(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def copies_of(nbytes: int, make: Callable[[], tuple[torch.Tensor, ...]]) -> list[tuple]:
    first = make()
    return [first, *(tuple(x.clone() for x in first) for _ in range(HELD // nbytes))]


def floats(heads: int, group: int, width: int, tokens: int, dtype: torch.dtype) -> Case:
    q = torch.randn(1, heads * group, width).to(dtype)
    shape = (1, heads, tokens, width)
    nbytes = 2 * heads * tokens * width * dtype.itemsize
    held = copies_of(nbytes, lambda: tuple(torch.randn(shape).to(dtype) for _ in range(2)))
    wanted = reference.decode_attention(q.float(), *(x.float() for x in held[0]), [tokens], 0.1)
    error = rms_ratio(decode_attention(q, *held[0], [tokens], 0.1), wanted)
    ours, theirs = cycle(held), cycle(held)
    return (
        lambda: decode_attention(q, *next(ours), [tokens], 0.1),
        lambda: reference.decode_attention(q, *next(theirs), [tokens], 0.1),
        error,
    )


def e4m3(heads: int, group: int, width: int, tokens: int) -> Case:
    q, scales = torch.randn(heads * group, width), (torch.ones(heads), torch.ones(heads))

    def make() -> tuple[torch.Tensor, ...]:
        planes = (torch.randn(heads, tokens, width) for _ in range(2))
        return tuple(x.to(torch.float8_e4m3fn).view(torch.uint8) for x in planes)

    held = copies_of(2 * heads * tokens * width, make)
    keys, values = (widen(x)[None] for x in held[0])
    wanted = reference.decode_attention(q[None], keys, values, [tokens], 0.1)[0]
    error = rms_ratio(decode_attention_e4m3(q, *held[0], 0.1, scales), wanted)
    ours, theirs = cycle(held), cycle(held)
    return (
        lambda: decode_attention_e4m3(q, *next(ours), 0.1, scales),
        lambda: plain_e4m3(q, *next(theirs), 0.1, scales),
        error,
    )


def packed(heads: int, group: int, width: int, tokens: int, bits: int) -> Case:
    q, count = torch.randn(1, heads * group, width), (tokens - SINK - WINDOW) // SIZE
    ring = Ring(
        torch.randn(1, heads, SINK + WINDOW + SIZE, width),
        torch.randn(1, heads, SINK + WINDOW + SIZE, width),
        torch.tensor([0]), SINK, WINDOW,
    )  # fmt: skip

    def make() -> tuple[torch.Tensor, ...]:
        keys = quantise(torch.randn(1, heads, count, width, SIZE), bits, SIZE)
        return *keys, *quantise(torch.randn(1, heads, count, SIZE, width), bits, SIZE)

    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([tokens]).int()
    held = copies_of(int(heads * tokens * width * (bits / 4 + 0.125)), make)
    read = [Blocks(*planes, table, bits, bits) for planes in held]
    wanted = plain_packed(q, ring, read[0], lengths, 0.1)
    error = rms_ratio(packed_attention(q, ring, read[0], lengths, 0.1), wanted)
    asked = q[0].view(heads, group, width)

    def plain(blocks: Blocks) -> torch.Tensor:
        # What a store does without a compiler, but for the ring.
        codes, scales = blocks.keys[0], blocks.key_scales[0, ..., 0, :]
        weights = torch.softmax(channel_scores(asked, codes, scales, bits, SIZE), dim=-1)
        flat = (x[0].flatten(1, 2) for x in (blocks.values, blocks.value_scales))
        return value_sums(weights, *flat, width, bits, SIZE)

    ours, theirs = cycle(read), cycle(read)
    return (
        lambda: packed_attention(q, ring, next(ours), lengths, 0.1),
        lambda: plain(next(theirs)),
        error,
    )


def latents(heads: int, rank: int, rope: int, tokens: int, dtype: torch.dtype) -> Case:
    q, shape = torch.randn(1, heads, rank + rope).to(dtype), (1, tokens, rank + rope)
    held = copies_of(
        tokens * (rank + rope) * dtype.itemsize, lambda: (torch.randn(shape).to(dtype),)
    )
    contract = latent_reference.latent_decode_attention
    wanted = contract(q.float(), held[0][0].float(), rank, [tokens], 0.1)
    error = rms_ratio(latent_decode_attention(q, *held[0], rank, [tokens], 0.1), wanted)
    ours, theirs = cycle(held), cycle(held)
    return (
        lambda: latent_decode_attention(q, *next(ours), rank, [tokens], 0.1),
        lambda: contract(q, *next(theirs), rank, [tokens], 0.1),
        error,
    )


KINDS: dict[str, tuple[Callable[..., Case], float, float]] = {
    "fp32": (lambda *x: floats(*x, torch.float32), 4, 1e-5),
    "bf16": (lambda *x: floats(*x, torch.bfloat16), 2, 8e-3),
    "e4m3": (e4m3, 1, 1e-5),
    "K4V4": (lambda *x: packed(*x, 4), 0.5625, 1e-5),
    "K2V2": (lambda *x: packed(*x, 2), 0.3125, 1e-5),
}
"""How a case is made, bytes of a number with its scales, and the error that is let pass."""

LATENT_KINDS = {name: KINDS[name][1:] for name in ("fp32", "bf16")}
LATENT_SHAPES = {
    "SmolLM2-135M, MLA at 50 %": (9, 160, 32),
    "16 heads, 512 + 64": (16, 512, 64),
    "Llama-3-8B, MLA at 25 %": (32, 448, 64),
}
"""Query heads, r, d_r."""


def cases() -> Iterator[tuple[str, int, str, Case, float, float]]:
    """Model, tokens and kind, the case, the bytes that it reads, and the error that is let pass."""
    for model, shape in SHAPES.items():
        for tokens in LENGTHS:
            for kind, (make, nbytes, allowed) in KINDS.items():
                read = 2 * shape[0] * tokens * shape[2] * nbytes
                yield model, tokens, kind, make(*shape, tokens), read, allowed
    for model, (heads, rank, rope) in LATENT_SHAPES.items():
        for tokens in LENGTHS:
            for kind, (nbytes, allowed) in LATENT_KINDS.items():
                dtype = torch.float32 if kind == "fp32" else torch.bfloat16
                case = latents(heads, rank, rope, tokens, dtype)
                yield model, tokens, kind, case, tokens * (rank + rope) * nbytes, allowed


def seconds(*runs: Callable[[], object], rounds: int) -> list[float]:
    """Medians of runs that take turns."""
    taken: list[list[float]] = [[] for _ in runs]
    for index in range(rounds + 2):
        for run, times in zip(runs, taken, strict=True):
            started = perf_counter()
            run()
            if index >= 2:
                times.append(perf_counter() - started)
    return [statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if compiler() is None:
        sys.exit("there is no C compiler")
    torch.manual_seed(0)
    source = torch.ones(HELD // 4)
    (copy,) = seconds(lambda: source.clone(), rounds=5)
    target = torch.empty_like(source)
    (copy,) = seconds(lambda: target.copy_(source), rounds=9)
    rows = []
    for model, tokens, kind, (ours, plain, error), read, allowed in cases():
        if error > allowed:
            sys.exit(f"{kind} of {model} is wrong by {error:.1e}")
        own, other = seconds(ours, plain, rounds=given.rounds)
        row = {
            "model": model, "tokens": tokens, "kind": kind, "us": round(own * 1e6, 1),
            "times plain torch": round(other / own, 2),
            "share of a copy": round(read / own / (2 * source.nbytes / copy), 3),
            "error": float(f"{error:.1e}"),
        }  # fmt: skip
        rows.append(row)
        print(*row.values(), sep="\t", file=sys.stderr)
    said = {
        "command": f"python -m benchmarks.native --rounds {given.rounds} --out {given.out}",
        "machine": cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "copy GB/s": round(2 * source.nbytes / copy / 1e9, 1),
        "rows": rows,
    }
    given.out.write_text(json.dumps(said, indent=1) + "\n")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
