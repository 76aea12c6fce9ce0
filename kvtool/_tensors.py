"""Safetensors headers: what tensors a folder holds, without reading their values."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kvtool.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Safetensors' name of each element type, and torch's.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # the others: 1


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors type name: `F32` gives `torch.float32`."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype: `torch.float32` gives `F32`."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, torch_name in _TORCH_NAMES.items() if torch_name == short)


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """What lies on disk of it, by role; without a name, if that is all."""
        return {"": self}

    def value(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself, given what lies on disk of it."""
        return stored[""]


@dataclass(frozen=True)
class DerivedTensor(TensorInfo):
    """A tensor that is not stored as such: it is made of stored parts.

    Attributes:
        shape, dtype: Of what is made.
        parts: What is stored, by role.
        make: Makes it.
    """

    parts: dict[str, TensorInfo]
    make: Callable[[dict[str, torch.Tensor]], torch.Tensor]

    @property
    def stored(self) -> dict[str, TensorInfo]:
        return self.parts

    def value(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.make(stored)


def first_line(error: BaseException) -> str:
    """What an exception says first; with what follows, where that is only announced."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} instead of an object.")
    return content


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor by name, from one file or from all the files that the index names."""
    if (path / WEIGHTS).is_file():  # transformers, too, prefers it to an index
        return read_header(path / WEIGHTS)
    if not (path / INDEX).is_file():
        _raise_no_weights(path)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map.")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        # The name is checked, not where it leads: files of a hub cache are links into its blobs.
        if (
            file.startswith(("/", "~"))
            or "\\" in file
            or ":" in file
            or ".." in PurePosixPath(file).parts
        ):
            raise CheckpointError(f"{path / INDEX} names a file outside its folder: {file}.")
        if not file.endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{path / INDEX} names {file}, which is not a safetensors file."
            )
        if not (path / file).is_file():
            raise CheckpointError(
                f"{path} is incomplete: {INDEX} names {file}, which is not there.",
                hint="Copy or download the checkpoint again.",
            )
        headers[file] = read_header(path / file)
    tensors: dict[str, TensorInfo] = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{path / INDEX} places {name} in {file}, which does not hold it."
            )
        tensors[name] = headers[file][name]
    return tensors


def _raise_no_weights(path: Path) -> None:
    pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
    shards = [file.name for file in path.glob("*.safetensors")]
    if shards:
        raise CheckpointError(
            f"{path} has neither {WEIGHTS} nor {INDEX}, so what belongs to the model is unknown."
        )
    if pickles:
        raise UnsupportedModelError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when read.",
            hint="If you trust them, load them once with transformers and save_pretrained them.",
        )
    raise UnsupportedModelError(f"{path} has no safetensors weights.")


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    size = file.stat().st_size if file.is_file() else 0
    if 0 < size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        return CheckpointError(
            f"{file} is a pointer of Git LFS in the place of the weights.",
            hint="Run 'git lfs install' and 'git lfs pull' in the folder.",
        )
    reason = "it is empty" if size == 0 else first_line(error)
    return CheckpointError(
        f"{file} is corrupt or truncated ({size} bytes): {reason}.",
        hint="Copy or download the checkpoint again.",
    )


class OpenFiles:
    """Safetensors files that stay open from the first tensor read of them on.

    Opening one parses its whole header, which costs more than reading a small tensor.
    """

    def __init__(self) -> None:
        self._handles: dict[Path, Any] = {}

    def read(self, info: TensorInfo) -> torch.Tensor:
        """A stored tensor: mapped, not copied."""
        from safetensors import SafetensorError, safe_open

        try:
            if info.file not in self._handles:
                self._handles[info.file] = safe_open(info.file, framework="pt")
            tensor: torch.Tensor = self._handles[info.file].get_tensor(info.name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(info.file, error) from error
        return tensor


def read_header(file: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    with open_safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            view = handle.get_slice(name)
            tensors[name] = TensorInfo(name, tuple(view.get_shape()), view.get_dtype(), file)
    unknown = next((info for info in tensors.values() if info.dtype not in _TORCH_NAMES), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"{file} stores {unknown.name} as {unknown.dtype}, which is not supported."
        )
    return tensors
