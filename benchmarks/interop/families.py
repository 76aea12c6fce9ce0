"""Small random models of every family with scales for an fp8 cache, and whether vLLM reads those.

python families.py make FOLDER [NAME ...]   # with kvtool: converts the cases of its tests
python families.py vllm MODEL ...           # with vLLM: loads each, and says what its caches got

Heads have 32 channels, the least that the CPU kernels of vLLM take. Models of several modalities
need torchvision to be loaded there; of those, the decoder counts alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True},
    "hy_v3": {"qk_norm": True, "route_norm": True, "router_scaling_factor": 1.0}
    | {"expert_hidden_dim": 32, "moe_router_use_sigmoid": True},
    "mellum": {"num_nextn_predict_layers": 0},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
}
"""Fields of published configs that vLLM reads and transformers does not write."""
PROCESSORS = {
    "aya_vision": ("AyaVisionProcessor", "GotOcr2ImageProcessor"),
    "idefics2": ("Idefics2Processor", "Idefics2ImageProcessor"),
    "vipllava": ("LlavaProcessor", "CLIPImageProcessor"),
}
"""Of those without a class in vLLM, which makes one of them before it loads weights."""
TOWERS = (
    *("vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector"),
    *("embed_vision", "image_newline", "model.vision", "model.audio", "model.connector"),
    *("model.multi_modal_projector", "model.image_newline"),
)
"""Modules of vLLM that do not count here, and have other names in files of another age."""


def make(folder: Path, wanted: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    import _wrapper_cases as wrappers
    from _convert_tools import convert
    from _family_cases import CASES
    from conftest import make_config, make_model

    from kvtool.errors import UnsupportedModelError

    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
    wider: dict[str, Any] = {"global_head_dim": 64, "mamba_n_heads": 16}

    def widened(fields: dict[str, Any]) -> dict[str, Any]:
        found = {**fields, **{key: wider[key] for key in wider.keys() & fields.keys()}}
        rope = dict(found.get("rope_parameters", {}))
        for key in rope.keys() & {"short_factor", "long_factor"}:
            rope[key] = 2 * rope[key]
        if "mrope_section" in rope:
            rope["mrope_section"] = [8, 4, 4]
        return {**found, "rope_parameters": rope} if rope else found

    def written(source: Path, name: str) -> None:
        config = json.loads((source / "config.json").read_text())
        config |= PUBLISHED.get(config["model_type"], {})
        if config["model_type"] in ("flex_olmo", "phimoe"):  # their experts are as wide as the rest
            config.pop("moe_intermediate_size", None)
        (source / "config.json").write_text(json.dumps(config))
        if config["model_type"] in PROCESSORS:
            kinds = zip(
                ("processor_class", "image_processor_type"),
                PROCESSORS[config["model_type"]],
                strict=True,
            )
            own = {**dict(kinds), "size": {"height": 28, "width": 28}}
            (source / "preprocessor_config.json").write_text(json.dumps(own))
        try:
            convert(source, folder / name, to="fp8-kv")
            print(f"made {name}")
        except UnsupportedModelError as error:
            print(f"refused {name}: {error}")

    for case, (family, fields) in CASES.items():
        name = re.sub(r"\W+", "-", case)
        if name in wanted or not wanted:
            source = make_model(family, folder / "sources" / name, **widened({**sizes, **fields}))
            written(source, name)
    for case in wrappers.KNOWN:
        name = "wrapper-" + re.sub(r"\W+", "-", case)
        if name in wanted or not wanted:
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
            wrappers.make_config = lambda kind, **fields: make_config(  # type: ignore[assignment]
                kind,
                **widened({**heads, **fields}),  # noqa: B023
            )
            made = wrappers.make_wrapper(case, folder / "sources" / name)[1]
            written(made["saved"], name)


def load(models: list[Path]) -> bool:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from transformers import AutoConfig, LlamaConfig
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.models.utils import AutoWeightsLoader

    for kind in ("internlm3", "iquestcoder"):  # published ones come with such a class
        own = type(kind, (LlamaConfig,), {"model_type": kind})
        AutoConfig.register(kind, own, exist_ok=True)
    torch.accelerator.empty_cache = lambda: None  # it insists on a GPU
    known = AutoWeightsLoader._can_ignore_unexpected

    def passed_over(self: Any, name: str) -> bool:
        return name.startswith(TOWERS) or known(self, name)

    passed = True
    # Groups are made for the first one, and only a model of experts has all of them.
    for model in sorted(models, key=lambda model: model.name != "mixtral"):
        wrapped = model.name.startswith("wrapper-")
        AutoWeightsLoader._can_ignore_unexpected = passed_over if wrapped else known
        try:
            arguments = EngineArgs(str(model), dtype="float32", enforce_eager=True)
            config = arguments.create_engine_config()
            with set_current_vllm_config(config):
                if not torch.distributed.is_initialized():
                    init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "gloo")
                    initialize_model_parallel(1, 1)
                loaded = get_model(vllm_config=config)
            got = {}
            for name, x in loaded.named_modules():
                if isinstance(x, Attention) and x.kv_cache_dtype == "fp8":
                    layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
                    got[layer] = [s.flatten().tolist() for s in (x._k_scale, x._v_scale)]
            verdict = "same scales" if got and got == stored(model) else "DIFFERENT scales"
            kind = type(loaded).__name__
            del loaded
        except Exception as error:
            verdict, kind = "NOT LOADED", f"{type(error).__name__}: {str(error)[:200]}"
        passed &= verdict == "same scales"
        print(f"RESULT {verdict}  {model.name}: {kind}", flush=True)
    return passed


def stored(model: Path) -> dict[int, list[list[float]]]:
    """By layer, of keys and values."""
    found: dict[int, list[list[float]]] = {}
    with safe_open(model / "model.safetensors", "pt") as tensors:
        for name in sorted(tensors.keys()):
            if name.endswith((".k_scale", ".v_scale")):
                layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
                found.setdefault(layer, []).append(tensors.get_tensor(name).flatten().tolist())
    return found


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "make":
        make(Path(arguments[0]), arguments[1:])
    else:
        sys.exit(not load([Path(x) for x in arguments]))
