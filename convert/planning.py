"""Whether a checkpoint can be converted, and what that will cost: to MLA, or to fewer KV heads."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvtool import distill
from kvtool.calibrate import statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.convert import artifact, costs, fp8_planning, heal, targets
from kvtool.convert.options import (
    OF_FP8,
    OF_MLA,
    ConvertOptions,
    attention_dtype,
    check_tokens,
    refuse,
    texts,
)
from kvtool.corpus import training_text
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.layout import AttentionLayout

Size = targets.LatentSize | targets.HeadsSize


def plan(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """Checks everything that can be checked before work starts, and says what it will cost.

    Args:
        output: Where it would be written; checked too if given.
        overwrite: Whether something may be there already.
        teacher: What `options.teacher` names, opened.

    Raises:
        UnsupportedModelError: The target cannot express the model.
        UsageError: A width or budget is impossible, the text is too short, the output in the way.
        CheckpointError: Tensors are missing or have the wrong shape.
        ResourceError: The disk is too small.
    """
    _check_names(checkpoint, options)
    if options.to == "fp8-kv":
        return fp8_planning.plan(checkpoint, options, output, overwrite=overwrite)
    stream = LayerStream(checkpoint)
    layout, layers = stream.layouts[0], len(stream)
    size = _size(checkpoint, options, layout)
    check_tokens(checkpoint, options)
    teacher = opened(options, teacher)
    healing = _check_healing(checkpoint, options, teacher)
    dtype = save_dtype(checkpoint, options)
    replaced = replaced_parts(options)
    gone = (t.nbytes for n, t in checkpoint.tensors.items() if artifact.is_replaced(n, replaced))
    written = layers * _attention_values(layout, size, options) * dtype.itemsize
    output_bytes = checkpoint.total_bytes - sum(gone) + written
    if checkpoint.hf_config().tie_word_embeddings and options.target == "vllm":
        output_bytes += checkpoint.tensors["model.embed_tokens.weight"].nbytes  # untied
    fitted = layers * _fitted_bytes(layout, size, options)
    disk_bytes = costs.disk_bytes(stream, output_bytes, written, fitted)
    measuring = fitting = 0
    if options.method != "exact":
        measuring = statistics.memory_bytes(stream, options.tokens)
    if options.method == "aware":
        # Two streams, their difference, the original's outputs, and what the projection reads.
        read = 6 * layout.hidden_size + layout.heads * layout.head_dim
        fitting = 4 * options.tokens * read
        disk_bytes += 4 * 4 * options.tokens * layout.hidden_size  # two streams, old and new
    memory_bytes = costs.memory_bytes(
        stream, options, output_bytes, measuring=measuring, fitting=fitting
    )
    if healing is not None:
        trained = layers * _attention_values(layout, size, replace(options, target="kvtool"))
        disk_bytes += fitted + 2 * 3 * 4 * trained  # a state of values and moments, old and new
        weights = checkpoint.parameters
        needed = costs.BASE_MEMORY + heal.memory_bytes(checkpoint.hf_config(), weights, trained)
        needed += 0 if teacher is None else 4 * teacher.parameters
        healing["memory_bytes"] = needed
    if output is not None:
        costs.check_room(checkpoint, output, disk_bytes, overwrite=overwrite)
    texts(checkpoint, options)
    return {
        "to": options.to,
        "method": options.method,
        "target": options.target,
        "text_of": checkpoint.wrapper,
        "layers": layers,
        **size.widths,
        "bytes_per_token_before": 2 * layers * size.native,
        "bytes_per_token_after": 2 * layers * size.kept,
        "share": size.kept / size.native,
        "output_bytes": output_bytes,
        "disk_bytes": disk_bytes,
        "memory_bytes": memory_bytes,
        "verify_memory_bytes": costs.verify_memory_bytes(checkpoint),
        "attention_dtype": str(dtype).removeprefix("torch."),
        "healing": healing,
    }


def _check_names(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    for value, known, flag in (
        (options.to, targets.KINDS, "--to"),
        (options.method, targets.METHODS, "--method"),
        (options.target, targets.TARGETS, "--target"),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value} is unknown: choose {', '.join(known)}")
    targets.refuse_fp8(checkpoint)
    if reasons := targets.of_checkpoint(checkpoint, options.to):
        raise UnsupportedModelError(f"cannot {targets.ASKED[options.to]}: {reasons[0]}")
    if checkpoint.config.get("model_type") == "kvtool_mla":
        targets.refuse_latent(options.to)
    targets.require(checkpoint.hf_config(), options.method, options.target, options.to)


def _size(checkpoint: Checkpoint, options: ConvertOptions, layout: AttentionLayout) -> Size:
    """The widths asked for; raises where other options do not go with them."""
    refuse(options, OF_FP8, "is for --to fp8-kv")
    if options.to == "gqa":
        why = "is for --to mla; fewer KV heads are asked for with --kv-heads alone"
        refuse(options, (*OF_MLA, "kv_budget"), why)
        return targets.heads_size(layout, options.kv_heads)
    return _latent_size(checkpoint, options, layout)


def _latent_size(
    checkpoint: Checkpoint, options: ConvertOptions, layout: AttentionLayout
) -> targets.LatentSize:
    if options.kv_heads is not None:
        raise UsageError("--kv-heads is for --to gqa: a latent has no heads")
    if options.method != "transmla" and options.freqfold != "auto":
        raise UsageError(f"--freqfold has no place in --method {options.method}")
    if options.method == "exact":
        if any(x is not None for x in (options.kv_budget, options.rope_dim, options.rank)):
            raise UsageError(
                "--method exact keeps every byte: --kv-budget, --rope-dim and --rank have no place"
            )
        width = layout.kv_heads * layout.head_dim
        return targets.LatentSize(width, width, layout.cached_values)
    widths = (options.kv_budget, options.rope_dim, options.rank)
    config = checkpoint.hf_config()
    size = targets.latent_size(config, options.method, options.target, *widths)
    if options.method == "transmla" and options.freqfold != "auto":
        if not options.freqfold.isdecimal():
            raise UsageError(f"--freqfold {options.freqfold} is neither 'auto' nor a number")
        targets.check_freqfold(int(options.freqfold), layout.head_dim, size.rope_dim)
    return size


def _check_healing(
    checkpoint: Checkpoint, options: ConvertOptions, teacher: Checkpoint | None
) -> dict[str, Any] | None:
    """What healing is planned."""
    if options.heal is None:
        if teacher is not None:
            raise UsageError("--teacher teaches while healing: give --heal, too")
        return None
    if options.method == "exact":
        raise UsageError("--method exact loses nothing that --heal could bring back")
    if teacher is not None:
        heal.check_teacher(teacher, checkpoint)
    amount = distill.Amount.parse(options.heal, "--heal", heal.AUTO)
    length = heal.window(checkpoint, teacher)
    _, processes = distill.processes()
    steps = None if amount.tokens is None else amount.steps(heal.BATCH * length * processes)
    text = training_text(options.data).id
    return {**dataclasses.asdict(amount), "window": length, "steps": steps, "text": text}


def opened(options: ConvertOptions, teacher: Checkpoint | None) -> Checkpoint | None:
    """The teacher, by its name if the caller did not open it."""
    return teacher or (None if options.teacher is None else Checkpoint.open(options.teacher))


def replaced_parts(options: ConvertOptions) -> list[str]:
    """Parts of an attention module of which the output does not hold the source's tensors."""
    if options.heal is not None or options.to == "gqa":
        return [*artifact.REPLACED, "o_proj"]
    parts = list(artifact.REPLACED) if options.target != "kvtool" else []
    return [*parts, "o_proj"] if options.method == "aware" else parts


def save_dtype(checkpoint: Checkpoint, options: ConvertOptions) -> torch.dtype:
    """Dtype of the attention tensors written."""
    if options.dtype == "auto":
        own = attention_dtype(checkpoint)
        if own == torch.float16 and _neutral_norm(options):
            raise UnsupportedModelError(targets.FLOAT16)
        return own
    if options.dtype == "float16" and _neutral_norm(options):
        raise UsageError(
            "--dtype float16 underflows in the scaling that makes the latent norm linear",
            hint="use bfloat16 or float32, or --target kvtool",
        )
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _neutral_norm(options: ConvertOptions) -> bool:
    """Whether the output has a latent norm that scaling makes linear."""
    return options.to == "mla" and options.target != "kvtool"


def _fitted_bytes(layout: AttentionLayout, size: Size, options: ConvertOptions) -> int:
    """Of the file that keeps a fitted layer until it is written: float64 factors, and weights."""
    if not isinstance(size, targets.LatentSize):
        return 4 * _attention_values(layout, size, options)
    width = layout.kv_heads * layout.head_dim
    ups = 3 if options.method == "exact" else 4
    factors = 2 * size.rope_dim * width + size.rank * ups * width
    return 8 * factors + 4 * layout.hidden_size * (2 * layout.heads * layout.head_dim + 2 * width)


def _attention_values(layout: AttentionLayout, size: Size, options: ConvertOptions) -> int:
    """Numbers in the attention tensors that one layer's conversion writes."""
    replaced = replaced_parts(options)
    width, inner = layout.kv_heads * layout.head_dim, layout.heads * layout.head_dim
    output = inner * layout.hidden_size + int(layout.output_bias) * layout.hidden_size
    output *= "o_proj" in replaced
    if isinstance(size, targets.HeadsSize):
        return (inner + size.kept) * (layout.hidden_size + int(layout.qkv_bias)) + output
    nope = 0 if options.method == "exact" else layout.head_dim  # of a key, without positions
    if options.target == "kvtool":
        ups = layout.kv_heads * (nope + layout.head_dim)
        factors = 2 * size.rope_dim * width + size.rope_dim // 2 + size.rank * (2 * width + ups)
        rows = inner + 2 * width
        own = rows * (layout.hidden_size + int(layout.qkv_bias)) if "q_proj" in replaced else 0
        return factors + own + output
    heads, hidden, bias = layout.heads, layout.hidden_size, int(layout.qkv_bias)
    query_in, query_out = heads * layout.head_dim, heads * (nope + size.rope_dim)
    query = query_out * hidden
    if bias:
        query = query_in * (hidden + 2) + query_in * query_out
    down = (size.rank + size.rope_dim) * (hidden + bias) + size.rank
    zeros = hidden if bias and not layout.output_bias else 0  # the stock bias of o_proj
    return query + down + heads * (nope + layout.head_dim) * size.rank + output + zeros
