"""What a conversion refuses, when, and in which words."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import (
    LLAMA3,
    MANIFEST,
    YARN,
    convert,
    edit_json,
    edited_copy,
    one_thread,
    plan,
    stock,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kvtool.checkpoint import Checkpoint
from kvtool.convert import mamba_planning, planning, targets
from kvtool.convert.mamba_planning import MambaOptions
from kvtool.convert.verify import verify
from kvtool.errors import (
    CalibrationError,
    CheckpointError,
    KvtoolError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from kvtool.layout import describe

Tiny = Callable[..., Path]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)


PUBLISHED = {"method": "transmla"}
BAD_OPTIONS = {
    "rank": ({"rank": 49}, "--rank 49 is impossible.*48"),
    "rank-zero": ({"rank": 0}, "--rank 0"),
    "rank-negative": ({"rank": -3}, "--rank -3"),
    "rank-and-rope-fill-the-cache": ({"rank": 48}, "rank 48 .* does not shrink the cache"),
    "rank-beyond-budget": ({"rank": 40, "kv_budget": "50%"}, "--rank 40.*32"),
    "rope-odd": ({"rope_dim": 1}, "--rope-dim 1 is impossible.*even"),
    "rope-not-dividing": (
        {"rope_dim": 6, "target": "vllm"},
        "--rope-dim 6 is impossible.*divide the head size 16",
    ),
    "rope-too-wide": ({"rope_dim": 34}, "--rope-dim 34 is impossible"),
    "rope-too-wide-transmla": ({"rope_dim": 32, **PUBLISHED}, "--rope-dim 32 is impossible"),
    "rope-zero": ({"rope_dim": 0}, "--rope-dim 0 is impossible"),
    "budget-zero": ({"kv_budget": "0"}, "--kv-budget '0' is neither"),
    "budget-zero-share": ({"kv_budget": "0%"}, "--kv-budget '0%' is neither"),
    "budget-negative": ({"kv_budget": "-50%"}, "--kv-budget '-50%' is neither"),
    "budget-not-a-number": ({"kv_budget": "nan%"}, "--kv-budget 'nan%' is neither"),
    "budget-words": ({"kv_budget": "abc"}, "--kv-budget 'abc' is neither"),
    "budget-whole": ({"kv_budget": "100%"}, "--kv-budget 100% does not shrink the cache"),
    "budget-more": ({"kv_budget": "150%"}, "--kv-budget 150% does not shrink the cache"),
    "budget-bytes-too-many": ({"kv_budget": "1KiB"}, "--kv-budget 1KiB does not shrink the cache"),
    "budget-tiny": ({"kv_budget": "1%"}, "nothing is left for the latent.*allows 0 numbers"),
    "budget-below-rope": (
        {"kv_budget": "20%", "rope_dim": 16},
        "nothing is left for the latent.*allows 12 numbers.*takes 16",
    ),
    "all-three": (
        {"kv_budget": "50%", "rank": 16, "rope_dim": 16},
        "--kv-budget, --rank and --rope-dim together",
    ),
    "freqfold-word": ({"freqfold": "many", **PUBLISHED}, "--freqfold many is neither"),
    "freqfold-negative": ({"freqfold": "-1", **PUBLISHED}, "--freqfold -1 is neither"),
    "freqfold-superscript": ({"freqfold": "²", **PUBLISHED}, "--freqfold ² is neither"),
    "freqfold-zero": ({"freqfold": "0", **PUBLISHED}, "--freqfold 0 is impossible"),
    "freqfold-not-dividing": (
        {"freqfold": "3", **PUBLISHED},
        "--freqfold 3 is impossible.*divides 8",
    ),
    "freqfold-too-large": ({"freqfold": "16", **PUBLISHED}, "--freqfold 16 is impossible"),
    "freqfold-below-collapse": (
        {"freqfold": "1", "rope_dim": 8, **PUBLISHED},
        "--freqfold 1 is impossible.*multiple of 2",
    ),
    "freqfold-of-another-method": ({"freqfold": "2"}, "--freqfold has no place.*aware"),
    "tokens": ({"tokens": 100}, "--tokens 100 is less than one window of 512"),
    "exact-with-budget": ({"method": "exact", "kv_budget": "50%"}, "exact keeps every byte"),
    "exact-with-rank": ({"method": "exact", "rank": 8}, "exact keeps every byte"),
    "exact-with-rope": ({"method": "exact", "rope_dim": 16}, "exact keeps every byte"),
    "method": ({"method": "magic"}, "--method magic is unknown.*aware, transmla, exact"),
    "target": ({"target": "moon"}, "--target moon is unknown.*transformers, vllm, kvtool"),
    "float16": ({"dtype": "float16"}, "float16 underflows"),
    "shard-size": ({"shard_size": "big"}, "--shard-size big is not a size"),
    "shard-size-zero": ({"shard_size": "0GB"}, "--shard-size 0GB"),
    "shard-size-negative": ({"shard_size": "-1GB"}, "--shard-size -1GB"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_an_impossible_option_is_refused_in_one_sentence(tiny, tmp_path, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        convert(tiny("llama"), tmp_path / "out", **options)
    assert caught.value.exit_code == 2
    assert "None" not in str(caught.value)
    assert not list(tmp_path.iterdir())


SHORT = {"calibration": "Hello.", "probe": "\n\n".join(f"Paragraph {i}." for i in range(100))}


@pytest.mark.parametrize("missing", ["windows", "calibration", "probe"])
def test_too_little_text_is_noticed_before_any_work(tiny, tmp_path, missing):
    options: dict[str, Any] = {"tokens": 10**7}
    if missing in SHORT:
        options = {"tokens": 512, "data": str(tmp_path / "text.txt")}
        (tmp_path / "text.txt").write_text(SHORT[missing])
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(UsageError, match="fewer than the"):
        convert(tiny("llama"), tmp_path / "out", report=lambda *step: steps.append(step), **options)
    assert steps == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["1.5MB", "40kb", "1GiB", "60KiB"])
def test_a_shard_size_that_is_accepted_works(tiny, tmp_path, size):
    convert(tiny("llama"), tmp_path / "out", method="exact", shard_size=size)
    assert stock(tmp_path / "out")


@pytest.mark.parametrize("head_dim", [16, 24, 80, 96, 128])
def test_every_share_of_the_cache_has_widths(tiny, head_dim):
    config = AutoConfig.from_pretrained(tiny("llama"))
    config.head_dim = head_dim
    native = 2 * config.num_key_value_heads * head_dim
    for share in range(2, 100, 2):
        total = native * share // 100
        if total >= 3:  # one pair with positions and one number without
            size = targets.latent_size(config, "transmla", "vllm", f"{share}%", None, None)
            assert size.rank + size.rope_dim == total
            assert size.rank >= 1
            assert head_dim % size.rope_dim == size.rope_dim % 2 == 0


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = {
    "float16": ("llama", {"dtype": "float16"}, {}, "float16 weights.*underflows"),
    "qwen3": ("qwen3", {}, {}, "q/k norm.*--target kvtool"),
    "qwen3-vllm": ("qwen3", {}, {"target": "vllm"}, "q/k norm.*--target kvtool"),
    "qwen2-vllm": ("qwen2", {}, {"target": "vllm"}, "no attention bias.*transformers or kvtool"),
    "sliding": ("mistral", {"sliding_window": 64}, {}, "sliding-window attention .64 tokens"),
    "sliding-kvtool": (
        "mistral",
        {"sliding_window": 64},
        {"target": "kvtool"},
        "sliding-window attention .64 tokens",
    ),
    "llama3-vllm": (
        "llama",
        {"rope_parameters": LLAMA3},
        {"target": "vllm"},
        "no 'llama3' RoPE scaling.*--target transformers",
    ),
    "yarn-vllm": ("llama", {"rope_parameters": YARN}, {"target": "vllm"}, "no 'yarn' RoPE scaling"),
    "exact-vllm": (
        "llama",
        {},
        {"target": "vllm", "method": "exact"},
        "once per KV head.*--target transformers",
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC}, {}, "'dynamic' changes its frequencies"),
    "dynamic-kvtool": (
        "llama",
        {"rope_parameters": DYNAMIC},
        {"target": "kvtool"},
        "'dynamic' changes its frequencies",
    ),
    "mlp-bias": ("llama", {"mlp_bias": True}, {}, "no bias in its MLP"),
}


@pytest.mark.parametrize(
    ("family", "overrides", "options", "reason"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_a_target_cannot_express_is_refused_before_any_work(
    tiny, tmp_path, family, overrides, options, reason
):
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        convert(tiny(family, **overrides), tmp_path / "out", **options)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_a_sliding_window_as_long_as_the_context_does_not_matter(tiny):
    assert plan(tiny("mistral", sliding_window=512), method="exact")["share"] == 1


def test_our_own_runtime_takes_an_mlp_bias(converted):
    model, output = converted("llama", {"mlp_bias": True}, method="exact", target="kvtool")
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


def test_float16_weights_are_refused_whatever_the_config_says(tiny, tmp_path):
    model = Path(shutil.copytree(tiny("llama", dtype="float16"), tmp_path / "model"))
    edit_json(model, "config.json", lambda config: config.pop("dtype"))
    with pytest.raises(UnsupportedModelError, match="float16 weights"):
        plan(model)


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_a_model_that_is_mla_already_is_refused(converted, tmp_path, target):
    _, output = converted("llama", {}, method="exact", target=target)
    with pytest.raises(UnsupportedModelError, match=r"already caches a latent \(MLA\)"):
        convert(output, tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_a_config_without_a_model_type_is_refused(tiny, tmp_path):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    edit_json(model, "config.json", lambda config: config.pop("model_type"))
    with pytest.raises(KvtoolError, match="model type"):
        plan(model)


def test_an_existing_output_is_refused_and_kept(tiny, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"out"):
            convert(tiny("llama"), output, method="exact", overwrite=overwrite)
    assert [f.read_text() for f in tmp_path.rglob("*") if f.is_file()] == ["mine"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    needed = plan(tiny("llama"), method="exact")["disk_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed - 1))
    with pytest.raises(ResourceError, match=r"needs \d\.\d\d MB of disk") as caught:
        convert(tiny("llama"), tmp_path / "out", method="exact")
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed))
    convert(tiny("llama"), tmp_path / "out", method="exact")


@pytest.mark.parametrize("to", ["mla", "mamba"])
def test_what_a_killed_run_left_is_of_the_disk_that_is_needed(tiny, tmp_path, monkeypatch, to):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    ask: Any = mamba_planning.plan if to == "mamba" else planning.plan
    options: Any = MambaOptions((1,)) if to == "mamba" else planning.ConvertOptions()
    usage = namedtuple("usage", "total used free")
    needed = ask(checkpoint, options)["disk_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, needed - 1000))
    left = tmp_path / "out.partial" / "layer"
    left.parent.mkdir()
    left.write_bytes(bytes(1000))
    ask(checkpoint, options, tmp_path / "out")
    left.write_bytes(bytes(999))
    with pytest.raises(ResourceError):
        ask(checkpoint, options, tmp_path / "out")


@pytest.mark.parametrize("method", ["exact", "transmla", "aware"])
@pytest.mark.parametrize("part", ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_values_that_are_not_finite_are_named_by_layer(tiny, tmp_path, part, method):
    def spoil(tensors):
        tensors[f"model.layers.1.{part}.weight"][3, 5] = float("nan")

    model = edited_copy(tiny("llama"), tmp_path / "model", spoil)
    with pytest.raises(CalibrationError, match="layer 1 produces values that are not finite"):
        convert(model, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_an_output_head_that_is_not_finite_is_noticed(tiny, tmp_path):
    def spoil(tensors):
        tensors["lm_head.weight"][3, 5] = float("inf")

    model = edited_copy(tiny("llama"), tmp_path / "model", spoil)
    with pytest.raises(CalibrationError, match="not finite"):
        convert(model, tmp_path / "out", method="exact")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_what_the_conversion_does(converted, tiny):
    _, output = converted("llama", {}, kv_budget="50%")
    manifest = json.loads((output / MANIFEST).read_text())
    assert plan(tiny("llama"), kv_budget="50%", tokens=1024) == manifest["plan"]


def damaged(tiny: Tiny, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a small model with its tensors changed."""
    shutil.copytree(tiny("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no tensor model.layers.1.mlp.up_proj.weight": lambda t: t.pop(
        "model.layers.1.mlp.up_proj.weight"
    ),
    "no tensor model.layers.0.self_attn.q_proj.weight": lambda t: t.pop(
        "model.layers.0.self_attn.q_proj.weight"
    ),
    "model.norm.weight has shape": lambda t: t.update({"model.norm.weight": torch.ones(7)}),
    "has a tensor model.layers.3.mlp.up_proj.weight": lambda t: t.update(
        {"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_tensor_that_does_not_fit_is_named_before_work_starts(tiny, tmp_path, message):
    model = damaged(tiny, tmp_path / "model", DAMAGE[message])
    with pytest.raises(CheckpointError, match=message):
        planning.plan(Checkpoint.open(str(model)), planning.ConvertOptions())


def test_frequencies_that_old_files_store_are_ignored(tiny, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = damaged(tiny, tmp_path / "model", lambda t: t.update({name: torch.ones(8)}))
    convert(model, tmp_path / "out", method="exact")
    assert name not in Checkpoint.open(str(tmp_path / "out")).tensors


def test_a_dry_run_refuses_what_the_run_would(tiny, tmp_path):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    with pytest.raises(UsageError, match="overlap"):
        planning.plan(checkpoint, planning.ConvertOptions(), tiny("llama"), overwrite=True)
    with pytest.raises(UsageError, match=r"nofile\.txt"):
        planning.plan(checkpoint, planning.ConvertOptions(data="nofile.txt"))
    with pytest.raises(UsageError, match="tokens"):
        planning.plan(checkpoint, planning.ConvertOptions(tokens=100_000_000))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("budget", "hint"), [("0.5", "50%"), ("1", "1%")])
def test_a_share_without_its_sign_is_asked_about(tiny, budget, hint):
    with pytest.raises(UsageError) as caught:
        planning.plan(
            Checkpoint.open(str(tiny("llama"))), planning.ConvertOptions(kv_budget=budget)
        )
    assert hint in (caught.value.hint or "")


def test_no_share_is_offered_for_bytes_that_can_be_none(tiny):
    layout = describe(Checkpoint.open(str(tiny("llama"))).hf_config())[0]
    with pytest.raises(UsageError, match="400 bytes per token, of 1280000") as caught:
        targets.parse_budget("400", layout, 10_000)
    assert caught.value.hint is None
