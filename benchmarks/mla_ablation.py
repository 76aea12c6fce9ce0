"""What each ingredient of `convert --method aware` is worth: one row each, KL on held-out text.

All variants go through the model together, layer by layer, in fp32. They differ in the lines that
name them; everything else is the library's code. Each layer chooses its own frequencies, as for
`--target kvtool`; stock layers share one list, which has a row of its own.

    python benchmarks/mla_ablation.py -o benchmarks/results/mla-ablation.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kvtool import __version__
from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint
from kvtool.convert import aware, transmla
from kvtool.convert.fitting import ConvertedLayer, converted_attention, converted_stages
from kvtool.convert.options import WINDOW
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.latent import LatentFactors
from kvtool.rope import Rope

JUDGED = 256  # last positions of each held-out window


@dataclass(frozen=True)
class Variant:
    """One row: how a layer's factors are made, and how its output projection."""

    name: str
    rope_dim: int
    rank: int
    choose: str = "damage"
    weigh_values: bool = True
    moment: str = "attended"
    queries: bool = False
    centre: bool = False
    balance: float = 1.0
    mean_rotation: bool = False
    drift: float | None = None
    shared: bool = False


def ladder(rope_dim: int, rank: int) -> list[Variant]:
    """TransMLA's widths first, then one ingredient after the other, then what was left out."""
    total = rope_dim + rank
    plain = Variant("rotations kept by damage", 64, total - 64, weigh_values=False, moment="tokens")
    wider = replace(plain, name="d_r as a share of the width", rope_dim=rope_dim, rank=rank)
    valued = replace(wider, name="values weighted by the output projection", weigh_values=True)
    attended = replace(valued, name="tokens weighted by attention", moment="attended")
    refitted = replace(attended, name="output projection refitted", drift=0.0)
    full = replace(attended, name="refit takes back half the drift: aware", drift=aware.DRIFT)
    rows = [
        Variant("transmla, F = 2", 64, total - 64, choose="transmla"),
        *(plain, wider, valued, attended, refitted, full),
    ]
    without = {
        "rotations kept by key energy": {"choose": "energy"},
        "keys weighted by queries": {"queries": True},
        "keys centred": {"centre": True},
        "keys weigh half": {"balance": 0.5},
        "keys weigh double": {"balance": 2.0},
        "dropped rotations replaced by their mean": {"mean_rotation": True},
        "one list of frequencies for all layers": {"shared": True},
    }
    rows += [replace(attended, name=f"before the refit: {n}", **w) for n, w in without.items()]
    rows.append(replace(full, name="aware, dropped rotations by their mean", mean_rotation=True))
    return rows


def fit(
    variant: Variant,
    measured: LayerStatistics,
    layer: StreamedLayer,
    rope: Rope,
    kept: Tensor | None,
) -> LatentFactors:
    """The factors of one layer under a variant."""
    layout = layer.attention.layout
    heads, width, size = layout.kv_heads, layout.kv_heads * layout.head_dim, layout.head_dim
    moment = measured.joint_moment
    gram = transmla.key_gram(moment[:width, :width], heads)
    if variant.choose == "transmla":
        published = transmla.RotatedBasis(gram, variant.rope_dim, 2)
        return transmla.latent_factors(moment, published, rope, heads, variant.rank)
    found = aware.rope_components(measured, layout, rope)
    if kept is None:
        score = found.damage
        if variant.choose == "energy":
            score = torch.linalg.eigvalsh(torch.einsum("hlgl->lhg", gram)).flip(-1)
        kept = aware.most_damaging(score, variant.rope_dim // 2)
    basis = aware.basis_of(found, kept)

    identity = torch.eye(width, dtype=torch.float64)
    values = (identity, identity)
    if variant.weigh_values:
        values = aware.square_root(aware.value_weight(layer.attention.o_proj.weight, heads, size))
    alpha = aware.balance(measured, basis, values[0]) * variant.balance
    keys = (alpha * identity, identity / alpha)
    if variant.queries:
        second = measured.queries.second.unflatten(0, (heads, -1)).sum(dim=1)
        root, inverse = aware.square_root(torch.block_diag(*second))
        scale = (width / float((root @ root).trace())) ** 0.5
        keys = (alpha * scale * root, inverse / (alpha * scale))
    if variant.moment == "attended":
        moment = measured.attended
    if variant.centre:
        centre = torch.zeros(2 * width, dtype=torch.float64)
        centre[:width] = measured.joint.mean[:width]
        bulk = measured.joint.second.trace() - measured.joint.tokens * centre @ centre
        moment = moment - float(moment.trace() / bulk) * torch.outer(centre, centre)
    factors = aware.decompose(moment, basis, keys, values, rope, variant.rank, heads)
    if variant.mean_rotation:
        factors = replace(factors, key_up=mean_rotation(measured, layout, rope) @ factors.key_up)
    return factors


def mean_rotation(measured: LayerStatistics, layout: Any, rope: Rope) -> Tensor:
    """`[H, D, D]`: E_Δ of the rotation by -θΔ, under the attention by distance of a KV head."""
    mass = measured.distance_mass[:, :-1]
    mass = mass.unflatten(0, (layout.kv_heads, -1)).mean(dim=1)
    mass = mass / mass.sum(dim=1, keepdim=True)
    theta = rope.inv_freq.double()
    angles = [torch.zeros(1, len(theta), dtype=torch.float64)]
    for bucket in range(mass.shape[1] - 1):
        distance = torch.arange(2**bucket, 2 ** (bucket + 1), dtype=torch.float64)
        angles.append(distance[:, None] * theta)
    cos, sin = (
        mass @ torch.stack([f(a).mean(dim=0) for a in angles]) for f in (torch.cos, torch.sin)
    )
    top = torch.cat((torch.diag_embed(cos), torch.diag_embed(sin)), dim=-1)
    bottom = torch.cat((torch.diag_embed(-sin), torch.diag_embed(cos)), dim=-1)
    return torch.cat((top, bottom), dim=-2)


def run(
    budget: int, tokens: int, windows: int, length: int, only: list[str]
) -> list[dict[str, Any]]:
    """Variants at `budget` numbers per token and layer: all, or those whose name has a word."""
    checkpoint = Checkpoint.open("smollm2")
    stream = LayerStream(checkpoint)
    options = StatisticsOptions(tokens=tokens, window=WINDOW)
    measured = statistics.collect(checkpoint, options)
    chat = float(measured.metadata["options"]["chat"])
    tokenizer = checkpoint.tokenizer()
    text = calibration_text().windows(tokenizer, WINDOW, tokens // WINDOW, 0, chat)
    held_out = evaluation_text().windows(tokenizer, length, windows)
    rope_dim = 8 * round(0.39 * budget / 8)
    rows = ladder(rope_dim, budget - rope_dim)
    if only:
        rows = [row for row in rows if any(word in row.name for word in only)]
    layout = stream.layouts[0]
    every = [
        aware.rope_components(measured.layer(i), layout, stream.rope) for i in range(len(stream))
    ]
    shared = aware.shared_by_layers(every, rope_dim // 2)

    original = stream.embed(held_out)
    states = {row.name: original.clone() for row in rows}
    texts = {
        row.name: [stream.embed(text), stream.embed(text)] for row in rows if row.drift is not None
    }
    for index in range(len(stream)):
        layer = stream.layer(index)
        here = measured.layer(index)
        weight = layer.attention.o_proj.weight
        for row in rows:
            factors = fit(row, here, layer, stream.rope, shared if row.shared else None)
            converted = ConvertedLayer(factors)
            if row.drift is not None:
                aware.DRIFT = row.drift
                stages = converted_stages(layer.attention, converted, stream.rope)
                refitted = aware.refit_output(stream, layer, stages, *texts[row.name])
                converted = ConvertedLayer(factors, {"o_proj.weight": refitted})
            attention = converted_attention(layer, converted, stream.rope)
            layer.run(states[row.name], attention)
            layer.attention.o_proj.weight = weight
        layer.run(original, stream.exact_attention(layer))
        print(f"layer {index + 1} of {len(stream)}", file=sys.stderr)
    results = []
    for row in rows:
        kl, ratio = compare(stream, original, states[row.name], held_out)
        results.append({"row": row.name, "rope_dim": row.rope_dim, "rank": row.rank})
        results[-1] |= {"kl": kl, "perplexity_ratio": ratio}
        print(f"{row.name:60} {row.rope_dim:3} + {row.rank:3}  KL {kl:.4f}  x{ratio:.3f}")
    return results


def compare(stream: LayerStream, a: Tensor, b: Tensor, ids: Tensor) -> tuple[float, float]:
    """Mean KL(a ‖ b) and the ratio of perplexities at the last positions of each window."""
    kl = difference = 0.0
    for x, y, tokens in zip(a, b, ids, strict=True):
        p, q = (stream.logits(s[-JUDGED - 1 : -1]).double().log_softmax(dim=-1) for s in (x, y))
        targets = tokens[-JUDGED:, None]
        kl += float((p.exp() * (p - q)).sum()) / JUDGED
        difference += float((p - q).gather(1, targets).mean())
    return kl / len(ids), math.exp(difference / len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--budget", type=int, default=192, help="numbers per token and layer")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of rows")
    options = parser.parse_args()
    rows = run(options.budget, options.tokens, options.windows, options.length, options.only)
    if options.output:
        result = {
            "model": "smollm2",
            "text": evaluation_text().id,
            "budget": options.budget,
            "calibration_tokens": options.tokens,
            "held_out": [options.windows, options.length],
            "judged_positions": JUDGED,
            "dtype": "float32",
            "device": "cpu",
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {
                "kvtool": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "command": "python " + " ".join(sys.argv),
            "rows": rows,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
