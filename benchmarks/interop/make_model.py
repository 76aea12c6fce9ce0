"""Writes a small random Llama with one KV head, the case that vLLM's MLA can express exactly.

python make_model.py FOLDER
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    vocab_size=49152,  # that of smollm2, whose tokenizer goes with it
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
model = LlamaForCausalLM(config)
with torch.no_grad():
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # Wide enough that the softmaxes are peaked and the next token is clear.
            weight.normal_(std=0.12 if "proj" in name else 1.0)
model.save_pretrained(sys.argv[1])
