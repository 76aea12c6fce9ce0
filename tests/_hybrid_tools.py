"""Hybrid checkpoints with random mixers, written without any conversion."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvtool.checkpoint import Checkpoint
from kvtool.convert import granite
from kvtool.layout import describe
from kvtool.mamba import Mixer
from kvtool.replacements import mixer_shape

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
"""Of a config; Granite's own are none of them 1."""


@torch.no_grad()
def random_linear_mixer(layout, seed):
    """Every tensor matters: no gate, tap, skip or decay is trivial."""
    generator = torch.Generator().manual_seed(seed)
    mixer = Mixer(mixer_shape(layout), linear=True)
    for parameter in mixer.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer


def write_hybrid(source: Path, folder: Path, layers, seed=0, **config) -> dict[int, Mixer]:
    """Writes a hybrid of `source`; returns its mixers."""
    checkpoint = Checkpoint.open(str(source))
    hf = checkpoint.hf_config()
    layout = describe(hf)[0]
    taken = granite.other_tensors(checkpoint.tensors, layers)
    tensors = {n: granite.reader(checkpoint.read, parts)() for n, parts in taken.items()}
    if granite.zero_bias(layout):
        for i in set(range(hf.num_hidden_layers)) - set(layers):
            tensors[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(layout.hidden_size)
    mixers = {i: random_linear_mixer(layout, seed + i) for i in layers}
    for i, mixer in mixers.items():
        for name, tensor in granite.stock_mixer(mixer, hf.rms_norm_eps).items():
            tensors[f"model.layers.{i}.mamba.{name}"] = tensor
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    stock = granite.stock_config(hf, layout, layers, "float32")
    (folder / "config.json").write_text(json.dumps(stock | config))
    checkpoint.copy_side_files(folder)
    return mixers
