"""The file of a plan: one safetensors file whose header holds one JSON document.

Names, types and sizes are checked before a tensor is read: a plan may come from a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import save
from torch import Tensor

from kvtool._staging import write_file
from kvtool._tensors import first_line, open_safetensors
from kvtool.bits import Axis, Turned
from kvtool.codes import Allocation, CodeKind, CodePlan, code_shapes
from kvtool.errors import CheckpointError, PlanError, UsageError
from kvtool.mamba import Rule

FORMAT_VERSION = 10
"""The newest. A file is of the oldest one that knows what is in it, see `kvtool/plan.py`."""
Policy = Literal["snapkv", "expected"]
"""How the tokens that a budget allows are chosen, at the end of a prompt."""
Prefill = Literal["dense", "streamed"]
"""Whether a prompt attends densely and is dropped afterwards, or streams from its first token."""
SCORE = "layers.{}.heads.score"
"""The tensor with the scores of a layer's heads, `[H]`."""

_KEY = "kvtool_plan"

# No model has a number near the limit; without one, a file could hold numbers of a thousand digits.
_Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Full(_Strict):
    """A head that keeps everything."""

    kind: Literal["full"]


class Streaming(_Strict):
    """A head that keeps the first and last tokens."""

    kind: Literal["streaming"]
    sink: _Count
    window: _Count


class TierEntry(_Strict):
    """The tokens of a block that got less attention."""

    tokens: _Count
    keys: _Count
    values: _Count


_Factors = tuple[tuple[float, ...], ...]


class BitsEntry(_Strict):
    """How full heads pack what they keep."""

    keys: _Count
    values: _Count
    group: _Count
    axis: Axis
    kind: CodeKind
    hadamard: Turned
    order: tuple[tuple[_Count, ...], ...] | None
    key_clip: float
    value_clip: float
    sink: _Count
    window: _Count
    rest: TierEntry | None = None
    key_balance: _Factors | None = None
    value_balance: _Factors | None = None
    rank: _Count = 0
    kept: _Count | None = None


class StateEntry(_Strict):
    """The state of a layer with a mixer."""

    kind: Literal["state"]
    heads: _Count
    head_dim: _Count
    groups: _Count
    state: _Count
    taps: _Count
    bits: _Count | None
    chunk: _Count
    taught: _Count | None
    least: tuple[float, ...] | None
    rule: Rule = "mamba2"


class LatentEntry(_Strict):
    """The latents of an MLA layer."""

    kind: Literal["latent"]
    rank: _Count
    rope_dim: _Count
    bits: tuple[_Count, ...]
    group: _Count
    sink: _Count
    window: _Count


class WindowEntry(_Strict):
    """A layer with a sliding window."""

    kind: Literal["window"]
    heads: _Count
    head_dim: _Count
    window: _Count


class SharedEntry(_Strict):
    """A layer whose past others read, or that reads another's."""

    kind: Literal["shared"]
    heads: _Count
    head_dim: _Count


class SparseEntry(_Strict):
    """How few tokens of full heads a query reads."""

    channels: tuple[tuple[_Count, ...], ...]
    tokens: _Count
    sink: _Count
    window: _Count


class ScalesEntry(_Strict):
    """By which full heads lie in fp8."""

    keys: tuple[float, ...]
    values: tuple[float, ...]
    window: _Count


_Kept = StateEntry | LatentEntry | WindowEntry | SharedEntry


class LayerEntry(_Strict):
    """One layer."""

    heads: tuple[Annotated[Full | Streaming, Field(discriminator="kind")], ...]
    budget: tuple[_Count | None, ...] | None
    bits: BitsEntry | None = None
    kept: Annotated[_Kept, Field(discriminator="kind")] | None = None
    sparse: SparseEntry | None = None
    scales: ScalesEntry | None = None


class CodeEntry(_Strict):
    """The code of the next `layers` layers."""

    kind: CodeKind
    layers: _Count
    widths: Annotated[tuple[_Count, ...], Field(min_length=1, max_length=2)]
    sink: _Count
    window: _Count
    bits: _Count | None = None
    group: _Count = 32


class BaseEntry(_Strict):
    """The model."""

    source: str
    fingerprint: str
    config_hash: str
    layers: _Count
    kv_heads: _Count
    head_dim: _Count


class Document(_Strict):
    """Everything in the header."""

    format_version: _Count
    base: BaseEntry
    prefill: Prefill
    policy: Policy | None
    provenance: tuple[dict[str, JsonValue], ...]
    layers: tuple[LayerEntry, ...]
    codes: tuple[CodeEntry, ...] = ()
    allocation: Allocation | None = None


class _Version(BaseModel):
    model_config = ConfigDict(strict=True)
    format_version: _Count


def check_plan_output(path: Path, *, overwrite: bool = False) -> None:
    """Raises UsageError where a plan may not be written; `overwrite` replaces only a plan."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder {path.absolute().parent} does not exist.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, but a plan is a file.", hint="Name a file.")
    if not os.access(path.absolute().parent, os.W_OK):  # known before a calibration of minutes
        raise UsageError(f"{path} cannot be written: permission is denied.")
    if not path.exists():
        return
    if not overwrite:
        raise UsageError(
            f"The output {path} exists already.", hint="Name another one, or give --overwrite."
        )
    try:
        with opened(path):
            pass
    except PlanError as error:
        raise UsageError(
            f"{path} is not a plan, so --overwrite will not replace it.",
            hint="Name another output.",
        ) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, str]]:
    """The open safetensors file of a plan, and its document."""
    try:
        if not path.is_file():
            raise PlanError("it is not a file" if path.exists() else "there is no such file")
        with open_safetensors(path) as handle:
            metadata = handle.metadata() or {}
            if _KEY not in metadata:
                raise PlanError("it is a safetensors file, but not a plan")
            yield handle, metadata[_KEY]
    except CheckpointError as error:
        reason = short(first_line(error.__cause__ or error))
        raise PlanError(f"it is no safetensors file: {reason}") from error
    except OSError as error:
        raise PlanError(f"it cannot be read: {error.strerror}") from error


def parse(text: str) -> Document:
    """The document of a plan of this kvtool or an older one.

    Raises:
        PlanError: It is none.
    """
    try:
        version = _Version.model_validate_json(text).format_version
        if version < 1:
            raise PlanError(f"its format is {version}, which no kvtool has written")
        if version == 2:
            raise PlanError("its format is 2, whose codes are not read", hint="Calibrate again.")
        if version > FORMAT_VERSION:
            raise PlanError(
                f"it was made by a newer kvtool: its format is {version}, not {FORMAT_VERSION}",
                hint="Update kvtool.",
            )
        return Document.model_validate_json(text)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, details["loc"]))
        what = details["msg"][:1].lower() + details["msg"][1:]
        raise PlanError(short(f"'{where}': {what}" if where else what)) from error


def read_tensors(handle: Any, document: Document) -> dict[str, Tensor]:
    """Every tensor that the document asks for, fp32, and no other."""
    stored, base = set(handle.keys()), document.base
    scores = [SCORE.format(index) for index in range(len(document.layers))]
    wanted: dict[str, tuple[int, ...]] = {}
    if stored & set(scores):
        wanted |= dict.fromkeys(scores, (base.kv_heads,))
    for index, entry in enumerate(document.codes):
        code = CodePlan(**entry.model_dump())
        rows = []
        for part in code.parts:
            name = f"codes.{index}.{part}.spectrum"
            if name not in stored:
                raise PlanError(f"{name} is missing, though a code needs it")
            rows.append(int((list(handle.get_slice(name).get_shape()) or [0])[0]))
        wanted |= code_shapes(index, code, base.kv_heads * base.head_dim, rows)
    if unknown := sorted(stored - wanted.keys()):
        raise PlanError(f"it holds a tensor that no plan has: {short(unknown[0])}")
    for name, shape in wanted.items():
        if name not in stored:
            why = "other layers have scores" if name in scores else "a code needs it"
            raise PlanError(f"{name} is missing, though {why}")
        view = handle.get_slice(name)
        found, dtype = list(view.get_shape()), view.get_dtype()
        if (found, dtype) != (list(shape), "F32"):
            raise PlanError(f"{name} is {dtype} {short(str(found))} instead of F32 {list(shape)}")
    return {name: handle.get_tensor(name) for name in wanted}


def write(path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes document and tensors in one rename. The same always give the same bytes."""
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(named, metadata={_KEY: text}))


def as_json(value: Any) -> str:
    """The one JSON text of a value; NaN and infinity, which JSON lacks, are refused."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan cannot be written as JSON: {first_line(error)}") from error


def short(text: str) -> str:
    """Its first 200 characters."""
    return text if len(text) <= 200 else text[:200] + " …"
