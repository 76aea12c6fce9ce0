"""What a conversion is asked to do, whether it can be done, and what it will cost."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import distill
from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint, check_disk, check_output, scratch_folder, torch_dtype
from kvtool.convert import artifact, fp8_kv, heal, targets
from kvtool.corpus import calibration_text, can_chat, evaluation_text, training_text
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.layout import AttentionLayout, with_heads

WINDOW = 2048
"""Tokens per calibration window (TransMLA's converter: 256): rotations matter at long distances."""
PROBE = 2112
"""Tokens of the probe: beyond 2048, where some engines switch their RoPE."""
_BASE_MEMORY = 500_000_000
"""Python, torch and transformers themselves."""

Size = targets.LatentSize | targets.HeadsSize | targets.BytesSize


@dataclass(frozen=True)
class ConvertOptions:
    """Everything that determines the output besides the model.

    Attributes:
        to: `mla`, `gqa` for fewer KV heads, or `fp8-kv` for the scales of an fp8 cache.
        method: `exact`, `transmla` or `aware`; only the last one but for `mla`.
        target: `transformers`, `vllm` or `kvtool`; only the first one but for `mla`.
        kv_heads: Of the result, for `gqa`.
        kv_budget, rope_dim, rank: Widths, see :func:`targets.latent_size`.
        freqfold: F of TransMLA, or `auto`.
        data: Calibration text; `None` is Python's own documentation, for healing with docstrings.
        tokens: Calibration tokens.
        heal: How long the original teaches the result, see :meth:`kvtool.distill.Amount.parse`.
        teacher: Another model that teaches instead, with the same tokenizer.
        scales: For `fp8-kv`, one for all heads (`tensor`) or one each (`head`).
        smooth, turn_values: For `fp8-kv`, what is folded into the weights, see `fp8_kv.py`.
        dtype: Of the attention tensors; `auto` keeps the source's.
    """

    to: str = "mla"
    method: str = "aware"
    target: str = "transformers"
    kv_heads: int | None = None
    kv_budget: str | None = None
    rope_dim: int | None = None
    rank: int | None = None
    freqfold: str = "auto"
    data: str | None = None
    tokens: int = 16384
    heal: str | None = None
    teacher: str | None = None
    scales: str = "tensor"
    smooth: bool = False
    turn_values: bool = False
    seed: int = 0
    dtype: str = "auto"
    shard_size: str = "2GB"


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
    config = checkpoint.hf_config()
    stream = LayerStream(checkpoint)
    layout, layers = with_heads(stream.layouts), len(stream)
    size = _size(checkpoint, options, stream)
    # Layers that differ are counted together.
    times = 1 if isinstance(size, targets.BytesSize) else layers
    teacher = opened(options, teacher)
    planned_healing = _check_healing(checkpoint, options, teacher)
    dtype = save_dtype(checkpoint, options)
    nope = 0 if options.method == "exact" else layout.head_dim
    replaced = replaced_parts(options, layout, checkpoint)
    gone = [t for n, t in checkpoint.tensors.items() if is_replaced(n, replaced)]
    untied = config.tie_word_embeddings and options.target == "vllm"
    head = checkpoint.tensors["model.embed_tokens.weight"]
    if isinstance(size, targets.BytesSize):
        scales = fp8_kv.scale_bytes(stream.layouts, options)
        attention_bytes = sum(t.nbytes for t in gone) + scales
        fitted = 4 * sum(math.prod(t.shape) for t in gone) + scales
        before = checkpoint.whole().total_bytes
    else:
        values = layers * _attention_values(layout, size, nope, options, replaced)
        attention_bytes, before = values * dtype.itemsize, checkpoint.total_bytes
        fitted = layers * _fitted_bytes(layout, size, nope, options, replaced)
    output_bytes = before - sum(t.nbytes for t in gone) + untied * head.nbytes + attention_bytes
    probe = 4 * layout.hidden_size * min(PROBE, _context(checkpoint))
    measuring = fitting = 0
    if options.to == "fp8-kv":
        fitting = 4 * options.tokens * layout.hidden_size
    elif options.method != "exact":
        measuring = statistics.memory_bytes(stream, options.tokens)
    if options.to != "fp8-kv" and options.method == "aware":
        # Two streams, their difference, the original's outputs, and what the projection reads.
        numbers = 6 * layout.hidden_size + layout.heads * layout.head_dim
        fitting = 4 * options.tokens * numbers
    layer_bytes = max(
        sum(t.nbytes for n, t in checkpoint.tensors.items() if n.startswith(f"model.layers.{i}."))
        for i in range(layers)
    )
    # As stored, and in fp32; experts twice and more while they are put together, 6.3 in all.
    copies = 7 if any(re.search(r"\.experts\.\d", name) for name in checkpoint.tensors) else 3
    shard = min(output_bytes, shard_bytes(options.shard_size))
    # Layer files lie beside the shards until the end, the states of the probe until the shards
    # are written, and twice while they are replaced. Statistics have a place of their own.
    disk_bytes = attention_bytes + probe + max(output_bytes, probe) + fitted
    if options.method == "aware":
        disk_bytes += 4 * 4 * options.tokens * layout.hidden_size  # two streams, old and new
    healing = 0
    if options.heal is not None:
        assert not isinstance(size, targets.BytesSize)
        own = replace(options, target="kvtool")
        parts = replaced_parts(own, layout, checkpoint)
        trained = layers * _attention_values(layout, size, nope, own, parts)
        disk_bytes += fitted + 2 * 3 * 4 * trained  # a state of values and moments, old and new
        weights = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        healing = _BASE_MEMORY + heal.memory_bytes(config, weights, trained)
        if teacher is not None:
            healing += sum(4 * math.prod(t.shape) for t in teacher.tensors.values())
    if output is not None:
        check_output(output, overwrite=overwrite, source=checkpoint.path)
        partial = scratch_folder(output).parent
        there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        check_disk(output, max(0, disk_bytes - there))
    texts(checkpoint, options)
    return {
        "to": options.to,
        "method": options.method,
        "target": options.target,
        "text_of": None if options.to == "fp8-kv" else checkpoint.wrapper,
        "layers": layers,
        **size.widths,
        "bytes_per_token_before": 2 * times * size.native,
        "bytes_per_token_after": 2 * times * size.kept,
        "share": size.kept / size.native,
        "output_bytes": output_bytes,
        "disk_bytes": disk_bytes,
        "memory_bytes": _BASE_MEMORY
        + max(
            measuring,
            copies * layer_bytes + fitting,
            # The logits of the probe take the output head as it is and in fp32.
            2 * probe + max(shard, copies * layer_bytes, head.nbytes + 4 * math.prod(head.shape)),
        ),
        "verify_memory_bytes": _BASE_MEMORY
        + 4 * sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "attention_dtype": str(dtype).removeprefix("torch."),
        "healing": planned_healing and {**planned_healing, "memory_bytes": healing},
        **_about_fp8(checkpoint, options),
    }


def _about_fp8(checkpoint: Checkpoint, options: ConvertOptions) -> dict[str, Any]:
    """What only an fp8 cache has in its plan."""
    if options.to != "fp8-kv":
        return {}
    large = {str(i): round(x, 1) for i, x in fp8_kv.large_key_biases(checkpoint).items()}
    return {
        "scales": options.scales,
        "smooth": options.smooth,
        "turn_values": options.turn_values,
        "large_key_biases": large,
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


def _size(checkpoint: Checkpoint, options: ConvertOptions, stream: LayerStream) -> Size:
    """The widths asked for; raises where other options do not go with them."""
    size: Size
    layout = with_heads(stream.layouts)
    if options.to != "fp8-kv":
        _check_none(options, ("scales", "smooth", "turn_values"), "is for --to fp8-kv")
    if options.to == "gqa":
        why = "is for --to mla; fewer KV heads are asked for with --kv-heads alone"
        _check_none(options, (*_OF_MLA, "kv_budget"), why)
        size = targets.heads_size(layout, options.kv_heads)
    elif options.to == "fp8-kv":
        why = "has no place in --to fp8-kv, which takes --scales, --smooth and --turn-values"
        _check_none(options, (*_OF_MLA, "kv_budget", "kv_heads", "heal", "dtype"), why)
        if options.scales not in ("tensor", "head"):
            raise UsageError(f"--scales {options.scales} is unknown: choose tensor or head")
        fp8_kv.check_options(checkpoint, stream, options)
        size = targets.BytesSize(sum(x.cached_values for x in stream.layouts))
    else:
        size = _latent_size(checkpoint, options, layout)
    window = min(WINDOW, _context(checkpoint))
    if options.method != "exact" and options.tokens < window:
        raise UsageError(f"--tokens {options.tokens} is less than one window of {window}")
    return size


_OF_MLA = ("method", "target", "rope_dim", "rank", "freqfold")


def _check_none(options: ConvertOptions, names: tuple[str, ...], why: str) -> None:
    """Refuses options of other conversions."""
    defaults = ConvertOptions()
    for name in names:
        if getattr(options, name) != getattr(defaults, name):
            raise UsageError(f"--{name.replace('_', '-')} {why}")


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


def texts(checkpoint: Checkpoint, options: ConvertOptions) -> tuple[Tensor | None, Tensor]:
    """Calibration windows `[N, T]`, unless the method needs none, and the probe `[T]`, held out."""
    tokenizer = checkpoint.tokenizer()
    ids = None
    if options.method != "exact":
        used = statistics_options(checkpoint, options)
        assert used.window is not None
        count = used.tokens // used.window
        chat = used.chat if can_chat(tokenizer) else 0.0
        corpus = calibration_text(options.data)
        ids = corpus.windows(tokenizer, used.window, count, options.seed, chat)
    length = min(PROBE, _context(checkpoint))
    probe = evaluation_text(options.data).windows(tokenizer, length, 1)[0]
    return ids, probe


def statistics_options(checkpoint: Checkpoint, options: ConvertOptions) -> StatisticsOptions:
    """The text that a conversion reads."""
    window = min(WINDOW, _context(checkpoint))
    return StatisticsOptions(
        data=options.data, tokens=options.tokens, window=window, seed=options.seed
    )


def is_replaced(name: str, parts: list[str]) -> bool:
    """Whether a tensor of the source is of the `replaced_parts`."""
    return any(f".self_attn.{part}." in name for part in parts)


def replaced_parts(
    options: ConvertOptions, layout: AttentionLayout, checkpoint: Checkpoint
) -> list[str]:
    """Parts of an attention module of which the output does not hold the source's tensors."""
    if options.to == "fp8-kv":
        return fp8_kv.folded_parts(options, layout, checkpoint)
    parts = list(artifact.REPLACED) if options.target != "kvtool" else []
    if options.heal is not None or options.to == "gqa":
        parts = [*artifact.REPLACED, "o_proj"]
    elif options.method == "aware":
        parts.append("o_proj")
    return parts


def save_dtype(checkpoint: Checkpoint, options: ConvertOptions) -> torch.dtype:
    """Dtype of the attention tensors written."""
    if options.dtype == "auto":
        outputs = (x for x in checkpoint.tensors if x.endswith(".self_attn.o_proj.weight"))
        own = torch_dtype(checkpoint.tensors[next(outputs)].dtype)
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


def _context(checkpoint: Checkpoint) -> int:
    return int(checkpoint.hf_config().max_position_embeddings)


def shard_bytes(text: str) -> int:
    """Bytes from `2GB` or `500MB`."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GIB": 2**30, "MIB": 2**20, "KIB": 2**10}
    for unit in ("GIB", "MIB", "KIB", "GB", "MB", "KB"):
        if text.upper().endswith(unit):
            try:
                size = int(float(text[: -len(unit)]) * units[unit])
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
            break
    raise UsageError(f"--shard-size {text} is not a size such as 2GB or 500MB")


def _fitted_bytes(
    layout: AttentionLayout,
    size: targets.LatentSize | targets.HeadsSize,
    nope: int,
    options: ConvertOptions,
    replaced: list[str],
) -> int:
    """Of the file that keeps a fitted layer until it is written: float64 factors, and weights."""
    if not isinstance(size, targets.LatentSize):
        return 4 * _attention_values(layout, size, nope, options, replaced)
    width = layout.kv_heads * layout.head_dim
    factors = 2 * size.rope_dim * width + size.rank * (3 * width + (nope and width))
    return 8 * factors + 4 * layout.hidden_size * (2 * layout.heads * layout.head_dim + 2 * width)


def _attention_values(
    layout: AttentionLayout,
    size: targets.LatentSize | targets.HeadsSize,
    nope: int,
    options: ConvertOptions,
    replaced: list[str],
) -> int:
    """Numbers in the attention tensors that one layer's conversion writes."""
    width, inner = layout.kv_heads * layout.head_dim, layout.heads * layout.head_dim
    output = inner * layout.hidden_size + int(layout.output_bias) * layout.hidden_size
    output *= "o_proj" in replaced
    if isinstance(size, targets.HeadsSize):
        return (inner + size.kept) * (layout.hidden_size + int(layout.qkv_bias)) + output
    if options.target == "kvtool":
        ups = (nope and width) + width
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
