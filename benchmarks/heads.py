"""Which heads may stream? Plans of several methods, and random choices, on the evaluation protocol.

    python benchmarks/heads.py smollm2 ablation.plan duo.plan ... -o heads.json

Every plan is cut to the same numbers of streaming heads. Prompts are read densely and dropped
afterwards, so one dense reading of each context serves all plans; what they drop shows in the tail,
which is computed as in calibration. That this equals the runtime's split store is a test
(tests/test_retrieval_heads.py); `kvtool evaluate --plan` measures the store itself.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import Reading, TailModel, Window, divergence
from kvtool.calibrate.tasks import RecallSample
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.evaluate.retrieval import is_exact, needle_cases, passkey_cases, plain_ids
from kvtool.evaluate.throughput import environment
from kvtool.layout import with_heads
from kvtool.plan import Plan
from kvtool.slices import ring_of, stream_heads

SHARES = (0.5, 0.75, 0.9)
LENGTHS = (2048, 4096)
PREFILL, CONTINUATION, WINDOWS = 1536, 256, 8
SEEDS = 5


@dataclass
class Question:
    """A question about a context that has been read."""

    task: str
    reading: Reading
    expected: str


def sample(context: list[int], tail: list[int], answers: range) -> RecallSample:
    """Token ids as a sample; only the context, the tail and the places of the answers count."""
    source = torch.full((len(tail),), -1)
    source[list(answers)] = 0
    nothing = torch.zeros(len(tail), 2, dtype=torch.int64)
    return RecallSample(torch.tensor(context), torch.tensor(tail), source, source == 0, nothing)


def questions(model: TailModel, tokenizer: Any, documents: list[str]) -> list[Question]:
    """The protocol's pass-keys and needles. The token behind the answer is predicted too."""
    asked = []
    cases = passkey_cases(tokenizer, documents, LENGTHS)
    cases += needle_cases(tokenizer, documents, LENGTHS)
    for case in cases:
        read = None
        for question in case.questions:
            answer = plain_ids(tokenizer, f" {question.answer}")
            tail = question.ids + answer + answer[-1:]
            new = sample(case.context, tail, range(len(question.ids), len(tail)))
            read = model.read(new) if read is None else replace(
                read, ids=new.tail, answers=new.answers, sample=new
            )  # fmt: skip
            asked.append(Question(f"{case.task} {case.length}", read, question.answer))
        print(f"{case.task} {case.length} read", flush=True)
    return asked


def measure(
    model: TailModel,
    tokenizer: Any,
    asked: list[Question],
    windows: list[tuple[Reading, Tensor]],
    streaming: Tensor,
    window: Window,
) -> dict[str, Any]:
    """Recall per task, KL and perplexity ratio with the heads in `streaming [L, H]` streaming."""
    found: dict[str, list[int]] = {}
    for question in asked:
        scores = model.recall(question.reading, streaming, window)
        said = str(tokenizer.decode(scores.argmax(-1).tolist()))
        right, all_ = found.setdefault(question.task, [0, 0])
        found[question.task] = [right + is_exact(said, question.expected), all_ + 1]
    kls, ratios = [], []
    for reading, original in windows:
        scores = model.recall(reading, streaming, window).double()
        targets = reading.ids[reading.answers][:, None]
        kls.append(float(divergence(original.double(), scores)))
        ratios.append(float((original.gather(1, targets) - scores.gather(1, targets)).mean()))
    return {"kl": fmean(kls), "perplexity_ratio": math.exp(fmean(ratios)), "recall": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    tokenizer = checkpoint.tokenizer()
    plans = [Plan.read(path) for path in arguments.plans]
    window = Window(*ring_of(plans[0]))
    model = TailModel(LayerStream(checkpoint))
    corpus = evaluation_text()
    asked = questions(model, tokenizer, corpus.documents)
    windows = []
    shape = (len(model.layers), with_heads(model.layouts).kv_heads)
    dense = torch.zeros(shape, dtype=torch.bool)
    for ids in corpus.windows(tokenizer, PREFILL + CONTINUATION + 1, WINDOWS).tolist():
        tail = ids[PREFILL:]
        reading = model.read(sample(ids[:PREFILL], tail, range(1, len(tail))))
        windows.append((reading, model.recall(reading, dense, window)))
    rows = [
        {"method": "none", "share": 0.0, **measure(model, tokenizer, asked, windows, dense, window)}
    ]
    scores: dict[str, Tensor] = {}
    for plan in plans:
        assert plan.scores is not None
        assert ring_of(plan) == (window.sink, window.window)
        scores["+".join(item["method"] for item in plan.provenance)] = plan.scores
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        scores[f"random, seed {seed}"] = torch.rand(shape, generator=generator)
    for share in SHARES:
        for method, score in scores.items():
            scored = replace(plans[0], scores=score)
            sliced = stream_heads(scored, int(share * score.numel()), window.sink, window.window)
            streaming = torch.tensor([layer.streaming for layer in sliced.layers])
            row = measure(model, tokenizer, asked, windows, streaming, window)
            rows.append({"method": method, "share": share, **row})
            print(json.dumps(rows[-1]), flush=True)
            result = {
                "model": checkpoint.source,
                "sink": window.sink,
                "window": window.window,
                "corpus": corpus.id,
                "environment": environment(torch.device("cpu"), torch.float32),
                "provenance": [plan.provenance for plan in plans],
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
