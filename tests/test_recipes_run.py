"""The recipe and the CI job for streaming heads really run: on a random model, on a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.plan import Plan

REPOSITORY = Path(__file__).resolve().parent.parent
JOB = REPOSITORY / "recipes" / "ci" / "streaming-heads.sh"


def test_the_heads_recipe_measures_plans_and_evaluates(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (REPOSITORY / "recipes" / "smollm2-heads.yaml").read_text(encoding="utf-8")
    for shipped, small in (
        ("model: smollm2", f"model: {tiny('llama')}"),
        ("  - uses: calibrate statistics", "  - uses: calibrate statistics\n    tokens: 1024"),
        ("method: ablation", "method: entropy\n    window: 64\n    seed: 3"),  # it cannot recall
        ("output: smollm2-heads.plan", f"output: {tmp_path / 'heads.plan'}"),
        ("lengths: [2048, 4096]", "lengths: [256]\n    windows: 2\n    prefill: 192"),
        ("max_ppl_ratio: 1.05", "max_ppl_ratio: 2.0"),
        ("    min_recall: 0.95\n", ""),
    ):
        assert shipped in text
        text = text.replace(shipped, small)
    recipe = tmp_path / "heads.yaml"
    recipe.write_text(text)

    assert run_command(["run", str(recipe), "--json"]) == 0
    captured = capsys.readouterr()
    statistics, heads, report = objects(captured.out)
    assert captured.err == ""
    assert statistics["tokens"] == 1024
    assert heads["streaming_heads"] == 3
    assert report["plan"]["streaming_heads"] == 3
    plan = Plan.read(tmp_path / "heads.plan")
    assert report["divergence"]["cache_bytes"] == plan.cache_bytes(192 + 256, 4)


def test_bits_are_given_to_the_heads_of_the_step_before(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""\
kvtool: 1
model: {tiny("llama")}
steps:
  - {{uses: calibrate retrieval-heads, method: entropy, window: 8, output: {tmp_path}/heads.plan}}
  - {{uses: calibrate quantization, bits: 3, group: 16, window: 8, tokens: 1024,
     output: {tmp_path}/bits.plan}}
"""
    (tmp_path / "bits.yaml").write_text(text)
    assert run_command(["run", str(tmp_path / "bits.yaml"), "--json"]) == 0
    heads, bits = objects(capsys.readouterr().out)
    assert bits["methods"] == ["entropy", "aware"]
    assert bits["streaming_heads"] == heads["streaming_heads"] > 0
    assert bits["bytes"] < heads["bytes"]


def test_heads_of_the_step_before_are_read_sparsely(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""\
kvtool: 1
model: {tiny("llama")}
steps:
  - {{uses: calibrate retrieval-heads, method: entropy, window: 8, output: {tmp_path}/heads.plan}}
  - {{uses: calibrate double-sparsity, channels: 4, tokens_read: 40, tokens: 1024,
     output: {tmp_path}/read.plan}}
"""
    (tmp_path / "read.yaml").write_text(text)
    assert run_command(["run", str(tmp_path / "read.yaml"), "--json"]) == 0
    heads, read = objects(capsys.readouterr().out)
    assert read["methods"] == ["entropy", "double-sparsity"]
    assert read["streaming_heads"] == heads["streaming_heads"] > 0
    assert {x["sparse"]["tokens"] for x in read["layers"] if x["sparse"]} == {40}


def test_a_dry_run_names_each_step_s_own_output(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""\
kvtool: 1
model: {tiny("llama")}
steps:
  - {{uses: calibrate budgets, kv_budget: 25%, output: {tmp_path}/budgets.plan}}
  - {{uses: calibrate quantization, output: {tmp_path}/bits.plan}}
  - {{uses: calibrate projections, output: {tmp_path}/codes.plan}}
"""
    (tmp_path / "r.yaml").write_text(text)
    assert run_command(["run", str(tmp_path / "r.yaml"), "--json", "--dry-run"]) == 0
    said = capsys.readouterr()
    names = [f"{tmp_path}/budgets.plan", f"{tmp_path}/codes.plan"]
    assert [found["plan"] for found in objects(said.out)] == names
    assert said.err.startswith("step 2, calibrate quantization: what it works with is not written")


@pytest.mark.parametrize("dry_run", [True, False])
def test_behind_a_conversion_steps_work_with_what_it_wrote(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    text = f"""\
kvtool: 1
model: {tiny("llama")}
steps:
  - {{uses: convert, to: mla, kv_budget: 75%, tokens: 1024, output: {tmp_path}/mla}}
  - {{uses: calibrate quantization, bits: 4, group: 16, window: 16, tokens: 1024,
     output: {tmp_path}/bits.plan}}
  - {{uses: evaluate, windows: 1, prefill: 96, continuation: 32, lengths: [128],
     layers: false, chat_prompts: false, speed: false}}
"""
    (tmp_path / "r.yaml").write_text(text)
    command = ["run", str(tmp_path / "r.yaml"), "--json", *["--dry-run"] * dry_run]
    assert run_command(command) == 0
    said = capsys.readouterr()
    found = objects(said.out)
    if dry_run:
        assert len(found) == 1
        why = "what it works with is not written yet, so its result is not foreseen"
        assert said.err == f"step 2, calibrate quantization: {why}\n"
        assert sorted(x.name for x in tmp_path.iterdir() if x.suffix != ".yaml") == []
        return
    _, bits, report = found
    plan = Plan.read(tmp_path / "bits.plan")
    assert [layer.kept.packed for layer in plan.layers] == [True] * 3
    assert bits["bytes"] == plan.cache_bytes(bits["context"], 2)
    assert report["divergence"]["cache_bytes"] == plan.cache_bytes(128, 4)
    assert report["base"] == str(tiny("llama"))


def test_the_ci_job_passes_on_a_real_model(smollm2: Checkpoint, tmp_path: Path) -> None:
    wrapper = tmp_path / "kvtool"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvtool "$@"\n')
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "KVTOOL": str(wrapper),
        "STATISTICS_OPTIONS": "--tokens 512 --window 512",
        "HEADS_OPTIONS": "--samples 1 --length 512 --sink 4 --window 48",
        "EVALUATE_OPTIONS": "--windows 1 --prefill 256 --continuation 64 --length 512 "
        "--no-layers --no-chat-prompts",
        # Two short samples are not what anyone should calibrate with.
        "MAX_PPL_RATIO": "1.5",
        "MIN_RECALL": "0.8",
    }

    job = subprocess.run(
        [str(JOB), str(smollm2.path), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (job.returncode, job.stderr) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["plan"]["streaming_heads"] == 45
    assert report["recall_share"] >= 0.8


def objects(text: str) -> list[dict[str, object]]:
    """The JSON objects that commands printed one after the other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found
