"""Plans with random codes, and models that read through them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.codes import CodeKind, CodePlan, code_shapes
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine

SINK, WINDOW = 3, 7
KINDS: tuple[CodeKind, ...] = ("rotated", "unrotated")
SHAPES = [(joint, together) for joint in (False, True) for together in (1, 2, 3)]
"""Whether keys and values share a code, and how many of the three layers of a tiny model do."""
SPAN = 24
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
}
_KINDS = [*["sliding_attention", "full_attention"] * 2, *["full_attention"] * 2]
_MIXED = {"num_hidden_layers": 6, "sliding_window": SPAN, "layer_types": _KINDS}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("gemma3_text", _MIXED | {"rope_parameters": _ROPES}),
    "olmo3": ("olmo3", _MIXED | {"rope_parameters": _ROPES}),
    "cohere2": ("cohere2", _MIXED),  # layers that see everything do not turn
    "exaone4": ("exaone4", _MIXED),
    "cwm": ("cwm", _MIXED),
}
"""Models whose layers 1, 3, 4 and 5 see the whole past, and the others :data:`SPAN` tokens."""


def coded(
    checkpoint: Checkpoint,
    kind: CodeKind = "rotated",
    joint: bool = False,
    together: int = 1,
    share: float = 1.0,
    sink: int = SINK,
    window: int = WINDOW,
) -> Plan:
    """A plan with random invertible codes, whose means are not zero; the last may be smaller."""
    base = base_of(checkpoint)
    start = Plan(base, whole_layers(checkpoint))
    count = len(start.planned_layers)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    codes: list[CodePlan] = []
    tensors: dict[str, Tensor] = {}
    for first in range(0, count, together):
        layers = min(together, count - first)
        full = CodePlan(kind, layers, (1,) if joint else (1, 1)).full_width(base.channels)
        kept = max(1, int(share * full))
        code = CodePlan(kind, layers, (kept,) * (1 if joint else 2), sink, window)
        index = len(codes)
        for name, shape in code_shapes(
            index, code, base.channels, [full] * len(code.widths)
        ).items():
            tensors[name] = torch.ones(shape)
        for part in code.parts:
            encode = torch.eye(full, dtype=torch.float64) + 0.3 * random(full, full) / full**0.5
            tensors[f"codes.{index}.{part}.encode"] = encode.float()
            tensors[f"codes.{index}.{part}.decode"] = torch.linalg.inv(encode).float()
            tensors[f"codes.{index}.{part}.mean"] = random(full).float()
        codes.append(code)
    return replace(start, codes=tuple(codes), allocation="even", tensors=tensors)


def narrowed(plan: Plan, share: float) -> Plan:
    """With so much of the width of each of its codes."""
    codes = (
        replace(x, widths=tuple(max(1, int(share * width)) for width in x.widths))
        for x in plan.codes
    )
    return replace(plan, codes=tuple(codes))


def token_by_token(engine: Engine, ids: Tensor, prompt: int = 1) -> Tensor:
    """Logits `[T, V]` of a prompt and of the tokens behind it, one at a time."""
    cache = engine.new_cache(1, len(ids))
    first = engine.extend(cache, ids[:prompt], all_logits=True)
    return torch.cat((first, *(engine.decode(cache, token[None]) for token in ids[prompt:])))
