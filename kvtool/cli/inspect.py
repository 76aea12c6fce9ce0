"""`kvtool inspect`: what a checkpoint is, what its cache costs, and what can be done with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.filesize import decimal
from rich.table import Table

from kvtool.cli import _console, _options

if TYPE_CHECKING:
    from kvtool.inspection import Inspection


def inspect(
    model: _options.Model,
    revision: _options.Revision = None,
    json: _options.Json = False,
    offline: _options.Offline = False,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Show attention, cache size, and the plans and conversions that apply; reads no weights."""
    from kvtool.checkpoint import Checkpoint
    from kvtool.inspection import inspect_checkpoint

    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    inspection = inspect_checkpoint(checkpoint)
    if not json:
        _console.out.print(_facts(inspection))
    _console.emit(inspection.to_dict(), json, _applications(inspection))


def _facts(inspection: Inspection) -> Table:
    from kvtool.inspection import CONTEXTS

    table = Table(title=inspection.model, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_row("family", f"{inspection.family} ({inspection.architecture})")
    if inspection.text_of:
        table.add_row("text alone", f"of {inspection.text_of}: all of this is about its decoder")
    for run in inspection.runs:
        which = f"layers {run.first}-{run.last}" if run.layers > 1 else f"layer {run.first}"
        table.add_row(which, run.summary)
    if inspection.unsupported:
        table.add_row("attention", f"not supported: {inspection.unsupported}")
    positions = inspection.max_positions
    rope = ", ".join(
        f"{key.removeprefix('rope_')} {value}" for key, value in sorted(inspection.rope.items())
    )
    table.add_row("RoPE", rope or "none")
    table.add_row("positions", f"{positions:,}" if positions else "unknown")
    table.add_row("embeddings", "tied" if inspection.tied_embeddings else "separate output head")
    table.add_row(
        "weights",
        f"{inspection.parameters:,} parameters, {decimal(inspection.weight_bytes)} "
        f"({', '.join(sorted(inspection.dtypes))})",
    )
    if inspection.quantised:
        table.add_row("  on disk", f"{decimal(inspection.stored_bytes)} ({inspection.quantised})")
    if inspection.cache_scales:
        told = f"{inspection.cache_scales}; vLLM reads them, and kvtool with a plan of --bits fp8"
        table.add_row("cache scales", told)
    if inspection.bytes_per_token is not None:
        per_token = f"{inspection.bytes_per_token:,} bytes per token"
        if (late := inspection.bytes_behind_windows) != inspection.bytes_per_token:
            per_token += f", {late:,} behind full windows"
        table.add_row("cache, bf16", per_token)
        for tokens in CONTEXTS:
            beyond = " (beyond its positions)" if positions and tokens > positions else ""
            table.add_row(
                f"  at {tokens // 1024}k tokens", decimal(inspection.cache_bytes(tokens)) + beyond
            )
    if (hybrid := inspection.hybrid) is not None:
        sizes = ", ".join(
            f"{decimal(hybrid.cache_bytes[str(n)])} at {n // 1024}k" for n in CONTEXTS[:2]
        )
        table.add_row(
            "  with --to mamba",
            f"{sizes}: {_console.counted(hybrid.layers, 'layer')} of "
            f"{decimal(hybrid.constant_bytes)} each at any length, less from {hybrid.even_at} "
            "tokens on",
        )
    return table


def _applications(inspection: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("what applies", "method", "target", "", "why not"):
        table.add_column(column, overflow="fold")
    every = [*inspection.plans, *inspection.applications]
    for command, group in groupby(every, lambda item: item.command):
        items = list(group)
        why = items[0].reasons
        if why and len(items) > 1 and all(item.reasons == why for item in items):
            items = [replace(items[0], method="any", target="any")]
        elif len(items) == 1:  # nothing to choose
            items = [replace(items[0], method="", target="")]
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # targets of a method, by verdict
        for item in items:
            alike.setdefault((item.method, tuple(item.reasons)), []).append(item.target)
        for (method, reasons), targets in alike.items():
            verdict = "no" if reasons else "yes"
            table.add_row(command, method, ", ".join(targets), verdict, "; ".join(reasons))
    return table
