"""Which way of cutting the work of attention is fastest on a GPU.

    python -m benchmarks.gpu_configs --out FILE                            # inside 9 minutes
    TRITON_INTERPRET=1 python -m benchmarks.gpu_configs --out FILE --tiny  # does it all work?

For the calls of `benchmarks.gpu` whose `config_for` is worth a second look: what that gives, and
beside it tiles, warps and rows of queries that spill few registers or none when they are compiled
for Hopper. Each is checked and timed as there; one that is wrong or fails gets no speed. What is
fastest belongs into `config_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_attention import (
    code_cases,
    decode_cases,
    float_cases,
    latent_cases,
    packed_cases,
    packed_latent_cases,
    split_cases,
)
from benchmarks.gpu_bench import Bench, Case, asked_for
from kvtool.kernels.decode_attention import triton as decode
from kvtool.kernels.decode_attention.cut_triton import Config
from kvtool.kernels.packed_attention import triton as packed
from kvtool.kernels.packed_latents import triton as packed_latents


class Sweep(NamedTuple):
    """Calls and how their work may be cut.

    Attributes:
        module: Whose `config_for` is put aside,
        where: for calls with arguments of which this is true.
        tried: Tokens of a tile, rows of queries, warps, stages, items per multiprocessor, and
            perhaps whether tokens come first.
    """

    cases: Iterator[Case]
    module: ModuleType
    where: Callable[..., bool]
    tried: list[tuple[int, ...]]


def always(*_: Any) -> bool:
    """Every call."""
    return True


def sweeps(device: torch.device, tiny: bool) -> Iterator[Sweep]:
    """All of them, the least known first."""
    batch, tokens = (1, 200) if tiny else (8, 32768)
    sizes = [(batch, tokens)]
    llama = {"Llama-3-8B": (32, 8, 128)}
    qwen = {"Qwen2.5-7B": (28, 4, 128)}
    floats = [(32, 8, 1, 5, 7, 1), (16, 8, 1, 5, 15, 1), (64, 8, 2, 5, 4, 1), (32, 16, 1, 5, 7)]
    yield Sweep(float_cases(device, llama, sizes), decode, always, floats)
    rows = [(1, tokens)]
    wide = [(16, 8, 1, 5, 7, 1), (32, 8, 2, 5, 4, 1), (16, 8, 2, 5, 7, 1), (32, 8, 1, 5, 4, 1)]
    yield Sweep(
        float_cases(device, {"8 on 4 heads of 256": (8, 4, 256)}, sizes), decode, always, wide
    )
    own = [
        (64, 16, 4, 4, 3),
        (64, 16, 4, 4, 4),
        (64, 16, 4, 4, 2),
        (64, 16, 4, 5, 3),
        (64, 16, 4, 5, 2),
        (32, 16, 4, 6, 4),
        (32, 16, 4, 6, 2),
    ]
    yield Sweep(split_cases(device, batch, tokens), decode, always, own)
    rows = rows if tiny else [(1, tokens), (64, 4096)]
    yield Sweep(decode_cases(device, llama, [*sizes, *rows]), decode, always, own)
    yield Sweep(decode_cases(device, qwen, [*sizes, *rows]), decode, always, own)
    many = [(64, 64, 8, 3, 1), (64, 32, 8, 5, 1), (32, 32, 4, 5, 2), (64, 32, 8, 4, 1, 1)]
    few = [(64, 16, 8, 5, 1), (64, 64, 8, 3, 1), (32, 16, 4, 6, 2), (64, 16, 4, 4, 1, 1)]
    codes = [(32, 64, 8, 3, 1), (32, 32, 8, 4, 1), (32, 32, 8, 4, 2), (32, 64, 8, 4, 1)]
    for name, shape, tried in (
        ("DeepSeek-V3", (128, 512, 64), many),
        ("Llama-3-8B, MLA at 25 %", (32, 448, 64), many),
        ("16 heads, 512 + 64", (16, 512, 64), few),
    ):
        cases = latent_cases(device, {name: shape}, sizes)
        yield Sweep(cases, decode, always, tried)
    read = islice(code_cases(device, batch, tokens), 1)  # behind it, keys are rebuilt
    yield Sweep(read, decode, lambda _, width, *__: width == 512, codes)
    blocks = [
        (64, 8, 1, 1, 8),
        (64, 8, 1, 1, 12),
        (64, 8, 2, 1, 8),
        (64, 8, 2, 1, 4),
        (64, 8, 4, 1, 2),
    ]
    yield Sweep(packed_cases(device, batch, tokens), packed, always, blocks)
    for heads, rank in ((16, 512), (32, 448)):
        tried = [
            (64, heads, 4, 3, 2),
            (64, heads, 4, 7, 2),
            (64, heads, 4, 5, 1),
            (64, heads, 8, 5, 1),
            (64, 16 if heads > 16 else 32, 4, 5, 2),
        ]
        cases = packed_latent_cases(
            device, {f"{heads} heads on {rank} + 64": (heads, rank, 64)}, sizes
        )
        yield Sweep(cases, packed_latents, always, tried)


def measure(bench: Bench, sweep: Sweep, only: int | None) -> None:
    """Each case by each configuration, the present one first."""
    present = sweep.module.config_for  # type: ignore[attr-defined]
    for case in sweep.cases:
        if case.error is None:  # packing, which has nothing to choose
            continue
        others = [
            Config(tile, 2, items, warps, stages, rows, tokens_first=bool(turned))
            for tile, rows, warps, stages, items, *turned in sweep.tried[:only]
        ]
        for config in (None, *others):
            if bench.late(10):
                return

            def chosen(*call: Any, config: Config | None = config) -> Config:
                own: Config = present(*call)
                if config is None or not sweep.where(*call):
                    return own
                return config

            sweep.module.config_for = chosen  # type: ignore[attr-defined]
            try:
                bench.measure(case, config=config._asdict() if config else None)
            finally:
                sweep.module.config_for = present  # type: ignore[attr-defined]


def show(bench: Bench) -> None:
    """The configurations of each case, the fastest first."""
    table = Table(title=f"{bench.header['device']}, copy {bench.copy / 1e12:.2f} TB/s")
    for name in ("kernel", "shape", "configuration", "µs", "of copy", "TFLOP/s"):
        table.add_column(name)
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in bench.rows:
        by_case.setdefault((row["kernel"], row["shape"]), []).append(row)
    for rows in by_case.values():
        for row in sorted(rows, key=lambda row: row.get("seconds", float("inf"))):
            config = row.get("config")
            said = " ".join(f"{k}={v}" for k, v in config.items()) if config else "[bold]present"
            seconds = row.get("seconds")
            table.add_row(
                row["kernel"], row["shape"], said,
                f"{seconds * 1e6:.1f}" if seconds else f"[red]{row['failed'][:60]}",
                f"{row['share_of_copy']:.0%}" if seconds else "",
                f"{row['tflops']:.1f}" if seconds else "",
            )  # fmt: skip
        table.add_section()
    Console(width=150).print(table)


def main() -> None:
    """Parses and measures."""
    bench, tiny = asked_for(__doc__)
    try:
        for sweep in sweeps(bench.device, tiny):
            with bench.going_on("sweep"):
                measure(bench, sweep, 1 if tiny else None)
    finally:
        show(bench)


if __name__ == "__main__":
    main()
