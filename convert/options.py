"""What a conversion to a checkpoint of attention is asked for, and the text that it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.checkpoint import Checkpoint, torch_dtype
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.errors import UsageError
from kvtool.sizes import bytes_of

WINDOW = 2048
"""Tokens per calibration window (TransMLA's converter: 256): rotations matter at long distances."""
PROBE = 2112
"""Tokens of the probe: beyond 2048, where some engines switch their RoPE."""


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


OF_MLA = ("method", "target", "rope_dim", "rank", "freqfold")
OF_FP8 = ("scales", "smooth", "turn_values")
"""Options that only these conversions have."""


def refuse(options: ConvertOptions, names: tuple[str, ...], why: str) -> None:
    """Raises UsageError where one of the options, those of other conversions, was given."""
    defaults = ConvertOptions()
    for name in names:
        if getattr(options, name) != getattr(defaults, name):
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def check_tokens(checkpoint: Checkpoint, options: ConvertOptions) -> None:
    """Raises UsageError unless the calibration text has a window."""
    window = min(WINDOW, positions(checkpoint))
    if options.method != "exact" and options.tokens < window:
        raise UsageError(f"--tokens {options.tokens} is less than one window of {window}")


def positions(checkpoint: Checkpoint) -> int:
    """The longest text of a model, in tokens."""
    return int(checkpoint.hf_config().max_position_embeddings)


def attention_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In which a checkpoint stores its attention."""
    outputs = (name for name in checkpoint.tensors if name.endswith(".self_attn.o_proj.weight"))
    return torch_dtype(checkpoint.tensors[next(outputs)].dtype)


def texts(checkpoint: Checkpoint, options: ConvertOptions) -> tuple[Tensor | None, Tensor]:
    """Calibration windows `[N, T]`, unless the method needs none, and the probe `[T]`, held out."""
    tokenizer = checkpoint.tokenizer()
    ids = None
    if options.method != "exact":
        used = statistics_options(checkpoint, options)
        assert used.window is not None
        count = used.tokens // used.window
        corpus = calibration_text(options.data)
        ids = corpus.windows(tokenizer, used.window, count, options.seed, used.chat)
    length = min(PROBE, positions(checkpoint))
    probe = evaluation_text(options.data).windows(tokenizer, length, 1)[0]
    return ids, probe


def statistics_options(checkpoint: Checkpoint, options: ConvertOptions) -> StatisticsOptions:
    """The text that a conversion reads."""
    window = min(WINDOW, positions(checkpoint))
    return StatisticsOptions(
        data=options.data, tokens=options.tokens, window=window, seed=options.seed
    )


def shard_bytes(text: str) -> int:
    """Bytes from a size with its unit, such as `2GB` or `500MB`."""
    size = bytes_of(text)
    if size is None or text.strip()[-1].isdecimal():
        raise UsageError(f"--shard-size {text} is not a size such as 2GB or 500MB")
    return size
