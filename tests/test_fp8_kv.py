"""Scales for an fp8 cache: what they are, what is folded, what is written and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import (
    MANIFEST,
    convert,
    digests,
    edit,
    edited_copy,
    engine,
    engine_logits,
    logits,
    one_thread,
    plan,
    random_ids,
    stock,
    weights,
)
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.convert import fp8_kv, planning
from kvtool.convert.verify import VerifyReport, verify
from kvtool.errors import CalibrationError, UnsupportedModelError, UsageError
from kvtool.fp8 import decode, encode
from kvtool.inspection import inspect_checkpoint
from kvtool.recipe import load_recipe

Written = Callable[..., tuple[Path, Path]]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

FAMILIES = ("llama", "qwen2", "qwen3")
FOLDINGS = {
    "smooth": {"smooth": True},
    "turned": {"turn_values": True},
    "both": {"smooth": True, "turn_values": True},
}


@pytest.fixture(scope="module")
def written(converted: Written) -> Written:
    """``written(family, **options)``: source and output. Do not write into them."""

    def get(family: str, **options: Any) -> Any:
        return converted(family, {}, to="fp8-kv", **options)

    return get


def uneven(tensors: dict[str, Tensor]) -> None:
    """One channel of all keys is large, as in real models; scores are such that rounding is not."""
    normed = any("q_norm" in name for name in tensors)
    for name, x in tensors.items():
        for part, all_channels, one in (("q", 1 / 4, 1 / 32), ("k", 1, 32)):
            if name.endswith(f"{part}_norm.weight") or (f".{part}_proj." in name and not normed):
                x *= all_channels
                x[3::16] *= one


@pytest.fixture(scope="module")
def folded(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """``folded(family, dtype, **options)``: an uneven source and its output."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str, dtype: str = "float32", **options: Any) -> tuple[Path, Path]:
        key = json.dumps([family, dtype, options])
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            source = edited_copy(tiny(family, dtype=dtype), folder / "source", uneven)
            convert(source, folder / "out", to="fp8-kv", **options)
            made[key] = source, folder / "out"
        return made[key]

    return get


def scales(folder: Path) -> dict[str, Tensor]:
    return {n: t for n, t in weights(folder).items() if n.endswith(("k_scale", "v_scale"))}


def model(folder: Path) -> Any:
    """As stock transformers has it, without the package that would quantise."""
    return Checkpoint.open(str(folder)).load_transformers(torch.float32)


def check(folder: Path, source: Path) -> VerifyReport:
    return verify(folder, Checkpoint.open(str(source)))


def failures(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


# ------------------------------------------------------------------------------------- codes


def test_a_code_is_the_nearest_e4m3_and_saturates() -> None:
    steps, one = torch.tensor([0.0, 2**-9, 1.0, 1.125, 17.0, -448.0]), torch.ones(1)
    expected = torch.tensor([0, 2**-9, 1, 1.125, 16, -448])
    assert torch.equal(decode(encode(steps, one), one), expected)
    far = torch.tensor([1e9, -1e9])
    assert torch.equal(decode(encode(far, one / 4), one / 4), torch.tensor([112.0, -112.0]))
    heads = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    x = torch.full((1, 2, 3, 4), 500.0)
    assert torch.equal(decode(encode(x, heads), heads)[0, :, 0, 0], torch.tensor([448.0, 512.0]))


# ------------------------------------------------------------------------------------ scales


def observed(source: Path, runs: Any, by_head: bool = False) -> dict[str, Tensor]:
    """Largest keys and values in the cache of a transformers model, on the calibration text."""
    checkpoint = Checkpoint.open(str(source))
    text, _ = planning.texts(checkpoint, planning.ConvertOptions(to="fp8-kv", tokens=1024))
    assert text is not None
    with torch.inference_mode():
        cache = runs(text, use_cache=True).past_key_values
    found = {}
    for i, layer in enumerate(cache.layers):
        for name, x in (("k_scale", layer.keys), ("v_scale", layer.values)):
            peak = x.abs().amax(dim=(0, 2, 3)).view(-1, 1, 1) if by_head else x.abs().amax().view(1)
            found[f"model.layers.{i}.self_attn.{name}"] = peak
    return found


@pytest.mark.parametrize("by", ["tensor", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_the_largest_number_that_the_cache_of_transformers_holds(
    written: Written, family: str, by: str
) -> None:
    source, output = written(family, scales=by)
    expected, found = observed(source, stock(source), by == "head"), scales(output)
    assert found.keys() == expected.keys()
    for name, peak in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == ((2, 1, 1) if by == "head" else (1,))
        torch.testing.assert_close(found[name] * 448, peak, rtol=1e-4, atol=0)


def test_a_scale_is_a_maximum_over_all_windows(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = written("llama")
    monkeypatch.setattr(fp8_kv, "BATCH", 1)
    convert(source, tmp_path / "out", to="fp8-kv")
    expected, found = scales(whole), scales(tmp_path / "out")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)


def test_everything_else_stays_as_it_is(written: Written) -> None:
    source, output = written("qwen2")
    before, after = weights(source), weights(output)
    assert after.keys() - scales(output).keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((output / "config.json").read_text())
    del config["kvtool"]
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "dynamic": False,
            "symmetric": True,
        },
    }
    assert config == json.loads((source / "config.json").read_text())


def test_scales_by_head_say_so(written: Written) -> None:
    config = json.loads((written("llama", scales="head")[1] / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"


# ----------------------------------------------------------------------------------- foldings


@pytest.mark.parametrize("folding", FOLDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_foldings_change_no_logit(folded: Written, family: str, folding: str) -> None:
    source, output = folded(family, **FOLDINGS[folding])
    ids = random_ids()
    torch.testing.assert_close(
        logits(model(output), ids), logits(stock(source), ids), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_foldings_change_what_they_say(folded: Written, family: str) -> None:
    source, output = folded(family, **FOLDINGS["both"])
    before, after = weights(source), weights(output)
    changed = {
        name.split(".self_attn.")[1] for name in before if after[name].ne(before[name]).any()
    }
    expected = {f"{part}.weight" for part in ("v_proj", "o_proj")}
    keys = ("q_norm", "k_norm") if family == "qwen3" else ("q_proj", "k_proj")
    expected |= {f"{part}.weight" for part in keys}
    if family == "qwen2":
        expected |= {f"{part}.bias" for part in ("q_proj", "k_proj", "v_proj")}
    assert changed == expected


def test_a_head_of_no_power_of_two_is_turned_in_blocks(converted: Written) -> None:
    source, output = converted("llama", {"head_dim": 24}, to="fp8-kv", turn_values=True)
    ids = random_ids()
    assert any(t.ne(weights(source)[n]).any() for n, t in weights(output).items() if "v_proj" in n)
    torch.testing.assert_close(
        logits(model(output), ids), logits(stock(source), ids), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("shared", [False, True])
def test_a_smoothing_factor_is_shared_by_a_pair(shared: bool) -> None:
    keys = torch.tensor([[1.0, 4.0, 0.0, 400.0], [64.0, 0.0, 25.0, 0.0]])
    first, second = ([8.0, 20.0] if shared else row for row in ([1.0, 20.0], [8.0, 0.2]))
    found = fp8_kv.smoothing(keys, shared=shared)
    torch.testing.assert_close(found, torch.tensor([first * 2, second * 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_foldings_keep_the_dtype_and_the_predictions_of_bfloat16(
    folded: Written, family: str
) -> None:
    source, output = folded(family, "bfloat16", **FOLDINGS["both"])
    assert {t.dtype for n, t in weights(output).items() if "_scale" not in n} == {torch.bfloat16}
    assert not failures(check(output, source)) & {"as converted", "folded"}


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothed_keys_are_nearer_to_each_other(folded: Written, family: str) -> None:
    """And the scales are those of the smoothed keys."""
    source, output = folded(family, smooth=True)
    expected, found = observed(source, model(output)), scales(output)
    text = random_ids()[None]
    with torch.inference_mode():
        caches = [m(text, use_cache=True).past_key_values for m in (stock(source), model(output))]
    for i, layers in enumerate(zip(*(c.layers for c in caches), strict=True)):
        before, after = (float(x.keys.abs().amax(dim=(0, 2)).log().std()) for x in layers)
        assert after < 0.8 * before
        name = f"model.layers.{i}.self_attn.k_scale"
        torch.testing.assert_close(found[name] * 448, expected[name], rtol=1e-4, atol=0)


# ------------------------------------------------------------------------ what it is good for


def test_an_output_passes_every_check_and_is_measured(written: Written) -> None:
    source, output = written("llama", **FOLDINGS["both"])
    report = check(output, source)
    assert failures(report) == set()
    assert (
        report.measured["fp8_bytes_per_token"] == plan(source, to="fp8-kv")["bytes_per_token_after"]
    )
    assert report.measured["fp8_bytes_per_token"] == 3 * 2 * 2 * 16
    assert 1e-4 < report.measured["kl"] < 1
    assert len(report.measured["layer_kl"]) == 3


def test_a_layer_that_fp8_hurts_is_named(written: Written) -> None:
    report = check(written("qwen2")[1], written("qwen2")[0])
    alone, skip = report.measured["layer_kl"], report.measured["skip_layers"]
    middle = sorted(alone)[1]
    assert skip == [i for i, kl in enumerate(alone) if kl > 10 * middle and kl > 1e-3] == [0]
    (told,) = (check.detail for check in report.checks if check.name == "layers")
    assert told.endswith("--kv-cache-dtype-skip-layers 0")


@pytest.mark.parametrize("factor", [0.25, float("nan"), 0.0])
def test_wrong_scales_fail(written: Written, tmp_path: Path, factor: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_scale"] *= factor

    source, output = written("llama")
    report = check(edited_copy(output, tmp_path / "bad", spoil), source)
    assert failures(report) & {"scales", "range"}


def test_scales_that_are_all_the_same_fail(written: Written, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name].fill_(0.05)

    source, output = written("llama")
    assert "scales" in failures(check(edited_copy(output, tmp_path / "bad", spoil), source))


def test_a_wrong_folding_fails(folded: Written, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][:8] *= 2

    source, output = folded("llama", smooth=True)
    report = check(edited_copy(output, tmp_path / "bad", spoil), source)
    assert {"as converted", "folded"} <= failures(report)


def test_kvtool_runs_it_as_the_original_and_says_what_it_is(written: Written) -> None:
    source, output = written("llama", scales="head")
    ids = random_ids(64)
    assert torch.equal(engine_logits(engine(output), ids), engine_logits(engine(source), ids))
    inspection = inspect_checkpoint(Checkpoint.open(str(output)))
    assert inspection.cache_scales is not None
    assert "float of 8 bits, one per KV head" in inspection.cache_scales
    assert all(item.reasons for item in inspection.applications)
    assert inspect_checkpoint(Checkpoint.open(str(source))).cache_scales is None
    assert run_command(["inspect", str(output)]) == 0


# ---------------------------------------------------------------------------------- refusals


def zeros(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.v_proj.weight"].zero_()


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "told"),
    [(zeros, "values of layer 2 are all zero"), (nan, "layer 2 produces values")],
)
def test_a_layer_that_has_no_scale_is_named(
    tiny: Callable[..., Path], tmp_path: Path, damage: Any, told: str
) -> None:
    bad = edited_copy(tiny("llama"), tmp_path / "bad", damage)
    with pytest.raises(CalibrationError, match=told):
        convert(bad, tmp_path / "out", to="fp8-kv")
    assert not (tmp_path / "out").exists()


def test_scales_that_nothing_can_have_measured() -> None:
    assert fp8_kv.check_scales([torch.tensor([0.1]), torch.tensor([0.2])]) is None
    for bad in ([0.1, 0.1], [0.0, 0.1], [-0.1, 0.1], [float("inf"), 0.1]):
        assert fp8_kv.check_scales(torch.tensor(bad).split(1)) is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "mla", "smooth": True}, "--smooth is for --to fp8-kv"),
        ({"to": "gqa", "kv_heads": 1, "scales": "head"}, "--scales is for --to fp8-kv"),
        ({"to": "fp8-kv", "heal": "auto"}, "--heal has no place"),
        ({"to": "fp8-kv", "kv_budget": "50%"}, "--kv-budget has no place"),
        ({"to": "fp8-kv", "target": "vllm"}, "--target has no place"),
        ({"to": "fp8-kv", "scales": "channel"}, "--scales channel is unknown"),
    ],
)
def test_options_of_other_conversions_are_refused(
    tiny: Callable[..., Path], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        plan(tiny("llama"), **options)


def test_it_is_converted_once(written: Written) -> None:
    for options in ({"to": "fp8-kv"}, {"to": "gqa", "kv_heads": 1}, {"to": "mla"}):
        with pytest.raises(UnsupportedModelError, match="already holds scales"):
            plan(written("llama")[1], **options)


def test_weights_quantised_in_an_unknown_way_are_still_refused(
    written: Written, tmp_path: Path
) -> None:
    output = edited_copy(written("llama")[1], tmp_path / "bad", lambda tensors: None)
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] |= {
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        Checkpoint.open(str(output))


def test_a_large_key_bias_is_told_before_any_work(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.bias"] *= 50

    assert plan(tiny("qwen2"), to="fp8-kv")["large_key_biases"] == {}
    bad = edited_copy(tiny("qwen2"), tmp_path / "bad", enlarge)
    assert list(plan(bad, to="fp8-kv")["large_key_biases"]) == ["1"]
    command = ["convert", str(bad), "--to", "fp8-kv", "-o", str(tmp_path / "out"), "--dry-run"]
    assert run_command([*command, "--tokens", "1024"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "skip-layers 1" in said
    assert "scales one for the keys and one for the values of each layer" in said


# -------------------------------------------------------------------------------- the command


def test_a_killed_conversion_ends_with_the_same_bytes(written: Written, tmp_path: Path) -> None:
    source, whole = written("llama", smooth=True)

    def die(stage: str, done: int, total: int) -> None:
        if (stage, done) == point:
            raise KeyboardInterrupt

    for point in (("fitting", 2), ("converting", 1)):
        output = tmp_path / point[0]
        with pytest.raises(KeyboardInterrupt):
            convert(source, output, to="fp8-kv", smooth=True, report=die)
        assert not output.exists()
        convert(source, output, to="fp8-kv", smooth=True)
        assert digests(output) == digests(whole)


def test_the_command_verifies_and_leaves_a_recipe(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    command = ["convert", str(tiny("llama")), "--to", "fp8-kv", "--scales", "head", "--turn-values"]
    assert run_command([*command, "--tokens", "1024", "--json", "-q", "-o", str(first)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["bytes_per_token_after"] == told["plan"]["bytes_per_token_before"] // 2
    assert told["verify"]["passed"]
    manifest = json.loads((first / MANIFEST).read_text())
    assert manifest["replaced"] == ["v_proj", "o_proj"]
    assert manifest["measured"]["kl"] == told["verify"]["measured"]["kl"]
    card = (first / "README.md").read_text()
    assert "k_scale" in card
    assert "192" in card
    (step,) = load_recipe(first / "recipe.yaml").steps
    asked = {"to": "fp8-kv", "scales": "head", "turn_values": True, "smooth": False, "tokens": 1024}
    assert asked.items() <= step.model_dump().items()
    assert run_command(["verify", str(first), "--against", str(tiny("llama")), "-q"]) == 0
    edit(first, lambda tensors: tensors["model.layers.0.self_attn.v_scale"].mul_(0.1))
    assert run_command(["verify", str(first), "--against", str(tiny("llama")), "-q"]) == 6
