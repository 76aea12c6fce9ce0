"""Few bits beside each other: KL, perplexity and recall through the cache, at measured bytes.

    kvtool calibrate retrieval-heads smollm2 -o heads.plan
    kvtool calibrate projections smollm2 -o codes.plan --read rebuilt --layers-together 5
    python benchmarks/quantization.py smollm2 --heads heads.plan --codes codes.plan \
        -o benchmarks/results/quantization.json

3840 tokens of a window are prefilled, and the next 256 true ones fed through the cache that they
left; pass-keys are asked for behind 2048 tokens. Models run in fp32; bytes are those of a cache for
4096 tokens as a bf16 model allocates it, against the dense one. The opponent is the QuantizedCache
of transformers with its quanto backend (package optimum-quanto, where it is installed), at its
defaults. It is fed in pieces of 32 tokens: what it gives for a piece sees that piece exactly, which
is in its favour. Rows that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from projections import CONTINUATION, Cases, filled, read
from transformers import DynamicCache

from kvtool.bits import Bits
from kvtool.calibrate.bit_options import QuantizationOptions, parse_bits, parse_tiers
from kvtool.calibrate.head_bits import harms, offered, shared
from kvtool.calibrate.projections import text_windows
from kvtool.calibrate.quantization import alike, allowed_bytes, calibrate_quantization, packed
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import evaluation_text
from kvtool.divergence import kl_divergence
from kvtool.evaluate.retrieval import ANSWER_TOKENS, is_exact
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine
from kvtool.slices import cut

CONTEXT, WINDOWS, STEPS = 4096, 3, 12
PREFILL = CONTEXT - CONTINUATION
PIECE = 32  # tokens that the opponent is fed at once


class Plans:
    """Plans of all rows, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, asked: argparse.Namespace) -> None:
        self.checkpoint, self.tokens = checkpoint, asked.tokens
        base = base_of(checkpoint)
        self.dense = Plan(base, whole_layers(checkpoint))
        self.native, self.size = self.dense.native_bytes(CONTEXT, 2), base.head_dim
        self.heads = Plan.read(asked.heads) if asked.heads else None
        self.codes = Plan.read(asked.codes) if asked.codes else None
        self.harm = cache(self._harm)

    def rows(self) -> Iterator[tuple[str, Callable[[], Plan]]]:
        """Names, and what makes the plan."""
        for bits in ("4", "K4V2", "3", "2"):
            for method, ring in (("kivi", {"sink": 0, "window": 128}), ("rotatekv", {})):
                read = "rebuilt" if method == "rotatekv" else "absorbed"
                yield (
                    f"{method} {bits}",
                    lambda b=bits, m=method, r=ring, d=read: self.alike(b, method=m, read=d, **r),
                )
            for read in ("absorbed", "rebuilt"):
                yield f"aware {bits}, {read}", lambda b=bits, r=read: self.aware(b, r)
        for bits in ("4", "3", "2"):
            yield f"gear {bits}", lambda b=bits: self.alike(b, method="gear", window=16)
        for keys in (8, 4):
            for share in (50, 70, 90):
                yield (
                    f"mustafar K{keys}, {share} %",
                    lambda k=keys, s=share: self.alike(
                        str(k), method="mustafar", window=16, kept=self.size - s * self.size // 100
                    ),
                )
            for values in (8, 4, 3, 2):
                yield (
                    f"kivi K{keys}V{values}, window 16",
                    lambda b=f"K{keys}V{values}": self.alike(b, method="kivi", window=16),
                )
        for bits in ("4/2", "K4V4/K4V2"):
            for method in ("zipcache", "mikv"):
                yield f"{method} {bits}", lambda b=bits, m=method: self.tiers(b, m)
        yield "fp8", lambda: self.fp8("streamed")
        yield "fp8, a prompt read exactly", lambda: self.fp8("dense")
        for window in (16, 64):
            yield f"fp8, window {window}", lambda w=window: self.fp8("streamed", w)
        for share in (28, 19):
            for read in ("absorbed", "rebuilt"):
                yield f"aware {share} %, {read}", lambda s=share, r=read: self.aware(s, r)
        if self.heads is not None:
            yield "half of the heads, no bits", lambda: self.heads
            for bits in ("4", "3", "2", 12.5):
                name = f"{bits} %" if isinstance(bits, float) else bits
                yield (
                    f"half of the heads, aware {name}, rebuilt",
                    lambda b=bits: self.aware(b, "rebuilt", heads=True),
                )
        if self.codes is not None:
            for width, share in ((75, 28), (50, 19), (50, 12.5), (37.5, 12.5), (25, 12.5)):
                yield (
                    f"codes of {width} %, bits for {share} %",
                    lambda w=width, s=share: self.coded(w, s),
                )
            for share in (28, 19, 12.5):
                yield f"codes of {share} %, no bits", lambda s=share: self.cut(s)

    def alike(self, bits: str, **options: Any) -> Plan:
        """The methods with the same bits everywhere."""
        asked = QuantizationOptions(bits=parse_bits(bits), tokens=self.tokens, **options)
        return calibrate_quantization(self.checkpoint, asked, self.dense, None, 2)

    def fp8(self, prefill: Any, window: int = 0) -> Plan:
        """What an engine's static fp8 cache keeps, and a window exactly."""
        asked = QuantizationOptions("fp8", (8, 8), window=window, tokens=self.tokens)
        heads = replace(self.dense, prefill=prefill)
        return calibrate_quantization(self.checkpoint, asked, heads, None, 2)

    def tiers(self, bits: str, method: Any) -> Plan:
        """The methods with two tiers of tokens, of which 128 are ranked together."""
        upper, lower = parse_tiers(bits)
        asked = QuantizationOptions(method, upper, 128, rest=lower, window=16, tokens=self.tokens)
        return calibrate_quantization(self.checkpoint, asked, self.dense, None, 2)

    def aware(self, size: str | float, read: Any, heads: bool = False) -> Plan:
        """Bits by harm, in the bytes of so many bits or a share of the native cache."""
        options = QuantizationOptions(tokens=self.tokens, read=read, window=16)
        budget = None
        if isinstance(size, str):
            options = replace(options, bits=parse_bits(size))
        else:
            budget = int(size / 100 * self.native)
        plan = self.heads if heads else self.dense
        assert plan is not None
        choices = offered(options.everywhere())
        allowed = allowed_bytes(plan, options, budget, 2)
        bits, _ = shared(plan, choices, self.harm(read, heads), allowed)
        return packed(plan, bits)

    def coded(self, width: float, share: float) -> Plan:
        """Codes of so much of the native bytes, and bits for them."""
        options = QuantizationOptions(bits=None, tokens=self.tokens)
        budget = int(share / 100 * self.native)
        return calibrate_quantization(self.checkpoint, options, self.cut(width), budget, 2)

    def cut(self, share: float) -> Plan:
        """Codes without bits."""
        assert self.codes is not None
        return cut(self.codes, int(share / 100 * self.native), CONTEXT, 2)

    def _harm(self, read: Any, heads: bool) -> torch.Tensor:
        options = QuantizationOptions(tokens=self.tokens, read=read, window=16)
        plan = self.heads if heads else self.dense
        assert plan is not None
        windows, offsets = text_windows(self.checkpoint, None, options.tokens, options.seed)
        texts = windows, offsets, options.seed, lambda *_: None
        return harms(self.checkpoint, plan, offered(options.everywhere()), *texts)


class Opponent:
    """transformers' QuantizedCache."""

    def __init__(self, checkpoint: Checkpoint, nbits: int) -> None:
        from transformers import QuantizedCache

        self.model = checkpoint.load_transformers(torch.float32, "cpu")
        self.tokenizer = checkpoint.tokenizer()
        self.new = lambda: QuantizedCache("quanto", self.model.config, nbits=nbits)

    @torch.inference_mode()
    def feed(self, store: Any, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Logits after the last `keep` tokens, all of them for 0."""
        return self.model(ids[None], past_key_values=store, logits_to_keep=keep).logits[0].float()

    def measure(self, cases: Cases) -> dict[str, Any]:
        """As :meth:`Cases.measure`, and milliseconds per decoded token."""
        kls, ratios, steps, size = [], [], [], 0
        for _, ids, expected, _ in cases.windows:
            store = self.new()
            self.feed(store, ids[:PREFILL], 1)
            said = torch.cat([self.feed(store, x) for x in ids[PREFILL:-1].split(PIECE)])
            said = said.log_softmax(-1)
            targets = ids[PREFILL + 1 :, None]
            kls.append(float(kl_divergence(expected, said).sum()) / len(said))
            ratios.append(float((expected.gather(1, targets) - said.gather(1, targets)).mean()))
            size = quantized_bytes(store)
        for _ in range(STEPS):
            started = time.perf_counter()
            self.feed(store, torch.tensor([5]))
            steps.append(time.perf_counter() - started)
        right = 0
        for case, _ in cases.keys:
            (question,) = case.questions
            store = self.new()
            self.feed(store, torch.tensor(case.context), 1)
            logits, tokens = self.feed(store, torch.tensor(question.ids))[-1], []
            for _ in range(ANSWER_TOKENS):
                tokens.append(int(logits.argmax()))
                logits = self.feed(store, torch.tensor(tokens[-1:]))[-1]
            right += is_exact(self.tokenizer.decode(tokens), question.answer)
        return {
            "bytes": size,
            "kl": fmean(kls),
            "kl_error": stdev(kls) / math.sqrt(len(kls)),
            "perplexity_ratio": math.exp(fmean(ratios)),
            "passkey": {"2048": [right, len(cases.keys)]},
            "milliseconds": 1000 * median(steps[2:]),
        }


def quantized_bytes(store: Any) -> int:
    """Of a QuantizedCache, every number that is not packed at two bytes."""
    total = 0
    for layer in store.layers:
        for x in (layer._quantized_keys, layer._quantized_values):
            total += x._data._data.nbytes + 2 * (x._scale.numel() + x._shift.numel())
        total += 2 * (layer.keys.numel() + layer.values.numel())
    return total


def milliseconds(engine: Engine, cases: Cases) -> float:
    """Of a decode step behind a prompt of the first window, the median."""
    (prompt, ids, *_), steps = cases.windows[0], []
    if engine.plan is None:
        store = cases.copy(prompt, STEPS)
    else:
        store = filled(engine, ids[:PREFILL], prompt, STEPS)
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.decode(store, torch.tensor([5]))
        steps.append(time.perf_counter() - started)
    return 1000 * median(steps[2:])


def speeds(checkpoint: Checkpoint) -> dict[str, float]:
    """Milliseconds per token behind 4000 tokens, medians of steps that were taken in turn."""
    dense = Engine.load(checkpoint)
    ids = evaluation_text().windows(checkpoint.tokenizer(), 4000, 1)[0]
    prompt = read(dense, ids)
    token = torch.tensor([5])
    steps: dict[str, Callable[[], Any]] = {}
    caches = {
        "everything": (dense, prompt),
        "everything, 16 tokens": (dense, read(dense, ids[:16])),
    }
    plan = Plans(checkpoint, argparse.Namespace(tokens=0, heads=None, codes=None)).dense
    for bits in (4, 2):
        for kind in ("rotated", "unrotated"):
            same = alike(plan, Bits(bits, bits, kind=kind, window=16))
            engine = Engine.load(checkpoint, plan=same)
            name = f"packed, {bits} bits, keys {'after' if kind == 'rotated' else 'before'} RoPE"
            caches[name] = engine, filled(engine, ids, prompt, STEPS)
    for name, (engine, store) in caches.items():
        steps[name] = lambda e=engine, c=store: e.decode(c, token)
    rival = Opponent(checkpoint, 4)
    store = rival.new()
    rival.feed(store, ids, 1)
    steps["transformers QuantizedCache, quanto, 4 bits"] = lambda: rival.feed(store, token)
    plain = DynamicCache()
    rival.feed(plain, ids, 1)
    steps["transformers DynamicCache"] = lambda: rival.feed(plain, token)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - started)
    return {name: 1000 * median(x[2:]) for name, x in taken.items()}


def allocated(checkpoint: Checkpoint, plan: Plan | None) -> int:
    """Bytes of a cache for one sequence of a bf16 model."""
    engine = Engine.load(checkpoint, dtype=torch.bfloat16, plan=plan)
    return engine.new_cache(1, CONTEXT).allocated_bytes


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by falling bytes."""
    lines = ["| | bytes | KL | perplexity ratio | pass-key | ms per token |", "|---" * 6 + "|"]
    for row in sorted(rows, key=lambda row: -row["share"]):
        keys = " ".join(f"{right}/{n}" for right, n in row["passkey"].values())
        lines.append(
            f"| {row['name']} | {row['share']:.1%} | {row['kl']:.4f} ± {row['kl_error']:.4f} | "
            f"{row['perplexity_ratio']:.3f} | {keys} | {row['milliseconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--codes", type=Path)
    parser.add_argument("--only", nargs="*", default=[""], help="Beginnings of names.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of calibration.")
    parser.add_argument("--speed", action="store_true", help="Measure speeds in turn, and no more.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    kept = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    rows: list[dict[str, Any]] = kept.get("rows", [])
    if asked.speed:
        kept["milliseconds_in_turn"] = speeds(checkpoint)
        print(json.dumps(kept["milliseconds_in_turn"], indent=1))
        asked.output.write_text(json.dumps(kept, indent=1) + "\n")
        return
    cases = Cases(checkpoint, PREFILL, WINDOWS)
    native = allocated(checkpoint, None)

    def record(name: str, found: dict[str, Any]) -> None:
        rows.append({"name": name, "share": found["bytes"] / native, **found})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        document = kept | {
            "model": asked.model,
            "command": " ".join(["python", *sys.argv]),
            "context": CONTEXT,
            "prefill": PREFILL,
            "continuation": CONTINUATION,
            "windows": WINDOWS,
            "calibration_tokens": asked.tokens,
            "dtype": "float32; bytes as of a bfloat16 model",
            "native_bytes": native,
            "environment": environment(torch.device("cpu"), torch.float32),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        asked.output.write_text(json.dumps(document, indent=1) + "\n")

    def wanted(name: str) -> bool:
        return name.startswith(tuple(asked.only)) and all(row["name"] != name for row in rows)

    if wanted("everything"):
        speed = milliseconds(cases.engine, cases)
        keys = {"2048": [len(cases.keys)] * 2}
        record("everything", {"bytes": native, "kl": 0.0, "kl_error": 0.0, "perplexity_ratio": 1.0,
                              "passkey": keys, "milliseconds": speed})  # fmt: skip
    makers = dict(Plans(checkpoint, asked).rows())
    for name in sorted(makers, key=lambda x: [not x.startswith(first) for first in asked.only]):
        if wanted(name):
            make = makers[name]
            plan = make()
            engine = Engine.load(checkpoint, plan=plan)
            size = allocated(checkpoint, plan)
            assert size == plan.cache_bytes(CONTEXT, 2)
            found = cases.measure(engine) | {"bytes": size}
            record(name, found | {"milliseconds": milliseconds(engine, cases)})
    for nbits in (4, 2):
        if wanted(name := f"transformers QuantizedCache, quanto, {nbits} bits"):
            record(name, Opponent(checkpoint, nbits).measure(cases))
    print(table(rows))


if __name__ == "__main__":
    main()
