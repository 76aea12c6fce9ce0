"""The chunked rule of Gated DeltaNet beside that of transformers, in turn in one process.

python -m benchmarks.gated_delta --out benchmarks/results/gated_delta.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from kvtool.evaluate.throughput import environment
from kvtool.kernels.gated_delta import gated_delta_chunked

TOKENS, HEADS, GROUPS, SIZE = 2048, 16, 8, 128


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, TOKENS, GROUPS, SIZE), dim=-1) for _ in range(2))
    v = torch.randn(1, TOKENS, HEADS, SIZE)
    g, beta = -torch.rand(1, TOKENS, HEADS), torch.rand(1, TOKENS, HEADS)
    runs = {
        "kvtool": lambda: gated_delta_chunked(q, k, v, g, beta),
        "transformers": lambda: torch_chunk_gated_delta_rule(
            q * SIZE**0.5, k, v, g, beta, output_final_state=True
        ),
    }
    (ours, _), (theirs, _) = runs["kvtool"](), runs["transformers"]()
    error = float((ours - theirs).norm() / theirs.norm())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.repeats + 3):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            if turn > 2:
                seconds[name].append(perf_counter() - begin)
    medians = {name: median(times) for name, times in seconds.items()}
    result = {
        "environment": environment(torch.device("cpu"), torch.float32),
        "shape": {"tokens": TOKENS, "heads": HEADS, "groups": GROUPS, "state": [SIZE, SIZE]},
        "relative_error": error,
        "seconds": medians,
        "ratio": medians["kvtool"] / medians["transformers"],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
