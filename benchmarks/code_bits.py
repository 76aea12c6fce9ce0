"""What bits of a code cost: KL through the cache at half of the width, with and without tuning.

    OMP_NUM_THREADS=1 python benchmarks/code_bits.py -o benchmarks/results/code_bits.json

All plans of a method have the same budget of numbers, half of the keys and values of a layer. The
file is written anew behind every row, and rows that it has are not measured again. `levels` is what
`calibrate/levelled.py` and its power were chosen by: 3 windows of 896 + 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvtool.calibrate import cskv
from kvtool.calibrate.levelled import levelled
from kvtool.calibrate.past import measure, read_past
from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections, empty_codes
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.checkpoint import Checkpoint
from kvtool.codes import CodePlan, Fitted, Part, Projection
from kvtool.corpus import evaluation_text
from kvtool.evaluate.protocol import score_windows, summarise
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine

CONTEXT = 4096
STEPS = ProjectionOptions.tuning
POWERS = (0.25, 0.5, 0.75)


def half(checkpoint: Checkpoint, options: ProjectionOptions) -> int:
    """Bytes of a cache whose codes have half of all numbers, at two bytes for a number."""
    start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    codes = [
        replace(code, widths=tuple(width // 2 for width in code.widths))
        for code in empty_codes(start, options)
    ]
    return sum(code.cache_bytes(CONTEXT, start.base.channels, 2) for code in codes)


def levels(checkpoint: Checkpoint, tokens: int) -> list[dict[str, Any]]:
    """KL of `cskv` at half width, read as in calibration, by what is done to its rows.

    `levelled P` has the power P of `calibrate/levelled.py`; `values centred` keeps values about
    their mean.
    """
    statistics = collect(checkpoint, StatisticsOptions(tokens=tokens))
    model = TailModel(LayerStream(checkpoint))
    windows = evaluation_text().windows(checkpoint.tokenizer(), 1152, 3)
    pasts = [read_past(model, ids, 256) for ids in windows]
    layers = [statistics.layer(i) for i in range(len(statistics))]
    width = len(layers[0].joint.mean) // 2
    places: dict[Part, slice] = {"keys": slice(0, width), "values": slice(width, None)}

    def projection(layer: LayerStatistics, part: Part, way: str) -> Projection:
        own = places[part]
        second = layer.joint.second[own, own] / layer.joint.tokens
        fitted = cskv.principal(second)
        if way == "values centred" and part == "values":
            about = cskv.principal(layer.joint.covariance[own, own]).projection
            mean = layer.joint.mean[own]
            fitted = Fitted(Projection(about.encode, about.decode, mean), fitted.spectrum)
        if way.startswith("levelled"):
            fitted = levelled(fitted, second, float(way.split()[1]))
        return Projection(*(x.float() for x in vars(fitted.projection).values()))

    rows = []
    ways = ["plain", "values centred", "plain", *(f"levelled {power}" for power in POWERS)]
    for way, bits in zip(ways, (None, None, *(4,) * (len(POWERS) + 1)), strict=True):
        code = CodePlan("unrotated", 1, (width // 2,) * 2, bits=bits)
        codes = [(code, {part: projection(x, part, way) for part in places}) for x in layers]
        rows.append({"code": way, "bits": bits, "kl": measure(model, pasts, codes)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Calibrates, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--prefill", type=int, default=768)
    parser.add_argument("--continuation", type=int, default=128)
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    base = Engine.load(checkpoint)
    length = asked.prefill + asked.continuation + 1
    windows = evaluation_text().windows(checkpoint.tokenizer(), length, asked.windows)
    found: dict[str, Any] = {"rows": []}
    if asked.output.is_file():
        found = json.loads(asked.output.read_text())
    found |= {
        "command": " ".join(["python", *sys.argv]),
        "model": checkpoint.source,
        "context_of_budgets": CONTEXT,
        "calibration_tokens": asked.tokens,
        "environment": environment(torch.device("cpu"), torch.float32),
        "threads": torch.get_num_threads(),
        "windows": asked.windows,
        "prefill": asked.prefill,
        "continuation": asked.continuation,
    }
    measured = {(row["code"], row["bits"]) for row in found["rows"]}

    def record(name: str, plan: Plan, seconds: float) -> None:
        engine = Engine.load(checkpoint, plan=plan)
        scores = list(score_windows(engine, base, windows, asked.prefill))
        result = summarise(scores, asked.prefill, asked.continuation)
        assert result.kl is not None
        assert result.perplexity_ratio is not None
        cache = engine.new_cache(1, CONTEXT)
        native = plan.native_bytes(CONTEXT, 2)
        row = {
            "code": name,
            "bits": plan.codes[0].bits,
            "numbers_per_token": sum(code.width for code in plan.codes),
            "bytes_per_token_bf16": plan.bytes_per_token(2),
            "share_of_native": plan.bytes_per_token(2) / plan.native_bytes(1, 2),
            "share_at_context": plan.cache_bytes(CONTEXT, 2) / native,
            "allocated_bytes_fp32": cache.allocated_bytes,
            "planned_bytes_fp32": plan.cache_bytes(CONTEXT, 4),
            "kl": result.kl.value,
            "kl_error": result.kl.standard_error,
            "perplexity_ratio": result.perplexity_ratio.value,
            "calibration_seconds": seconds,
        }
        for losses in plan.provenance:
            if errors := losses.get("reconstruction"):
                row |= {k: sum(x) / len(x) for k, x in errors.items()}
        found["rows"].append(row)
        asked.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for method, bits, tuning in (
        ("aware", 4, 0), ("cskv", None, 0), ("cskv", 4, 0), ("cskv", 4, STEPS), ("aware", None, 0),
        ("cskv", 2, 0), ("cskv", 2, STEPS), ("aware", 2, 0), ("aware", 8, 0),
    ):  # fmt: skip
        name = f"cskv, {tuning} steps" if method == "cskv" and bits is not None else method
        if (name, bits) in measured:
            continue
        options = ProjectionOptions(
            method, context=CONTEXT, tokens=asked.tokens, bits=bits, tuning=tuning
        )
        started = time.perf_counter()
        plan = calibrate_projections(checkpoint, options, half(checkpoint, options), 2)
        seconds = time.perf_counter() - started
        if (method, bits) == ("cskv", None):
            rounded = tuple(replace(code, bits=4) for code in plan.codes)
            record("cskv, not levelled", replace(plan, codes=rounded), seconds)
        record(name, plan, seconds)
    found["levels"] = levels(checkpoint, asked.tokens)
    asked.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
