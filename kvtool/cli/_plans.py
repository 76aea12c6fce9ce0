"""How plans are shown: what they keep as tables and pictures, what a dry run foresees of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

from kvtool.cli import _console
from kvtool.cli._console import counted
from kvtool.sizes import BF16

if TYPE_CHECKING:
    from kvtool.bits import Bits
    from kvtool.layer_plan import LayerPlan
    from kvtool.plan import Plan
    from kvtool.progress import Progress

FULL, STREAMING, BUDGETED = "█", "·", "▒"
SHADES, QUARTERS = "·░▒█", ("lowest quarter", "second", "third", "highest")
_PLANNED_BYTES = {
    "bytes": "cache, bf16",
    "bytes_at_most": "cache, bf16, at most",
    "bytes_read": "  read by each token",
    "native_bytes": "native cache",
    "memory_bytes": "memory needed, about",
}


def emit_made(
    make: Callable[[Progress], Plan], path: Path, context: int, *,
    overwrite: bool, json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Has a plan made, writes it and prints it."""
    with _console.progress(quiet) as report:
        started = time.perf_counter()
        plan = make(report)
        seconds = time.perf_counter() - started
    plan.write(path, overwrite=overwrite)
    emit_plan(plan, path, context, json, {"seconds": seconds})


def emit_plan(
    plan: Plan, path: Path, context: int, json: bool, also: dict[str, Any] | None = None
) -> None:
    """Prints what a plan keeps, and `also` in JSON."""
    result = {**summary(plan, path, context), **(also or {})}
    if not json:
        _console.out.print(_facts(result))
        if plan.knows_heads:
            _console.out.print(head_picture(plan), soft_wrap=True)
    _console.emit(result, json)


def emit_planned(plan: Path, model: str, facts: dict[str, Any], json: bool) -> None:
    """Prints what a dry run foresees of a plan, name by name."""
    facts = {"plan": str(plan), "model": model, **facts, "dry_run": True}
    table = Table(title="nothing written", title_justify="left", box=box.SIMPLE, show_header=False)
    for name, value in facts.items():
        if name in _PLANNED_BYTES:
            of = f" ({value / facts['native_bytes']:.1%})" if name.startswith("bytes") else ""
            table.add_row(_PLANNED_BYTES[name], decimal(value) + of)
        elif value is not None and name != "dry_run":
            told = f"{value:,}" if type(value) is int else f"{value}"
            table.add_row(name.replace("_", " "), told)
    _console.emit(facts, json, table)


def summary(plan: Plan, path: Path, context: int) -> dict[str, Any]:
    """What a plan keeps, and what its cache costs as bfloat16, as plain values."""
    return {
        "plan": str(path),
        "model": plan.base.source,
        "fingerprint": plan.base.fingerprint,
        "methods": [str(item.get("method", "unknown")) for item in plan.provenance],
        "prefill": plan.prefill,
        "policy": plan.policy,
        "kv_heads": plan.planned_heads,
        "streaming_heads": plan.streaming_heads,
        "layers": [
            {
                "streaming": sum(layer.streaming),
                "sink": layer.sink,
                "window": layer.window,
                "budget": layer.budget,
                "bits": None if layer.bits is None else _bits(layer.bits),
                "kept": None if layer.kept is None else asdict(layer.kept),
                "sparse": asdict(layer.sparse) if layer.sparse and layer.full_heads else None,
                "scales": asdict(layer.scales) if layer.scales and layer.full_heads else None,
            }
            for layer in plan.layers
        ],
        "codes": [asdict(code) for code in plan.codes],
        "scores": plan.scores is not None,
        "bytes_per_token": plan.bytes_per_token(BF16),
        "native_bytes_per_token": plan.native_bytes_per_token(BF16),
        "context": context,
        "bytes": plan.cache_bytes(context, BF16),
        "bytes_read": plan.read_bytes(context, BF16),
        "native_bytes": plan.native_bytes(context, BF16),
        "provenance": plan.provenance,
    }


def _bits(bits: Bits) -> dict[str, Any]:
    """All of it that is not a list of channels."""
    return asdict(replace(bits, order=None, key_balance=None, value_balance=None))


def _facts(result: dict[str, Any]) -> Table:
    table = Table(title=result["plan"], title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_row("model", result["model"])
    table.add_row("method", ", ".join(result["methods"]) or "unknown")
    table.add_row("prefill", result["prefill"])
    if codes := result["codes"]:
        _describe_codes(table, codes)
    else:
        if result["kv_heads"]:
            _describe_heads(table, result)
        _describe_bits(table, result["layers"])
        _describe_scales(table, result["layers"])
        _describe_sparse(table, result["layers"])
        if latents := _kept_with(result["layers"], "rank"):
            _describe_latents(table, latents)
    _describe_states(table, result["layers"])
    _describe_windows(table, result["layers"])
    _describe_shared(table, result["layers"])
    native = result["native_bytes_per_token"]
    per_token = f"{result['bytes_per_token']:,} bytes per further token (native {native:,})"
    table.add_row("cache, bf16", per_token)
    size, native = result["bytes"], result["native_bytes"]
    table.add_row(
        f"  at {result['context']:,} tokens",
        f"{decimal(size)} (native {decimal(native)}, {size / native:.1%})",
    )
    if (read := result["bytes_read"]) < size:
        share = f"{decimal(read)} of these by each new token ({read / size:.1%})"
        table.add_row("  read", f"{share}: it saves reading, not memory")
    return table


def _describe_heads(table: Table, result: dict[str, Any]) -> None:
    """Rows for heads that stream or have a token budget."""
    layers = result["layers"]
    rings = sorted({(x["sink"], x["window"]) for x in layers if x["streaming"]})
    kept = ", ".join(f"the first {sink} and last {window} tokens" for sink, window in rings)
    if rings:
        share = f"{result['streaming_heads']} of {result['kv_heads']} KV heads"
        table.add_row("streaming", f"{share}, {kept}")
        table.add_row("  per layer", " ".join(str(layer["streaming"]) for layer in layers))
    budgets = [x for layer in layers for x in layer["budget"] or () if x is not None]
    if budgets:
        spread = f"{_spread(budgets)} tokens, chosen by {result['policy']}"
        table.add_row("token budgets", f"{len(budgets)} KV heads, {spread}")


def _describe_bits(table: Table, layers: list[dict[str, Any]]) -> None:
    """Rows for what the heads that keep everything are packed as."""
    from kvtool.evaluate.report import tiers

    packed = [layer["bits"] for layer in layers]
    one = next((bits for bits in packed if bits is not None), None)
    if one is None:
        return
    for part in ("keys", "values"):
        each = ["-" if bits is None else tiers(bits, part) for bits in packed]
        table.add_row(f"bits of {part}", " ".join(each) if len(set(each)) > 1 else each[0])
    if rest := one["rest"]:
        upper = f"{one['group'] - rest['tokens']} of {one['group']} tokens have the more bits"
        table.add_row("  tiers", f"{upper}, by the attention that they get")
    if kept := one["kept"]:
        table.add_row("  kept", f"the {kept} numbers of largest magnitude, and a bitmap")
    scale = "a channel" if one["axis"] == "channel" else "a token"
    stored = f"a scale and a minimum (4 bytes) for {one['group']} numbers of {scale}"
    table.add_row("  stored", stored)
    if rank := one["rank"]:
        table.add_row("  factors", f"of rank {rank}, of what the codes leave out")
    read = "after RoPE, read as stored"
    if one["kind"] == "unrotated":
        read = "before RoPE, rebuilt when read"
    table.add_row("  keys", read)
    table.add_row(
        "  exact", f"the first {one['sink']} and at least the last {one['window']} tokens"
    )


def _describe_scales(table: Table, layers: list[dict[str, Any]]) -> None:
    """A row for heads that keep everything in fp8."""
    if stored := [layer for layer in layers if layer["scales"] is not None]:
        full = "every number of the heads that keep everything, by a scale per head"
        table.add_row("fp8 (e4m3)", f"{counted(len(stored), 'layer')}: {full}")
        if window := stored[0]["scales"]["window"]:
            table.add_row("  exact", f"the last {counted(window, 'token')} as well")


def _describe_sparse(table: Table, layers: list[dict[str, Any]]) -> None:
    """Rows for heads that keep everything and are read sparsely."""
    sparse = [layer["sparse"] for layer in layers if layer["sparse"] is not None]
    if not sparse:
        return
    labels = _spread([len(x["channels"][0]) for x in sparse])
    tokens = _spread([x["tokens"] for x in sparse])
    few = f"{counted(len(sparse), 'layer')}: {tokens} tokens, of all that full heads keep"
    table.add_row("sparse reading", few)
    table.add_row("  chosen", f"by {labels} label channels of each key")
    always = sorted({(x["sink"], x["window"]) for x in sparse})
    each = ", ".join(f"the first {sink} and last {window} tokens" for sink, window in always)
    table.add_row("  always", each)


def _spread(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least} to {most}" if least < most else f"{least}"


def _describe_latents(table: Table, latents: list[dict[str, Any]]) -> None:
    """Rows for layers that keep a latent."""
    for name, parts in (
        ("latents", [x["bits"][: x["rank"]] for x in latents]),
        ("  shared keys", [x["bits"][x["rank"] :] for x in latents]),
    ):
        numbers = [bits for part in parts for bits in part]
        if numbers:
            counts = ", ".join(f"{numbers.count(n)} of {n}" for n in sorted(set(numbers)))
            mean = sum(numbers) / len(numbers)
            table.add_row(name, f"{mean:.2f} bits in the mean: {counts} in all layers")
    one = latents[0]
    stored = f"a scale and a minimum (4 bytes) for {one['group']} tokens of each number"
    table.add_row("  stored", stored)
    table.add_row(
        "  exact", f"the first {one['sink']} and at least the last {one['window']} tokens"
    )


def _kept_with(layers: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """What layers without planned heads keep, if it has such a field."""
    kept = (layer["kept"] for layer in layers)
    return [one for one in kept if one is not None and field in one]


def _describe_states(table: Table, layers: list[dict[str, Any]]) -> None:
    """Rows for layers that keep a state."""
    if not (states := _kept_with(layers, "chunk")):
        return
    one = states[0]
    bits = "float32"
    if one["bits"] is not None:
        bits = f"{one['bits']} bits, packed every {one['chunk']} tokens, a scale (2 bytes) for "
        bits += f"{one['state']} numbers"
    table.add_row("states", f"{counted(len(states), 'layer')}: {bits}")
    if one["taught"] is not None:
        heads = sum(x > 0 for state in states for x in state["least"] or ())
        table.add_row("  beyond", f"{heads} heads pass tokens over behind {one['taught']} tokens")


def _describe_windows(table: Table, layers: list[dict[str, Any]]) -> None:
    """A row for layers with a sliding window."""
    latents = _kept_with(layers, "rank")
    if windows := [x["window"] for x in _kept_with(layers, "window") if x not in latents]:
        last = f"the last {_spread(windows)} tokens, as without a plan"
        table.add_row("sliding windows", f"{counted(len(windows), 'layer')}: {last}")


def _describe_shared(table: Table, layers: list[dict[str, Any]]) -> None:
    """A row for layers that read what others keep, and for those of them that keep everything."""
    shared = [x for x in layers if (x["kept"] or {}).keys() == {"heads", "head_dim"}]
    if not shared:
        return
    lenders = [x for x in shared if x["kept"]["heads"]]
    said = f"{counted(len(shared) - len(lenders), 'layer')} without a cache"
    if lenders:
        packed = any(x["bits"] or x["scales"] for x in lenders)
        how = "packed" if packed else "as without a plan"
        said += f"; {counted(len(lenders), 'layer')} that they read: all tokens, {how}"
    table.add_row("shared", said)


def _describe_codes(table: Table, codes: list[dict[str, Any]]) -> None:
    """Rows for codes of one kind and ring, which those of a calibration are."""
    one = codes[0]
    together = f", of {one['layers']} layers each" if one["layers"] > 1 else ", one per layer"
    read = "keys after RoPE, read as stored"
    if one["kind"] == "unrotated":
        read = "keys before RoPE, rebuilt when read"
    table.add_row("codes", f"{len(codes)}{together}: {read}")
    for part, place in (("keys", 0), ("values", 1)) if len(one["widths"]) == 2 else (("joint", 0),):
        widths = [x["widths"][place] for x in codes]
        table.add_row(f"  {part}", f"{_spread(widths)} numbers per token")
    if one["bits"] is not None:
        own = [str(x["bits"]) for x in codes]
        each = f"{' '.join(own) if len(set(own)) > 1 else own[0]} bits each"
        each += f", a scale and a minimum (4 bytes) for {one['group']}"
        table.add_row("  stored", each)
    table.add_row("  exact", f"the first {one['sink']} and last {one['window']} tokens")


def head_picture(plan: Plan) -> str:
    """One row per KV head, one column per layer: full, streaming or with a token budget."""
    columns = [_marks(layer) or [" "] * plan.base.kv_heads for layer in plan.layers]
    width = len(str(plan.base.kv_heads - 1))
    rows = [
        f"{head:>{width}} {''.join(row)}" for head, row in enumerate(zip(*columns, strict=True))
    ]
    words = {FULL: "full", STREAMING: "streaming", BUDGETED: "token budget"}
    used = {mark for column in columns for mark in column}
    legend = "  ".join(f"{mark} {word}" for mark, word in words.items() if mark in used)
    return "\n".join([*rows, f"{'':>{width}} rows: KV heads, columns: layers; {legend}"])


def _marks(layer: LayerPlan) -> list[str]:
    return [
        STREAMING if streams else FULL if budget is None else BUDGETED
        for streams, budget in zip(layer.streaming, layer.budgets, strict=True)
    ]


def score_picture(plan: Plan) -> str:
    """One row per KV head, one column per layer: the darker, the higher the head's score ranks."""
    assert plan.scores is not None
    planned = [layer.kept is None for layer in plan.layers]
    scores = plan.scores[planned]
    places = scores.flatten().argsort(stable=True).argsort() * len(SHADES)
    shades = iter((places // max(1, scores.numel())).view(scores.shape).tolist())
    columns = [
        [SHADES[shade] for shade in next(shades)] if own else [" "] * plan.base.kv_heads
        for own in planned
    ]
    width = len(str(plan.base.kv_heads - 1))
    rows = [
        f"{head:>{width}} {''.join(row)}" for head, row in enumerate(zip(*columns, strict=True))
    ]
    legend = ", ".join(f"{shade} {name}" for shade, name in zip(SHADES, QUARTERS, strict=True))
    return "\n".join([*rows, f"{'':>{width}} rows: KV heads, columns: layers; {legend}"])
