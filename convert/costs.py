"""Memory and disk that conversions take, as far as they take the same."""

from __future__ import annotations

import math
from pathlib import Path

from kvtool.calibrate import statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint, check_disk, check_output, scratch_folder
from kvtool.convert.options import PROBE, ConvertOptions, positions, shard_bytes

BASE_MEMORY = 500_000_000
"""Python, torch and transformers themselves."""


def memory_bytes(
    stream: LayerStream, options: ConvertOptions, output_bytes: int, *, measuring: int, fitting: int
) -> int:
    """About what a conversion holds at once, layer by layer.

    Args:
        output_bytes: Of the weights that it writes.
        measuring: What the pass of the statistics holds.
        fitting: What is held beside a layer while it is fitted.
    """
    layer = statistics.layer_memory(stream)
    head = stream.checkpoint.tensors["model.embed_tokens.weight"]
    shard = min(output_bytes, shard_bytes(options.shard_size))
    # The logits of the probe take the output head as it is and in fp32.
    writing = max(shard, layer, head.nbytes + 4 * math.prod(head.shape))
    probing = 2 * _probe_bytes(stream) + writing
    return BASE_MEMORY + max(measuring, layer + fitting, probing)


def verify_memory_bytes(checkpoint: Checkpoint, added: int = 0) -> int:
    """About what verification holds: a model in fp32, with so many numbers more."""
    return BASE_MEMORY + 4 * (checkpoint.parameters + added)


def disk_bytes(stream: LayerStream, output_bytes: int, written: int, fitted: int) -> int:
    """What a conversion needs on disk but for the states of its text.

    Args:
        output_bytes: Of the weights that it writes. written: Of those that it makes itself.
        fitted: Of all files of fitted layers.
    """
    # Layer files lie beside the shards until the end, the states of the probe until the shards
    # are written, and twice while they are replaced. Statistics have a place of their own.
    probe = _probe_bytes(stream)
    return written + probe + max(output_bytes, probe) + fitted


def check_room(checkpoint: Checkpoint, output: Path, needed: int, *, overwrite: bool) -> None:
    """Whether the output may be written; what a killed run left is of what it needs.

    Raises:
        UsageError: Something is in the way.
        ResourceError: The disk is too small.
    """
    check_output(output, overwrite=overwrite, source=checkpoint.path)
    partial = scratch_folder(output).parent
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    check_disk(output, max(0, needed - there))


def _probe_bytes(stream: LayerStream) -> int:
    """Of its hidden states, and of what else goes from layer to layer with them."""
    return 4 * stream.columns.width * min(PROBE, positions(stream.checkpoint))
