"""Checkpoints: opened lazily from headers, written through a staging folder.

A checkpoint is an ordinary Hugging Face folder. Opening one reads `config.json` and the safetensors
headers, never the weights; a tensor is read when somebody asks for it. Writing happens in
`OUT.partial`, which becomes `OUT` in one rename, so that a killed process leaves no half-written
output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool import chat_template
from kvtool._sources import BUILTIN_MODEL, locate
from kvtool._staging import (
    Shaped,
    Staging,
    check_disk,
    check_output,
    scratch_folder,
    sha256_file,
    write_shards,
)
from kvtool._tensors import (
    PICKLES,
    OpenFiles,
    TensorInfo,
    dtype_name,
    first_line,
    read_header,
    read_headers,
    read_json,
    torch_dtype,
)
from kvtool._transformers import quiet_transformers
from kvtool.errors import CheckpointError, KvtoolError, UnsupportedModelError
from kvtool.fp8 import BESIDE, SCALES, cache_scheme
from kvtool.quantised_weights import as_numbers
from kvtool.wrappers import text_config, text_tensors, upright, wrapper_of

if TYPE_CHECKING:
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

__all__ = [
    "BUILTIN_MODEL",
    "MANIFEST",
    "Checkpoint",
    "Shaped",
    "Staging",
    "TensorInfo",
    "check_disk",
    "check_output",
    "dtype_name",
    "quiet_transformers",
    "read_header",
    "scratch_folder",
    "sha256_file",
    "torch_dtype",
    "write_shards",
]

MANIFEST = "kvtool_manifest.json"
"""What a conversion leaves about itself, beside the weights."""

# What tokenizers of transformers are read from; without one of them, it only guesses why.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")

# What is in a folder but must not travel into a converted one: weights in any format, what
# describes them and how they are quantised, and what kvtool wrote about an earlier conversion.
_NOT_CARRIED = (
    *(
        "config.json",
        "*.index.json",
        "*quant*_config.json",
        "*.safetensors",
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.onnx",
        "*.ot",
    ),
    *PICKLES,
    *(
        "README*",
        ".*",
        "trainer_state.json",
        "recipe.yaml",
        "kvtool*.json",
        "manifest.json",
        "report.*",
    ),
)
# What makes inputs of images and sound, of no use to the text of a wrapper alone.
_OF_WRAPPERS = ("*processor_config.json",)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face decoder on disk, known from its config and headers.

    Attributes:
        source: What the user typed.
        path: The folder that holds it.
        config: The content of `config.json`.
        tensors: Every weight by name, from the headers.
        revision: Branch, tag or commit of a hub id, as asked for.
        wrapper: Architecture of a model of several modalities whose decoder of text this is; then
            `config` and `tensors` are those of the decoder, see `kvtool.wrappers`.
        quantised: How the weights are quantised on disk; then `config` and `tensors` are those of
            the numbers that they stand for, see `kvtool.quantised_weights`.
    """

    source: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    trust_remote_code: bool = False
    revision: str | None = None
    wrapper: str | None = None
    quantised: str | None = None

    @classmethod
    def open(
        cls,
        source: str,
        *,
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Opens a folder, hub id, `.gguf` file or the built-in `smollm2` without reading weights.

        Args:
            source: The built-in name wins over a path, and an existing path wins over a hub id.
            revision: Branch, tag or commit of a hub id.
            offline: Take a hub id from the local hub cache or not at all.
            trust_remote_code: Whether code that comes with the checkpoint may run.

        Raises:
            UsageError: There is nothing at this path or under this hub id.
            UnsupportedModelError: It is not a decoder, has only pickled weights, or is quantised in
                a way that is not known here.
            CheckpointError: It is damaged, incomplete, or its index points outside its folder.
        """
        path = locate(source, revision, offline, trust_remote_code)
        config = read_json(path / "config.json") if (path / "config.json").is_file() else None
        if config is not None:
            _check_names(path, config)
        _check_decoder(path, config)
        assert config is not None
        if "quantization_config" not in config and (path / BESIDE).is_file():
            beside = read_json(path / BESIDE)
            # ModelOpt writes it one level deeper than others.
            if isinstance(inner := beside.get("quantization"), dict):
                beside = {"quant_method": "modelopt", **beside, **inner}
            config["quantization_config"] = beside
        if wrapper := wrapper_of(config):
            config = text_config(path, config)
        tensors = read_headers(path)
        if wrapper:
            tensors = text_tensors(path, tensors)
        config, tensors, quantised = as_numbers(path, config, tensors)
        if wrapper:
            tensors = upright(wrapper, config, tensors)
            # As in transformers, a head that is there is not replaced by the embedding.
            config["tie_word_embeddings"] &= "lm_head.weight" not in tensors
        return cls(source, path, config, tensors, trust_remote_code, revision, wrapper, quantised)

    def whole(self) -> Checkpoint:
        """All that lies in the folder, as it lies there: of a wrapper, also what is beside its
        text; of quantised weights, their codes.
        """
        if self.wrapper is None and self.quantised is None:
            return self
        config, tensors = read_json(self.path / "config.json"), read_headers(self.path)
        return replace(self, config=config, tensors=tensors, wrapper=None, quantised=None)

    @property
    def parameters(self) -> int:
        """Numbers in all its tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(part.nbytes for info in self.tensors.values() for part in info.stored.values())

    def largest_layer(self, layers: int) -> int:
        """Size of the largest of its first layers, so many as it computes with."""
        sizes = Counter[str]()
        for name, info in self.tensors.items():
            if name.startswith("model.layers."):
                sizes[name.split(".", 3)[2]] += info.nbytes
        return max(sizes[str(index)] for index in range(layers))

    @property
    def files(self) -> list[Path]:
        """Where its tensors lie."""
        infos = self.tensors.values()
        return sorted({part.file for info in infos for part in info.stored.values()})

    def stamps(self) -> list[tuple[str, int, int]]:
        """Size and time of each of them. :meth:`fingerprint` samples large tensors; what goes on
        where it was left must not miss that a file changed in between.
        """
        stats = [(file.name, file.stat()) for file in self.files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the conversion says that made it; None if none did.

        Raises:
            CheckpointError: It is damaged.
        """
        file = self.path / MANIFEST
        return read_json(file) if file.exists() else None

    @property
    def cache_scheme(self) -> dict[str, Any] | None:
        """What engines are told about quantising the cache, see :func:`kvtool.fp8.cache_scheme`."""
        return cache_scheme(self.config)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""
        return self._read([name], OpenFiles())[name]

    def read_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        """Reads every tensor whose name starts with `prefix`, under its name without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        tensors = self._read(names, OpenFiles())
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _read(self, names: list[str], files: OpenFiles) -> dict[str, torch.Tensor]:
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"{self.path} has no tensor {name}.")
            parts = self.tensors[name].stored.items()
            stored[name] = {role: files.read(info) for role, info in parts}
        # One after the other gives up its parts: codes and numbers are not held together of all.
        return {name: self._value(name, stored.pop(name)) for name in names}

    def _value(self, name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        try:
            return self.tensors[name].value(stored)
        except (RuntimeError, IndexError) as error:  # parts of shapes that do not fit together
            raise CheckpointError(
                f"{self.path}: {name} cannot be made of its parts: {first_line(error)}"
            ) from error

    def fingerprint(self) -> str:
        """A sha256 that identifies the model: config, headers, and samples of every tensor.

        It does not depend on how the tensors are spread over files. Tensors up to 64 KiB count
        whole, larger ones by 16 blocks of 4 KiB, which any training or conversion changes.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        import torch

        ignored = ("transformers_version", "_name_or_path")
        config = {key: value for key, value in self.config.items() if key not in ignored}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        stored = [
            (f"{name}{role and ' '}{role}", info)
            for name in sorted(self.tensors)
            for role, info in sorted(self.tensors[name].stored.items())
        ]
        files = OpenFiles()
        for name, info in stored:
            tensor = files.read(info)  # one at a time: models exceed the memory
            digest.update(f"{name} {info.dtype} {list(tensor.shape)}".encode())
            data = tensor.reshape(-1).view(torch.uint8)
            if data.numel() > 2**16:
                starts = [i * (data.numel() - 4096) // 15 for i in range(16)]
                data = torch.cat([data[start : start + 4096] for start in starts])
            digest.update(data.numpy().tobytes())
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """Tokenizer, chat templates, generation config, licence: what any converted form keeps."""
        left = _NOT_CARRIED if self.wrapper is None else (*_NOT_CARRIED, *_OF_WRAPPERS)
        extra = self.path / "additional_chat_templates"
        found = [*self.path.iterdir(), *(extra.iterdir() if extra.is_dir() else ())]
        return sorted(
            file
            for file in found
            if file.is_file() and not any(file.match(pattern) for pattern in left)
        )

    def copy_side_files(self, folder: Path) -> list[Path]:
        """Copies the side files byte for byte into `folder`, and returns the copies.

        A chat template that came with a processor gets the name under which tokenizers look for it.
        """
        copies = [folder / file.relative_to(self.path) for file in self.side_files()]
        for file, copy in zip(self.side_files(), copies, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        named, own = folder / "chat_template.jinja", chat_template.of_processor(self.path)
        if self.wrapper is not None and own is not None and not named.exists():
            named.write_text(str(self.tokenizer().chat_template), encoding="utf-8")
            copies.append(named)
        return copies

    def hf_config(self) -> PreTrainedConfig:
        """The transformers config object; scales for the cache of other engines are left out.

        Raises:
            UnsupportedModelError: Transformers does not know the model type.
        """
        from transformers import CONFIG_MAPPING, AutoConfig

        family = self.config.get("model_type")
        if family not in CONFIG_MAPPING and not self.trust_remote_code:
            raise UnsupportedModelError(
                f"{self.path} has model type {family}, which transformers does not know.",
                hint="If you trust its own code, allow it with --trust-remote-code."
                if "auto_map" in self.config
                else None,
            )
        config: PreTrainedConfig
        with self._transformers("its config"):
            if self.wrapper is not None:
                config = AutoConfig.for_model(**deepcopy(self.config))
            else:
                config = AutoConfig.from_pretrained(
                    self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
                )
        if hasattr(config, "quantization_config"):
            # With it, transformers would want the package that quantises, and quantise.
            del config.quantization_config
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights.

        Raises:
            CheckpointError: There is none, or none that transformers can read.
        """
        from transformers import AutoTokenizer

        files = (file for pattern in _TOKENIZERS for file in self.path.glob(pattern))
        if not self.trust_remote_code and not any(files):
            raise CheckpointError(
                f"{self.path} has no tokenizer: there is neither tokenizer.json nor a vocabulary.",
                hint="Copy the tokenizer's files beside the weights.",
            )
        with self._transformers("its tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        if not isinstance(longest := tokenizer.model_max_length, int | float):
            file = self.path / "tokenizer_config.json"
            raise CheckpointError(f"{file}: model_max_length is {longest!r} and no number.")
        if tokenizer.chat_template is None:
            tokenizer.chat_template = chat_template.of_processor(self.path)
        chat_template.take_text(tokenizer)
        return tokenizer

    def load_transformers(self, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
        """Loads the model with its stock transformers class, in eval mode.

        Raises:
            CheckpointError: Transformers finds a weight missing, superfluous or of the wrong shape.
        """
        with self._transformers("the model"):
            model, info = self._load(
                dtype=dtype,
                output_loading_info=True,
                # Otherwise a wrong shape is an exception that does not say which file it is about.
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
        info["unexpected_keys"] = [
            name for name in info["unexpected_keys"] if name.split(".")[-1] not in SCALES
        ]
        wrong = {
            kind.removesuffix("_keys"): sorted(map(_named, info[kind]))
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        }
        if wrong:
            listed = "; ".join(f"{len(names)} {kind}: {names[0]}" for kind, names in wrong.items())
            raise CheckpointError(
                f"{self.path} does not hold the weights of its {type(model).__name__} ({listed})."
            )
        ready: PreTrainedModel = model.to(device).eval()
        ready.generation_config = self.generation_config() or ready.generation_config
        return ready

    def generation_config(self) -> GenerationConfig | None:
        """How the model is to generate, from the file beside the weights; None if there is none.

        Transformers passes over one that it cannot read, and the model would never stop.

        Raises:
            CheckpointError: It is damaged.
        """
        from transformers import GenerationConfig

        file = self.path / "generation_config.json"
        if not file.is_file():
            return None
        stops = read_json(file).get("eos_token_id")
        listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(type(token) is int for token in listed):
            raise CheckpointError(
                f"{file}: eos_token_id is {stops!r}, neither a token id nor a list of them."
            )
        with self._transformers("its generation config"):
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)

    def _load(self, **options: Any) -> Any:
        """The model and what transformers reports of its weights."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        if self.wrapper is None and self.quantised is None:
            options["config"] = self.hf_config()  # without what it may say of quantisation
            return AutoModelForCausalLM.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, **options
            )
        config, files = self.hf_config(), OpenFiles()
        weights: dict[str, Any] = {name: _Unread(self, name, files) for name in self.tensors}
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = kind.from_pretrained(None, config=config, state_dict=weights, **options)
        return model, info

    @contextlib.contextmanager
    def _transformers(self, what: str) -> Iterator[None]:
        """Runs transformers without its noise, and puts the file's name on its exceptions."""
        try:
            with quiet_transformers():
                yield
        except KvtoolError:  # of a tensor that it asks for
            raise
        except Exception as error:  # whatever a damaged file makes transformers raise
            raise CheckpointError(
                f"transformers cannot load {what} from {self.path}: {first_line(error)}"
            ) from error


@dataclass(frozen=True)
class _Unread:
    """A tensor as transformers takes it from a file: it is read when its values are asked for."""

    checkpoint: Checkpoint
    name: str
    files: OpenFiles

    def __getitem__(self, values: Any) -> torch.Tensor:
        return self.checkpoint._read([self.name], self.files)[self.name][values]


def _named(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """A weight that is wrong; with its shape and the right one, where transformers tells them."""
    if isinstance(key, str):
        return key
    name, found, wanted = key
    return f"{name} is {list(found)} instead of {list(wanted)}"


def _check_names(path: Path, config: dict[str, Any]) -> None:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path / 'config.json'}: architectures is not a list of names.")
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{path / 'config.json'}: model_type is not a name.")
    if not isinstance(config.get("kvtool", {}), dict):  # what a conversion notes
        raise CheckpointError(f"{path / 'config.json'}: kvtool is not an object.")


def _check_decoder(path: Path, config: dict[str, Any] | None) -> None:
    if config is None:
        if (path / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"{path} is an adapter and not a model.", hint="Merge it into its base model first."
            )
        gguf = next(path.glob("*.gguf"), None)
        raise UnsupportedModelError(
            f"{path} is not a checkpoint: it has no config.json.",
            hint=f"Name the file itself: {gguf}" if gguf else None,
        )
    if wrapper_of(config):
        return
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in names
    ):
        what = ", ".join(map(str, names)) or f"model type {config.get('model_type', 'unknown')}"
        kind = "an encoder-decoder" if config.get("is_encoder_decoder") else "no ...ForCausalLM"
        raise UnsupportedModelError(
            f"{path} is not a decoder: its architecture is {kind} ({what})."
        )
