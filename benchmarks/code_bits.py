"""What bits of a code cost: KL through the cache at half of the width, with and without tuning.

    OMP_NUM_THREADS=1 python benchmarks/code_bits.py -o benchmarks/results/code_bits.json

All plans of a method have the same budget of numbers, half of the keys and values of a layer. The
file is written anew behind every row, and rows that it has are not measured again. `powers` has the
reconstruction errors by which the power of `calibrate/levelled.py` was chosen.
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
from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections, empty_codes
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tuned import tokens_of
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.evaluate.protocol import score_windows, summarise
from kvtool.evaluate.throughput import environment
from kvtool.kernels.quantise import fake_quantise
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine

CONTEXT = 4096
STEPS = ProjectionOptions.tuning
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def half(checkpoint: Checkpoint, options: ProjectionOptions) -> int:
    """Bytes of a cache whose codes have half of all numbers, at two bytes for a number."""
    base = base_of(checkpoint)
    codes = [
        replace(code, widths=tuple(width // 2 for width in code.widths))
        for code in empty_codes(base, options)
    ]
    return sum(code.cache_bytes(CONTEXT, base.channels, 2) for code in codes)


def powers(checkpoint: Checkpoint, last: int, tokens: int) -> list[dict[str, Any]]:
    """Held-out reconstruction errors at half width, as shares of the variance, by power and bits.

    `plain` is the closed form as it is: not centred, not levelled.
    """
    stream = LayerStream(checkpoint)
    windows = calibration_text().windows(checkpoint.tokenizer(), 2048, tokens // 2048 + 1, 0, 0.25)
    hidden = stream.embed(windows)
    rows: list[dict[str, Any]] = []
    for index in range(last + 1):
        both = tokens_of(stream, stream.layer(index), hidden, 4).double().chunk(2, dim=-1)
        for part, y in zip(("keys", "values"), both, strict=True):
            own, held = y[:-1].flatten(0, 1), y[-1]
            mean, second = own.mean(dim=0), own.T @ own / len(own)
            covariance = second - mean[:, None] * mean
            codes = {"plain": cskv.principal(second).projection}
            for power in POWERS:
                fitted = levelled(cskv.principal(covariance), mean, covariance, power)
                codes[str(power)] = fitted.projection
            spread = (held - mean).square().sum(dim=1).mean()
            for name, code in codes.items():
                used = code.cut(y.shape[-1] // 2)
                z = (held - used.mean) @ used.encode.T
                row: dict[str, Any] = {"layer": index, "part": part, "power": name}
                for bits in (None, 8, 4, 2):
                    read = z if bits is None else fake_quantise(z, bits)
                    error = read @ used.decode.T + used.mean - held
                    row[str(bits)] = float(error.square().sum(dim=1).mean() / spread)
                rows.append(row)
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

    def measure(name: str, plan: Plan, seconds: float) -> None:
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
            measure("cskv, neither centred nor levelled", replace(plan, codes=rounded), seconds)
        measure(name, plan, seconds)
    found["powers"] = powers(checkpoint, 3, asked.tokens)
    asked.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
