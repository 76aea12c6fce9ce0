"""Verification notices every way in which a converted folder can be wrong, and says which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import (
    MANIFEST,
    PROBE,
    convert,
    edit,
    edit_json,
    one_thread,
    rehash,
)
from conftest import make_model
from safetensors.torch import load_file, save_file

from kvtool.checkpoint import Checkpoint
from kvtool.convert import artifact
from kvtool.convert.verify import VerifyReport, verify
from kvtool.errors import CheckpointError, KvtoolError

Tensors = dict[str, torch.Tensor]
HEADS, HEAD, RANK = 4, 16, 32
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

KINDS = {
    "transmla": {"method": "transmla", "freqfold": "2"},
    "exact": {"method": "exact"},
    "kvtool": {"method": "transmla", "freqfold": "2", "target": "kvtool"},
}


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory) -> dict[str, Path]:
    """One conversion of every kind. Do not write into them."""
    folder = tmp_path_factory.mktemp("outputs")
    for kind, options in KINDS.items():
        convert(tiny("llama"), folder / kind, **options)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copy_of(outputs, tmp_path) -> Callable[[str], Path]:
    """``copy_of(kind)``: an output that a test may damage."""
    return lambda kind: Path(shutil.copytree(outputs[kind], tmp_path / kind))


@pytest.fixture
def failed(tiny) -> Callable[[Path], set[str]]:
    """``failed(folder)``: the checks that a folder fails."""
    return lambda folder: failures(verify(folder, Checkpoint.open(str(tiny("llama")))))


def failures(report: VerifyReport) -> set[str]:
    names = {check.name for check in report.checks if not check.passed}
    assert report.passed == (not names)
    assert report.to_dict()["passed"] is report.passed
    json.dumps(report.to_dict(), allow_nan=True)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_output_passes_every_check(tiny, outputs, kind):
    report = verify(outputs[kind], Checkpoint.open(str(tiny("llama"))))
    assert failures(report) == set()
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names) == 10
    assert report.measured["tokens"] == 512
    assert report.measured["bytes_per_token"] == (384 if kind == "exact" else 288)
    assert (report.measured["kl"] < 1e-6) is (kind == "exact")


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_form_looks_at_fewer_tokens(tiny, tmp_path, kind):
    model = tiny("llama", max_position_embeddings=600)
    convert(model, tmp_path / "out", **KINDS[kind])
    report = verify(tmp_path / "out", Checkpoint.open(str(model)), long_prompt=False)
    assert failures(report) == set()
    assert "long prompt" not in {check.name for check in report.checks}
    assert report.measured["tokens"] == 512


# ------------------------------------------------------- wrong weights under the right hashes


def every(tensors: Tensors, part: str) -> list[str]:
    names = [name for name in tensors if name.endswith(f".self_attn.{part}")]
    assert names
    return names


def swap_keys_and_values(tensors: Tensors) -> None:
    """All keys then all values inside each head, the other way round."""
    for name in every(tensors, "kv_b_proj.weight"):
        heads = tensors[name].view(HEADS, 2, HEAD, RANK)
        tensors[name] = heads.flip(1).reshape_as(tensors[name])


def keys_of_all_heads_first(tensors: Tensors) -> None:
    """The layout that is easily mistaken for the right one."""
    for name in every(tensors, "kv_b_proj.weight"):
        heads = tensors[name].view(HEADS, 2, HEAD, RANK)
        tensors[name] = heads.transpose(0, 1).reshape_as(tensors[name])


def values_of_the_other_group(tensors: Tensors) -> None:
    for name in every(tensors, "kv_b_proj.weight"):
        tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)


def rope_rows_half_split(tensors: Tensors) -> None:
    """Shared key rows real parts first, where the config says interleaved."""
    for name in every(tensors, "kv_a_proj_with_mqa.weight"):
        latent, rope = tensors[name].split([RANK, len(tensors[name]) - RANK])
        halves = rope.view(-1, 2, rope.shape[-1]).transpose(0, 1).reshape_as(rope)
        tensors[name] = torch.cat((latent, halves))


def rope_rows_in_another_order(tensors: Tensors) -> None:
    """Two pairs exchange frequencies, in the key and not in the query."""
    for name in every(tensors, "kv_a_proj_with_mqa.weight"):
        latent, first, second, others = tensors[name].tensor_split([RANK, RANK + 2, RANK + 4])
        tensors[name] = torch.cat((latent, second, first, others))


def real_and_imaginary_exchanged(tensors: Tensors) -> None:
    """The rotation turns the wrong way."""
    for name in every(tensors, "kv_a_proj_with_mqa.weight"):
        latent, rope = tensors[name].split([RANK, len(tensors[name]) - RANK])
        turned = rope.view(-1, 2, rope.shape[-1]).flip(1).reshape_as(rope)
        tensors[name] = torch.cat((latent, turned))


def norm_of_ones(tensors: Tensors) -> None:
    for name in every(tensors, "kv_a_layernorm.weight"):
        tensors[name] = torch.ones_like(tensors[name])


def norm_that_normalises(tensors: Tensors) -> None:
    """The product of scale and weight is right, but the norm is no longer linear."""
    for name in every(tensors, "kv_a_layernorm.weight"):
        gamma = tensors[name][0].clone()
        tensors[name] /= gamma
        tensors[name.replace("layernorm", "proj_with_mqa")][:RANK] *= gamma


def one_norm_a_little_off(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.kv_a_layernorm.weight"] *= 1.05


def queries_scaled(tensors: Tensors) -> None:
    for name in every(tensors, "q_proj.weight"):
        tensors[name] *= 1.1


def one_layer_scaled_a_little(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1.01


def one_rope_query_zeroed(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"][-2:] = 0


BEHAVIOUR = {
    "transmla": [
        swap_keys_and_values,
        keys_of_all_heads_first,
        values_of_the_other_group,
        rope_rows_half_split,
        rope_rows_in_another_order,
        real_and_imaginary_exchanged,
        norm_of_ones,
        norm_that_normalises,
        one_norm_a_little_off,
        queries_scaled,
        one_layer_scaled_a_little,
        one_rope_query_zeroed,
    ],
    "exact": [
        values_of_the_other_group,
        rope_rows_half_split,
        rope_rows_in_another_order,
        real_and_imaginary_exchanged,
        norm_of_ones,
        norm_that_normalises,
        one_norm_a_little_off,
        queries_scaled,
        one_layer_scaled_a_little,
        one_rope_query_zeroed,
    ],
}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(kind, wrong) for kind, wrongs in BEHAVIOUR.items() for wrong in wrongs],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_wrong_attention_weights_do_not_behave_as_converted(copy_of, failed, kind, wrong):
    expected = {"as converted"} | ({"against the original"} if kind == "exact" else set())
    assert failed(edit(copy_of(kind), wrong)) == expected


@pytest.mark.parametrize("method", ["transmla", "exact"])
@pytest.mark.parametrize(
    "wrong", [swap_keys_and_values, rope_rows_half_split, norm_of_ones, queries_scaled]
)
def test_wrong_bfloat16_weights_do_not_pass_for_rounding(tiny, tmp_path, method, wrong):
    if method == "exact" and wrong is swap_keys_and_values:
        wrong = values_of_the_other_group  # there are no key rows
    model = tiny("llama", dtype="bfloat16")
    options = {} if method == "exact" else {"freqfold": "2"}
    convert(model, tmp_path / "out", method=method, **options)
    base = Checkpoint.open(str(model))
    assert failures(verify(tmp_path / "out", base)) == set()
    assert failures(verify(edit(tmp_path / "out", wrong), base)) == {"as converted"}


@pytest.mark.parametrize("part", ["rope", "down", "key_up", "value_up", "inv_freq"])
def test_wrong_factors_do_not_behave_as_converted(copy_of, failed, part):
    def turn(tensors: Tensors) -> None:
        name = f"model.layers.1.self_attn.latent.{part}"
        tensors[name] = tensors[name].roll(1, 0)

    assert failed(edit(copy_of("kvtool"), turn)) == {"as converted"}


@pytest.mark.parametrize("kind", ["transmla", "exact"])
def test_the_other_rope_order_does_not_behave_as_converted(copy_of, failed, kind):
    folder = edit_json(copy_of(kind), "config.json", lambda c: c.update(rope_interleave=False))
    assert "as converted" in failed(folder)


@pytest.mark.parametrize("kind", ["transmla", "exact"])
def test_another_rope_base_does_not_behave_as_converted(copy_of, failed, kind):
    def change(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 20000.0

    assert "as converted" in failed(edit_json(copy_of(kind), "config.json", change))


def flip_one_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[5] ^= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_one_bit_in_a_tensor_that_no_conversion_touches_is_noticed(copy_of, failed, kind, name):
    folder = edit(copy_of(kind), lambda tensors: flip_one_bit(tensors[name]))
    assert failed(folder) == {"untouched tensors"}


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_one_bit_in_a_projection_that_our_own_format_keeps_is_noticed(copy_of, failed, part):
    name = f"model.layers.1.self_attn.{part}.weight"
    folder = edit(copy_of("kvtool"), lambda tensors: flip_one_bit(tensors[name]))
    assert failed(folder) == {"untouched tensors"}


def test_an_output_head_that_was_untied_for_vllm_counts_as_untouched(tiny, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    convert(model, tmp_path / "out", method="transmla", freqfold="2", target="vllm")
    base = Checkpoint.open(str(model))
    assert failures(verify(tmp_path / "out", base)) == set()
    edit(tmp_path / "out", lambda tensors: flip_one_bit(tensors["lm_head.weight"]))
    assert failures(verify(tmp_path / "out", base)) == {"untouched tensors"}


def test_an_untouched_tensor_in_another_dtype_is_noticed(copy_of, failed):
    def round_it(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    assert "untouched tensors" in failed(edit(copy_of("exact"), round_it))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_named(copy_of, tiny, kind):
    part = "latent.value_up" if kind == "kvtool" else "kv_b_proj.weight"
    folder = edit(copy_of(kind), lambda t: t.pop(f"model.layers.1.self_attn.{part}"))
    report = verify(folder, Checkpoint.open(str(tiny("llama"))))
    assert failures(report) == {"loads"}
    assert part.split(".")[kind == "kvtool"] in report.checks[-1].detail


@pytest.mark.parametrize("kind", KINDS)
def test_a_superfluous_tensor_is_named(copy_of, tiny, kind):
    name = "model.layers.1.self_attn.secret.weight"
    folder = edit(copy_of(kind), lambda tensors: tensors.update({name: torch.ones(2)}))
    report = verify(folder, Checkpoint.open(str(tiny("llama"))))
    assert failures(report) == {"loads"}
    assert "secret" in report.checks[-1].detail


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_noticed(copy_of, failed, kind):
    part = "latent.value_up" if kind == "kvtool" else "kv_b_proj.weight"

    def spoil(tensors: Tensors) -> None:
        tensors[f"model.layers.1.self_attn.{part}"].view(-1)[0] = float("nan")

    assert failed(edit(copy_of(kind), spoil)) == {"finite"}


# ------------------------------------------------------------------- files, manifest and probe


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "config.json", "recipe.yaml", "generation_config.json", PROBE]
)
def test_a_file_that_changed_after_the_conversion_is_named(copy_of, tiny, file):
    folder = copy_of("exact")
    # White space where the format ignores it.
    with (folder / file).open("ab") as handle:
        handle.write(b"\n" if file != PROBE else b"")
    if file == PROBE:
        tensors = load_file(folder / PROBE)
        tensors["logits"][0, 0] += 1e-7
        save_file(tensors, folder / PROBE)
    report = verify(folder, Checkpoint.open(str(tiny("llama"))))
    assert failures(report) == {"hashes"}
    assert [c.detail for c in report.checks if c.name == "hashes"] == [f"changed: {file}"]


def test_weights_that_changed_after_the_conversion_fail_their_hash_too(copy_of, failed):
    folder = copy_of("transmla")
    manifest = (folder / MANIFEST).read_text()
    edit(folder, queries_scaled)
    (folder / MANIFEST).write_text(manifest)
    assert failed(folder) == {"hashes", "as converted"}


def test_a_file_that_is_gone_is_named(copy_of, failed):
    folder = copy_of("exact")
    (folder / "recipe.yaml").unlink()
    assert failed(folder) == {"hashes"}


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_model_is_noticed(outputs, tmp_path, kind):
    other = make_model("llama", tmp_path / "other", seed=1)
    names = failures(verify(outputs[kind], Checkpoint.open(str(other))))
    assert {"base model", "untouched tensors"} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_lossy_method_lost_is_measured_and_not_judged(outputs, tiny, kind):
    report = verify(outputs[kind], Checkpoint.open(str(tiny("llama"))))
    judged = {check.name: check.judged for check in report.checks}
    assert judged.pop("against the original") == (kind == "exact")
    assert all(judged.values())


def test_measured_results_in_the_manifest_change_no_hash(copy_of, failed):
    folder = copy_of("exact")
    artifact.record(folder, {"kl": 0.5, "ppl": 20.0})
    assert artifact.read_manifest(folder)["measured"] == {"kl": 0.5, "ppl": 20.0}
    assert "| 0.5 |" in (folder / "README.md").read_text()
    assert failed(folder) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_that_is_not_finite_fails(copy_of, failed, kind, value):
    folder = copy_of(kind)
    tensors = load_file(folder / PROBE)
    tensors["logits"][2, 7] = value
    save_file(tensors, folder / PROBE)
    assert failed(rehash(folder)) == {"as converted"}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def forget_logits(file: Path) -> None:
    tensors = load_file(file)
    del tensors["logits"]
    save_file(tensors, file)


def foreign_tokens(file: Path) -> None:
    tensors = load_file(file)
    tensors["ids"][3] = 10**6
    save_file(tensors, file)


def positions_beyond(file: Path) -> None:
    tensors = load_file(file)
    tensors["positions"] += 100
    save_file(tensors, file)


def no_tokens(file: Path) -> None:
    save_file({name: tensor[:0] for name, tensor in load_file(file).items()}, file)


def fewer_logits(file: Path) -> None:
    tensors = load_file(file)
    tensors["logits"] = tensors["logits"][:, :100].contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, forget_logits])
def test_a_probe_that_cannot_be_read_is_named(copy_of, failed, damage):
    folder = copy_of("exact")
    damage(folder / PROBE)
    with pytest.raises(CheckpointError, match=r"probe\.safetensors cannot be read"):
        failed(rehash(folder))


@pytest.mark.parametrize("damage", [foreign_tokens, positions_beyond, no_tokens, fewer_logits])
def test_a_probe_of_another_model_is_an_error_or_a_failed_check(copy_of, failed, damage):
    folder = copy_of("exact")
    damage(folder / PROBE)
    try:
        names = failed(rehash(folder))
    except KvtoolError as error:
        names = {str(error)}
    assert any("probe" in name or name == "as converted" for name in names)


def test_a_folder_without_a_manifest_is_refused(copy_of, failed):
    folder = copy_of("exact")
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="was not written by kvtool convert"):
        failed(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path, failed):
    with pytest.raises(KvtoolError, match="nowhere"):
        failed(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"sha256": {}, "plan": {}}', "[" * 99999], ids=range(7)
)
def test_a_damaged_manifest_is_refused(copy_of, failed, text):
    folder = copy_of("exact")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        failed(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("attention_dtype", "float3"), ("rope_dim", None), ("rope_dim", [1])]
)
def test_a_manifest_whose_plan_is_none_is_refused(copy_of, failed, key, value):
    folder = copy_of("exact")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["plan"][key] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"is damaged: .*{key}"):
        failed(folder)


@pytest.mark.parametrize("key", ["base", "method", "plan", "ranks", "sha256"])
def test_a_manifest_that_lacks_a_part_is_refused(copy_of, failed, key):
    folder = copy_of("exact")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        failed(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_promises_a_smaller_cache_is_noticed(copy_of, failed, kind):
    folder = copy_of(kind)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["ranks"][1] -= 1
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert failed(folder) == {"cache bytes"}


def test_verification_leaves_the_folder_as_it_was(copy_of, failed):
    folder = copy_of("kvtool")
    before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*")}
    failed(folder)
    assert {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*")} == before
