"""Log-probabilities of the first 512 tokens of a folder's probe, through its fp8 cache, as JSON.

python fp8.py kvtool|transformers|vllm FOLDER

kvtool simulates the cache; transformers does with the package compressed-tensors; vLLM has one.
"""

import json
import os
import sys

from safetensors.torch import load_file

TOKENS = 512


def main(engine: str, folder: str) -> dict:
    ids = load_file(f"{folder}/kvtool/probe.safetensors")["ids"][:TOKENS]
    if engine == "vllm":
        return with_vllm(folder, ids.tolist())
    import torch

    if engine == "kvtool":
        from kvtool.checkpoint import Checkpoint
        from kvtool.convert.verify import Fp8Cache

        checkpoint = Checkpoint.open(folder)
        model, cache = checkpoint.load_transformers(torch.float32), Fp8Cache.of(checkpoint)
        scales = [[s.flatten().tolist() for s in pair] for pair in cache.scales.values()]
    else:
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        cache, layers = None, [x.self_attn for x in model.model.layers]
        scales = [[s.flatten().tolist() for s in (x.k_scale, x.v_scale)] for x in layers]
    with torch.inference_mode():
        logits = model(ids[None], past_key_values=cache, use_cache=True).logits[0]
    found = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return {"scales": scales, "logprobs": found.tolist()}


def with_vllm(folder: str, ids: list[int]) -> dict:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to look into the model
    from vllm import LLM, SamplingParams

    # No word about the cache: the checkpoint asks for fp8.
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=2 * TOKENS)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (done,) = engine.generate([{"prompt_token_ids": ids}], sampling)
    (scales,) = engine.apply_model(scales_of)
    pairs = zip(ids[1:], done.prompt_logprobs[1:], strict=True)
    return {"scales": scales, "logprobs": [row[token].logprob for token, row in pairs]}


def scales_of(model) -> list:
    attention = [x.self_attn.attn for x in model.model.layers]
    assert {x.kv_cache_dtype for x in attention} == {"fp8"}
    assert {x.kv_cache.element_size() for x in attention} == {1}
    return [[s.flatten().tolist() for s in (x._k_scale, x._v_scale)] for x in attention]


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
