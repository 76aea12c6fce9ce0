"""What a static fp8 cache costs, by scales and foldings, and 4 bits beside it: KL on held-out text.

All rows go through the model together, layer by layer, in fp32, each with the keys and values that
its cache would give back. `4 bits` has a scale and a zero in fp32 per token and head; vLLM's
`int4_per_token_head` puts a Hadamard transform with random signs in front of that.

    python benchmarks/fp8_kv.py -o benchmarks/results/fp8_kv.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import fp8
from kvtool.calibrate.stream import Attention, LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint
from kvtool.convert import artifact, fp8_kv
from kvtool.convert.options import WINDOW
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.kernels.hadamard import hadamard


@dataclass(frozen=True)
class Row:
    """A cache.

    Attributes:
        scales: `tensor` or `head`; None for 4 bits.
        room: On the scales.
        keys, values: Whether they are stored so, or exactly.
        hadamard: Transform before 4 bits, as vLLM does.
    """

    name: str
    scales: str | None = "tensor"
    smooth: bool = False
    turn_values: bool = False
    room: float = 1.0
    keys: bool = True
    values: bool = True
    hadamard: bool = False


ROWS = [
    Row("fp8, a scale per layer"),
    Row("fp8, a scale per head", "head"),
    Row("fp8, --smooth", smooth=True),
    Row("fp8, --turn-values", turn_values=True),
    Row("fp8, keys alone", values=False),
    Row("fp8, values alone", keys=False),
    Row("fp8, scales times 1.25", room=1.25),
    *(
        Row(f"4 bits{how}{folded}", None, smooth, turn, hadamard=how != "")
        for how in ("", " behind a Hadamard transform")
        for folded, smooth, turn in (
            ("", False, False),
            (", --smooth", True, False),
            (", --turn-values", False, True),
        )
    ),
]


@dataclass(frozen=True)
class Peaks:
    """Of the keys, values, and turned values `[H, D]` of a layer."""

    keys: Tensor
    values: Tensor
    turned: Tensor


def four_bits(x: Tensor, transformed: bool) -> Tensor:
    """`x [..., D]` as read from 4 bits with a range per token and head."""
    signs = torch.randint(0, 2, x.shape[-1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = hadamard(x * signs) if transformed else x
    low, high = y.amin(dim=-1, keepdim=True), y.amax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-8)
    y = ((y - low) / step).round() * step + low
    return hadamard(y) * signs if transformed else y


def attention(stream: LayerStream, layer: StreamedLayer, row: Row, peaks: Peaks) -> Attention:
    """The layer with the row's cache."""
    own, keys = copy.deepcopy(layer.attention), peaks.keys
    smooth = fp8_kv.smoothing(keys, shared=own.layout.qk_norm) if row.smooth else None
    own.replace_weights(fp8_kv.fold(own, smooth, turn_values=row.turn_values))
    keys = keys if smooth is None else keys / smooth
    pair = (keys, peaks.turned if row.turn_values else peaks.values)

    def stored(x: Tensor, peak: Tensor) -> Tensor:
        if row.scales is None:
            return four_bits(x, row.hadamard)
        scale = fp8.scale(peak, row.scales, row.name) * row.room
        return fp8.decode(fp8.encode(x, scale), scale)

    def attend(hidden: Tensor) -> Tensor:
        q, k, v = own.project(hidden)
        q, k = own.rotate(*own.normalise(q, k), *stream.tables(layer.index, hidden.shape[1]))
        k = stored(k, pair[0]) if row.keys else k
        v = stored(v, pair[1]) if row.values else v
        return own.output(own.attend(q, k, v), hidden)

    return attend


@torch.inference_mode()
def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row, or those whose name has one of the words in `only`."""
    checkpoint = Checkpoint.open(options.model)
    stream, tokenizer = LayerStream(checkpoint), checkpoint.tokenizer()
    text = calibration_text().windows(tokenizer, WINDOW, options.tokens // WINDOW, 0, 0.25)
    held_out = evaluation_text().windows(tokenizer, options.length, options.windows)
    rows = [r for r in ROWS if not options.only or any(w in r.name for w in options.only)]
    reference, original = stream.embed(text), stream.embed(held_out)
    states = {row.name: original.clone() for row in rows}
    for index in range(len(stream)):
        layer = stream.layer(index)
        keys, values = fp8_kv.peaks(stream, layer, reference, turn_values=False)
        turned = fp8_kv.peaks(stream, layer, reference, turn_values=True)[1]
        for row in rows:
            cache = attention(stream, layer, row, Peaks(keys, values, turned))
            layer.run(states[row.name], cache, 1)
        for hidden in (reference, original):
            layer.run(hidden, stream.exact_attention(layer), 1)
        print(f"layer {index + 1} of {len(stream)}", file=sys.stderr)
    results = []
    for row in rows:
        judged = [judge(stream, *x) for x in zip(original, states[row.name], held_out, strict=True)]
        kl, nats = (torch.tensor(x, dtype=torch.float64) for x in zip(*judged, strict=True))
        error = float(kl.std() / math.sqrt(len(kl)))
        ratio = math.exp(float(nats.mean()))
        results.append(
            {"row": row.name, "kl": float(kl.mean()), "kl_error": error, "perplexity_ratio": ratio}
        )
        print(f"{row.name:32} KL {float(kl.mean()):.5f} ± {error:.5f}  x{ratio:.4f}", flush=True)
    return results


def judge(stream: LayerStream, a: Tensor, b: Tensor, ids: Tensor) -> tuple[float, float]:
    """KL(a ‖ b) per position, and how many nats b loses of each next token."""
    p, q = (stream.logits(x).double().log_softmax(dim=-1) for x in (a, b))
    lost = (p - q)[:-1].gather(1, ids[1:, None])
    return float((p.exp() * (p - q)).sum(dim=-1).mean()), float(lost.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of rows")
    options = parser.parse_args()
    rows = run(options)
    if options.output:
        result = {
            "model": options.model,
            "text": evaluation_text().id,
            "calibration_tokens": options.tokens,
            "held_out": [options.windows, options.length],
            "dtype": "float32",
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "versions": artifact.versions(),
            "command": "python " + " ".join(sys.argv),
            "rows": rows,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
