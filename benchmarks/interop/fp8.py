"""Log-probabilities of the first 512 tokens of a folder's probe, through its fp8 cache, as JSON.

python fp8.py kvtool|truncated|transformers|vllm FOLDER
python fp8.py compare A.json B.json                      # how far two of them are apart

kvtool simulates the cache. transformers does with the package compressed-tensors. vLLM has one, but
its CPU kernel (0.32) cuts codes off towards zero, where its GPU kernels and everybody else round to
the nearest: `truncated` simulates that.
"""

from __future__ import annotations

import json
import os
import sys
from math import exp
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TOKENS = 512


def simulated(folder: str, ids: Any, truncated: bool) -> dict[str, Any]:
    import torch

    from kvtool.checkpoint import Checkpoint
    from kvtool.convert import verify
    from kvtool.fp8 import encode, stored_scales
    from kvtool.layout import describe

    def towards_zero(x: Any, scale: Any) -> Any:
        codes = encode(x, scale)
        beyond = codes.float().abs() > (x / scale).abs()
        return (codes.view(torch.uint8) - beyond.byte()).view(codes.dtype)

    if truncated:
        verify.encode = towards_zero
    checkpoint = Checkpoint.open(folder)
    model, cache = checkpoint.load_transformers(torch.float32), verify.Fp8Cache.of(checkpoint)
    layouts = enumerate(describe(checkpoint.hf_config()))
    pairs = (stored_scales(checkpoint, i) for i, layout in layouts if layout.kind != "state")
    scales = [[s.flatten().tolist() for s in pair] for pair in pairs]
    return {"scales": scales, "logprobs": logprobs(model, ids, cache)}


def with_transformers(folder: str, ids: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    layers = [x.self_attn for x in model.model.layers]
    scales = [[s.flatten().tolist() for s in (x.k_scale, x.v_scale)] for x in layers]
    return {"scales": scales, "logprobs": logprobs(model, ids, DynamicCache())}


def logprobs(model: Any, ids: Any, cache: Any) -> list[float]:
    import torch

    with torch.inference_mode():
        logits = model(ids[None], past_key_values=cache, use_cache=True).logits[0]
    found: list[float] = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()
    return found


def with_vllm(folder: str, ids: list[int]) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to look into the model
    from vllm import LLM, SamplingParams

    # No word about the cache: the checkpoint asks for fp8.
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=len(ids) + 1)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (done,) = engine.generate([{"prompt_token_ids": ids}], sampling)
    (scales,) = engine.apply_model(scales_in_vllm)
    pairs = zip(ids[1:], done.prompt_logprobs[1:], strict=True)
    return {"scales": scales, "logprobs": [row[token].logprob for token, row in pairs]}


def scales_in_vllm(model: Any) -> list[list[list[float]]]:
    from vllm.model_executor.layers.attention import Attention

    attention = [x for x in model.modules() if isinstance(x, Attention)]
    assert {x.kv_cache_dtype for x in attention} == {"fp8"}
    assert {x.kv_cache.element_size() for x in attention} == {1}
    return [[s.flatten().tolist() for s in (x._k_scale, x._v_scale)] for x in attention]


def compare(files: list[str]) -> str:
    a, b = (json.loads(Path(file).read_text()) for file in files)
    same = "same scales" if a["scales"] == b["scales"] else "DIFFERENT scales"
    apart = [x - y for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    nats, absolute = sum(apart) / len(apart), sum(map(abs, apart)) / len(apart)
    return f"{same}, log-probabilities {absolute:.1e} nats apart, perplexity x{exp(nats):.4f}"


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "compare":
        print(compare(arguments))
    else:
        (folder,) = arguments
        tokens = load_file(f"{folder}/kvtool/probe.safetensors")["ids"][:-1][:TOKENS]
        if what == "vllm":
            result = with_vllm(folder, tokens.tolist())
        elif what == "transformers":
            result = with_transformers(folder, tokens)
        else:
            result = simulated(folder, tokens, what == "truncated")
        print("RESULT " + json.dumps(result))
