"""What a conversion to Mamba-2 is asked for, whether it can be done, and what it will cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvtool import distill
from kvtool.calibrate import statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.convert import costs, granite, targets
from kvtool.convert.heal import check_teacher
from kvtool.convert.options import attention_dtype
from kvtool.corpus import training_text
from kvtool.distill import Amount
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.layout import AttentionLayout
from kvtool.replacements import mixer_shape

AUTO = 512 * 1024
"""Tokens of `--heal auto`, and of no `--heal`."""
WINDOW = 1024
"""Tokens of a text on the CPU: many small steps teach more than few large ones."""
WINDOW_CUDA, BATCH_CUDA = 2048, 8
"""On a GPU, and texts of a step there."""


@dataclass(frozen=True)
class MambaOptions:
    """Everything that determines the output besides the model.

    Attributes:
        layers: Whose attention is replaced.
        heal: How long each arm is taught, see :meth:`kvtool.distill.Amount.parse`; `0` stops behind
            the closed form.
        teacher: Another model that teaches instead, with the same tokenizer.
        loss: Of the last stage, the original's predictions first.
        data: Text to learn from; `None` is Python's own documentation, and docstrings.
        tokens: Calibration tokens, for the reach of the heads.
        dtype: Of the mixers' tensors; `auto` keeps the source's.
    """

    layers: tuple[int, ...]
    heal: str = "auto"
    teacher: str | None = None
    loss: Literal["forward-kl", "reverse-kl"] = "forward-kl"
    data: str | None = None
    tokens: int = 16384
    seed: int = 0
    dtype: str = "auto"
    shard_size: str = "2GB"

    to = "mamba"
    method = "distilled"
    target = "transformers"

    @property
    def amount(self) -> Amount | None:
        """None behind the closed form."""
        return None if self.heal == "0" else Amount.parse(self.heal, "--heal", AUTO)

    def sizes(self, checkpoint: Checkpoint, device: str) -> tuple[int, int]:
        """Texts of a step, and their tokens."""
        cuda = torch.device(device).type == "cuda"
        batch, window = (BATCH_CUDA, WINDOW_CUDA) if cuda else (1, WINDOW)
        return batch, min(window, int(checkpoint.hf_config().max_position_embeddings))


def require(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError with the first reason of :func:`targets.check`."""
    targets.refuse_fp8(checkpoint)
    if reasons := targets.check(checkpoint.hf_config(), "distilled", "transformers", "mamba"):
        raise UnsupportedModelError(f"cannot convert to a hybrid: {reasons[0]}")


def plan(
    checkpoint: Checkpoint,
    options: MambaOptions,
    output: Path | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """Checks everything that can be checked before work starts, and says what it will cost.

    Raises:
        UnsupportedModelError: The class cannot express the model.
        UsageError: A layer is not there, or none would keep its attention; the output is in the
            way; the teacher has another tokenizer.
        ResourceError: The disk is too small.
    """
    require(checkpoint)
    stream = LayerStream(checkpoint)
    layout, count = stream.layouts[0], len(stream)
    _check_layers(options.layers, count)
    dtype = save_dtype(checkpoint, options)
    if teacher is not None:
        if options.amount is None:
            raise UsageError("--teacher says who teaches, and with --heal 0 nobody does")
        check_teacher(teacher, checkpoint)
    shape = mixer_shape(layout)
    mixer = _mixer_values(layout)
    weights = checkpoint.parameters
    taken = granite.other_tensors(checkpoint.tensors, options.layers)
    kept = sum(checkpoint.tensors[name].nbytes for parts in taken.values() for name in parts)
    output_bytes = kept + len(options.layers) * mixer * dtype.itemsize
    trained = len(options.layers) * mixer
    state = 0 if options.amount is None else 9 * 2 * 4 * trained  # three stages of three arms
    disk_bytes = 2 * output_bytes + state + 4 * 3 * trained
    if output is not None:
        costs.check_room(checkpoint, output, disk_bytes, overwrite=overwrite)
    batch, window = options.sizes(checkpoint, device)
    measuring = costs.BASE_MEMORY + statistics.memory_bytes(stream, options.tokens)
    healing = None
    memory = costs.BASE_MEMORY + 4 * weights + 4 * trained
    if (amount := options.amount) is not None:
        steps = amount.tokens and amount.steps(batch * window * distill.processes()[1])
        memory += 12 * trained + _step_bytes(stream, len(options.layers), batch * window)
        memory += 0 if teacher is None else 4 * teacher.parameters
        healing = {
            **dataclasses.asdict(amount),
            "window": window,
            "batch": batch,
            "steps": steps,
            "text": training_text(options.data).id,
            "memory_bytes": memory,
        }
    before = 2 * count * layout.cached_values
    after = 2 * (count - len(options.layers)) * layout.cached_values
    constant = len(options.layers) * shape.constant_bytes(2)
    return {
        "to": "mamba",
        "method": options.method,
        "target": options.target,
        "text_of": checkpoint.wrapper,
        "layers": count,
        "replaced_layers": list(options.layers),
        "bytes_per_token_before": before,
        "bytes_per_token_after": after,
        "constant_bytes": constant,
        "share": after / before,
        "output_bytes": output_bytes,
        "disk_bytes": disk_bytes,
        "memory_bytes": max(memory, measuring),
        "verify_memory_bytes": costs.verify_memory_bytes(checkpoint, trained),
        "attention_dtype": str(dtype).removeprefix("torch."),
        "healing": healing,
        "norm": "neutral: transformers may take its mean over all channels or by group",
        "vllm": "mamba_ssm_cache_dtype float32; on a CPU, no prefix caching (seen with 0.32)",
    }


def _step_bytes(stream: LayerStream, replaced: int, tokens: int) -> int:
    """Of activations and logits of a step of so many tokens."""
    config, shape = stream.config, mixer_shape(stream.layouts[0])
    activations = len(stream) * (8 * shape.hidden_size + 4 * int(config.intermediate_size))
    activations += replaced * (4 * shape.projected + 8 * shape.inner)
    return 4 * tokens * activations + 4 * 4 * 512 * int(config.vocab_size)


def _check_layers(layers: tuple[int, ...], count: int) -> None:
    if not layers:
        raise UsageError("--layers names no layer to replace")
    if wrong := [i for i in layers if not 0 <= i < count]:
        raise UsageError(f"--layers: {wrong[0]} is none of the {count} layers")
    if len(set(layers)) < len(layers):
        raise UsageError("--layers names a layer twice")
    if len(layers) == count:
        raise UsageError(
            f"--layers replaces all {count} layers, but transformers needs one with attention to "
            "know how long a text is"
        )


def save_dtype(checkpoint: Checkpoint, options: MambaOptions) -> torch.dtype:
    """Dtype of the mixers' matrices."""
    dtype = attention_dtype(checkpoint)
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    if dtype == torch.float16:
        raise UnsupportedModelError(
            "the scaling that makes the mixer's norm linear underflows in float16",
            hint="use --dtype bfloat16 or float32",
        )
    return dtype


def _mixer_values(layout: AttentionLayout) -> int:
    """Numbers in the tensors of one mixer."""
    shape = mixer_shape(layout)
    return (
        shape.projected * (shape.hidden_size + 1)
        + shape.convolved * (shape.taps + 1)
        + 3 * shape.heads
        + shape.inner * (shape.hidden_size + 1)
        + shape.hidden_size
    )
