"""Plans: what every layer keeps of the past. A calibration makes one, the runtime obeys it.

A plan belongs to one model and changes none of its weights. On disk it is a single safetensors
file: the tensors are the scores that heads were chosen by, and the codes of layers. The header
holds one JSON document with the model's identity, how the plan was made, and what is kept.

Whatever is wrong with a plan is a :class:`~kvtool.errors.PlanError`, whether it was made by hand or
read from a file by a stranger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors.torch import save
from torch import Tensor

from kvtool import __version__
from kvtool._tensors import first_line, open_safetensors
from kvtool.attention import describe
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError, PlanError, UnsupportedModelError, UsageError

FORMAT_VERSION = 2
"""2 knows codes; files of version 1 are read."""
Policy = Literal["snapkv", "expected"]
"""How the tokens that a budget allows are chosen, at the end of a prompt."""
Prefill = Literal["dense", "streamed"]
"""Whether a prompt attends densely and is dropped afterwards, or streams from its first token."""

CodeKind = Literal["rotated", "unrotated"]
"""Whether the code of a key is taken after RoPE, or before it."""

_KEY = "kvtool_plan"
_SCORE = "layers.{}.heads.score"
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


# ------------------------------------------------------------------------------------ content


@dataclass(frozen=True)
class CodePlan:
    """How one layer codes its tokens: see :mod:`kvtool.codes`.

    Attributes:
        kind: Where the code sits.
        keys, values: Numbers stored per token.
        sink, window: Tokens that are also kept exactly: the first and the last, the current one
            included.

    Raises:
        PlanError: The numbers are out of range.
    """

    kind: CodeKind
    keys: int
    values: int
    sink: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        if min(self.keys, self.values) < 1:
            raise PlanError(f"a code of {self.keys} + {self.values} numbers is impossible")
        if self.sink < 0 or self.window < 1:
            raise PlanError(
                f"{self.sink} exact sinks and a window of {self.window} tokens are impossible: the "
                "window holds at least the current token"
            )

    @property
    def width(self) -> int:
        """Numbers stored per token."""
        return self.keys + self.values

    def numbers(self, tokens: int, base: Base) -> int:
        """Numbers that a layer stores of a sequence; the ring counts whole even if unfilled."""
        exact = 2 * base.kv_heads * base.head_dim * (self.sink + self.window)
        return self.width * tokens + exact

    def within(self, budget_bytes: int, base: Base, itemsize: int, context: int) -> CodePlan:
        """The widest code of the kind that all layers can have, in a sequence of `context` tokens.

        Keys keep their share of the width.

        Raises:
            PlanError: Exact tokens and the narrowest code take more than the budget.
        """
        width = 2 * base.kv_heads * base.head_dim
        exact = width * (self.sink + self.window)
        numbers = (budget_bytes // (itemsize * base.layers) - exact) // context
        keys = min(numbers * self.keys // self.width, width // 2)
        values = min(numbers - keys, width // 2)
        if self.keys == self.values:
            values = keys  # an odd number does not make them differ
        if min(keys, values) < 1:
            least = itemsize * base.layers * (exact + 2 * context)
            raise PlanError(
                f"a budget of {budget_bytes} bytes at {context} tokens is too small: the first "
                f"{self.sink} and last {self.window} tokens, kept exactly, and the narrowest code "
                f"of all take {least}"
            )
        return replace(self, keys=keys, values=values)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Layers that mean the same are equal: without a streaming head `sink` and `window` become 0, and
    a `budget` without any number becomes `None`.

    Attributes:
        streaming: Per KV head, whether it keeps only the first `sink` tokens and the last `window`.
        sink, window: In tokens; the window counts the current one. Both 0 where no head streams.
        budget: Tokens of the prompt that each KV head keeps after it, chosen by the plan's policy;
            `None` for a head that keeps everything, and for a streaming one.
        code: What is stored of a token instead of keys and values; `None` stores these.

    Raises:
        PlanError: The numbers are out of range or do not belong together.
    """

    streaming: tuple[bool, ...]
    sink: int = 0
    window: int = 0
    budget: tuple[int | None, ...] | None = None
    code: CodePlan | None = None

    def __post_init__(self) -> None:
        if self.code is not None and (any(self.streaming) or self.budget is not None):
            raise PlanError("a layer that codes its tokens keeps all of them in all heads")
        if not any(self.streaming):
            object.__setattr__(self, "sink", 0)
            object.__setattr__(self, "window", 0)
        elif self.sink < 0 or self.window < 1:
            raise PlanError(
                f"a head that streams with {self.sink} sinks and a window of {self.window} tokens "
                "is impossible: the window holds at least the current token"
            )
        if self.budget is None:
            return
        if len(self.budget) != len(self.streaming):
            raise PlanError(f"{len(self.budget)} budgets for {len(self.streaming)} heads")
        for head, (streams, budget) in enumerate(zip(self.streaming, self.budget, strict=True)):
            if budget is not None and streams:
                raise PlanError(f"head {head} streams, so it cannot have a token budget too")
            if budget is not None and budget < 1:
                raise PlanError(f"head {head} has a budget of {budget} tokens; it must keep one")
        if all(budget is None for budget in self.budget):
            object.__setattr__(self, "budget", None)

    @property
    def plain(self) -> bool:
        """Whether every head keeps everything, as it is."""
        return self.budget is None and self.code is None and not any(self.streaming)

    @property
    def budgets(self) -> tuple[int | None, ...]:
        """One entry per head, also where `budget` is `None`."""
        return self.budget or (None,) * len(self.streaming)

    def tokens(self, prompt: int) -> int:
        """Tokens that all heads together keep of a prompt; a ring counts whole even if unfilled."""
        kept = 0
        for streams, budget in zip(self.streaming, self.budgets, strict=True):
            if streams:
                kept += self.sink + self.window
            else:
                kept += prompt if budget is None else min(prompt, budget)
        return kept

    def numbers(self, prompt: int, base: Base) -> int:
        """Numbers that are stored behind a prompt of so many tokens."""
        if self.code is not None:
            return self.code.numbers(prompt, base)
        return 2 * base.head_dim * self.tokens(prompt)


@dataclass(frozen=True)
class Base:
    """The model that a plan belongs to. Two are equal if they are the same model under any name.

    Attributes:
        source: What the user called it.
        fingerprint: :meth:`Checkpoint.fingerprint` of its weights.
        config_hash: sha256 of its config, without what a new version of transformers rewrites.
    """

    source: str = field(compare=False)
    fingerprint: str
    config_hash: str
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def all_heads(self) -> int:
        """KV heads of all layers together."""
        return self.layers * self.kv_heads

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of one sequence without a plan."""
        return 2 * itemsize * self.head_dim * self.all_heads * tokens

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.layers} layers, {self.kv_heads} KV heads of size {self.head_dim}"


def base_of(checkpoint: Checkpoint) -> Base:
    """The identity of a model; samples of all its weights are read.

    Raises:
        UnsupportedModelError: Its heads have no keys of their own (MLA), or its attention is not
            known at all.
    """
    layouts = describe(checkpoint.hf_config())
    layout = layouts[0]
    if any(item.kind == "mla" for item in layouts):
        raise UnsupportedModelError(
            f"{checkpoint.source} has MLA: its heads share one latent, so none can keep less alone."
        )
    if any((x.kv_heads, x.head_dim) != (layout.kv_heads, layout.head_dim) for x in layouts):
        raise UnsupportedModelError(f"{checkpoint.source} has layers of different shapes.")
    config = {key: value for key, value in checkpoint.config.items() if key not in _VOLATILE}
    return Base(
        checkpoint.source,
        checkpoint.fingerprint(),
        hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        len(layouts),
        layout.kv_heads,
        layout.head_dim,
    )


def code_shapes(layer: int, base: Base) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layer's code, at full width: a slice needs no other.

    With K = H·D: `encode [K, K]`, `decode [K, K]`, `mean [K]` of a `Projection` and its `spectrum
    [K]`, of keys and of values.
    """
    width = base.kv_heads * base.head_dim
    square = {"encode": (width, width), "decode": (width, width)}
    parts: dict[str, tuple[int, ...]] = square | {"mean": (width,), "spectrum": (width,)}
    names = ("keys", "values")
    return {f"layers.{layer}.{x}.{part}": s for x in names for part, s in parts.items()}


def check_can_drop(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError where no head can keep less than the model gives it."""
    if any(layout.sliding_window is not None for layout in describe(checkpoint.hf_config())):
        raise UnsupportedModelError(
            f"{checkpoint.source} has layers with a sliding window: what they keep is bounded, and "
            "streaming heads or token budgets in them are not supported"
        )


def provenance_of(
    method: str, options: dict[str, Any], corpus: str | None, tokens: int, **more: Any
) -> dict[str, Any]:
    """How a plan was made, as a plan holds it: `more` are numbers of the method."""
    versions = {"kvtool": __version__}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    said = {"method": method, "options": options, "corpus": corpus, "tokens": tokens}
    return {**said, **more, "versions": versions}


@dataclass(frozen=True, eq=False)
class Plan:
    """What every layer of one model keeps of the past.

    Attributes:
        base: The model.
        layers: One entry per layer.
        prefill: Whether a prompt attends densely and is dropped afterwards, or streams from its
            first token.
        policy: How budgets choose tokens; there if and only if some head has a budget.
        provenance: One JSON object per calibration that made it: method, options, corpus, tokens,
            seed, versions.
        scores: `[L, H]` fp32, finite: how much a head needs the whole past (higher: more). They
            are kept so that another size is a slice and not another calibration.
        tensors: Of codes, fp32, by their names in the file: see :func:`code_shapes`.

    Raises:
        PlanError: The parts contradict each other.
    """

    base: Base
    layers: tuple[LayerPlan, ...]
    prefill: Prefill = "dense"
    policy: Policy | None = None
    provenance: tuple[dict[str, Any], ...] = ()
    scores: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base, budgets = self.base, any(layer.budget is not None for layer in self.layers)
        if min(base.layers, base.kv_heads, base.head_dim) < 1:
            raise PlanError(f"no model has {base.shape}")
        if len(self.layers) != base.layers:
            raise PlanError(f"{len(self.layers)} layers are planned, of a model with {base.layers}")
        for index, layer in enumerate(self.layers):
            if len(layer.streaming) != base.kv_heads:
                raise PlanError(
                    f"layer {index} plans {len(layer.streaming)} KV heads of {base.kv_heads}"
                )
        if budgets and self.policy is None:
            raise PlanError("there are token budgets, but no policy that chooses the tokens")
        if self.policy is not None and not budgets:
            raise PlanError(f"the policy {self.policy} has no token budget to apply")
        _json(self.provenance)
        if self.scores is not None:
            shape = (base.layers, base.kv_heads)
            if tuple(self.scores.shape) != shape or self.scores.dtype != torch.float32:
                raise PlanError(
                    f"the scores are {self.scores.dtype} {list(self.scores.shape)} "
                    f"instead of torch.float32 {list(shape)}"
                )
            if not self.scores.isfinite().all():
                raise PlanError("the scores are not all finite numbers")
        self._check_codes()

    def _check_codes(self) -> None:
        codes = [layer.code for layer in self.layers if layer.code is not None]
        width = self.base.kv_heads * self.base.head_dim
        if codes and (len(codes) < len(self.layers) or self.scores is not None):
            raise PlanError("layers with codes stand beside others, or beside scores of heads")
        if any(max(code.keys, code.values) > width for code in codes):
            raise PlanError(f"a code stores more than the {width} numbers that keys or values have")
        wanted = {
            name: shape
            for index, layer in enumerate(self.layers)
            if layer.code is not None
            for name, shape in code_shapes(index, self.base).items()
        }
        if missing := sorted(wanted.keys() - self.tensors.keys()):
            raise PlanError(f"the tensor {missing[0]} of a code is missing")
        if unknown := sorted(self.tensors.keys() - wanted.keys()):
            raise PlanError(f"it holds a tensor that no plan has: {_short(unknown[0])}")
        for name, shape in wanted.items():
            tensor = self.tensors[name]
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise PlanError(
                    f"{name} is {tensor.dtype} {_short(str(list(tensor.shape)))} instead of "
                    f"torch.float32 {list(shape)}"
                )
            if not tensor.isfinite().all():
                raise PlanError(f"{name} holds numbers that are not finite")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan.

        Raises:
            PlanError: There is no plan at `path`, it is damaged or of a newer kvtool, or its parts
                contradict each other. The message names the file.
        """
        try:
            with _opened(path) as handle:
                document = _parse(handle.metadata()[_KEY])
                return _plan(document, *_read_tensors(handle, document))
        except PlanError as error:
            raise PlanError(f"{path}: {error}", error.hint) from error

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Writes the plan as one file, in one rename. The same plan always gives the same bytes.

        Raises:
            UsageError: See :func:`check_plan_output`.
            PlanError: The provenance is not JSON.
        """
        check_plan_output(path, overwrite=overwrite)
        text = _json(_document(self))
        _plan(_parse(text), self.scores, self.tensors)  # what cannot be read must not be written
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as handle:
            handle.write(save(_named(self.scores, self.tensors), metadata={_KEY: text}))
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(path)

    # -------------------------------------------------------------------------------- sizes

    @property
    def streaming_heads(self) -> int:
        """How many heads stream."""
        return sum(sum(layer.streaming) for layer in self.layers)

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of one sequence after a prompt of N `tokens`.

        With head size D and b bytes per number (`itemsize`), keys and values of a head take
        `2 b D` per token; a full head keeps N tokens, a streaming one `sink + window` (its ring is
        allocated whole, also for a short prompt), and one with a budget `min(N, budget)`. A layer
        with a code takes its width per token, and `sink + window` exact tokens of every head.
        """
        stored = sum(layer.numbers(tokens, self.base) for layer in self.layers)
        return itemsize * stored

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of one sequence without a plan."""
        return self.base.native_bytes(tokens, itemsize)

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that every further token costs: streaming heads overwrite, all others append."""
        numbers = sum(
            2 * self.base.head_dim * layer.streaming.count(False)
            if layer.code is None
            else layer.code.width
            for layer in self.layers
        )
        return itemsize * numbers

    # ------------------------------------------------------------------------------- slices

    def stream_heads(self, count: int, sink: int, window: int) -> Plan:
        """The plan whose `count` lowest-scored heads stream, and all others keep everything.

        Among equal scores the earlier head, by layer, streams first. So the heads that stream for
        one count also do for every larger one.

        Raises:
            PlanError: There are no scores, fewer heads than `count`, or token budgets, which were
                made for the heads that are full now.
        """
        heads = self.base.all_heads
        if self.scores is None:
            raise PlanError("the plan has no scores, so its heads cannot be chosen anew")
        if self.policy is not None:
            raise PlanError(
                "the plan has token budgets for the heads that are full now",
                hint="Slice the plan that it was composed from, and compose again.",
            )
        if not 0 <= count <= heads:
            raise PlanError(f"{count} heads cannot stream: the model has {heads}")
        streaming = torch.zeros(heads, dtype=torch.bool)
        streaming[self.scores.flatten().argsort(stable=True)[:count]] = True
        layers = tuple(
            LayerPlan(tuple(row), sink, window)
            for row in streaming.view(self.scores.shape).tolist()
        )
        return replace(self, layers=layers)

    @property
    def ring(self) -> tuple[int, int]:
        """Sink and window of the heads that stream, or that the calibration had in mind.

        Raises:
            PlanError: That is not known, or not all heads stream with the same.
        """
        rings = {(layer.sink, layer.window) for layer in self.layers if any(layer.streaming)}
        if not rings:
            rings = {ring for item in self.provenance if (ring := _intended_ring(item))}
        if len(rings) != 1:
            why = "no head streams" if not rings else "heads stream with different windows"
            raise PlanError(f"{why}, so what another streaming head would keep is unknown")
        return rings.pop()

    def cut(self, budget_bytes: int, context: int, itemsize: int) -> Plan:
        """The plan with the fewest streaming heads, or the widest codes, that fits a budget.

        Sinks and windows stay as they are.

        Args:
            budget_bytes: Largest :meth:`cache_bytes` of one sequence.
            context: Tokens of that sequence.
            itemsize: Bytes per number.

        Raises:
            PlanError: It does not fit even if all heads stream, or :meth:`stream_heads` refuses.
        """
        codes = {layer.code for layer in self.layers if layer.code is not None}
        if codes:
            if len(codes) > 1:
                raise PlanError("its layers have codes of different widths, so none fits all")
            code = codes.pop().within(budget_bytes, self.base, itemsize, context)
            return replace(self, layers=tuple(replace(x, code=code) for x in self.layers))
        sink, window = self.ring
        heads, per_token = self.base.all_heads, 2 * itemsize * self.base.head_dim
        saved = per_token * (context - sink - window)  # by each head that streams
        native = self.native_bytes(context, itemsize)
        for count in range(heads + 1):
            if native - count * saved <= budget_bytes:
                return self.stream_heads(count, sink, window)
        raise PlanError(
            f"a budget of {budget_bytes} bytes at {context} tokens is too small: the model takes "
            f"{native}, and {native - heads * saved} if every head keeps only the first {sink} "
            f"and last {window} tokens"
        )

    def compose(self, other: Plan) -> Plan:
        """The heads of this plan with the token budgets of `other`, but for heads that stream.

        How prompts are read is for the heads to say: budgeted heads read them densely anyway.

        Raises:
            PlanError: They are for different models, both choose heads or both have budgets, or
                are in the wrong order.
        """
        if self.base != other.base:
            raise PlanError(
                f"one plan is for {self.base.source}, the other for {other.base.source}, "
                "and these are different models"
            )
        if self.tensors or other.tensors:
            raise PlanError("a plan with codes cannot be composed with another one yet")
        if other.streaming_heads and self.streaming_heads:
            raise PlanError("both plans choose heads that stream")
        if self.policy is not None and other.policy is not None:
            raise PlanError("both plans have token budgets")
        if other.streaming_heads or self.policy is not None:
            raise PlanError(
                "the plans are in the wrong order",
                hint="First the one that chooses heads, then the one with token budgets.",
            )
        layers = tuple(
            replace(
                mine,
                budget=tuple(
                    None if streams else budget
                    for streams, budget in zip(mine.streaming, theirs.budgets, strict=True)
                ),
            )
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )
        budgets = any(layer.budget is not None for layer in layers)
        return replace(
            self,
            layers=layers,
            policy=other.policy if budgets else None,
            provenance=self.provenance + other.provenance,
        )

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raises PlanError if the plan belongs to another model than `checkpoint`."""
        found, base = base_of(checkpoint), self.base
        if found == base:
            return
        if found.shape != base.shape:
            what = f"the plan is for {base.shape}, the model has {found.shape}"
        elif found.config_hash != base.config_hash:
            what = "their shapes agree, but not their configs"
        else:
            what = "their configs agree, but not their weights"
        raise PlanError(
            f"the plan was made for {base.source} and not for {found.source}: {what}",
            hint="Calibrate again for this model.",
        )


# --------------------------------------------------------------------------------------- file


# No model has a number near the limit; without one, a file could hold numbers of a thousand digits.
_Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Full(_Strict):
    kind: Literal["full"]


class _Streaming(_Strict):
    kind: Literal["streaming"]
    sink: _Count
    window: _Count


class _Code(_Strict):
    kind: CodeKind
    keys: _Count
    values: _Count
    sink: _Count
    window: _Count


class _Layer(_Strict):
    heads: tuple[Annotated[_Full | _Streaming, Field(discriminator="kind")], ...]
    budget: tuple[_Count | None, ...] | None
    code: _Code | None = None


class _Base(_Strict):
    source: str
    fingerprint: str
    config_hash: str
    layers: _Count
    kv_heads: _Count
    head_dim: _Count


class _Document(_Strict):
    format_version: _Count
    base: _Base
    prefill: Prefill
    policy: Policy | None
    provenance: tuple[dict[str, JsonValue], ...]
    layers: tuple[_Layer, ...]


class _Version(BaseModel):
    model_config = ConfigDict(strict=True)
    format_version: _Count


def check_plan_output(path: Path, *, overwrite: bool = False) -> None:
    """Raises UsageError where a plan may not be written; `overwrite` replaces only a plan."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder {path.absolute().parent} does not exist.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, but a plan is a file.", hint="Name a file.")
    if not path.exists():
        return
    if not overwrite:
        raise UsageError(
            f"The output {path} exists already.", hint="Name another one, or give --overwrite."
        )
    try:
        with _opened(path):
            pass
    except PlanError as error:
        raise UsageError(
            f"{path} is not a plan, so --overwrite will not replace it.",
            hint="Name another output.",
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open safetensors file of a plan."""
    try:
        if not path.is_file():
            raise PlanError("it is not a file" if path.exists() else "there is no such file")
        with open_safetensors(path) as handle:
            if _KEY not in (handle.metadata() or {}):
                raise PlanError("it is a safetensors file, but not a plan")
            yield handle
    except CheckpointError as error:
        reason = _short(first_line(error.__cause__ or error))
        raise PlanError(f"it is no safetensors file: {reason}") from error
    except OSError as error:
        raise PlanError(f"it cannot be read: {error.strerror}") from error


def _parse(text: str) -> _Document:
    try:
        version = _Version.model_validate_json(text).format_version
        if version < 1:
            raise PlanError(f"its format is {version}, which no kvtool has written")
        if version > FORMAT_VERSION:
            raise PlanError(
                f"it was made by a newer kvtool: its format is {version}, not {FORMAT_VERSION}",
                hint="Update kvtool.",
            )
        return _Document.model_validate_json(text)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, details["loc"]))
        what = details["msg"][:1].lower() + details["msg"][1:]
        raise PlanError(_short(f"'{where}': {what}" if where else what)) from error


def _read_tensors(handle: Any, document: _Document) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Scores `[L, H]` fp32, or `None` where no layer has any, and the tensors of codes.

    Names and shapes are checked before anything is read.
    """
    layers, base = range(len(document.layers)), Base(**document.base.model_dump())
    stored = set(handle.keys())
    scores = [_SCORE.format(index) for index in layers]
    wanted: dict[str, tuple[int, ...]] = {}
    if stored & set(scores):
        wanted |= dict.fromkeys(scores, (base.kv_heads,))
    for index, layer in enumerate(document.layers):
        if layer.code is not None:
            wanted |= code_shapes(index, base)
    if unknown := sorted(stored - wanted.keys()):
        raise PlanError(f"it holds a tensor that no plan has: {_short(unknown[0])}")
    for name, shape in wanted.items():
        if name not in stored:
            why = "other layers have scores" if name in scores else "a code needs it"
            raise PlanError(f"{name} is missing, though {why}")
        view = handle.get_slice(name)
        found, dtype = list(view.get_shape()), view.get_dtype()
        if (found, dtype) != (list(shape), "F32"):
            raise PlanError(f"{name} is {dtype} {_short(str(found))} instead of F32 {list(shape)}")
    tensors = {name: handle.get_tensor(name) for name in wanted}
    if scores and scores[0] in tensors:
        return torch.stack([tensors.pop(name) for name in scores]), tensors
    return None, tensors


def _plan(document: _Document, scores: Tensor | None, tensors: Mapping[str, Tensor]) -> Plan:
    layers = []
    for index, layer in enumerate(document.layers):
        try:
            layers.append(_layer(layer))
        except PlanError as error:
            raise PlanError(f"layer {index}: {error}") from error
    return Plan(
        Base(**document.base.model_dump()),
        tuple(layers),
        document.prefill,
        document.policy,
        document.provenance,
        scores,
        tensors,
    )


def _layer(layer: _Layer) -> LayerPlan:
    rings = {(head.sink, head.window) for head in layer.heads if isinstance(head, _Streaming)}
    if len(rings) > 1:
        raise PlanError("its streaming heads differ in sink or window; they share one ring")
    sink, window = next(iter(rings), (0, 0))
    streaming = tuple(isinstance(head, _Streaming) for head in layer.heads)
    code = None if layer.code is None else CodePlan(**layer.code.model_dump())
    return LayerPlan(streaming, sink, window, layer.budget, code)


def _document(plan: Plan) -> dict[str, Any]:
    def heads(layer: LayerPlan) -> list[dict[str, Any]]:
        ring = {"kind": "streaming", "sink": layer.sink, "window": layer.window}
        return [ring if streams else {"kind": "full"} for streams in layer.streaming]

    def entry(layer: LayerPlan) -> dict[str, Any]:
        code = {} if layer.code is None else {"code": asdict(layer.code)}
        return {"heads": heads(layer), "budget": layer.budget, **code}

    return {
        "format_version": FORMAT_VERSION if plan.tensors else 1,  # older ones read what they know
        "base": asdict(plan.base),
        "prefill": plan.prefill,
        "policy": plan.policy,
        "provenance": plan.provenance,
        "layers": [entry(layer) for layer in plan.layers],
    }


def _intended_ring(provenance: dict[str, Any]) -> tuple[int, int] | None:
    """The sink and window that a calibration measured with, if it says so."""
    options = provenance.get("options")
    if not isinstance(options, dict):
        return None
    sink, window = options.get("sink"), options.get("window")
    if isinstance(sink, int) and isinstance(window, int) and sink >= 0 and window >= 1:
        return sink, window
    return None


def _json(value: Any) -> str:
    """The one JSON text of a value; NaN and infinity, which JSON lacks, are refused."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan cannot be written as JSON: {first_line(error)}") from error


def _named(scores: Tensor | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows = [] if scores is None else scores.detach().cpu().unbind()
    named = {_SCORE.format(index): row.clone() for index, row in enumerate(rows)}
    return named | {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " …"


# ------------------------------------------------------------------------------- what users type


def parse_budget(text: str, native: int) -> int:
    """A number of bytes from `55%` of `native`, or from a size such as `11520`, `1.5MiB`, `2GB`.

    Raises:
        UsageError: It is neither, is zero, or is a share above 100 %.
    """
    value, unit = _number(text)
    if unit == "%" and 0 < value <= 100:
        return int(value * native / 100)
    if unit not in _UNITS or value * _UNITS[unit] < 1:
        raise UsageError(
            f"the budget '{text}' is neither a share of the native cache such as 55% "
            "nor a size such as 300MB"
        )
    return int(value * _UNITS[unit])


def parse_share(text: str, total: int) -> int:
    """A count from `50%` of `total` (rounded down), or from the count itself.

    Raises:
        UsageError: It is neither, or is more than `total`.
    """
    value, unit = _number(text)
    count = value * total / 100 if unit == "%" else value
    if unit not in ("", "%") or not 0 <= count <= total or (not unit and count.denominator > 1):
        raise UsageError(f"'{text}' is neither a share such as 50% nor a number up to {total}")
    return int(count)


def _number(text: str) -> tuple[Fraction, str]:
    """The number that *text* starts with, -1 if there is none, and the unit behind it."""
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z%]*)\s*", text)
    return (Fraction(found[1]), found[2].lower()) if found else (Fraction(-1), "")
