"""`kvtool calibrate projections`, and the commands that look at its plans, cut and run them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool.calibrate.projections import METHODS
from kvtool.cli import run_command
from kvtool.plan import Plan

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
SMALL = ["--tokens", "1024", "--sink", "2", "--window", "6", "--context", "400", "-q"]


def calibrate(model: Path, output: Path, *arguments: str) -> int:
    words = ["calibrate", "projections", str(model), "-o", str(output), *SMALL, *arguments]
    return run_command(words)


def answer(capture: Capture) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capture.readouterr().out)
    return result


@pytest.mark.parametrize("method", METHODS)
def test_a_slice_is_what_calibration_gives_at_that_size(
    tiny: Tiny, tmp_path: Path, capsys: Capture, method: str
) -> None:
    model, large, small = tiny("llama"), tmp_path / "large", tmp_path / "small"
    assert calibrate(model, large, "--method", method, "--kv-budget", "80%", "--json") == 0
    said = answer(capsys)
    assert said["bytes"] <= 0.8 * said["native_bytes"]
    assert said["codes"][0]["sink"] == 2
    assert said["methods"] == [method]
    assert (len(said["codes"]) == 1) == (method == "xkv")  # four layers together, of three
    assert calibrate(model, small, "--method", method, "--kv-budget", "50%") == 0
    command = ["plan", "slice", str(large), "-o", str(tmp_path / "cut"), "--context", "400"]
    assert run_command([*command, "--kv-budget", "50%"]) == 0
    cut, fitted = Plan.read(tmp_path / "cut"), Plan.read(small)
    assert cut.codes == fitted.codes
    assert all((cut.tensors[name] == tensor).all() for name, tensor in fitted.tensors.items())
    assert run_command([*command, "--streaming-heads", "50%", "--overwrite"]) == 3
    assert "no scores" in capsys.readouterr().err


def test_show_says_what_is_coded(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    for arguments, said in (
        (
            ["--method", "cskv"],
            "codes 3, one per layer: keys before RoPE, rebuilt when read "
            "keys 15 numbers per token values 15",
        ),
        (
            ["--method", "xkv", "--layers-together", "2"],
            "codes 2, of 2 layers each: keys before RoPE, rebuilt when read "
            "keys 15 to 30 numbers per token",
        ),
        ([], "codes 3, one per layer: keys after RoPE, read as stored keys"),
        (
            ["--read", "rebuilt", "--layers-together", "3"],
            "of 3 layers each: keys before RoPE, rebuilt when read joint 88 numbers",
        ),
    ):
        made = ["--kv-budget", "50%", "--overwrite", *arguments]
        assert calibrate(tiny("llama"), tmp_path / "p", *made) == 0
        capsys.readouterr()
        assert run_command(["plan", "show", str(tmp_path / "p"), "--context", "400"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert said in shown
        assert "exact the first 2 and last 6 tokens" in shown


@pytest.mark.parametrize("method", ["aware", "xkv", "pca"])
def test_a_dry_run_predicts_the_plan(
    tiny: Tiny, tmp_path: Path, capsys: Capture, method: str
) -> None:
    output, arguments = tmp_path / "p", ("--method", method, "--json")
    assert calibrate(tiny("llama"), output, "--dry-run", *arguments) == 0
    said = answer(capsys)
    assert not output.exists()
    assert said["memory_bytes"] > 0
    assert calibrate(tiny("llama"), output, *arguments) == 0
    done = answer(capsys)
    assert said["native_bytes"] == done["native_bytes"]
    assert done["bytes"] <= said["bytes_at_most"] == said["native_bytes"] // 2
    assert said["codes"] == len(done["codes"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kv-budget", "1%"), 2, "is too small: the first 2 and last 6 tokens"),
        (("--kv-budget", "lots"), 2, "neither a share"),
        (("--context", "100000"), 2, "is beyond the model's"),
        (("--method", "magic"), 2, "magic"),
        (("--method", "cskv", "--read", "rebuilt"), 2, "--read is for --method aware"),
        (("--method", "palu", "--layers-together", "2"), 2, "for aware and xkv"),
        (("--tokens", "100"), 2, "tokens"),
        (
            ("--window", "300", "--kv-budget", "95%", "--context", "500", "--dry-run"),
            2,
            "leave too little of them to be coded",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(
    tiny: Tiny, tmp_path: Path, capsys: Capture, arguments: tuple[str, ...], code: int, message: str
) -> None:
    assert calibrate(tiny("llama"), tmp_path / "p", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "p").exists()


def test_a_plan_with_codes_is_evaluated_and_generates(
    tiny: Tiny, tmp_path: Path, capsys: Capture
) -> None:
    model, plan = tiny("llama"), tmp_path / "p"
    assert calibrate(model, plan, "--kv-budget", "60%") == 0
    capsys.readouterr()
    words = ["evaluate", str(model), "--plan", str(plan), "--quick", "--prefill", "200", "--json"]
    words += ["--continuation", "50", "--windows", "2", "--length", "300", "-q", "--no-speed"]
    assert run_command(words) == 0
    report = answer(capsys)
    assert report["plan"]["codes"][0]["layers"] == 1
    planned = Plan.read(plan)
    assert report["divergence"]["cache_bytes"] == planned.cache_bytes(250, 4)
    assert report["divergence"]["kl"]["value"] > 0
    assert run_command(["generate", str(model), "a b", "--plan", str(plan), "-q"]) == 0


def test_models_that_no_code_is_for_are_refused(
    tiny: Tiny, tmp_path: Path, capsys: Capture
) -> None:
    assert calibrate(tiny("mistral", sliding_window=32), tmp_path / "p") == 4
    assert "sliding window" in capsys.readouterr().err
    said = [
        (calibrate(tiny("qwen3"), tmp_path / "p", "--method", "asvd", *words), capsys.readouterr())
        for words in ([], ["--dry-run"])
    ]
    assert said[0] == said[1]
    assert said[0][0] == 4
    assert "norms its keys" in said[0][1].err
