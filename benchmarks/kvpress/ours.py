"""kvtool's own rows: plans run on the cases of `cases.py`, in the format of its results.

python ours.py CASES RESULTS PLAN ...
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

from kvtool.checkpoint import Checkpoint
from kvtool.evaluate import retrieval
from kvtool.evaluate.protocol import Estimate, judge, mean
from kvtool.evaluate.retrieval import Case, Question
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan
from kvtool.runtime import Engine
from kvtool.slices import ring_of


def name_of(plan: Plan) -> str:
    methods = "+".join(str(item["method"]) for item in plan.provenance)
    if not plan.streaming_heads:
        return f"kvtool {methods}, {plan.policy}"
    sink, window = ring_of(plan)
    heads = f"{plan.streaming_heads} of {plan.planned_heads} heads stream"
    return f"kvtool {methods}, {heads}, {sink}+{window}"


def run(engine: Engine, window: list[int], split: int) -> tuple[torch.Tensor, int]:
    """Logits of what follows the first `split` tokens, and the bytes that these left."""
    ids = torch.tensor(window)
    cache = engine.new_cache(1, split)
    engine.extend(cache, ids[:split])
    size = cache.allocated_bytes
    return engine.extend(cache, ids[split:-1], all_logits=True), size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("plans", type=Path, nargs="+")
    arguments = parser.parse_args()
    content = json.loads(arguments.cases.read_text())
    settings, split = content["settings"], content["settings"]["prefill"]
    cases = [
        Case(**{**case, "questions": [Question(**question) for question in case["questions"]]})
        for case in content["cases"]
    ]
    checkpoint = Checkpoint.open(settings["model"])
    original = Engine.load(checkpoint)
    base = [run(original, window, split) for window in content["windows"]]
    base_correct = [retrieval.ask(original, case) for case in cases]
    rows: list[dict[str, Any]] = []
    for file in arguments.plans:
        plan, start = Plan.read(file), perf_counter()
        engine = Engine.load(checkpoint, plan=plan)
        kls, ratios, sizes = [], [], []
        for window, (expected, full) in zip(content["windows"], base, strict=True):
            logits, size = run(engine, window, split)
            targets = torch.tensor(window[split + 1 :])
            scores = mean(judge(logits, expected, targets))
            kls.append(scores.kl)
            ratios.append(scores.nll - scores.base_nll)
            sizes.append(size / full)
        correct = [retrieval.ask(engine, case) for case in cases]
        recalls = retrieval.summarise(list(zip(cases, correct, base_correct, strict=True)))
        rows.append(
            {
                "method": name_of(plan),
                "bytes": size,
                "frees_memory": True,
                "kept": fmean(sizes),
                "seconds": perf_counter() - start,
                "kl": asdict(Estimate.of(kls)),
                "perplexity_ratio": asdict(Estimate.of(ratios).exp()),
                "retrieval": [asdict(recall) for recall in recalls],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    made_by = environment(torch.device("cpu"), torch.float32)
    result = {
        "versions": made_by["versions"],
        "machine": {"cpu": made_by["cpu"], "threads": made_by["threads"]},
        "settings": settings,
        "methods": rows,
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
