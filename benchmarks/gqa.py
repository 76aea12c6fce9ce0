"""What each ingredient of `convert --to gqa` is worth: one row each, KL on held-out text.

All variants go through the model together, layer by layer, in fp32, each ingredient on top of those
above it, beside mean pooling, where GQA (arXiv 2305.13245) starts.

    python benchmarks/gqa.py -o benchmarks/results/gqa/ingredients.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mla_ablation import JUDGED, compare
from torch import Tensor

from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint
from kvtool.convert import artifact, aware, gqa
from kvtool.convert.fitting import ConvertedLayer, converted_attention, converted_stages
from kvtool.convert.options import WINDOW
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.layout import AttentionLayout


@dataclass(frozen=True)
class Variant:
    """One row: how heads are merged, and what is solved anew on text."""

    name: str
    mean: bool = False
    real: bool = False
    query_power: bool = True
    output_gram: bool = True
    attended: bool = True
    queries: bool = False
    output: bool = False


def ladder() -> list[Variant]:
    """Mean pooling, principal directions as published, then one ingredient after the other."""
    mean = Variant("mean pooling", mean=True)
    none = {"query_power": False, "output_gram": False, "attended": False}
    real = Variant("principal directions of keys (real) and values", real=True, **none)
    turned = replace(real, name="complex combinations of keys", real=False)
    keys = replace(turned, name="keys weighted by the power of queries", query_power=True)
    values = replace(keys, name="values weighted by the output projection", output_gram=True)
    tokens = replace(values, name="values weighted by attention", attended=True)
    queries = replace(tokens, name="queries refitted", queries=True)
    return [
        *(mean, real, turned, keys, values, tokens),
        replace(mean, name="the mean, output projection refitted", output=True),
        replace(tokens, name="output projection refitted, queries not", output=True),
        queries,
        replace(queries, name="both refitted: --to gqa", output=True),
    ]


def mean_pooling(layout: AttentionLayout, kv_heads: int) -> gqa.Merge:
    """Keys and values of neighbours are averaged; queries and outputs stay."""
    t, size = layout.kv_heads // kv_heads, layout.head_dim
    ones = torch.ones(kv_heads, t, size // 2, dtype=torch.complex128)
    decode = ones[:, :, None].expand(-1, -1, layout.heads // layout.kv_heads, -1)
    identity = torch.eye(size, dtype=torch.float64).expand(kv_heads, t, size, size)
    groups = torch.arange(layout.kv_heads).view(kv_heads, t)
    return gqa.Merge(groups, ones / t, decode, identity / t, identity)


def merge(
    variant: Variant, measured: LayerStatistics, layer: StreamedLayer, kv_heads: int
) -> gqa.Merge:
    """The merge of a layer under a variant, before any refit."""
    layout = layer.attention.layout
    if variant.mean:
        return mean_pooling(layout, kv_heads)
    heads, size = layout.kv_heads, layout.head_dim
    width = heads * size
    keys = gqa.key_moments(measured.joint.second[:width, :width], heads)
    power = gqa.query_power(measured, heads)
    values = measured.attended if variant.attended else measured.joint.second
    gram = aware.value_weight(layer.attention.o_proj.weight, heads, size)
    found = gqa.merge_heads(
        keys.real.to(keys.dtype) if variant.real else keys,
        power if variant.query_power else torch.ones_like(power),
        values[width:, width:],
        gram if variant.output_gram else torch.eye(width, dtype=torch.float64),
        kv_heads,
    )
    shared = found.key_decode.expand(-1, -1, layout.heads // heads, -1)
    return replace(found, key_decode=shared)


@torch.inference_mode()
def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row, or those whose name has one of the words in `only`."""
    checkpoint = Checkpoint.open(options.model)
    stream = LayerStream(checkpoint)
    measured = statistics.collect(
        checkpoint, StatisticsOptions(tokens=options.tokens, window=WINDOW)
    )
    tokenizer, chat = checkpoint.tokenizer(), float(measured.metadata["options"]["chat"])
    text = calibration_text().windows(tokenizer, WINDOW, options.tokens // WINDOW, 0, chat)
    held_out = evaluation_text().windows(tokenizer, options.length, options.windows)
    rows = [v for v in ladder() if not options.only or any(w in v.name for w in options.only)]
    original, reference = stream.embed(held_out), stream.embed(text)
    states = {row.name: original.clone() for row in rows}
    texts: dict[str, Tensor] = {row.name: reference.clone() for row in rows if row.output}
    seconds = dict.fromkeys(states, 0.0)
    for index in range(len(stream)):
        layer, here = stream.layer(index), measured.layer(index)
        following = None
        for row in rows:
            started = time.process_time()
            found = merge(row, here, layer, options.kv_heads)
            if row.queries:
                found = gqa.refit_queries(stream, layer, found, reference)
            folded = ConvertedLayer(None, gqa.fold(layer.attention, found))
            if row.output:
                stages = converted_stages(layer.attention, folded, stream.rope)
                following = reference.clone()
                weight = aware.refit_output(stream, layer, stages, following, texts[row.name])
                folded = ConvertedLayer(None, {**folded.weights, "o_proj.weight": weight})
            seconds[row.name] += time.process_time() - started
            layer.run(states[row.name], converted_attention(layer, folded, stream.rope))
        if following is not None:  # refits took the text through the original layer
            reference = following
        elif any(row.queries for row in rows):
            layer.run(reference, stream.exact_attention(layer))
        layer.run(original, stream.exact_attention(layer))
        print(f"layer {index + 1} of {len(stream)}", file=sys.stderr)
    results = []
    for row in rows:
        kl, ratio = compare(stream, original, states[row.name], held_out)
        spent = round(seconds[row.name], 1)
        results.append({"row": row.name, "kl": kl, "perplexity_ratio": ratio, "cpu_seconds": spent})
        print(f"{row.name:48} KL {kl:.4f}  x{ratio:.3f}  {spent} s")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of rows")
    options = parser.parse_args()
    rows = run(options)
    if options.output:
        result = {
            "model": options.model,
            "kv_heads": options.kv_heads,
            "text": evaluation_text().id,
            "calibration_tokens": options.tokens,
            "held_out": [options.windows, options.length],
            "judged_positions": JUDGED,
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
