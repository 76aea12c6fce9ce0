"""Quantised checkpoints: the numbers behind their codes, and that every command works with those.

Matrices are rounded here by other code than that which reads them, written after the formats.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint, TensorInfo, dtype_name
from kvtool.cli import run_command
from kvtool.convert.fitting import ConvertedLayer
from kvtool.convert.fp8_kv import ToFp8Kv
from kvtool.convert.options import ConvertOptions
from kvtool.errors import CheckpointError, UnsupportedModelError
from kvtool.fp8 import is_static
from kvtool.inspection import inspect_checkpoint
from kvtool.quantised_weights import as_numbers, fp4, said_of_weights, unpack, with_said_of_weights
from kvtool.runtime import Engine

GROUP = 16
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

Stored = tuple[dict[str, Tensor], Tensor]
"""The parts of a matrix by what their names end with, and the numbers that they stand for."""


def words(codes: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Codes `[rows, n]` into int32, along the rows, the first code lowest."""
    per_word = 32 // bits
    grouped = codes.numpy().astype(np.uint64).reshape(len(codes), -1, per_word)
    if order is not None:
        grouped = grouped[..., order]
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    packed = (grouped << shifts).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(packed))


def grid(rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """A scale per block, no two alike."""
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    return (torch.arange(1, shape[0] * shape[1] + 1).view(shape) % 7 + 4) / 512


def by_block(scales: Tensor, w: Tensor, block: tuple[int, int]) -> Tensor:
    """Those scales for every element."""
    rows, columns = (torch.arange(n) // b for n, b in zip(w.shape, block, strict=True))
    return scales[rows][:, columns]


def e4m3(block: tuple[int, int], name: str, kind: torch.dtype = torch.float32) -> Any:
    def rounded(w: Tensor) -> Stored:
        scales = grid(*w.shape, block).to(kind)
        spread = by_block(scales.float(), w, block)
        codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {".weight": codes, f".weight_{name}": scales}, codes.float() * spread

    return rounded


def one_e4m3(w: Tensor) -> Stored:
    """With one scale, and one for activations."""
    scale = torch.tensor(0.0078125)
    codes = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {".weight": codes, ".weight_scale_inv": scale, ".activation_scale": torch.ones(())}
    return parts, codes.float() * scale


def exponents(w: Tensor) -> Stored:
    """e4m3 in blocks whose scales are powers of two, in bytes."""
    block = (32, 32)
    powers = (120 + 512 * grid(*w.shape, block) % 4).to(torch.uint8)
    spread = by_block(2.0 ** (powers.float() - 127), w, block)
    codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": powers}, codes.float() * spread


def int8(w: Tensor) -> Stored:
    scales, zeros = grid(*w.shape, (1, w.shape[1])), torch.arange(len(w)).view(-1, 1) % 5 - 2
    codes = (w / scales + zeros).round().clamp(-128, 127)
    parts = {".weight": codes.to(torch.int8), ".weight_scale": scales}
    return {**parts, ".weight_zero_point": zeros.to(torch.int8)}, (codes - zeros) * scales


def groups(w: Tensor, bits: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 on, and a scale and a zero point for every group of inputs."""
    scales = grid(*w.shape, (1, GROUP)) * reach
    zeros = torch.arange(scales.numel()).view(scales.shape) % (2**bits - 2) + 1
    spread, middle = (by_block(x, w, (1, GROUP)) for x in (scales, zeros))
    codes = (w / spread + middle).round().clamp(0, 2**bits - 1)
    return codes.int(), scales, zeros


def packed(bits: int) -> Any:
    """Of compressed-tensors, with zero points."""

    def rounded(w: Tensor) -> Stored:
        codes, scales, zeros = groups(w, bits, 2**6 / 2**bits)
        parts = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scales,
            ".weight_zero_point": words(zeros.T, bits).T.contiguous(),
            ".weight_shape": torch.tensor(w.shape),
        }
        spread, middle = (by_block(x, w, (1, GROUP)) for x in (scales, zeros))
        return parts, (codes - middle) * spread

    return rounded


def unpacked_zeros(w: Tensor) -> Stored:
    """Of the first compressed-tensors, whose zero points lie one to a byte."""
    parts, numbers = packed(4)(w)
    zeros = groups(w, 4, 4)[2]
    return {**parts, ".weight_zero_point": (zeros - 8).to(torch.int8)}, numbers


def symmetric(w: Tensor) -> Stored:
    """Of compressed-tensors, where inputs do not lie in the order of their groups."""
    order = torch.arange(w.shape[1]).flip(0) // GROUP
    scales = grid(*w.shape, (1, GROUP)) * 4
    codes = (w / scales[:, order]).round().clamp(-8, 7)
    parts = {".weight_packed": words(codes.int() + 8, 4), ".weight_scale": scales}
    return {**parts, ".weight_g_idx": order.int()}, codes * scales[:, order]


def gptq(less: int, bits: int = 4) -> Any:
    def rounded(w: Tensor) -> Stored:
        codes, scales, zeros = groups(w, bits, 2**6 / 2**bits)
        parts = {
            ".qweight": words(codes, bits).T.contiguous(),
            ".qzeros": words(zeros.T - less, bits),
            ".scales": scales.T.half().contiguous(),
            ".g_idx": (torch.arange(w.shape[1]) // GROUP).int(),
        }
        spread, middle = (by_block(x, w, (1, GROUP)) for x in (scales.half().float(), zeros))
        return parts, (codes - middle) * spread

    return rounded


def awq(w: Tensor) -> Stored:
    codes, scales, zeros = groups(w, 4, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {
        ".qweight": words(codes.T, 4, order),
        ".qzeros": words(zeros.T, 4, order),
        ".scales": scales.T.half().contiguous(),
    }
    spread, middle = (by_block(x, w, (1, GROUP)) for x in (scales.half().float(), zeros))
    return parts, (codes - middle) * spread


def to_e2m1(w: Tensor) -> tuple[Tensor, Tensor]:
    """Two to a byte, and their numbers."""
    table = torch.tensor(E2M1 + [-x for x in E2M1])
    codes = (w[..., None] - table).abs().argmin(-1)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), table[codes]


def nvfp4(packed_name: str, whole_name: str, whole: float) -> Any:
    def rounded(w: Tensor) -> Stored:
        own = (grid(*w.shape, (1, GROUP)) * 512).to(torch.float8_e4m3fn)
        factor = 1 / whole if "global" in whole_name else whole
        spread = by_block(own.float() * factor, w, (1, GROUP))
        codes, numbers = to_e2m1(w / spread)
        parts = {packed_name: codes, ".weight_scale": own, whole_name: torch.tensor([whole])}
        return parts, numbers * spread

    return rounded


def weights(**kind: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 48]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Stored]]] = {
    "fp8 by blocks": (BLOCKS, e4m3((32, 48), "scale_inv")),
    "fp8, scales in bfloat16": (BLOCKS, e4m3((32, 48), "scale_inv", torch.bfloat16)),
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, one_e4m3),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, e4m3((1, 10**6), "scale")),
    "fp8 by exponents": (
        weights(num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
        exponents,
    ),
    "int8": (weights(num_bits=8, type="int", symmetric=False), int8),
    "4 bits": (weights(num_bits=4, type="int"), symmetric),
    "4 bits with zeros": (weights(num_bits=4, type="int", symmetric=False), packed(4)),
    "4 bits with zeros in bytes": (
        weights(num_bits=4, type="int", symmetric=False),
        unpacked_zeros,
    ),
    "8 bits with zeros": (weights(num_bits=8, type="int", symmetric=False), packed(8)),
    "gptq": (GPTQ, gptq(1)),
    "gptq of 8 bits, in spite of its config": (GPTQ, gptq(1, 8)),
    "gptq 2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(0)),
    "gptq 2, in a newer field": ({**GPTQ, "format": "GPTQ_v2"}, gptq(0)),
    "autoround": (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
        gptq(1),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "nvfp4": (
        weights(num_bits=4, type="float"),
        nvfp4(".weight_packed", ".weight_global_scale", 800.0),
    ),
    "nvfp4 of modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        nvfp4(".weight", ".weight_scale_2", 1 / 800),
    ),
}


def write(source: Path, folder: Path, config: dict[str, Any], rounded: Any) -> tuple[Path, Path]:
    """A quantised checkpoint and one with the same numbers, of a model with plain weights."""
    codes, numbers = dict[str, Tensor](), dict[str, Tensor]()
    for name, w in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            codes[name] = numbers[name] = w
            continue
        parts, value = rounded(w.float())
        stem = name.removesuffix(".weight")
        codes |= {stem + part: x.contiguous() for part, x in parts.items()}
        numbers[name] = value.to(w.dtype)
    written = []
    for kind, tensors in (("codes", codes), ("numbers", numbers)):
        copy = Path(shutil.copytree(source, folder / kind))
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        written.append(copy)
    edit(written[0], quantization_config=config)
    return written[0], written[1]


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture(scope="module")
def quantised(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``quantised(kind, family)``: a checkpoint with codes, and one with their numbers."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(kind: str, family: str = "llama") -> tuple[Path, Path]:
        if (kind, family) not in made:
            source = tiny(family, dtype="bfloat16")
            made[kind, family] = write(source, tmp_path_factory.mktemp("model"), *FORMATS[kind])
        return made[kind, family]

    return get


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_stand_for_their_numbers(quantised: Any, kind: str) -> None:
    codes, numbers = map(Checkpoint.open, map(str, quantised(kind)))
    assert codes.quantised == FORMATS[kind][0]["quant_method"]
    assert codes.config == numbers.config
    assert {name: (x.shape, x.dtype) for name, x in codes.tensors.items()} == {
        name: (x.shape, x.dtype) for name, x in numbers.tensors.items()
    }
    for name in numbers.tensors:
        assert torch.equal(codes.read(name), numbers.read(name)), name
    assert codes.total_bytes < 0.8 * numbers.total_bytes


@pytest.mark.parametrize("kind", ["fp8 by blocks", "awq"])
def test_transformers_and_the_layer_stream_have_the_same_weights(quantised: Any, kind: str) -> None:
    codes, numbers = map(Checkpoint.open, map(str, quantised(kind)))
    states = [x.load_transformers(torch.float32).state_dict() for x in (codes, numbers)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    hidden = torch.randn(1, 9, 64)
    found = []
    for checkpoint in (codes, numbers):
        stream = LayerStream(checkpoint)
        layer = stream.layer(1)
        found.append(layer(hidden, stream.exact_attention(layer)))
    assert torch.equal(*found)


def test_experts_are_quantised_one_by_one(quantised: Any, tiny: Callable[..., Path]) -> None:
    from _family_cases import CASES

    family, more = CASES["qwen3_moe"]
    source = tiny(family, **{**more, "dtype": "bfloat16"})
    folder = quantised("fp8 by blocks")[0].parent / "experts"
    codes, numbers = write(source, folder, *FORMATS["fp8 by blocks"])
    engines = [Engine.load(Checkpoint.open(str(x)), dtype=torch.float32) for x in (codes, numbers)]
    ids = torch.arange(3, 20)
    found = [engine.extend(engine.new_cache(1, 32), ids) for engine in engines]
    assert torch.equal(*found)


def test_a_plan_is_for_the_quantised_model_alone(
    quantised: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, numbers = quantised("4 bits with zeros")
    plan = str(tmp_path / "a.plan")
    calibrate = ["calibrate", "quantization", "--bits", "4", "--tokens", "512", "-o", plan]
    assert run_command([*calibrate, str(codes)]) == 0
    assert run_command(["generate", str(codes), "a", "--plan", plan, "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert run_command(["generate", str(numbers), "a", "--plan", plan]) == 3
    assert "not their weights" in capsys.readouterr().err


def test_a_conversion_writes_the_numbers(
    quantised: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from _convert_tools import stock

    codes, _ = quantised("gptq")
    (codes / "quantize_config.json").write_text("{}")  # as AutoGPTQ writes it
    arguments = ["convert", str(codes), "--to", "gqa", "--kv-heads", "1", "--tokens", "512"]
    assert run_command([*arguments, "-o", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    stock(tmp_path / "out")
    assert run_command(["verify", str(tmp_path / "out"), "--against", str(codes)]) == 0


def test_inspect_says_what_lies_on_disk(quantised: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_checkpoint(Checkpoint.open(str(quantised("awq")[0])))
    assert found.quantised == "awq"
    assert set(found.dtypes) == {"BF16"}
    assert found.stored_bytes < found.weight_bytes
    assert run_command(["inspect", str(quantised("awq")[0])]) == 0
    assert "(awq)" in capsys.readouterr().out


def test_scales_of_a_quantised_cache_are_kept(quantised: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantised("fp8, one scale")[0], tmp_path / "scaled"))
    scheme = {"type": "float", "num_bits": 8, "dynamic": False}
    method = {**FORMATS["fp8, one scale"][0], "kv_cache_scheme": scheme}
    edit(source, quantization_config=method)
    file = source / "model.safetensors"
    scales = {
        f"model.layers.{i}.self_attn.{x}_proj.{x}_scale": torch.ones(1)
        for i in range(3)
        for x in "kv"
    }
    save_file(load_file(file) | scales, file, {"format": "pt"})
    checkpoint = Checkpoint.open(str(source))
    assert is_static(checkpoint.cache_scheme)
    assert "model.layers.2.self_attn.v_scale" in checkpoint.tensors
    checkpoint.load_transformers(torch.float32)


def test_the_parts_of_a_matrix_may_lie_in_different_files(quantised: Any, tmp_path: Path) -> None:
    codes, numbers = quantised("gptq")
    source = Path(shutil.copytree(codes, tmp_path / "parts"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: f"{'b' if name.endswith('scales') else 'a'}.safetensors" for name in tensors}
    for file in set(files.values()):
        own = {name: x for name, x in tensors.items() if files[name] == file}
        save_file(own, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    checkpoint = Checkpoint.open(str(source))
    assert [file.name for file in checkpoint.files] == ["a.safetensors", "b.safetensors"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read(name), Checkpoint.open(str(numbers)).read(name))
    assert checkpoint.fingerprint() == Checkpoint.open(str(codes)).fingerprint()


def parts_of(**tensors: Tensor) -> dict[str, TensorInfo]:
    """As headers list them."""
    return {
        name.replace("__", "."): TensorInfo(name, tuple(x.shape), dtype_name(x.dtype), Path("x"))
        for name, x in tensors.items()
    }


def test_blocks_of_modelopt_have_scales_of_four_dimensions() -> None:
    w, scale = torch.randn(300, 256).to(torch.float8_e4m3fn), torch.rand(3, 1, 2, 1)
    _, found, _ = as_numbers(Path("x"), {}, parts_of(a__weight=w, a__weight_scale=scale))
    value = found["a.weight"].value({"codes": w, "scale": scale})
    wanted = w.float() * by_block(scale[:, 0, :, 0], w, (128, 128))
    assert torch.equal(value, wanted.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["block", "row", "expert", "one"])
def test_experts_that_are_one_tensor_have_scales_of_their_own(kind: str) -> None:
    w = torch.randn(3, 6, 8).to(torch.float8_e4m3fn)
    shapes = {"block": (3, 2, 2), "row": (3, 6, 1), "expert": (3, 1, 1), "one": (1, 1, 1)}
    scale = torch.rand(shapes[kind])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    parts = parts_of(experts__up_proj=w, experts__up_proj_scale_inv=scale)
    _, found, _ = as_numbers(Path("x"), config, parts)
    value = found["experts.up_proj"].value({"codes": w, "scale": scale})
    for expert in range(3):
        own = scale[min(expert, len(scale) - 1)]
        block = (-(-6 // own.shape[0]), 8 // own.shape[1])
        block = (4, 4) if kind == "block" else block
        wanted = w[expert].float() * by_block(own, w[expert], block)
        assert torch.equal(value[expert], wanted.to(torch.bfloat16))


def test_blocks_may_be_said_as_text(quantised: Any, tmp_path: Path) -> None:
    codes, numbers = quantised("fp8 by exponents")
    source = Path(shutil.copytree(codes, tmp_path / "text"))
    edit(source, quantization_config=weights(num_bits=8, block_structure="32x32"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(*(Checkpoint.open(str(x)).read(name) for x in (source, numbers)))


def test_bits_may_be_said_of_some_matrices_alone() -> None:
    config = weights(num_bits=8)
    only = {"targets": ["re:.*language_model.*up_proj"], "weights": {"num_bits": 4}}
    config["config_groups"]["group_1"] = only
    tensors = {}
    for layer in ("up", "down"):
        stem = f"layers.{layer}_proj.weight"
        on_disk = f"language_model.{stem}_packed"
        tensors[f"{stem}_packed"] = TensorInfo(on_disk, (4, 8), "I32", Path("x"))
        tensors[f"{stem}_scale"] = TensorInfo(f"{stem}_scale", (4, 1), "F32", Path("x"))
    _, found, _ = as_numbers(Path("x"), {"compression_config": config}, tensors)
    assert found["layers.up_proj.weight"].shape == (4, 64)
    assert found["layers.down_proj.weight"].shape == (4, 32)


def test_zeros_that_gptq_writes_as_biases_are_none(quantised: Any, tmp_path: Path) -> None:
    codes, _ = quantised("gptq")
    source = Path(shutil.copytree(codes, tmp_path / "biases"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    biases = {
        name.replace("scales", "bias"): torch.zeros_like(x[0])
        for name, x in tensors.items()
        if name.endswith("scales")
    }
    save_file(tensors | biases, file, {"format": "pt"})
    checkpoint = Checkpoint.open(str(source))
    checkpoint.load_transformers(torch.float32)
    LayerStream(checkpoint).layer(0)
    name = "model.layers.0.mlp.up_proj.bias"
    save_file(tensors | biases | {name: biases[name] + 1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*up_proj\.bias"):
        Checkpoint.open(str(source)).load_transformers(torch.float32)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("k_proj.k_scale", "k_scale"),
        ("qkv_proj.v_scale", "v_scale"),
        ("k_cache.scale", "k_scale"),
        ("v_scale", "v_scale"),
        ("q.scale", None),
        ("kv_scale", None),
        ("prob_output_scale", None),
    ],
)
def test_scales_of_a_cache_have_many_names(name: str, own: str | None) -> None:
    stem = "model.layers.0.self_attn."
    info = TensorInfo(stem + name, (1,), "F32", Path("x"))
    config = {"quantization_config": {"quant_method": "modelopt"}}
    _, found, _ = as_numbers(Path("x"), config, {stem + name: info})
    assert list(found) == ([] if own is None else [stem + own])


def test_scales_of_a_cache_that_no_config_mentions_are_passed_over(
    quantised: Any, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(quantised("fp8, one scale")[0], tmp_path / "scaled"))
    edit(source, quantization_config={"quant_method": "fp8", "kv_cache_scheme": "static"})
    file = source / "model.safetensors"
    scales = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(load_file(file) | scales, file, {"format": "pt"})
    checkpoint = Checkpoint.open(str(source))
    assert checkpoint.cache_scheme is None
    checkpoint.load_transformers(torch.float32)


def test_another_scale_is_another_model(quantised: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantised("fp8 by blocks")[0], tmp_path / "other"))
    before = Checkpoint.open(str(source)).fingerprint()
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint.open(str(source)).fingerprint() != before


def test_words_and_bytes_hold_codes_from_the_low_end() -> None:
    word = torch.tensor([0x76543210], dtype=torch.int32)
    assert unpack(word, 4).tolist() == list(range(8))
    assert unpack(word, 8).tolist() == [0x10, 0x32, 0x54, 0x76]
    assert unpack(torch.tensor([-1], dtype=torch.int32), 2).tolist() == [3] * 16
    assert fp4(torch.tensor([0x10, 0xF7], dtype=torch.uint8)).tolist() == [0, 0.5, 6, -6]


def test_experts_of_gpt_oss() -> None:
    """2^(e - 127) times e2m1, 32 inputs to a scale, and transposed."""
    name = "model.layers.0.mlp.experts.down_proj"
    codes = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 3, 4), dtype=torch.uint8)
    tensors = {
        f"{name}_{part}": TensorInfo(f"{name}_{part}", tuple(x.shape), "U8", Path("x"))
        for part, x in (("blocks", codes), ("scales", scales))
    }
    _, found, _ = as_numbers(Path("x"), {"quantization_config": {"quant_method": "mxfp4"}}, tensors)
    assert list(found) == [name]
    value = found[name].value({"codes": codes, "scale": scales})
    assert value.shape == found[name].shape == (2, 128, 3)
    for expert, row, inputs in ((0, 0, 0), (1, 2, 127), (0, 1, 65)):
        block, within = divmod(inputs, 32)
        byte = int(codes[expert, row, block, within // 2])
        code = byte >> 4 if within % 2 else byte & 15
        number = (E2M1 + [-x for x in E2M1])[code] * 2.0 ** (int(scales[expert, row, block]) - 127)
        assert float(value[expert, inputs, row]) == number


# -------------------------------------------------------------------------------- what is refused

REFUSED = {
    "another method": ({"quant_method": "exl3"}, "method exl3"),
    "sparse": (
        {**weights(num_bits=8), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse",
    ),
    "transforms": (
        {**weights(num_bits=4), "transform_config": {"config_groups": {"u": {}}}},
        "transforms",
    ),
    "another awq": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
    "another gptq": ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
    "another gptq, in a newer field": ({"quant_method": "gptq", "format": "marlin"}, "marlin"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_one_sentence(quantised: Any, tmp_path: Path, case: str) -> None:
    config, said = REFUSED[case]
    source = Path(shutil.copytree(quantised("gptq")[0], tmp_path / "refused"))
    edit(source, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=said):
        Checkpoint.open(str(source))


def test_a_part_that_is_missing_or_too_short_is_told(quantised: Any, tmp_path: Path) -> None:
    for kind, part, said in (
        ("gptq", "qzeros", "without their .*qzeros"),
        ("fp8 by blocks", "weight_scale_inv", "without their .*scale"),
        ("4 bits", "weight_scale", "without their .*scale"),
        ("nvfp4", "weight_scale", "without their .*scale"),
    ):
        source = Path(shutil.copytree(quantised(kind)[0], tmp_path / kind))
        file = source / "model.safetensors"
        tensors, name = load_file(file), f"model.layers.1.mlp.up_proj.{part}"
        rest = {key: x for key, x in tensors.items() if key != name}
        save_file(rest, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            Checkpoint.open(str(source))
        save_file(rest | {name: tensors[name][:-1]}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"do not fit|instead of"):
            Checkpoint.open(str(source)).read("model.layers.1.mlp.up_proj.weight")


def test_a_config_that_says_more_than_there_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "plain"))
    edit(source, quantization_config=GPTQ)
    assert Checkpoint.open(str(source)).quantised is None
    Checkpoint.open(str(source)).load_transformers(torch.float32)
    edit(source, quantization_config="fp8")
    with pytest.raises(CheckpointError, match="not an object"):
        Checkpoint.open(str(source))


def test_bits_that_are_not_known_are_told(quantised: Any, tmp_path: Path) -> None:
    for kind, part in (("gptq", "qzeros"), ("awq", "qweight")):
        source = Path(shutil.copytree(quantised(kind)[0], tmp_path / kind))
        file = source / "model.safetensors"
        tensors, name = load_file(file), f"model.layers.1.mlp.down_proj.{part}"
        other = tensors[name].repeat(1, 2) if kind == "awq" else tensors[name][:, :6]
        save_file(tensors | {name: other.contiguous()}, file, {"format": "pt"})
        with pytest.raises(UnsupportedModelError, match=r"packs weights of [38] bits"):
            Checkpoint.open(str(source))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "compressed-tensors", "config_groups": ["group_0"]},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": None}},
        {"quant_method": "compressed-tensors", "transform_config": [1]},
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(
    quantised: Any, tmp_path: Path, config: dict[str, Any]
) -> None:
    source = Path(shutil.copytree(quantised("fp8, one scale")[0], tmp_path / "senseless"))
    edit(source, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"quantization_config is not as"):
        Checkpoint.open(str(source))


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"a__weight": torch.zeros(4, dtype=torch.int8), "a__weight_scale": torch.ones(4)}, "fit"),
        ({"a__weight": torch.zeros(4, 4, dtype=torch.uint8)}, "without what makes numbers"),
        (
            {
                "a__proj": torch.zeros(4, 4, 4, dtype=torch.float8_e4m3fn),
                "a__proj_scale": torch.ones(4),
            },
            "do not fit",
        ),
        ({"a__b_blocks": torch.zeros(4, 4, 16, dtype=torch.uint8)}, "not blocks of 16"),
    ],
)
def test_codes_in_another_form_are_not_read(tensors: dict[str, Tensor], error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        as_numbers(Path("x"), {}, parts_of(**tensors))


# ----------------------------------------------------------------------- scales for an fp8 cache


@pytest.mark.parametrize("kind", ["fp8 by blocks", "4 bits with zeros"])
def test_scales_of_a_cache_go_beside_codes(
    quantised: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    codes, numbers = quantised(kind)
    written = []
    for source in (codes, numbers):
        written.append(tmp_path / source.name)
        arguments = ["convert", str(source), "--to", "fp8-kv", "--tokens", "512"]
        assert run_command([*arguments, "-o", str(written[-1])]) == 0, capsys.readouterr().err
    config, before = (json.loads((x / "config.json").read_text()) for x in (written[0], codes))
    scheme = config["quantization_config"].pop("kv_cache_scheme")
    assert config["quantization_config"] == before["quantization_config"]
    stored, own = (load_file(x / "model.safetensors") for x in (written[0], codes))
    scales = {name: x for name, x in stored.items() if name not in own}
    assert all(
        torch.equal(stored[name].view(torch.uint8), x.view(torch.uint8))
        for name, x in own.items()
        if x.dim()
    )
    of_numbers = load_file(written[1] / "model.safetensors")
    assert len(scales) == 6
    assert all(torch.equal(x, of_numbers[name]) for name, x in scales.items())
    checkpoint = Checkpoint.open(str(written[0]))
    method = FORMATS[kind][0]["quant_method"]
    assert checkpoint.quantised == method
    card = (written[0] / "README.md").read_text()
    assert ("--kv-cache-dtype fp8" if method == "fp8" else "without a flag") in card
    assert checkpoint.cache_scheme == scheme
    assert is_static(scheme)
    assert run_command(["verify", str(written[0]), "--against", str(codes)]) == 0
    assert (
        run_command(
            [
                "calibrate",
                "quantization",
                str(written[0]),
                "--bits",
                "fp8",
                "-o",
                str(tmp_path / "fp8.plan"),
            ]
        )
        == 0
    ), capsys.readouterr().err


def test_scales_are_told_where_the_weights_are(quantised: Any, tmp_path: Path) -> None:
    """In `config.json`, which engines read first, though a file beside it says the same; and under
    an older key, if that is there.
    """
    source = Path(shutil.copytree(quantised("nvfp4 of modelopt")[0], tmp_path / "both"))
    config = json.loads((source / "config.json").read_text())
    said = config.pop("quantization_config")
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    for key in ("quantization_config", "compression_config"):
        (source / "config.json").write_text(json.dumps({**config, key: said}))
        stream: Any = SimpleNamespace(checkpoint=Checkpoint.open(str(source)), layouts=[])
        conversion = ToFp8Kv(stream, ConvertOptions(to="fp8-kv"))
        written = conversion.config(ConvertedLayer(None))
        scheme = written.pop(key).pop("kv_cache_scheme")
        assert is_static(scheme)
        assert written == config
        conversion.write_beside(tmp_path)
        beside = json.loads((tmp_path / "hf_quant_config.json").read_text())
        assert beside["kv_cache_scheme"] == scheme


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_is_said_of_weights_is_changed_where_it_is_said(inside: bool, key: str) -> None:
    own, other = {"quant_method": "fp8"}, {"quant_method": "fp8", "kv_cache_scheme": {}}
    said, changed = ({"a": 1, key: x} for x in (own, other))
    if inside:
        said, changed = ({"b": 2, "text_config": x} for x in (said, changed))
    assert said_of_weights(said) == own
    assert with_said_of_weights(said, other) == changed
    assert with_said_of_weights({"text_config": {}}, other)["quantization_config"] == other


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("gptq", [], "reads scales beside weights of compressed-tensors, fp8, modelopt, and not"),
        ("fp8 by blocks", ["--smooth"], "cannot fold anything into weights that are quantised"),
    ],
)
def test_scales_that_nothing_would_read_are_refused(
    quantised: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    more: list[str],
    said: str,
) -> None:
    arguments = ["convert", str(quantised(kind)[0]), "--to", "fp8-kv", *more]
    assert run_command([*arguments, "-o", str(tmp_path / "out")]) == 4
    assert said in " ".join(capsys.readouterr().err.split())


def test_scales_that_are_there_are_not_doubled(
    quantised: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ModelOpt writes them: its config names no scheme."""
    source = Path(shutil.copytree(quantised("fp8 by blocks")[0], tmp_path / "scaled"))
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    arguments = ["convert", str(source), "--to", "fp8-kv", "-o", str(tmp_path / "out")]
    assert run_command(arguments) == 4
    assert "already holds scales" in " ".join(capsys.readouterr().err.split())


def test_modelopt_says_it_in_a_file_of_its_own(quantised: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantised("nvfp4 of modelopt")[0], tmp_path / "own"))
    config = json.loads((source / "config.json").read_text())
    said = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": said["quant_algo"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(beside))
    assert Checkpoint.open(str(source)).quantised == "modelopt"


@torch.inference_mode()
def test_gpt_oss_is_what_transformers_makes_of_its_codes(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from _convert_tools import stock
    from _family_cases import CASES

    family, more = CASES["gpt_oss"]
    source = tiny(family, **{**more, "intermediate_size": 64, "dtype": "bfloat16"})
    folder = Path(shutil.copytree(source, tmp_path / "mxfp4"))
    stored, generator = dict[str, Tensor](), torch.Generator().manual_seed(0)
    for name, x in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            shape = (x.shape[0], x.shape[2], x.shape[1] // 32)  # [E, out, in / 32]
            byte = torch.randint(0, 256, (*shape, 16), generator=generator)
            power = torch.randint(120, 126, shape, generator=generator)
            stored |= {f"{name}_blocks": byte.byte(), f"{name}_scales": power.byte()}
        else:
            stored[name] = x
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    checkpoint, ids = Checkpoint.open(str(folder)), torch.arange(3, 40)
    own = checkpoint.load_transformers(torch.bfloat16)
    assert torch.equal(own(ids[None]).logits, stock(folder, torch.bfloat16)(ids[None]).logits)
    engine = Engine.load(checkpoint, dtype=torch.float32)
    got = engine.extend(engine.new_cache(1, 64), ids, all_logits=True)
    wanted = checkpoint.load_transformers(torch.float32)(ids[None]).logits[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.std()))
