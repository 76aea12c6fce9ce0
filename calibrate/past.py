"""Windows of text as a model has read them, and their ends read again through a code.

The past of a window is exact, as behind a prompt that was read densely, so what a code does to the
predictions behind it costs a forward pass over the end of the window alone. Codes are made of the
original's keys and values, also those of the end: within it, what a code has changed in the layers
below is not coded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.calibrate.tail import Attend, Behind, TailModel, divergence
from kvtool.codes import CodePlan, Part, Projection, layers_of
from kvtool.kernels.quantise import fake_quantise
from kvtool.kernels.sink_logits import softmax
from kvtool.rope import rotate

Codes = Sequence[tuple[CodePlan, dict[Part, Projection]]]
"""Codes of all layers that see the whole past, with their projections in fp32."""


@dataclass(frozen=True)
class Past:
    """A window as the original reads it.

    Attributes:
        reading: Its past and the tokens of its end.
        keys, values: Per layer `[1, H, S, D]` of all S tokens, keys rotated.
        expected: `[M, V]`, the original's log-probabilities behind each token of the end.
        states: `[1, M, hidden]`, the end in front of every layer.
    """

    reading: Behind
    keys: list[Tensor]
    values: list[Tensor]
    expected: Tensor
    states: list[Tensor]

    def unrotated(self, model: TailModel, layer: int) -> Tensor:
        """Keys of a layer before RoPE."""
        cos, sin = tables(model, layer, self.reading, self.keys[layer].shape[2])
        return rotate(self.keys[layer], cos, -sin) / model.ropes[layer].scale ** 2


def tables(model: TailModel, layer: int, reading: Behind, length: int) -> tuple[Tensor, Tensor]:
    """Cos and sin `[S, D]` in a layer of the first positions of a window."""
    positions = torch.arange(reading.offset, reading.offset + length, device=model.device)
    return model.ropes[layer].tables(positions)


@torch.no_grad()
def read_past(model: TailModel, ids: Tensor, end: int, offset: int = 0) -> Past:
    """Reads a window `ids [S]`, whose last `end` tokens are to be read again.

    Args:
        offset: Position of the first token.
    """
    keys, values = model.nothing(), model.nothing()
    whole = Behind([], [], ids, offset=offset)
    hidden = model.embed(ids)
    states, kept = [], {}
    past = len(ids) - end
    for index, layer in enumerate(model.layers):
        states.append(hidden[:, -end:])

        def remember(q: Tensor, k: Tensor, v: Tensor, start: int, index: int = index) -> Tensor:
            keys[index], values[index] = k.contiguous(), v.contiguous()
            return model.dense(index)(q, k, v, start)

        if layer.mixer is not None:
            before, kept[index] = model.mix(index, hidden[:, :past])
            hidden = torch.cat((before, model.mix(index, states[-1], kept[index])[0]), dim=1)
        else:
            hidden = model.layer(index, hidden, whole, remember)
    expected = model.predictions(hidden[:, -end:])[0]
    reading = Behind(
        [k[:, :, :past] for k in keys],
        [v[:, :, :past] for v in values],
        ids[past:].to(model.device),
        offset=offset,
        states=kept,
    )
    return Past(reading, keys, values, expected, states)


def through(
    model: TailModel, past: Past, codes: Codes, only: int | None = None
) -> list[Attend | None]:
    """How each layer reads a past that is coded; None for one that has no code. Differentiable.

    Args:
        only: Index of the one code that is applied; None for all.
    """
    found: list[Attend | None] = [None] * len(model.layers)
    groups = layers_of([code for code, _ in codes], model.planned_layers)
    for index, (layers, (code, projections)) in enumerate(zip(groups, codes, strict=True)):
        if only in (None, index):
            attends = _coded(model, past, layers, code, projections)
            for layer, attend in zip(layers, attends, strict=True):
                found[layer] = attend
    return found


def _coded(
    model: TailModel,
    past: Past,
    layers: Sequence[int],
    code: CodePlan,
    projections: dict[Part, Projection],
) -> list[Attend]:
    """The same of the layers of one code.

    Args:
        projections: By part; as many rows of each are used as the code is wide.
    """
    reading = past.reading
    heads, length = past.keys[layers[0]].shape[1:3]
    rotated = code.kind == "rotated"
    flat = {
        "keys": [past.keys[i] if rotated else past.unrotated(model, i) for i in layers],
        "values": [past.values[i] for i in layers],
    }
    flat["joint"] = flat["keys"] + flat["values"]
    found: list[Tensor] = []  # [1, H, S, D], keys of all layers, then values
    for part, width in zip(code.parts, code.widths, strict=True):
        x = torch.cat([y[0].transpose(0, 1).flatten(1) for y in flat[part]], dim=-1)  # [S, W]
        used = projections[part].cut(width)
        z = (x - used.mean) @ used.encode.T
        if code.bits is not None:
            z = fake_quantise(z, code.bits, code.group)
        again = z @ used.decode.T + used.mean
        pieces = again.unflatten(-1, (-1, heads, x.shape[1] // (heads * len(flat[part]))))
        found += list(pieces.permute(1, 2, 0, 3)[:, None])
    keys, values = found[: code.layers], found[code.layers :]
    if not rotated:
        turns = (tables(model, i, reading, length) for i in layers)
        keys = [rotate(k, cos, sin) for k, (cos, sin) in zip(keys, turns, strict=True)]
    pairs = zip(layers, keys, values, strict=True)
    return [
        beside(model.layouts[i].scaling, k, v, code.sink, code.window, model.sink_logits(i))
        for i, k, v in pairs
    ]


def beside(
    scaling: float,
    far_keys: Tensor,
    far_values: Tensor,
    sink: int,
    window: int,
    sink_logits: Tensor | None = None,
) -> Attend:
    """Attention to exact sinks and window, and to `[1, H, S, D]` in the place of all others.

    Args:
        sink_logits: `[Q]`, see `kernels/sink_logits`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        at = torch.arange(k.shape[2], device=k.device)
        distance = torch.arange(start, k.shape[2], device=k.device)[:, None] - at
        near = (at < sink) | (distance < window)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [1, H, g, M, D]
        exact, stored = (grouped @ x[:, :, None].mT for x in (k, far_keys))
        scores = torch.where(near, exact, stored) * scaling
        weights = softmax(scores.masked_fill(distance < 0, -torch.inf), sink_logits, first=1)
        context = (weights * near) @ v[:, :, None] + (weights * ~near) @ far_values[:, :, None]
        return context.flatten(1, 2)

    return attend


def read_again(model: TailModel, past: Past, attends: Sequence[Attend | None]) -> Tensor:
    """Log-probabilities `[M, V]` behind the end of a window, read so layer by layer.

    Args:
        attends: One entry per layer; None for the layer's own attention.
    """
    first = next((i for i, attend in enumerate(attends) if attend is not None), 0)
    hidden = past.states[first]
    for index in range(first, len(attends)):
        attend = attends[index] or model.dense(index)
        hidden = model.layer(index, hidden, past.reading, attend)
    return model.predictions(hidden)[0]


@torch.no_grad()
def measure(
    model: TailModel, pasts: Sequence[Past], codes: Codes, only: int | None = None
) -> float:
    """Mean KL(original || coded) in nats behind the ends of windows.

    Args:
        only: Index of the one code that is applied; None for all.
    """
    found = [
        divergence(past.expected, read_again(model, past, through(model, past, codes, only)))
        for past in pasts
    ]
    return float(torch.stack(found).mean())
