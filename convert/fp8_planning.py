"""Whether a checkpoint can get scales for an fp8 cache, and what that will cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.convert import costs, fp8_kv
from kvtool.convert.artifact import is_replaced
from kvtool.convert.options import (
    OF_MLA,
    ConvertOptions,
    attention_dtype,
    check_tokens,
    refuse,
    texts,
)
from kvtool.errors import UsageError


def plan(
    checkpoint: Checkpoint, options: ConvertOptions, output: Path | None, *, overwrite: bool
) -> dict[str, Any]:
    """As :func:`kvtool.convert.planning.plan`, for `fp8-kv`."""
    stream = LayerStream(checkpoint)
    _check(stream, options)
    scales = fp8_kv.scale_bytes(stream.layouts, options)
    folded = fp8_kv.folded_parts(options, stream)
    changed = [t for name, t in checkpoint.tensors.items() if is_replaced(name, folded)]
    output_bytes = checkpoint.whole().total_bytes + scales
    written = sum(t.nbytes for t in changed) + scales
    fitted = 4 * sum(math.prod(t.shape) for t in changed) + scales
    states = 4 * options.tokens * stream.columns.width
    disk_bytes = costs.disk_bytes(stream, output_bytes, written, fitted) + 2 * states  # old and new
    memory_bytes = costs.memory_bytes(stream, options, output_bytes, measuring=0, fitting=states)
    if output is not None:
        costs.check_room(checkpoint, output, disk_bytes, overwrite=overwrite)
    texts(checkpoint, options)
    before = 2 * sum(layout.cached_values for layout in stream.layouts)
    large = {str(i): round(x, 1) for i, x in fp8_kv.large_key_biases(checkpoint).items()}
    return {
        "to": options.to,
        "method": options.method,
        "target": options.target,
        "text_of": None,  # a model of several modalities is written whole
        "layers": len(stream),
        "bytes_per_token_before": before,
        "bytes_per_token_after": before // 2,
        "share": 0.5,
        "output_bytes": output_bytes,
        "disk_bytes": disk_bytes,
        "memory_bytes": memory_bytes,
        "verify_memory_bytes": costs.verify_memory_bytes(checkpoint),
        "attention_dtype": str(attention_dtype(checkpoint)).removeprefix("torch."),
        "healing": None,
        "scales": options.scales,
        "smooth": options.smooth,
        "turn_values": options.turn_values,
        "large_key_biases": large,
    }


def _check(stream: LayerStream, options: ConvertOptions) -> None:
    """Raises UsageError or UnsupportedModelError where options do not go together or cannot be."""
    why = "has no place in --to fp8-kv, which takes --scales, --smooth and --turn-values"
    refuse(options, (*OF_MLA, "kv_budget", "kv_heads", "heal", "dtype"), why)
    if options.scales not in ("tensor", "head"):
        raise UsageError(f"--scales {options.scales} is unknown: choose tensor or head")
    fp8_kv.check_options(stream, options)
    check_tokens(stream.checkpoint, options)
    if options.teacher is not None:
        raise UsageError("--teacher teaches while healing: give --heal, too")
