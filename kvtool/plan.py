"""Plans: what every layer keeps of the past. A calibration makes one, the runtime obeys it.

A plan belongs to one model and changes none of its weights. On disk it is a single safetensors
file: the tensors are the scores that heads were chosen by, and the codes of layers. The header
holds one JSON document with the model's identity, how the plan was made, and what is kept.

Whatever is wrong with a plan is a :class:`~kvtool.errors.PlanError`, whether it was made by hand or
read from a file by a stranger.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import __version__, plan_file
from kvtool.bits import Bits, Tier
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Allocation, CodePlan, code_shapes, layers_of
from kvtool.errors import PlanError, UnsupportedModelError
from kvtool.factored import is_factored, model_config
from kvtool.fp8 import Scales
from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan, by_head
from kvtool.layout import describe, with_heads
from kvtool.plan_file import SCORE, Document, LayerEntry, short
from kvtool.plan_file import Policy as Policy
from kvtool.plan_file import Prefill as Prefill
from kvtool.sharing import SharedPlan
from kvtool.sparse import SparseReading
from kvtool.states import StatePlan
from kvtool.windows import WindowPlan

_NEWER_BITS = ("rest", "key_balance", "value_balance", "rank", "kept")
"""Fields of bits that a file leaves out where they say nothing: its oldest readers lack them."""
_KEPT: dict[str, type[StatePlan | LatentPlan | WindowPlan | SharedPlan]] = {
    "state": StatePlan, "latent": LatentPlan, "window": WindowPlan, "shared": SharedPlan,
}  # fmt: skip
_LONG = 2**40  # tokens: longer than every sliding window
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


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
    def channels(self) -> int:
        """K = H·D, numbers of the keys of one token and layer, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.layers} layers, {self.kv_heads} KV heads of size {self.head_dim}"


def base_of(checkpoint: Checkpoint) -> Base:
    """The identity of a model; samples of all its weights are read.

    Raises:
        UnsupportedModelError: Its attention is not known.
    """
    layouts = describe(model_config(checkpoint))
    layout = with_heads(layouts)
    shape, kind = (layout.kv_heads, layout.head_dim), (layout.kind, layout.stores_all)
    like = [x for x in layouts if (x.kind, x.stores_all) == kind]
    if any((x.kv_heads, x.head_dim) != shape for x in like):
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


def whole_layers(checkpoint: Checkpoint) -> tuple[LayerPlan, ...]:
    """The layers of a plan that keeps all that the model looks at, which has no latents."""
    layers = []
    for layout in describe(model_config(checkpoint)):
        kept: StatePlan | WindowPlan | SharedPlan | None
        kept = WindowPlan.of(layout) or SharedPlan.of(layout)
        if layout.mixer is not None:
            kept = StatePlan.of(layout.mixer)
        heads = 0 if kept is not None else layout.kv_heads
        layers.append(LayerPlan((False,) * heads, kept=kept))
    return tuple(layers)


def check_can_drop(checkpoint: Checkpoint, *, other: bool = False) -> None:
    """Raises UnsupportedModelError where no head can keep less than the model gives it.

    Args:
        other: Layers that keep something else than KV heads, or whose past others read, are no
            hindrance: it may have few bits.
    """
    layouts = describe(model_config(checkpoint))
    if not other and (is_factored(checkpoint) or any(x.kind == "mla" for x in layouts)):
        raise UnsupportedModelError(
            f"{checkpoint.source} has MLA: its heads share one latent, so none can keep or "
            "read less alone",
            hint="calibrate quantization packs latents.",
        )
    lent = any(layout.stores_all and layout.read for layout in layouts)
    bounded = all(layout.shares or layout.sliding_window is not None for layout in layouts)
    if bounded and not (lent and other):
        if lent:
            raise UnsupportedModelError(
                f"{checkpoint.source} has no layer that sees the whole past and whose keys and "
                "values no other layer reads: only such layers are planned"
            )
        raise UnsupportedModelError(
            f"{checkpoint.source} has a sliding window in all layers: what they keep is bounded, "
            "and streaming heads, token budgets, codes, few bits and sparse reading are not for "
            "them"
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
        codes: What is stored of tokens instead of keys and values: one entry for the first layers
            that see the whole past, the next for those behind them, up to the last; or none at all.
        allocation: How a budget is shared among codes.
        scores: `[L, H]` fp32, finite: how much a head needs the whole past (higher: more). They
            are kept so that another size is a slice and not another calibration.
        tensors: Of codes, fp32, by their names in the file: see :func:`kvtool.codes.code_shapes`.

    Raises:
        PlanError: The parts contradict each other.
    """

    base: Base
    layers: tuple[LayerPlan, ...]
    prefill: Prefill = "dense"
    policy: Policy | None = None
    provenance: tuple[dict[str, Any], ...] = ()
    scores: Tensor | None = None
    codes: tuple[CodePlan, ...] = ()
    allocation: Allocation | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base, budgets = self.base, any(layer.budget is not None for layer in self.layers)
        if min(base.layers, base.kv_heads, base.head_dim) < 1:
            raise PlanError(f"no model has {base.shape}")
        if len(self.layers) != base.layers:
            raise PlanError(f"{len(self.layers)} layers are planned, of a model with {base.layers}")
        for index, layer in enumerate(self.layers):
            if layer.bits is not None and layer.bits.rank > base.head_dim:
                raise PlanError(
                    f"layer {index} has factors of rank {layer.bits.rank} for {base.head_dim} "
                    "channels"
                )
            if layer.bits is not None and (layer.bits.kept or 0) > base.head_dim:
                raise PlanError(
                    f"layer {index} keeps {layer.bits.kept} numbers of values of {base.head_dim}"
                )
            for what, rows in by_head(layer.bits):
                for row in rows:
                    if len(row) != base.head_dim:
                        raise PlanError(
                            f"layer {index} has {what} of {len(row)} channels of {base.head_dim}"
                        )
            labels = () if layer.sparse is None else layer.sparse.channels
            if (last := max((max(row) for row in labels), default=0)) >= base.head_dim:
                raise PlanError(f"layer {index} has a label channel {last} of {base.head_dim}")
            if isinstance(layer.kept, SharedPlan) and layer.packed:
                own = SharedPlan(base.kv_heads, base.head_dim)
                if layer.kept != own:
                    raise PlanError(f"layer {index} packs {layer.kept}, of a model with {own}")
            if layer.kept is None and len(layer.streaming) != base.kv_heads:
                raise PlanError(
                    f"layer {index} plans {len(layer.streaming)} KV heads of {base.kv_heads}"
                )
        if budgets and self.policy is None:
            raise PlanError("there are token budgets, but no policy that chooses the tokens")
        if self.policy is not None and not budgets:
            raise PlanError(f"the policy {self.policy} has no token budget to apply")
        plan_file.as_json(self.provenance)
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
        if bool(self.codes) != (self.allocation is not None):
            raise PlanError("codes and how they share a budget come together")
        if self.codes:
            layers, there = sum(code.layers for code in self.codes), len(self.planned_layers)
            if layers != there:
                whole = f" that see the whole past, of {len(self.layers)}"
                others = whole if there < len(self.layers) else ""
                raise PlanError(f"codes cover {layers} layers, of a model with {there}{others}")
            latents = any(isinstance(layer.kept, LatentPlan) for layer in self.layers)
            plain = all(layer.plain for layer in self.layers if layer.kept is None)
            if self.scores is not None or latents or not plain:
                raise PlanError("a layer that codes its tokens keeps all of them in all heads")
        wanted: dict[str, tuple[int, ...]] = {}
        for index, code in enumerate(self.codes):
            stored = []
            for part, width in zip(code.parts, code.widths, strict=True):
                name, full = f"codes.{index}.{part}.spectrum", code.full_width(self.base.channels)
                if name not in self.tensors:
                    raise PlanError(f"the tensor {name} of a code is missing")
                stored.append(self.tensors[name].numel())
                if not width <= stored[-1] <= full:
                    raise PlanError(
                        f"a code stores {width} numbers of {full}, and has {stored[-1]} to choose"
                    )
            wanted |= code_shapes(index, code, self.base.channels, stored)
        if missing := sorted(wanted.keys() - self.tensors.keys()):
            raise PlanError(f"the tensor {missing[0]} of a code is missing")
        if unknown := sorted(self.tensors.keys() - wanted.keys()):
            raise PlanError(f"it holds a tensor that no plan has: {short(unknown[0])}")
        for name, shape in wanted.items():
            tensor = self.tensors[name]
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise PlanError(
                    f"{name} is {tensor.dtype} {short(str(list(tensor.shape)))} instead of "
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
            with plan_file.opened(path) as (handle, text):
                document = plan_file.parse(text)
                return _plan(document, plan_file.read_tensors(handle, document))
        except PlanError as error:
            raise PlanError(f"{path}: {error}", error.hint) from error

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Writes the plan as one file, in one rename. The same plan always gives the same bytes.

        Raises:
            UsageError: See :func:`check_plan_output`.
            PlanError: The provenance is not JSON.
        """
        plan_file.check_plan_output(path, overwrite=overwrite)
        text = plan_file.as_json(_document(self))
        tensors = dict(self.tensors)
        if self.scores is not None:
            tensors |= {SCORE.format(i): row.clone() for i, row in enumerate(self.scores)}
        _plan(plan_file.parse(text), tensors)  # what cannot be read must not be written
        plan_file.write(path, text, tensors)

    # -------------------------------------------------------------------------------- sizes

    @property
    def planned_layers(self) -> list[int]:
        """The layers with KV heads that see the whole past, which no other layer reads."""
        return [index for index, layer in enumerate(self.layers) if layer.kept is None]

    @property
    def planned_heads(self) -> int:
        """KV heads of all these layers."""
        return sum(len(layer.streaming) for layer in self.layers)

    @property
    def coded_layers(self) -> list[list[int]]:
        """By code, the layers that share it."""
        return layers_of(self.codes, self.planned_layers)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what is kept of the start of a prompt is the same whatever comes behind it: no
        budget chooses among all of its tokens, and none are dropped or rounded at its end alone.
        """
        at_end = any(
            any(layer.streaming) or layer.packed or isinstance(layer.kept, LatentPlan)
            for layer in self.layers
        )
        whole = self.prefill == "streamed" or not (at_end or self.codes)
        return whole and self.policy is None

    @property
    def knows_heads(self) -> bool:
        """Whether it tells heads apart: some stream, or have token budgets."""
        return any(any(layer.streaming) or layer.budget is not None for layer in self.layers)

    @property
    def streaming_heads(self) -> int:
        """How many heads stream."""
        return sum(sum(layer.streaming) for layer in self.layers)

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of one sequence after a prompt of N `tokens`.

        With head size D and b bytes per number (`itemsize`), keys and values of a head take
        `2 b D` per token; a full head keeps N tokens, a streaming one `sink + window` (its ring is
        allocated whole, also for a short prompt), and one with a budget `min(N, budget)`. A code
        takes its width per token, and `sink + window` exact tokens of every head of its layers. If
        its numbers have bits, b is of the exact tokens alone: see :meth:`CodePlan.part_bytes`, and
        :meth:`Bits.cache_bytes` for full heads with bits.
        """
        if self.codes:
            channels = self.base.channels
            coded = sum(code.cache_bytes(tokens, channels, itemsize) for code in self.codes)
            return coded + self.bounded_bytes(tokens, itemsize)
        size = self.base.head_dim
        return sum(layer.cache_bytes(tokens, size, itemsize) for layer in self.layers)

    def bounded_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the layers without planned heads, such as those with a sliding window."""
        kept, size = (x for x in self.layers if x.kept is not None), self.base.head_dim
        return sum(layer.cache_bytes(tokens, size, itemsize) for layer in kept)

    def read_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of N `tokens` that a query reads: of a head that is read sparsely r N
        numbers of keys, and keys and values of k tokens; of all others what is kept.
        """
        size = self.base.head_dim
        unread = sum(layer.unread_bytes(tokens, size, itemsize) for layer in self.layers)
        return self.cache_bytes(tokens, itemsize) - unread

    def native_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the cache of one sequence without a plan."""
        size = self.base.head_dim
        return sum(layer.native_bytes(tokens, size, itemsize) for layer in self.layers)

    def native_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that every further token of a long text costs without a plan: states and sliding
        windows do not grow.
        """
        return self.native_bytes(_LONG + 1, itemsize) - self.native_bytes(_LONG, itemsize)

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that every further token costs: streaming heads overwrite, all others append."""
        size = self.base.head_dim
        if self.codes:
            kept = [layer for layer in self.layers if layer.kept is not None]
            bounded = sum(layer.token_bytes(size, itemsize) for layer in kept)
            return sum(code.token_bytes(itemsize) for code in self.codes) + math.ceil(bounded)
        return math.ceil(sum(layer.token_bytes(size, itemsize) for layer in self.layers))

    @property
    def rings(self) -> tuple[LayerPlan | CodePlan, ...]:
        """By layer, what knows how many first and last tokens it keeps exactly."""
        found: list[LayerPlan | CodePlan] = [*self.layers]
        for code, own in zip(self.codes, self.coded_layers, strict=True):
            for layer in own:
                found[layer] = code
        return tuple(found)

    def check_context(self, checkpoint: Checkpoint) -> None:
        """Raises PlanError if a layer keeps more tokens exactly than `checkpoint` has positions."""
        positions = int(model_config(checkpoint).max_position_embeddings)
        for index, ring in enumerate(self.rings):
            if ring.exact > positions:
                raise PlanError(
                    f"layer {index} keeps {ring.exact} tokens exactly, more than the {positions} "
                    f"positions of {checkpoint.source}"
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
        made = f"the plan was made for {base.source} and not for {found.source}: {what}"
        if found.source == base.source:
            made = f"{base.source} is not what it was when the plan was made: {what}"
        raise PlanError(
            made,
            hint="Calibrate again for this model.",
        )


# --------------------------------------------------------------------------------------- file


def _plan(document: Document, tensors: dict[str, Tensor]) -> Plan:
    layers = []
    for index, layer in enumerate(document.layers):
        try:
            layers.append(_layer(layer))
        except PlanError as error:
            raise PlanError(f"layer {index}: {error}") from error
    codes = {name: tensor for name, tensor in tensors.items() if name.startswith("codes.")}
    scores = [tensors[name] for i in range(len(layers)) if (name := SCORE.format(i)) in tensors]
    return Plan(
        Base(**document.base.model_dump()),
        tuple(layers),
        document.prefill,
        document.policy,
        document.provenance,
        torch.stack(scores) if scores else None,
        tuple(CodePlan(**code.model_dump()) for code in document.codes),
        document.allocation,
        codes,
    )


def _layer(layer: LayerEntry) -> LayerPlan:
    rings = {(x.sink, x.window) for x in layer.heads if isinstance(x, plan_file.Streaming)}
    if len(rings) > 1:
        raise PlanError("its streaming heads differ in sink or window; they share one ring")
    sink, window = next(iter(rings), (0, 0))
    streaming = tuple(isinstance(head, plan_file.Streaming) for head in layer.heads)
    bits = None
    if layer.bits is not None:
        said = layer.bits.model_dump()
        rest = said.pop("rest")
        bits = Bits(**said, rest=None if rest is None else Tier(**rest))
    kept: StatePlan | LatentPlan | WindowPlan | SharedPlan | None = None
    if layer.kept is not None:
        kept = _KEPT[layer.kept.kind](**layer.kept.model_dump(exclude={"kind"}))
    sparse = None if layer.sparse is None else SparseReading(**layer.sparse.model_dump())
    scales = None if layer.scales is None else Scales(**layer.scales.model_dump())
    return LayerPlan(streaming, sink, window, layer.budget, bits, kept, sparse, scales)


def _document(plan: Plan) -> dict[str, Any]:
    def heads(layer: LayerPlan) -> list[dict[str, Any]]:
        ring = {"kind": "streaming", "sink": layer.sink, "window": layer.window}
        return [ring if streams else {"kind": "full"} for streams in layer.streaming]

    document: dict[str, Any] = {
        "format_version": _format(plan),
        "base": asdict(plan.base),
        "prefill": plan.prefill,
        "policy": plan.policy,
        "provenance": plan.provenance,
        "layers": [{"heads": heads(x), "budget": x.budget} for x in plan.layers],
    }
    if plan.codes:
        codes = [asdict(code) for code in plan.codes]
        document |= {"codes": codes, "allocation": plan.allocation}
    names = {kind: name for name, kind in _KEPT.items()}
    for entry, layer in zip(document["layers"], plan.layers, strict=True):
        if layer.bits is not None:
            said = asdict(layer.bits).items()
            entry["bits"] = {name: x for name, x in said if x or name not in _NEWER_BITS}
        if layer.kept is not None:
            entry["kept"] = {"kind": names[type(layer.kept)], **asdict(layer.kept)}
            if isinstance(layer.kept, StatePlan) and layer.kept.rule == "mamba2":
                del entry["kept"]["rule"]  # older versions know no other
        if layer.sparse is not None:
            entry["sparse"] = asdict(layer.sparse)
        if layer.scales is not None:
            entry["scales"] = asdict(layer.scales)
    return document


def _format(plan: Plan) -> int:
    """The oldest format that knows what is in a plan, so that older versions of kvtool read it."""
    bits = [layer.bits for layer in plan.layers if layer.bits is not None]
    kept = [layer.kept for layer in plan.layers if layer.kept is not None]
    tiers = any(x.rest or x.key_balance or x.value_balance or x.rank or x.kept for x in bits)
    needed = {
        3: bool(plan.codes),  # as they are now; 2 had others
        4: bool(bits),
        5: tiers or bool(kept),
        6: any(layer.sparse is not None for layer in plan.layers),
        7: any(isinstance(x, WindowPlan) for x in kept),
        8: any(isinstance(x, StatePlan) and x.rule != "mamba2" for x in kept),  # Gated DeltaNet
        9: any(layer.scales is not None for layer in plan.layers)
        or any(isinstance(x, SharedPlan) for x in kept),
        10: any(isinstance(x.kept, SharedPlan) and x.packed for x in plan.layers),
    }
    return max((version for version, there in needed.items() if there), default=1)
