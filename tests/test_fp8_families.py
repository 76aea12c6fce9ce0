"""Scales for the fp8 cache of every family, and of models of several modalities."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import MANIFEST, convert, one_thread, weights
from _family_cases import CASES, long_rope
from _family_tools import open_case, tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from kvtool._transformers import cache_argument
from kvtool.checkpoint import Checkpoint
from kvtool.convert import planning, targets
from kvtool.convert.verify import verify
from kvtool.errors import UnsupportedModelError
from kvtool.fp8 import BESIDE
from kvtool.inspection import inspect_checkpoint
from kvtool.rope import apply_long_factors

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)
READ = [name for name, (family, _) in CASES.items() if family not in targets.UNREAD]
UNTURNABLE = {
    "afmoe": "a gate of layer 0",
    "gemma4_text, keys are values": "the values of layer 1 are its keys",
    "laguna, gate per channel": "a gate of layer 0",
    "qwen3_5_text": "a gate of layer 1",
    "qwen3_next, yarn": "a gate of layer 1",
}
FOLDED = [
    *UNTURNABLE,
    *("cohere2", "gemma3_text", "gemma4_text", "glm4", "granitemoehybrid", "laguna", "minimax_m2"),
    *("olmo2", "phi3, longrope on a part", "phi3, partial", "smollm3", "stablelm", "starcoder2"),
]
"""Those that differ in what lies between projections and cache: norms, RoPE, gates, biases."""
_FIRST = {CASES[name][0]: name for name in reversed(READ)}
PLAIN = [name for name in _FIRST.values() if name not in FOLDED]


class Peaks(DynamicCache):
    """Remembers the largest keys and values of every layer, also of those that roll."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.found: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        for name, x in (("k_scale", key_states), ("v_scale", value_states)):
            self.found[f"model.layers.{layer_idx}.self_attn.{name}"] = x.abs().amax()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def stock(checkpoint: Checkpoint) -> Any:
    model = checkpoint.load_transformers(torch.float32)
    apply_long_factors(model)
    return model


def without_kvtool(checkpoint: Checkpoint) -> Any:
    """As a user has it who does not know of scales, and of no package that quantises."""
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    assert all(x.endswith(("k_scale", "v_scale")) for x in info.pop("unexpected_keys"))
    assert not any(info.values())
    return model.eval()


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids[None], use_cache=False).logits[0]


@torch.inference_mode()
def observed(checkpoint: Checkpoint, model: Any) -> dict[str, Tensor]:
    text, _ = planning.texts(checkpoint, planning.ConvertOptions(to="fp8-kv", tokens=1024))
    cache = Peaks(model.config)
    model(text, use_cache=True, **{cache_argument(): cache})
    return cache.found


def scales(folder: Path) -> dict[str, Tensor]:
    return {n: t for n, t in weights(folder).items() if n.endswith(("k_scale", "v_scale"))}


def holds(checkpoint: Checkpoint, output: Path, model: Any) -> None:
    expected, found = observed(checkpoint, model), scales(output)
    assert found.keys() == expected.keys() != set()
    for name, peak in expected.items():
        torch.testing.assert_close(found[name] * 448, peak.view(1), rtol=1e-4, atol=0)


def differs(x: Tensor, source: Checkpoint, name: str) -> bool:
    return name in source.tensors and not torch.equal(x, source.read(name))


@pytest.mark.parametrize("name", PLAIN)
def test_scales_are_the_largest_number_that_the_cache_of_transformers_holds(
    tiny, tmp_path: Path, name: str
) -> None:
    source, ids = open_case(tiny, name), tokens(60)
    convert(source.path, tmp_path / "out", to="fp8-kv")
    output = Checkpoint.open(str(tmp_path / "out"))
    model = stock(source)
    holds(source, output.path, model)
    beside = (output.path / BESIDE).exists()
    assert beside != (
        "quantization_config" in json.loads((output.path / "config.json").read_text())
    )
    assert torch.equal(
        logits((without_kvtool if beside else stock)(output), ids), logits(model, ids)
    )
    assert not any(differs(x, source, n) for n, x in weights(output.path).items())


@pytest.mark.parametrize("name", FOLDED)
def test_foldings_change_no_logit(tiny, tmp_path: Path, name: str) -> None:
    """And scales are those of what is stored then."""
    source, ids = open_case(tiny, name), tokens(60)
    options = {"smooth": True, "turn_values": name not in UNTURNABLE}
    convert(source.path, tmp_path / "out", to="fp8-kv", **options)
    output = Checkpoint.open(str(tmp_path / "out"))
    model, wanted = stock(output), logits(stock(source), ids)
    got = logits(model, ids)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.std()))
    holds(source, output.path, model)
    changed = {n.split(".")[-2] for n, x in weights(output.path).items() if differs(x, source, n)}
    assert changed.isdisjoint({"v_proj", "o_proj"}) == (name in UNTURNABLE)
    assert changed & {"q_proj", "q_norm", "qkv_proj"}


@pytest.mark.parametrize(("name", "reason"), UNTURNABLE.items())
def test_values_that_cannot_be_turned_are_refused(tiny, name: str, reason: str) -> None:
    options = planning.ConvertOptions(to="fp8-kv", tokens=1024, turn_values=True)
    with pytest.raises(UnsupportedModelError, match=f"cannot turn values: {reason}"):
        planning.plan(open_case(tiny, name), options)


def test_a_scale_per_head_is_refused_where_layers_have_several_numbers_of_them(tiny) -> None:
    checkpoint = open_case(tiny, "gemma4_text, keys are values")
    options = planning.ConvertOptions(to="fp8-kv", tokens=1024, scales="head")
    with pytest.raises(UnsupportedModelError, match="layers have 2 and 4 KV heads"):
        planning.plan(checkpoint, options)


@pytest.mark.parametrize(
    ("name", "beside"),
    [("gemma3_text", False), ("mixtral", True), ("phi3, longrope", False), ("qwen3_next", True)],
)
def test_an_output_passes_every_check(tiny, tmp_path: Path, name: str, beside: bool) -> None:
    source, output = open_case(tiny, name), tmp_path / "out"
    result = convert(source.path, output, to="fp8-kv", smooth=True)
    report = verify(output, source)
    assert report.passed, report.to_dict()
    planned = result.plan["bytes_per_token_after"]
    assert report.measured["fp8_bytes_per_token"] == planned
    assert planned == inspect_checkpoint(source).bytes_per_token / 2
    assert result.plan["output_bytes"] == Checkpoint.open(str(output)).total_bytes
    assert (BESIDE in (output / "README.md").read_text()) == beside
    assert (BESIDE in json.loads((output / MANIFEST).read_text())["sha256"]) == beside
    with pytest.raises(UnsupportedModelError, match="already holds scales"):
        planning.plan(Checkpoint.open(str(output)), planning.ConvertOptions(to="fp8-kv"))


def test_short_texts_are_verified_with_the_long_factors_of_vllm(tiny, tmp_path: Path) -> None:
    fields = {"sliding_window": None, "max_position_embeddings": 1024, **long_rope(600, 1.0)}
    source = tiny("phi3", **fields)
    convert(source, tmp_path / "out", to="fp8-kv")
    report = verify(tmp_path / "out", Checkpoint.open(str(source)), long_prompt=False)
    assert report.passed, report.to_dict()


def test_one_that_no_engine_reads_is_refused(tiny) -> None:
    for family, reason in targets.UNREAD.items():
        if family in CONFIG_MAPPING:
            (name,) = (name for name, case in CASES.items() if case[0] == family)
            checkpoint = open_case(tiny, name)
            with pytest.raises(UnsupportedModelError, match=reason):
                planning.plan(checkpoint, planning.ConvertOptions(to="fp8-kv"))
            (told,) = (x for x in inspect_checkpoint(checkpoint).applications if "fp8" in x.command)
            assert told.reasons == [reason]


def test_the_documents_name_what_is_refused() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    section = text.split("## Scales for an fp8 cache")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert dict(rows) == targets.UNREAD
