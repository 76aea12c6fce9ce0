"""`kvtool inspect` tells from headers what a checkpoint is, costs, and can become."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _family_cases import CASES
from _hybrid_tools import write_hybrid
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config

from kvtool.checkpoint import Checkpoint
from kvtool.cli import _console, run_command
from kvtool.convert import targets
from kvtool.factored import factor_tensors, factored_config
from kvtool.inspection import CONTEXTS, inspect_checkpoint
from kvtool.latent import LatentFactors
from kvtool.runtime import Engine

Tiny = Callable[..., Path]


def reasons(
    path: Path, method: str = "exact", target: str = "transformers", to: str = "mla"
) -> str:
    inspection = inspect_checkpoint(Checkpoint.open(str(path)))
    items = [a for a in inspection.applications if a.command == f"convert --to {to}"]
    (item,) = (a for a in items if (a.method, a.target) == (method, target))
    return "; ".join(item.reasons)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_states_layout_and_cache_of_each_family(tiny: Tiny, family: str) -> None:
    inspection = inspect_checkpoint(Checkpoint.open(str(tiny(family))))
    (run,) = inspection.runs
    assert run.summary.startswith("3 x GQA 4/2 heads x 16")
    assert ("bias" in run.summary) == (family == "qwen2")
    assert ("q/k norm" in run.summary) == (family == "qwen3")
    assert inspection.bytes_per_token == 3 * 2 * 2 * 16 * 2
    assert inspection.cache_bytes(4096) == 4096 * 384
    assert inspection.max_positions == 512
    assert inspection.rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_what_it_says_applies_is_what_the_conversion_checks(tiny: Tiny) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        checkpoint = Checkpoint.open(str(tiny(family)))
        for item in inspect_checkpoint(checkpoint).applications:
            to, config = item.command.removeprefix("convert --to "), checkpoint.hf_config()
            assert item.reasons == targets.check(config, item.method, item.target, to)


def test_it_says_why_a_conversion_does_not_apply(tiny: Tiny) -> None:
    assert reasons(tiny("llama")) == ""
    assert "bias" in reasons(tiny("qwen2"), "transmla", "vllm")
    assert "q/k norm" in reasons(tiny("qwen3"))
    assert reasons(tiny("qwen3"), target="kvtool") == ""
    assert "window" in reasons(tiny("mistral", sliding_window=64))
    merged = {"method": "aware", "to": "gqa"}
    assert reasons(tiny("qwen2"), **merged) == ""
    assert "q/k norm" in reasons(tiny("qwen3"), **merged)


def test_advice_is_a_target_that_has_no_reason_against_it(tiny: Tiny) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 128
    said = reasons(tiny("qwen3", rope_parameters=yarn), target="vllm")
    assert "q/k norm" in said
    assert "'yarn'" in said
    assert "--target transformers" not in said
    assert "use --target transformers" in reasons(
        tiny("llama", rope_parameters=yarn), target="vllm"
    )


def test_one_layer_is_no_layers(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(tiny("llama", num_hidden_layers=2))]) == 0
    assert ": 1 layer of " in capfd.readouterr().out
    assert run_command(["inspect", str(tiny("llama", num_hidden_layers=1))]) == 0
    out = capfd.readouterr().out
    assert "layer 0 " in out
    assert "layers" not in out


def test_logits_beside_a_softmax_and_the_bases_of_rope_are_named(tiny: Tiny) -> None:
    family, more = CASES["granite_swa"]
    inspection = inspect_checkpoint(Checkpoint.open(str(tiny(family, **more))))
    assert all("sink logits" in run.summary for run in inspection.runs)
    assert "no RoPE" in inspection.runs[2].summary
    assert inspection.rope["rope_theta"] == "4 values"


def test_a_window_bounds_the_cache(tiny: Tiny) -> None:
    inspection = inspect_checkpoint(Checkpoint.open(str(tiny("mistral", sliding_window=64))))
    assert "window of 64 tokens" in inspection.runs[0].summary
    assert inspection.cache_bytes(32768) == 64 * 384


def test_heads_are_called_by_their_sharing(tiny: Tiny) -> None:
    def summary(kv_heads: int) -> str:
        path = tiny("llama", num_key_value_heads=kv_heads)
        return inspect_checkpoint(Checkpoint.open(str(path))).runs[0].summary

    assert summary(4) == "3 x MHA 4 heads x 16"
    assert summary(1) == "3 x MQA 4/1 heads x 16"


def test_it_reads_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    content = (source / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(content[:header])
    os.truncate(tmp_path / "model.safetensors", len(content))  # the weights are a hole
    assert inspect_checkpoint(Checkpoint.open(str(tmp_path))).parameters > 0


def test_an_mla_checkpoint_shows_its_latent(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
    )
    config.save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    inspection = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    assert inspection.runs[0].summary == "2 x MLA 4 heads, latent 24 + RoPE key 16"
    assert inspection.bytes_per_token == 2 * (24 + 16) * 2
    assert all("already" in item.reasons[0] for item in inspection.applications)
    # A conversion notes the ranks that layers really need inside the common stock width.
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"kvtool": {"ranks": [24, 8]}}))
    inspection = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    assert inspection.bytes_per_token == 2 * (24 + 8 + 2 * 16)
    # What are no ranks says nothing: the stock width counts.
    (tmp_path / "config.json").write_text(json.dumps(written | {"kvtool": {"ranks": [24, "8"]}}))
    stock = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    assert stock.bytes_per_token == 2 * 2 * (written["kv_lora_rank"] + 16)


def test_our_own_latent_format_shows_the_rank_of_every_layer(tiny: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(str(tiny("qwen3")))
    tensors = load_file(source.path / "model.safetensors")
    ranks = [24, 24, 8]
    for layer, rank in enumerate(ranks):
        factors = LatentFactors(
            rope=torch.zeros(16, 32),
            rope_query=torch.zeros(2, 16, 16),
            inv_freq=torch.zeros(8),
            down=torch.zeros(rank, 64),
            key_up=torch.zeros(2, 16, rank),
            value_up=torch.zeros(2, 16, rank),
        )
        tensors |= factor_tensors(layer, factors, torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(factored_config(source.config)))
    inspection = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    assert [(run.first, run.last, run.layout.rank) for run in inspection.runs] == [
        (0, 1, 24),
        (2, 2, 8),
    ]
    assert inspection.bytes_per_token == 2 * sum(rank + 16 for rank in ranks)
    assert inspection.max_positions == 512


def test_an_unknown_attention_is_explained_and_not_an_error(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny("llama") / "config.json").read_text())
    config |= {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny("llama") / "model.safetensors").read_bytes())
    assert run_command(["inspect", str(tmp_path)]) == 0
    assert "not supported: model type 'gemma2'" in capfd.readouterr().out
    assert run_command(["inspect", str(tmp_path), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["kv_bytes_per_token"] is None
    assert result["attention"] == []
    assert all(item["reasons"] for item in result["applications"])


def test_it_foretells_the_cache_of_a_hybrid(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama", num_hidden_layers=4)
    forecast = inspect_checkpoint(Checkpoint.open(str(source))).hybrid
    assert forecast is not None
    assert forecast.layers == 2
    write_hybrid(source, tmp_path, [0, 2])
    hybrid = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    assert forecast.cache_bytes == {str(n): hybrid.cache_bytes(n) for n in CONTEXTS}
    engine = Engine.load(Checkpoint.open(str(tmp_path)), dtype=torch.bfloat16)
    assert hybrid.cache_bytes(512) == engine.new_cache(1, 512).allocated_bytes
    saved = 2 * 2 * 16 * 2 * forecast.even_at
    assert saved - 128 < forecast.constant_bytes <= saved
    assert hybrid.hybrid is None  # it is one already
    assert inspect_checkpoint(Checkpoint.open(str(tiny("qwen3")))).hybrid is None


def test_json_and_table_say_the_same(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tiny("llama"))
    assert run_command(["inspect", path, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert run_command(["inspect", path]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert result["kv_bytes_per_token"] == 384
    assert result["cache_bytes"] == {"4096": 1572864, "32768": 12582912, "131072": 50331648}
    assert "384 bytes per token" in text
    assert result["attention"][0]["summary"] in text
    assert f"{result['parameters']:,} parameters" in text
    assert len(result["applications"]) == len(targets.METHODS) * len(targets.TARGETS) + 3
    assert f"less from {result['hybrid']['even_at']} tokens on" in text
    alike = ("command", "method", "reasons")
    for item in result["applications"] + result["plans"]:
        verdict = "yes" if item["applies"] else "no"
        choice = ""
        if item["command"].endswith("mla"):  # targets of which the same is said share a row
            targets_alike = [
                other["target"]
                for other in result["applications"]
                if [other[x] for x in alike] == [item[x] for x in alike]
            ]
            choice = f"{item['method']} {', '.join(targets_alike)}"
        row = f"{item['command']} {choice} {verdict}"
        assert " ".join(row.split()) in text


def test_what_no_method_can_do_is_said_once(tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(tiny("olmo2"))]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert text.count("convert --to mla") == 1
    assert "convert --to mla any any no model type 'olmo2' is not one of" in text


def test_plans_apply_where_heads_see_the_whole_past(tiny: Tiny) -> None:
    def applying(family: str, **more: Any) -> list[str]:
        inspection = inspect_checkpoint(Checkpoint.open(str(tiny(family, **more))))
        return [item.command for item in inspection.plans if not item.reasons]

    family, mixed = CASES["gemma3_text"]
    assert len(applying(family, **mixed)) == len(applying("olmo2")) == 5
    assert not applying("mistral", sliding_window=24)


def test_a_narrow_terminal_loses_no_word(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(_console, "out", Console(file=said, width=60))
    assert run_command(["inspect", str(tiny("llama"))]) == 0
    assert "convert" in said.getvalue()
    assert "…" not in said.getvalue()


def test_bad_input_is_one_line_and_an_exit_code(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    for source, code in (
        (str(tmp_path / "missing"), 2),
        ("owner/name", 2),
        (str(tmp_path), 4),
    ):
        assert run_command(["inspect", source, "--offline"]) == code
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert source in captured.err
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert run_command(["inspect", str(tmp_path)]) == 1


def test_smollm2_costs_23040_bytes_per_token(smollm2: Checkpoint) -> None:
    inspection = inspect_checkpoint(smollm2)
    assert inspection.bytes_per_token == 23_040
    assert inspection.runs[0].summary == "30 x GQA 9/3 heads x 64"
    assert inspection.max_positions == 8192
    assert inspection.tied_embeddings
    assert inspection.parameters == 134_515_008


def test_the_command_works_in_a_process_of_its_own(tiny: Tiny) -> None:
    command = [sys.executable, "-m", "kvtool", "inspect", str(tiny("llama")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["family"] == "llama"
    assert done.stderr == ""
