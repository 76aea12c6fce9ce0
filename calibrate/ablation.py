"""Ablation: what streaming one head alone does to recall, exactly.

For every KV head the model recalls the answers of synthetic pass-keys with this head, and no other,
reduced to sinks and a window. The score is the mean KL(original || ablated) over the tokens to be
recalled, in nats. No gradient, no threshold, no attention heuristic: the effect itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtool.calibrate.tail import Reading, TailModel, Window, divergence
from kvtool.layout import with_heads
from kvtool.progress import Progress

STATE = "ablation.safetensors"
"""Of a run that goes on: the sums so far."""


@torch.no_grad()
def ablation_scores(
    model: TailModel,
    readings: Sequence[Reading],
    window: Window,
    report: Progress,
    folder: Path | None = None,
    key: str = "",
    *,
    resume: bool = True,
) -> Tensor:
    """The score of every KV head, `[L, H]` float64, >= 0 up to rounding; 0 where it has no past.

    A change in layer l passes through the layers behind it only, so all heads of a layer go through
    those together, and a model of L layers costs L / 2 forward passes over the tail per head.

    Args:
        folder: Where the sums are kept after every reading.
        key: Everything that determines them; sums under another one are not gone on with.
    """
    layers, heads = len(model.layers), with_heads(model.layouts).kv_heads
    scores = torch.zeros(layers, heads, dtype=torch.float64)
    done = 0
    if folder is not None and resume:
        done, scores = _kept(folder / STATE, key, scores)
    report("ablating heads", done * layers, len(readings) * layers)
    for number, reading in enumerate(readings[done:], done):
        inputs = [model.embed(reading.ids)]
        for index in range(layers):
            inputs.append(model.layer(index, inputs[-1], reading, model.dense(index)))
        original = model.log_probabilities(inputs[-1], reading)
        for index, layout in enumerate(model.layouts):
            if not layout.sees_all:
                continue
            ablated = [
                model.layer(index, inputs[index], reading, model.split(index, head_alone, window))
                for head_alone in torch.eye(heads, dtype=torch.bool)
            ]
            hidden = torch.cat(ablated)  # [H, M, hidden]
            for later in range(index + 1, layers):
                hidden = model.layer(later, hidden, reading, model.dense(later))
            kl = divergence(original, model.log_probabilities(hidden, reading))
            scores[index] += kl.double().cpu() / len(readings)
            report("ablating heads", number * layers + index + 1, len(readings) * layers)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written = folder / f"{STATE}.new"
            save_file({"scores": scores}, written, {"key": key, "readings": str(number + 1)})
            written.replace(folder / STATE)
    return scores


def _kept(file: Path, key: str, none: Tensor) -> tuple[int, Tensor]:
    """Readings that an earlier run has been through, and their sums."""
    try:
        with safe_open(file, "pt") as handle:
            told = handle.metadata() or {}
            if told.get("key") == key:
                return int(told["readings"]), handle.get_tensor("scores")
    except (OSError, SafetensorError):
        pass  # there was none, or it is damaged: begin anew
    return 0, none
