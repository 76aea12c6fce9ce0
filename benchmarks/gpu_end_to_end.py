"""Decode tokens/s of a whole model on a GPU, a part of `gpu.py`."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvtool.bits import Bits
from kvtool.codes import CodePlan, code_shapes
from kvtool.fp8 import Scales
from kvtool.layer_plan import LayerPlan
from kvtool.layout import decoder_layers
from kvtool.plan import Base, Plan
from kvtool.rope import ropes_of
from kvtool.runtime import Engine
from kvtool.runtime.host import swap_attention


def end_to_end(bench: Any, layers: int, batch: int, tokens: int, shrink: int = 1) -> None:
    """Decode tokens/s of the shape of Llama-3-8B with random weights, behind random caches.

    In `generate` of transformers the model keeps the layers that the runtime has put into it, but
    for their attention; they are no slower than its own.
    """
    config = LlamaConfig(
        hidden_size=4096 // shrink, intermediate_size=14336 // shrink, num_hidden_layers=layers,
        num_attention_heads=32 // shrink, num_key_value_heads=8 // min(shrink, 4), head_dim=128,
        vocab_size=128256 // shrink, max_position_embeddings=tokens + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16",
    )  # fmt: skip
    with bench.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    heads, width = config.num_key_value_heads, config.head_dim
    originals = [layer.self_attn for layer in decoder_layers(model)]
    shape = f"Llama-3-8B, {layers} layers"

    def add(name: str, seconds: float, cache_bytes: int | None) -> None:
        bench.add(
            {
                "kernel": "end to end", "shape": f"{shape}, {name}", "batch": batch,
                "tokens": tokens, "seconds": seconds, "tokens_per_second": batch / seconds,
                "cache_bytes": cache_bytes,
            }
        )  # fmt: skip

    base = Base("random", "", "", layers, heads, width)
    plain = LayerPlan((False,) * heads)
    half = CodePlan("rotated", 1, (heads * width // 2,) * 2)
    tensors: dict[str, Tensor] = {}
    for i in range(layers):
        for name, size in code_shapes(i, half, base.channels, half.widths).items():
            tensors[name] = (
                torch.randn(size) * size[-1] ** -0.5
                if len(size) > 1
                else (torch.zeros(size) if name.endswith("mean") else torch.ones(size))
            )
    streams = tuple(head % 2 == 1 for head in range(heads))
    budgets = tuple(tokens // 8 * (1 + head % 3) for head in range(heads))
    plans = {
        "dense": None,
        "codes of half the width": Plan(
            base, (plain,) * layers, codes=(half,) * layers, allocation="even", tensors=tensors
        ),
        "half of the heads stream": Plan(base, (LayerPlan(streams, 4, 256),) * layers),
        "budgets of 12, 25 and 37 %": Plan(
            base, (LayerPlan((False,) * heads, budget=budgets),) * layers, policy="snapkv"
        ),
        "4 bits": Plan(base, (replace(plain, bits=Bits(4, 4)),) * layers),
        "fp8": Plan(base, (replace(plain, scales=Scales(*[(0.01,) * heads] * 2)),) * layers),
    }
    for name, plan in plans.items():
        if bench.late(20):
            return
        for layer, module in zip(decoder_layers(model), originals, strict=True):
            layer.self_attn = module
        attentions = swap_attention(model, ropes_of(config), plan)
        checkpoint: Any = SimpleNamespace(tokenizer=lambda: SimpleNamespace(eos_token_id=0))
        engine = Engine(checkpoint, model, attentions, plan)
        with bench.going_on(f"end to end, {name}"):
            add(name, *_decode_seconds(engine, batch, tokens))
        del engine, attentions
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if bench.late(40):
        return
    for layer, module in zip(decoder_layers(model), originals, strict=True):
        layer.self_attn = module
    past = DynamicCache(config=config)
    size = (batch, heads, tokens, width)
    for i in range(layers):
        past.update(
            *(torch.randn(size, dtype=torch.bfloat16, device=bench.device) for _ in range(2)), i
        )
    prompt = torch.ones(batch, tokens + 1, dtype=torch.long, device=bench.device)
    stamps: list[float] = []

    class Stamps:
        def put(self, _: Tensor) -> None:
            _wait(bench.device)
            stamps.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left to say."""

    with torch.inference_mode():
        model.generate(
            prompt, past_key_values=past, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            streamer=_PerStep(Stamps()), attention_mask=torch.ones_like(prompt),
        )  # fmt: skip
    between = [after - before for before, after in pairwise(stamps[2:])]
    add("transformers generate", median(between), 2 * 2 * layers * batch * heads * width * tokens)


@torch.inference_mode()
def _decode_seconds(engine: Any, batch: int, tokens: int) -> tuple[float, int]:
    """Median time of a decode step behind caches of random numbers, and the bytes of these."""
    cache = engine.new_cache(batch, tokens + 64)
    for row in range(batch):
        cache.begin(row, tokens)
    for store in cache.stores:
        full = getattr(store, "full", None)
        parts = [store, full, *(getattr(x, "exact", None) for x in (store, full))]
        for part in (*parts, getattr(store, "streaming", None)):
            for plane in (getattr(part, "planes", None) or {}).values():
                if plane.dtype == torch.float8_e4m3fn:
                    plane.view(torch.uint8).random_(0, 127)  # 127 is NaN
                elif plane.is_floating_point():
                    plane.normal_()
                else:
                    plane.random_(0, 256)
    cache.lengths = [tokens] * batch
    ids = torch.ones(batch, dtype=torch.long)
    found = []
    for _ in range(19):
        _wait(engine.device)
        started = time.perf_counter()
        engine.decode(cache, ids)
        _wait(engine.device)
        found.append(time.perf_counter() - started)
    return median(found[3:]), cache.allocated_bytes


class _PerStep:
    """Lets `generate` report every step of a batch, which its own streamers refuse."""

    def __init__(self, stamps: Any) -> None:
        self.put, self.end = stamps.put, stamps.end


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
