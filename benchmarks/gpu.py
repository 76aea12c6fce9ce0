"""Checks and times every kernel on a GPU, and decoding from end to end, in one call.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json        # inside 9 minutes
    TRITON_INTERPRET=1 python -m benchmarks.gpu --out FILE --tiny     # does it all work?

Every kernel is checked against its contract in plain torch first, on the inputs that are timed; one
that fails gets no speed; of attention, the first row is checked. Times are medians over replays of
a CUDA graph of several calls on up to four inputs: a few megabytes stay in the L2 cache. Bandwidth
is that of the bytes that must be read and written, beside a copy of 2 GiB measured in the same
process. A copy reads and writes; what only reads can be faster, so a sum over as much is measured
as well. The file is written row by row, and a row that fails does not take the others with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

os.environ.setdefault("KVTOOL_KERNELS", "triton")

from benchmarks.gpu_end_to_end import end_to_end
from kvtool.attention import Rope
from kvtool.evaluate.throughput import environment
from kvtool.kernels.append import Encoder, append
from kvtool.kernels.decode_attention import merge, paged_decode_attention
from kvtool.kernels.decode_attention import reference as decode_reference
from kvtool.kernels.grouped_linear import grouped_linear
from kvtool.kernels.grouped_linear import reference as grouped_reference
from kvtool.kernels.hadamard import hadamard
from kvtool.kernels.latent_attention import paged_latent_attention
from kvtool.kernels.packed_attention import Blocks, Ring, pack_blocks, packed_attention
from kvtool.kernels.packed_attention import paged as paged_packed
from kvtool.kernels.packed_latents import Blocks as LatentBlocks
from kvtool.kernels.packed_latents import pack_latents, packed_latent_attention
from kvtool.kernels.packed_latents import reference as packed_latents_reference
from kvtool.kernels.quantise import quantise
from kvtool.kernels.rebuild_attention import rebuild_decode_attention
from kvtool.kernels.rebuild_attention import reference as rebuild_reference
from kvtool.kernels.rms_norm import add_rms_norm, rms_norm
from kvtool.kernels.ssd import reference as ssd_reference
from kvtool.kernels.ssd import ssd_chunked, ssd_step
from kvtool.kernels.streaming_attention import reference as streaming_reference
from kvtool.kernels.streaming_attention import streaming_attention
from kvtool.kernels.swiglu import swiglu
from kvtool.runtime.coded import at_once
from kvtool.runtime.fused import FusedMLP

PAGE = 64
BFLOAT16 = torch.bfloat16
TOLERANCE = 1.5e-2
"""Of the root mean square of an error over that of what was expected, in bfloat16."""
ROTATED_BYTES = 3e8
"""What the inputs that a graph goes through take together, as far as four of them do."""


@dataclass
class Case:
    """Something to measure.

    Attributes:
        kernel: What it belongs to in the table.
        nbytes: That one call must read and write; flops: that it must do.
        runs: The same call on several inputs.
        error: Of the first of them, as :func:`rms_ratio` has it; None for other people's code.
    """

    kernel: str
    shape: str
    batch: int
    tokens: int
    nbytes: float
    flops: float
    runs: list[Callable[[], Any]]
    error: Callable[[], float] | None
    others: dict[str, list[Callable[[], Any]]] = field(default_factory=dict)


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what was expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


class Bench:
    """Measures cases on one device and writes what it found."""

    def __init__(self, out: Path, device: torch.device, seconds: float) -> None:
        self.out, self.device = out, device
        self.deadline = time.perf_counter() + seconds
        self.rows: list[dict[str, Any]] = []
        self.header = environment(device, BFLOAT16)
        if device.type == "cuda":
            import triton

            from kvtool.kernels.tiles import ptxas_version

            self.header["versions"] |= {
                "triton": triton.__version__, "ptxas": ".".join(map(str, ptxas_version(90))),
            }  # fmt: skip
        self.copy = self._copy_bandwidth()
        self.header |= {
            "copy_bytes_per_second": self.copy, "read_bytes_per_second": self._read_bandwidth(),
            "matmul_flops": self._matmul(),
        }  # fmt: skip

    def late(self, seconds: float = 0.0) -> bool:
        """Whether so many seconds are not left."""
        return time.perf_counter() + seconds > self.deadline

    def seconds(self, runs: list[Callable[[], Any]], repeats: int = 10) -> float:
        """Median time of a call."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            runs[0]()
            return time.perf_counter() - started
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        seconds = self._graph_seconds(runs, max(4, len(runs)), repeats)
        # Of short calls, too, what it takes to launch the graph is to be small.
        return seconds if seconds > 5e-5 else self._graph_seconds(runs, 40, repeats)

    def _graph_seconds(self, runs: list[Callable[[], Any]], calls: int, repeats: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                runs[i % len(runs)]()
        graph.replay()
        return median(self._events(graph.replay, repeats)) / calls

    def _events(self, run: Callable[[], Any], repeats: int) -> list[float]:
        found = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return found

    def _copy_bandwidth(self) -> float:
        if self.device.type != "cuda":
            return float("nan")
        x = torch.randn(2**30, device=self.device, dtype=BFLOAT16)
        y = torch.empty_like(x)
        y.copy_(x)
        return 2 * x.nbytes / median(self._events(lambda: y.copy_(x), 20))

    def _read_bandwidth(self) -> float:
        if self.device.type != "cuda":
            return float("nan")
        x = torch.randn(2**30, device=self.device, dtype=BFLOAT16)
        x.sum()
        return x.nbytes / median(self._events(x.sum, 20))

    def _matmul(self) -> float:
        if self.device.type != "cuda":
            return float("nan")
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=BFLOAT16) for _ in range(2))
        a @ b
        return 2 * 8192**3 / median(self._events(lambda: a @ b, 10))

    def measure(self, case: Case, **about: Any) -> None:
        """Checks a case and times it, beside what others do on the same.

        Args:
            about: What else its row is to say.
        """
        row: dict[str, Any] = {
            "kernel": case.kernel, "shape": case.shape, "batch": case.batch, "tokens": case.tokens,
            "bytes": case.nbytes, "flops": case.flops, **about,
        }  # fmt: skip
        try:
            row["error"] = case.error() if case.error else None
            if row["error"] is not None and not row["error"] <= TOLERANCE:
                raise ArithmeticError(f"wrong by {row['error']:.3g}")
            row["seconds"] = self.seconds(case.runs)
            row["share_of_copy"] = case.nbytes / row["seconds"] / self.copy
            row["tflops"] = case.flops / row["seconds"] / 1e12
        except Exception as failure:  # the others are to be measured all the same
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        for name, runs in case.others.items():
            try:
                row[f"{name}_seconds"] = self.seconds(runs)
            except Exception as failure:
                row[f"{name}_failed"] = f"{type(failure).__name__}: {failure}"[:200]
        self.add(row)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Writes down what fails in here; what comes behind it is measured all the same.

        Not where the device itself is lost, as after an illegal access: nothing works then.
        """
        try:
            yield
        except Exception as failure:
            said = f"{type(failure).__name__}: {failure}"[:300]
            self.add({"kernel": what, "shape": "", "batch": 0, "tokens": 0, "failed": said})
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again if so

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows.append(row)
        said = {k: v for k, v in row.items() if k not in ("bytes", "flops")}
        print(" ".join(f"{k}={_short(v)}" for k, v in said.items() if v is not None), flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({**self.header, "rows": self.rows}, indent=1) + "\n")


def _short(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def normal(device: torch.device, *shape: int) -> Tensor:
    """Standard normal numbers in bfloat16."""
    return torch.empty(shape, dtype=BFLOAT16, device=device).normal_()


def copies(nbytes: float) -> int:
    """How many inputs are rotated."""
    return max(1, min(4, int(ROTATED_BYTES // nbytes) + 1))


def paged(device: torch.device, batch: int, tokens: int, heads: int, *widths: int) -> list[Tensor]:
    """Planes of as many widths, the table of their pages in random order, and the lengths."""
    pages = batch * -(-tokens // PAGE)
    table = torch.randperm(pages, device=device).view(batch, -1).int()
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    return [*(normal(device, pages, heads, PAGE, width) for width in widths), table, lengths]


def first_row(table: Tensor, lengths: Tensor, *planes: Tensor) -> list[Tensor]:
    """The first row alone, its pages side by side."""
    own = table[0].long()
    order = torch.arange(len(own), dtype=torch.int32, device=table.device)[None]
    return [*(plane[own] for plane in planes), order, lengths[:1]]


# --------------------------------------------------------------------------------- attention


def decode_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Every token of every head, as without a plan; beside torch on contiguous rows."""
    for name, (queries, heads, width) in shapes.items():
        for batch, tokens in sizes:
            nbytes = batch * tokens * heads * width * 4
            if device.type == "cuda" and nbytes > 0.3 * torch.cuda.mem_get_info()[1]:
                continue
            inputs = []
            for _ in range(copies(nbytes)):
                keys, values, table, lengths = paged(device, batch, tokens, heads, width, width)
                q = normal(device, batch, queries, width)
                inputs.append((q, keys, values, lengths, width**-0.5, table))

            def error(inputs: list[Any] = inputs) -> float:
                q, keys, values, lengths, scaling, table = inputs[0]
                found, _ = paged_decode_attention(*inputs[0])
                keys, values, table, lengths = first_row(table, lengths, keys, values)
                exact, _ = decode_reference.paged_decode_attention(
                    q[:1].float(), keys, values, lengths, scaling, table
                )
                return rms_ratio(found[:1], exact)

            # Contiguous rows of the same bytes: pages are as good as any random numbers.
            def rows_of(plane: Tensor, batch: int = batch, tokens: int = tokens) -> Tensor:
                pages, heads, page, width = plane.shape
                return plane.view(batch, heads, pages // batch * page, width)[:, :, :tokens]

            sdpa = [
                lambda x=x: F.scaled_dot_product_attention(
                    x[0][:, :, None], rows_of(x[1]), rows_of(x[2]), enable_gqa=True
                )
                for x in inputs
            ]
            yield Case(
                "decode_attention", name, batch, tokens, nbytes,
                4 * batch * tokens * queries * width,
                [lambda x=x: paged_decode_attention(*x) for x in inputs],
                error, {"sdpa": sdpa},
            )  # fmt: skip


def flex_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """FlexAttention decoding, on as many rows as decode_attention reads above.

    Also with a mask of blocks in which every token is seen: what it is given decides how it splits.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    queries, heads, width = 32, 8, 128
    nbytes = batch * tokens * heads * width * 4
    runs = []
    for _ in range(copies(nbytes)):
        keys, values = (normal(device, batch, heads, tokens, width) for _ in range(2))
        q = normal(device, batch, queries, 1, width)
        runs.append(partial(flex, q, keys, values, enable_gqa=True))
    mask = create_block_mask(
        lambda b, h, i, j: j < tokens, None, None, 1, tokens, device=str(device)
    )
    masked = [lambda run=run: run(block_mask=mask) for run in runs]
    others: dict[str, list[Callable[[], Any]]] = {"flex_masked": masked}
    yield Case("flex_attention", "Llama-3-8B", batch, tokens, nbytes, 0, runs, None, others)


def latent_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Absorbed MLA."""
    for name, (queries, rank, rope) in shapes.items():
        for batch, tokens in sizes:
            nbytes = batch * tokens * (rank + rope) * 2
            inputs = []
            for _ in range(copies(nbytes)):
                latents, table, lengths = paged(device, batch, tokens, 1, rank + rope)
                q = normal(device, batch, queries, rank + rope)
                scaling = (rank + rope) ** -0.5
                inputs.append((q, latents[:, 0], rank, lengths, scaling, table))

            def error(inputs: list[Any] = inputs) -> float:
                q, latents, rank, lengths, scaling, table = inputs[0]
                found, _ = paged_latent_attention(*inputs[0])
                own, table, lengths = first_row(table, lengths, latents[:, None])
                exact, _ = decode_reference.paged_decode_attention(
                    q[:1].float(), own, rank, lengths, scaling, table
                )
                return rms_ratio(found[:1], exact)

            yield Case(
                "latent_attention", name, batch, tokens, nbytes,
                2 * batch * tokens * queries * (2 * rank + rope),
                [lambda x=x: paged_latent_attention(*x) for x in inputs], error,
            )  # fmt: skip


def split_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """A layer of Llama-3-8B half of whose heads stream."""
    queries, heads, width, sink, window = 32, 8, 128, 4, 256
    scaling, half, ring = width**-0.5, heads // 2, sink + window
    keys, values, table, lengths = paged(device, batch, tokens, half, width, width)
    near = [normal(device, batch, half, ring, width) for _ in range(2)]
    near_lengths = lengths.clamp(max=ring)
    own = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    q = normal(device, batch, queries, width)
    full, streaming = q[:, : queries // 2].contiguous(), q[:, queries // 2 :].contiguous()

    def split() -> Tensor:
        out = torch.empty_like(q)
        close, far = out[:, queries // 2 :], out[:, : queries // 2]
        paged_decode_attention(streaming, *near, near_lengths, scaling, own, out=close)
        paged_decode_attention(full, keys, values, lengths, scaling, table, out=far)
        return out

    def split_error() -> float:
        planes = first_row(table, lengths, keys, values)
        far, _ = decode_reference.paged_decode_attention(
            full[:1].float(), *planes[:2], planes[3], scaling, planes[2]
        )
        close, _ = decode_reference.paged_decode_attention(
            streaming[:1].float(), *(x[:1] for x in near), near_lengths[:1], scaling
        )
        return rms_ratio(split()[:1], torch.cat((far, close), dim=1))

    yield Case(
        "plan", "Llama-3-8B, half of the heads stream", batch, tokens,
        4 * batch * half * width * (tokens + ring), 2 * batch * tokens * queries * width, [split],
        split_error,
    )  # fmt: skip


def code_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """The same with codes of half the width, read as they are and rebuilt."""
    queries, heads, width = 32, 8, 128
    scaling, rank = width**-0.5, heads * width // 2
    q = normal(device, batch, queries, width)
    own = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    key_codes, value_codes, table, lengths = paged(device, batch, tokens, 1, rank, rank)
    exact = [normal(device, batch, heads, 68, width) for _ in range(2)]
    code_q = normal(device, batch, queries, rank)
    decode = normal(device, heads, rank, width) * rank**-0.5

    near_lengths, far_lengths = lengths.clamp(max=68), lengths - 64

    def codes() -> Tensor:
        (close, close_mass), (far, far_mass) = at_once(
            device,
            lambda: paged_decode_attention(q, *exact, near_lengths, scaling, own),
            lambda: paged_decode_attention(
                code_q, key_codes, value_codes, far_lengths, scaling, table, 4
            ),
        )
        return merge((close, grouped_linear(far, decode)), (close_mass, far_mass))

    def codes_error() -> float:
        found, _ = paged_decode_attention(
            code_q, key_codes, value_codes, far_lengths, scaling, table, 4
        )
        planes = first_row(table, lengths, key_codes, value_codes)
        wanted, _ = decode_reference.paged_decode_attention(
            code_q[:1].float(), *planes[:2], planes[3] - 64, scaling, planes[2], 4
        )
        return rms_ratio(found[:1], wanted)

    yield Case(
        "plan", "Llama-3-8B, codes of half the width", batch, tokens, 4 * batch * tokens * rank,
        4 * batch * tokens * queries * rank, [codes], codes_error,
    )  # fmt: skip
    decoder = normal(device, heads, rank, width) * rank**-0.5
    rope = Rope(500000.0 ** -(torch.arange(0, width, 2, device=device) / width))
    cos, sin = (x.to(BFLOAT16) for x in rope.tables(torch.arange(tokens, device=device)))
    arguments = (q, key_codes, decoder, value_codes, cos, sin, lengths - 64, scaling, table, 4)

    def rebuilt_error() -> float:
        found, _ = rebuild_decode_attention(*arguments)
        planes = first_row(table, lengths, key_codes, value_codes)
        wanted, _ = rebuild_reference.rebuild_decode_attention(
            q[:1].float(), planes[0], decoder, planes[1], cos, sin, planes[3] - 64, scaling,
            planes[2], 4,
        )  # fmt: skip
        return rms_ratio(found[:1], wanted)

    yield Case(
        "plan", "Llama-3-8B, codes of half the width, keys rebuilt", batch, tokens,
        4 * batch * tokens * rank,
        2 * batch * tokens * (heads * rank * width + queries * (width + rank)),
        [lambda: rebuild_decode_attention(*arguments)], rebuilt_error,
    )  # fmt: skip


def streaming_cases(device: torch.device, tokens: int) -> Iterator[Case]:
    """Reading a prompt with the streaming heads of Llama-3-8B."""
    queries, heads, width, sink, window = 32, 8, 128, 64, 256
    q, k, v = (normal(device, 1, n, tokens, width) for n in (queries, heads, heads))

    def error() -> float:
        exact = streaming_reference.streaming_attention(
            *(x.float() for x in (q, k, v)), sink, window, width**-0.5
        )
        return rms_ratio(streaming_attention(q, k, v, sink, window, width**-0.5), exact)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    others: dict[str, list[Callable[[], Any]]] = {"sdpa_causal": [dense]}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ((j < sink) | (i - j < window))

        mask = create_block_mask(seen, None, None, tokens, tokens, device=device)
        flex = torch.compile(flex_attention, dynamic=False)
        others["flex"] = [lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)]
    yield Case(
        "streaming_attention", "Llama-3-8B prompt, sinks 64, window 256", 1, tokens,
        2 * tokens * width * (2 * queries + 2 * heads), 4 * tokens * queries * width * 320,
        [lambda: streaming_attention(q, k, v, sink, window, width**-0.5)], error, others,
    )  # fmt: skip


def packed_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """The same with keys and values of few bits; and packing a block of each row."""
    queries, heads, width, size, sink, window = 32, 8, 128, PAGE, 4, 64
    pages, scaling = batch * -(-tokens // PAGE), width**-0.5
    table = torch.randperm(pages, device=device).view(batch, -1).int()
    # So that the newest token of every row makes a block complete.
    blocks_of_a_row = (tokens - sink - window) // size
    lengths = torch.full((batch,), sink + window + size * blocks_of_a_row, device=device).int()
    q = normal(device, batch, queries, width)
    ring = Ring(
        *(normal(device, batch, heads, sink + window + size, width) for _ in range(2)),
        torch.arange(batch, device=device), sink, window,
    )  # fmt: skip
    for keys, values in ((4, 4), (4, 2), (3, 3), (2, 2)):
        planes = []
        for lines, numbers, bits in ((width, size, keys), (size, width, values)):
            x = normal(device, pages, heads, 1, lines, numbers)
            planes += quantise(x, bits, size)
        blocks = Blocks(*planes, table, keys, values)

        def error(blocks: Blocks = blocks) -> float:
            found = packed_attention(q, ring, blocks, lengths, scaling)
            own = table[0].long()
            first = blocks._replace(
                **{name: getattr(blocks, name)[own] for name in Blocks._fields[:4]},
                table=torch.arange(len(own), device=device)[None],
            )
            exact = paged_packed.packed_attention(q[:1].float(), ring, first, lengths[:1], scaling)
            return rms_ratio(found[:1], exact)

        each = sum(plane[0].nbytes for plane in planes)
        nbytes = batch * blocks_of_a_row * each + 4 * batch * heads * (sink + window) * width
        yield Case(
            "packed_attention", f"Llama-3-8B, K{keys}V{values}", batch, tokens, nbytes,
            4 * batch * tokens * queries * width,
            [lambda x=blocks: packed_attention(q, ring, x, lengths, scaling)], error,
        )  # fmt: skip
    yield Case(
        "pack_blocks", "Llama-3-8B, K2V2", batch, tokens,
        batch * (4 * heads * size * width + each), 0,
        [lambda: pack_blocks(ring, blocks, lengths)], None,
    )  # fmt: skip


def packed_latent_cases(
    device: torch.device, shapes: dict[str, tuple[int, int, int]], sizes: list[tuple[int, int]]
) -> Iterator[Case]:
    """Absorbed MLA over latents of 4 bits; and packing a block of each row."""
    size, bits, sink, window = PAGE, 4, 4, 64
    for name, (queries, rank, rope) in shapes.items():
        for batch, tokens in sizes:
            width, pages = rank + rope, batch * -(-tokens // PAGE)
            # So that the newest token of every row makes a block complete.
            done = (tokens - sink - window) // size
            lengths = torch.full((batch,), sink + window + size * done, device=device).int()
            each = width * (size * bits // 8 + 4)
            nbytes = batch * (done * each + 2 * (sink + window) * width)
            inputs: list[Any] = []
            for _ in range(copies(nbytes)):
                codes, scales = quantise(normal(device, pages, 1, 1, width, size), bits, size)
                latents = normal(device, batch, 1, sink + window + size, width)
                rows = torch.arange(batch, device=device)
                ring = Ring(latents, latents[..., :rank], rows, sink, window)
                table = torch.randperm(pages, device=device).view(batch, -1).int()
                blocks = LatentBlocks((codes,), (scales,), (bits,), (rank,), table)
                q = normal(device, batch, queries, width)
                inputs.append((q, ring, blocks, lengths, width**-0.5))

            def error(inputs: list[Any] = inputs) -> float:
                q, ring, blocks, lengths, scaling = inputs[0]
                own = blocks.table[0].long()
                first = blocks._replace(
                    codes=(blocks.codes[0][own],), scales=(blocks.scales[0][own],),
                    table=torch.arange(len(own), device=device)[None],
                )  # fmt: skip
                exact = packed_latents_reference.packed_latent_attention(
                    q[:1].float(), ring, first, lengths[:1], scaling
                )
                return rms_ratio(packed_latent_attention(*inputs[0])[:1], exact)

            yield Case(
                "packed_latents", f"{name}, {bits} bits", batch, tokens, nbytes,
                2 * batch * tokens * queries * (2 * rank + rope),
                [lambda x=x: packed_latent_attention(*x) for x in inputs], error,
            )  # fmt: skip
            yield Case(
                "pack_latents", f"{name}, {bits} bits", batch, tokens,
                batch * (2 * size * width + each), 0,
                [lambda x=x: pack_latents(*x[1:4]) for x in inputs], None,
            )  # fmt: skip


# --------------------------------------------------------------------------- everything else


def state_cases(device: torch.device, batch: int, tokens: int) -> Iterator[Case]:
    """Mamba-2 of the shapes of Llama-3-8B after conversion: a group per head."""
    heads, size = 32, 128
    x, b, c = (normal(device, batch, tokens, heads, size) for _ in range(3))
    b, c = b * size**-0.5, c * size**-0.5
    dt = torch.rand(batch, tokens, heads, device=device) * 0.1
    a = -torch.rand(heads, device=device) - 0.5

    def error() -> float:
        part = [one[:1, :2048] for one in (x, dt)], [one[:1, :2048] for one in (b, c)]
        found = ssd_chunked(*part[0], a, *part[1])
        exact = ssd_reference.ssd_chunked(
            part[0][0].float(), part[0][1], a, *(one.float() for one in part[1])
        )
        return max(rms_ratio(*pair) for pair in zip(found, exact, strict=True))

    others: dict[str, list[Callable[[], Any]]] = {}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        pass
    else:

        def fla() -> Any:
            written = x * dt[..., None].to(BFLOAT16)
            return chunk_simple_gla(c, b, written, dt * a, scale=1.0, output_final_state=True)

        others["fla"] = [fla]
    chunk = 64
    yield Case(
        "ssd", "32 heads of 128 x 128, scan", batch, tokens,
        2.0 * 4 * x.numel(), 2.0 * batch * tokens * heads * (2 * chunk * size + 2 * size * size),
        [lambda: ssd_chunked(x, dt, a, b, c)], error, others,
    )  # fmt: skip
    rows = 64 if device.type == "cuda" else batch
    state = torch.randn(rows, heads, size, size, device=device)
    one = [normal(device, rows, heads, size) for _ in range(3)]
    step = torch.rand(rows, heads, device=device)

    def step_error() -> float:
        held = [state.clone() for _ in range(2)]
        found = ssd_step(one[0], step, a, one[1], one[2], held[0])
        wide = [x.float() for x in one]
        exact = ssd_reference.ssd_step(wide[0], step, a, wide[1], wide[2], held[1])
        return max(rms_ratio(found, exact), rms_ratio(*held))

    yield Case(
        "ssd", "32 heads of 128 x 128, step", rows, 1, 2.0 * state.nbytes, 6.0 * state.numel(),
        [lambda: ssd_step(one[0], step, a, one[1], one[2], state)], step_error,
    )  # fmt: skip


def small_cases(device: torch.device) -> Iterator[Case]:
    """What a decode step does besides attention."""
    rows, queries, heads, width = 64, 32, 8, 128
    k, v = (normal(device, rows, heads, width) for _ in range(2))
    q = normal(device, rows, queries, width)
    cos, sin = (torch.randn(rows, width, device=device).to(BFLOAT16) for _ in range(2))
    planes = [normal(device, rows + 1, heads, PAGE, width) for _ in range(2)]
    slots = torch.arange(rows, device=device) * PAGE + 17

    def error() -> float:
        found = append(k, v, cos, sin, *planes, slots, q)
        at = slots // PAGE, slots % PAGE
        real, imag = q.float().chunk(2, dim=-1)
        exact = q.float() * cos[:, None] + torch.cat((-imag, real), dim=-1) * sin[:, None]
        assert found is not None
        return rms_ratio(found, exact) + rms_ratio(planes[1][at[0], :, at[1]], v)

    yield Case(
        "append", "Llama-3-8B", rows, 1, 2.0 * 2 * rows * width * (queries + 2 * heads), 0,
        [lambda: append(k, v, cos, sin, *planes, slots, q)], error,
    )  # fmt: skip
    x = normal(device, 2**20 if device.type == "cuda" else 64, width)

    def hadamard_error() -> float:
        matrix = hadamard(torch.eye(width, device=device))
        return rms_ratio(hadamard(x), x.float() @ matrix)

    yield Case(
        "hadamard", "width 128", x.shape[0], 1, 2.0 * x.nbytes, x.numel() * 7.0,
        [lambda: hadamard(x)], hadamard_error,
    )  # fmt: skip


def coding_cases(device: torch.device, rows: int) -> Iterator[Case]:
    """What codes of half the width of Llama-3-8B take besides: written, met by queries, read."""
    queries, heads, width, rank = 32, 8, 128, 512
    k, v, q = (normal(device, rows, n, width) for n in (heads, heads, queries))
    cos, sin = (torch.randn(rows, width, device=device).to(BFLOAT16) for _ in range(2))
    planes = [normal(device, rows + 1, heads, PAGE, width) for _ in range(2)]
    slots, others = torch.arange(rows, device=device) * PAGE + 17, []
    for _ in range(4):  # a model has encoders enough to leave none of them in a cache
        weights = [normal(device, rank, heads * width).T for _ in range(2)]
        pages = [normal(device, rows + 1, 1, PAGE, rank) for _ in range(2)]
        others.append([Encoder(w, None, p) for w, p in zip(weights, pages, strict=True)])

    def write(codes: list[Encoder]) -> None:
        key_code, value_code = codes
        append(k, v, cos, sin, *planes, slots, q, key_code=key_code, value_code=value_code)

    def write_error() -> float:
        write(others[0])
        code = others[0][1]
        found = code.pages[slots // PAGE, 0, slots % PAGE]
        return rms_ratio(found, v.flatten(1).float() @ code.weight.float())

    yield Case(
        "append", "Llama-3-8B, codes of half the width", rows, 1,
        2.0 * (rows * width * (2 * queries + 4 * heads) + 2 * rank * (heads * width + rows)),
        4.0 * rows * heads * width * rank, [partial(write, codes) for codes in others], write_error,
    )  # fmt: skip
    for inner, outer in ((width, rank), (rank, width)):
        x = normal(device, rows, queries, inner)
        weights = [normal(device, heads, inner, outer) * inner**-0.5 for _ in range(4)]

        def batched(x: Tensor = x, weight: Tensor = weights[0]) -> Tensor:
            grouped = x.unflatten(1, (heads, -1)).transpose(0, 1)
            y = torch.matmul(grouped.flatten(1, 2), weight).view(*grouped.shape[:3], -1)
            return y.transpose(0, 1).flatten(1, 2)

        def error(x: Tensor = x, weight: Tensor = weights[0]) -> float:
            exact = grouped_reference.grouped_linear(x.float(), weight.float())
            return rms_ratio(grouped_linear(x, weight), exact)

        yield Case(
            "grouped_linear", f"Llama-3-8B, {inner} to {outer}", rows, 1,
            2.0 * (x.numel() // inner * (inner + outer) + weights[0].numel()),
            2.0 * rows * queries * inner * outer,
            [partial(grouped_linear, x, weight) for weight in weights], error,
            {"torch": [partial(batched, x, weight) for weight in weights]},
        )  # fmt: skip


def norm_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    """What comes before a product of so many rows, with the addition before that and without."""
    x, other = (normal(device, rows, width) for _ in range(2))
    weight, eps = normal(device, width), 1e-5

    def exact(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps)

    def torch_norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def sum_error() -> float:
        both, normed = add_rms_norm(x, other, weight, eps)
        return max(rms_ratio(both, x.float() + other.float()), rms_ratio(normed, exact(both)))

    yield Case(
        "rms_norm", f"width {width}", rows, 1, 2.0 * x.nbytes, 0,
        [lambda: rms_norm(x, weight, eps)], lambda: rms_ratio(rms_norm(x, weight, eps), exact(x)),
        {"torch": [lambda: torch_norm(x)]},
    )  # fmt: skip
    yield Case(
        "rms_norm", f"width {width}, of a sum", rows, 1, 4.0 * x.nbytes, 0,
        [lambda: add_rms_norm(x, other, weight, eps)], sum_error,
        {"torch": [lambda: torch_norm(x + other)]},
    )  # fmt: skip


def swiglu_cases(device: torch.device, rows: int, width: int) -> Iterator[Case]:
    """What lies between the products of an MLP."""
    both = normal(device, rows, 2 * width)
    gate, up = (x.contiguous() for x in both.chunk(2, dim=-1))
    yield Case(
        "swiglu", f"width {width}", rows, 1, 1.5 * both.nbytes, 0, [lambda: swiglu(both)],
        lambda: rms_ratio(swiglu(both), F.silu(gate.float()) * up.float()),
        {"torch": [lambda: F.silu(gate) * up]},
    )  # fmt: skip


def mlp_cases(device: torch.device, rows: int, hidden: int, inner: int) -> Iterator[Case]:
    """A whole gated MLP, and the addition behind it."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner)
    with device:
        theirs = LlamaMLP(config).to(BFLOAT16).requires_grad_(False)
    ours, exact = FusedMLP(theirs), copy.deepcopy(theirs).float()
    x, residual = normal(device, rows, hidden), 0.1 * normal(device, rows, hidden)

    def error() -> float:
        return rms_ratio(ours.add_to(residual.clone(), x), residual.float() + exact(x.float()))

    yield Case(
        "mlp", f"{hidden} to {inner}", rows, 1, 2.0 * 3 * hidden * inner,
        2.0 * 3 * rows * hidden * inner, [lambda: ours.add_to(residual, x)], error,
        {"torch": [lambda: residual + theirs(x)]},
    )  # fmt: skip


def merge_cases(device: torch.device, rows: int) -> Iterator[Case]:
    """Two parts of Llama-3-8B, of which one lies head by head."""
    queries, width = 32, 128
    parts = [normal(device, rows, queries, width), normal(device, queries, rows, width)]
    parts[1] = parts[1].transpose(0, 1)
    masses = [torch.randn(rows, queries, device=device) for _ in range(2)]
    yield Case(
        "merge", "Llama-3-8B", rows, 1, 3.0 * parts[0].nbytes, 0, [lambda: merge(parts, masses)],
        lambda: rms_ratio(
            merge(parts, masses), decode_reference.merge([x.float() for x in parts], masses)
        ),
        {"torch": [lambda: decode_reference.merge(parts, masses)]},
    )  # fmt: skip


# ------------------------------------------------------------------------------- end to end


def show(bench: Bench) -> None:
    """One table of everything."""
    table = Table(title=f"{bench.header['device']}, copy {bench.copy / 1e12:.2f} TB/s")
    for name in ("kernel", "shape", "batch", "tokens", "µs", "of copy", "TFLOP/s", "others (µs)"):
        table.add_column(name)
    for row in bench.rows:
        others = " ".join(
            f"{key.removesuffix('_seconds')} {value * 1e6:.1f}"
            for key, value in row.items()
            if key.endswith("_seconds")
        )
        seconds = row.get("seconds")
        if "tokens_per_second" in row:
            others = f"{row['tokens_per_second']:.1f} tokens/s"
        table.add_row(
            row["kernel"], row["shape"], str(row["batch"]), str(row["tokens"]),
            f"{seconds * 1e6:.1f}" if seconds else f"[red]{row.get('failed')}",
            f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "",
            f"{row['tflops']:.1f}" if "tflops" in row else "", others,
        )  # fmt: skip
    Console(width=150).print(table)


def asked_for(description: str) -> tuple[Bench, bool]:
    """What the command line asks for, and whether sizes are to be small."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500, help="stop after so many")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    return Bench(asked.out, device, asked.seconds), asked.tiny


def main() -> None:
    """Parses and measures."""
    bench, tiny = asked_for(__doc__)
    device = bench.device
    grouped = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}
    latents = {
        "SmolLM2-135M, MLA at 50 %": (9, 160, 32),
        "16 heads, 512 + 64": (16, 512, 64),
        "Llama-3-8B, MLA at 25 %": (32, 448, 64),
        "Llama-3-8B, MLA at 50 %": (32, 960, 64),
        "DeepSeek-V3": (128, 512, 64),
    }
    packed_latents = {name: latents[name] for name in list(latents)[1:3]}
    groups: list[Iterator[Case]]
    if tiny:
        groups = [
            decode_cases(device, {"SmolLM2-135M": (9, 3, 64)}, [(2, 100)]),
            latent_cases(device, {"SmolLM2-135M": (9, 160, 32)}, [(2, 100)]),
            split_cases(device, 1, 100),
            code_cases(device, 1, 100),
            packed_cases(device, 1, 200),
            packed_latent_cases(device, {"SmolLM2-135M": (9, 160, 32)}, [(2, 200)]),
            small_cases(device),
            coding_cases(device, 2),
            norm_cases(device, 2, 256),
            swiglu_cases(device, 2, 256),
            mlp_cases(device, 2, 64, 96),
            merge_cases(device, 2),
            state_cases(device, 1, 100),
            streaming_cases(device, 100),
        ]
    else:
        sizes = [(b, n) for n in (4096, 32768, 131072) for b in (1, 8, 64)]
        short = [(1, 4096), (64, 4096), (1, 32768), (8, 32768), (64, 32768), (8, 131072)]
        groups = [
            decode_cases(device, grouped, sizes),
            split_cases(device, 8, 32768),
            code_cases(device, 8, 32768),
            packed_cases(device, 8, 32768),
            latent_cases(device, latents, short),
            packed_latent_cases(device, packed_latents, short[2:]),
            small_cases(device),
            *(norm_cases(device, rows, 4096) for rows in (1, 8, 64, 4096)),
            *(norm_cases(device, rows, 128) for rows in (256, 2**17)),
            *(swiglu_cases(device, rows, 14336) for rows in (1, 8, 64, 8192)),
            *(mlp_cases(device, rows, 4096, 14336) for rows in (1, 8, 64, 8192)),
            *(merge_cases(device, rows) for rows in (1, 8, 64)),
            *(coding_cases(device, rows) for rows in (1, 8, 64)),
            state_cases(device, 4, 8192),
            streaming_cases(device, 32768),
        ]
    try:
        for cases in groups:
            with bench.going_on("cases"):
                for case in cases:
                    if bench.late(15):
                        break
                    bench.measure(case)
                    del case
        with bench.going_on("end to end"):
            if tiny:
                end_to_end(bench, 2, 2, 100, shrink=16)
            else:
                end_to_end(bench, 32, 8, 32768)
        for batch in () if tiny else (1, 8):
            with bench.going_on("flex_attention"):
                for case in flex_cases(device, batch, 32768):
                    if not bench.late(20):
                        bench.measure(case)
    finally:
        show(bench)


if __name__ == "__main__":
    main()
