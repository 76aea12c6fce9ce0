"""The text of a model of several modalities is what its wrapper computes of text alone."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _wrapper_cases import CASES, KNOWN, make_wrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.cli.generate import chat_ids
from kvtool.convert import planning
from kvtool.errors import CheckpointError, PlanError, UnsupportedModelError
from kvtool.inspection import inspect_checkpoint
from kvtool.layout import describe, logits_factor
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.wrappers import WRAPPERS, text_config

Made = tuple[nn.Module, dict[str, Path]]
AGES = ("saved", "named")
KINDS = [name for name in KNOWN if CASES[name][0] != "qwen3_5"]
"""Those whose decoder kvtool knows."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """``made(name)``: a wrapper in memory, and its folder of each age, not to be changed."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = make_wrapper(name, tmp_path_factory.mktemp("wrapper"))
        return known[name]

    return get


@pytest.fixture
def llava(made, tmp_path: Path) -> Path:
    """A folder to be changed."""
    return Path(shutil.copytree(made("llava")[1]["saved"], tmp_path / "llava"))


def tokens(count: int) -> Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def expected(wrapper: Any, ids: Tensor) -> Tensor:
    """Logits of transformers' wrapper, `[T, V]`.

    It leaves out what the decoder's own class multiplies them by, as Cohere's and Granite's do.
    """
    logits = wrapper(input_ids=ids[None], use_cache=False).logits[0]
    return logits * logits_factor(wrapper.config.get_text_config(decoder=True))


def same(got: Tensor, wanted: Tensor) -> None:
    assert float(wanted.std()) > 1e-2, "the model says the same of everything"
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.std()))


def decoded(engine: Engine, ids: Tensor, prompt: int = 40) -> Tensor:
    cache = engine.new_cache(1, len(ids))
    found = [engine.extend(cache, ids[:prompt], all_logits=True)]
    found += [engine.decode(cache, token[None]) for token in ids[prompt:]]
    return torch.cat(found)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], what: str = "config") -> None:
    """Rewrites `config.json`, its text section, or the weights after `change` edited them."""
    if what == "weights":
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    config = json.loads((folder / "config.json").read_text())
    change(config if what == "config" else config["text_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, kind: type[Exception] = UnsupportedModelError) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.open(str(folder))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_wrapper_has_a_case() -> None:
    assert {kind for kind, *_ in CASES.values()} == set(WRAPPERS)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", KINDS)
def test_the_runtime_computes_what_the_wrapper_computes(made, name: str, age: str) -> None:
    wrapper, folders = made(name)
    ids = tokens(60)
    same(decoded(Engine.load(Checkpoint.open(str(folders[age]))), ids), expected(wrapper, ids))


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_streamed_layers_compute_what_the_wrapper_computes(made, name: str) -> None:
    wrapper, folders = made(name)
    ids, stream = tokens(50), LayerStream(Checkpoint.open(str(folders["saved"])))
    hidden = stream.embed(ids[None])
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer))
    same(stream.logits(hidden)[0], expected(wrapper, ids))


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", KNOWN)
@torch.inference_mode()
def test_transformers_runs_its_text_alone(made, name: str, age: str) -> None:
    wrapper, folders = made(name)
    checkpoint, ids = Checkpoint.open(str(folders[age])), tokens(50)
    model = checkpoint.load_transformers(torch.float32)
    same(model(ids[None]).logits[0], expected(wrapper, ids))
    assert type(model).__name__ == checkpoint.config["architectures"][0]
    assert not any("vision" in name or "audio" in name for name in checkpoint.tensors)


@pytest.mark.parametrize("name", KNOWN)
def test_the_config_is_what_transformers_reads_in_the_wrapper(made, name: str) -> None:
    folder = made(name)[1]["saved"]
    checkpoint = Checkpoint.open(str(folder))
    own = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).to_dict()
    got = checkpoint.hf_config().to_dict()
    for field in ("model_type", "architectures", "tie_word_embeddings", "dtype"):
        own.pop(field, None)
    own["rope_parameters"].pop("mrope_section", None)
    assert {field: got.get(field) for field in own} == own
