"""Prints greedy continuations of fixed prompts as JSON, by one engine or the other.

python greedy.py transformers|vllm MODEL
"""

import json
import sys

PROMPTS = [list(range(100, 140)), list(range(900, 1500, 3)), [504, 3575, 282, 4649, 314]]
NEW_TOKENS = 32


def with_transformers(model: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    host = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts = []
    for prompt in PROMPTS:
        out = host.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,  # none: `min_new_tokens` would forbid it instead of going on after it
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def with_vllm(model: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        # With it, vLLM 0.32 asks its CPU scan for Mamba-2 states inside a prompt and gets only the
        # last one: "index 3 is out of bounds".
        enable_prefix_caching=False,
        # Two CPU kernels of vLLM 0.32 are wrong for any DeepSeek model: RMSNorm reads a slice of a
        # wider row as if it were contiguous, and interleaved RoPE turns the wrong query elements
        # when there are more query heads than keys. The native versions are right.
        ir_op_priority={"rms_norm": ["native"]},
        compilation_config={"custom_ops": ["none"]},
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    done = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling)
    return [list(result.outputs[0].token_ids) for result in done]


if __name__ == "__main__":
    engine, model = sys.argv[1:]
    texts = with_transformers(model) if engine == "transformers" else with_vllm(model)
    print("RESULT " + json.dumps(texts))
