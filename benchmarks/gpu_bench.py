"""What the benchmarks of kernels on a GPU share: cases, how they are timed, and the table.

Every kernel is checked against its contract in plain torch first, on the inputs that are timed; one
that fails gets no speed; of attention, the first row is checked. Times are medians over replays of
a CUDA graph of several calls on up to four inputs: a few megabytes stay in the L2 cache. Bandwidth
is that of the bytes that must be read and written, beside a copy of 2 GiB measured in the same
process. A copy reads and writes; what only reads can be faster, so a sum over as much is measured
as well. The file is written row by row, and a row that fails does not take the others with it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

os.environ.setdefault("KVTOOL_KERNELS", "triton")

from kvtool.evaluate.throughput import environment

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
