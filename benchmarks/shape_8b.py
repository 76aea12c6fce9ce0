"""A checkpoint with the shapes of an 8B Llama and random bf16 weights, to measure costs on.

    python benchmarks/shape_8b.py FOLDER [--layers N]

A layer takes 0.44 GB, embedding and output head 1.05 GB each: 16 GB with all 32 layers.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from kvtool.checkpoint import Checkpoint


def write(folder: Path, layers: int, shrink: int = 1) -> None:
    """Writes it; all layers have the same weights, and the tokenizer is that of `smollm2`.

    Args:
        shrink: Divides hidden, inner and head size, to try a benchmark out.
    """
    hidden, inner, size = 4096 // shrink, 14336 // shrink, 128 // shrink
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=size,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    Checkpoint.open("smollm2").tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    parts = {
        "self_attn.q_proj": random(32 * size, hidden),
        "self_attn.k_proj": random(8 * size, hidden),
        "self_attn.v_proj": random(8 * size, hidden),
        "self_attn.o_proj": random(hidden, 32 * size),
        "mlp.gate_proj": random(inner, hidden),
        "mlp.up_proj": random(inner, hidden),
        "mlp.down_proj": random(hidden, inner),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.clone(),
    }
    shards = [
        {f"model.layers.{i}.{name}.weight": x for name, x in parts.items()} for i in range(layers)
    ]
    shards.append({"model.embed_tokens.weight": random(128256, hidden), "model.norm.weight": ones})
    shards.append({"lm_head.weight": shards[-1]["model.embed_tokens.weight"]})
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def main() -> None:
    """Parses and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divides the widths, for a trial")
    asked = parser.parse_args()
    write(asked.folder, asked.layers, asked.shrink)


if __name__ == "__main__":
    main()
