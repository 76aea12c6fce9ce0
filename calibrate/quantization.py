"""Plans that store what layers keep as integers of few bits: heads (`head_bits.py`), the codes of a
plan (`code_bits.py`), the latents of MLA (`latents.py`) and the states of Mamba-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kvtool.bits import Bits
from kvtool.calibrate import code_bits, fp8_scales, head_bits, latents
from kvtool.calibrate.bit_options import FP8, QuantizationOptions
from kvtool.calibrate.projections import text_windows
from kvtool.calibrate.statistics import WINDOW, StatisticsOptions, collect
from kvtool.calibrate.statistics import memory_bytes as memory_of_statistics
from kvtool.calibrate.statistics_file import Statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.corpus import calibration_text
from kvtool.errors import UsageError
from kvtool.factored import latent_sizes, model_config
from kvtool.fp8 import is_static
from kvtool.kernels.quantise import BITS
from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan
from kvtool.layout import describe
from kvtool.plan import Base, Plan, check_can_drop, provenance_of, whole_layers
from kvtool.progress import Progress, silent
from kvtool.states import CHUNKS, StatePlan

_FITTED = {
    "rotatekv": head_bits.ordered,
    "zipcache": head_bits.separated,
    "mikv": head_bits.balanced,
}
"""Methods that ask statistics of the model's keys, values and queries."""


def everything(checkpoint: Checkpoint, base: Base, options: QuantizationOptions) -> Plan:
    """The plan that every layer keeps what it keeps without one; latents with 8 bits."""
    if sizes := latent_sizes(checkpoint):
        _check_for_latents(options)
        ring = options.group, options.sink, options.window
        kept = [LatentPlan(r, rope, (max(BITS),) * (r + rope), *ring) for r, rope in sizes]
        return Plan(base, tuple(LayerPlan((), kept=one) for one in kept))
    # An engine with an fp8 cache reads it in prompts as well.
    return Plan(base, whole_layers(checkpoint), "streamed" if options.method == FP8 else "dense")


def _check_for_latents(options: QuantizationOptions) -> None:
    if options.method in (FP8, *_FITTED):
        raise UsageError(f"{options.named} is for keys and values of heads, and not for latents")


def with_states(plan: Plan, bits: int | None) -> Plan:
    """The plan with so many bits for all states of Mamba-2; None for 8 where they have none yet."""
    layers = []
    for layer in plan.layers:
        state = layer.kept
        if isinstance(state, StatePlan) and state.rule == "mamba2" and (bits or not state.bits):
            width = bits or 8
            layer = replace(layer, kept=replace(state, bits=width, chunk=CHUNKS[width]))
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


def _with_states(plan: Plan, options: QuantizationOptions) -> Plan:
    """Of engines with an fp8 cache, the states stay as they are unless bits are asked for."""
    as_they_are = options.method == FP8 and options.states is None
    return plan if as_they_are else with_states(plan, options.states)


def calibrate_quantization(
    checkpoint: Checkpoint,
    options: QuantizationOptions,
    plan: Plan,
    budget_bytes: int | None,
    itemsize: int,
    *,
    report: Progress = silent,
) -> Plan:
    """The plan with bits for all that it keeps of every token.

    Args:
        plan: What that is.
        budget_bytes: Of a sequence of `context` tokens, where `options` have no bits.
        itemsize: Bytes per exact number that the budget is stated for.

    Raises:
        UnsupportedModelError: All layers have a sliding window.
        UsageError: The budget is too small, the text too short, or all heads drop tokens.
    """
    check_can_drop(checkpoint, other=True)
    plan_ahead(plan, options, budget_bytes, itemsize)
    before, plan = plan.provenance, _with_states(plan, options)
    method: str = options.method
    corpus, tokens = None, 0
    found: dict[str, Any] = {}
    if not options.heads:
        method = "states"
    elif method == FP8 and is_static(checkpoint.cache_scheme):
        plan = fp8_scales.of_checkpoint(checkpoint, plan, options.window)
        found = {"scales": "of the checkpoint"}
        options = replace(options, data=None, tokens=0)
    elif method == FP8 or method in _FITTED:
        wanted = StatisticsOptions(
            data=options.data, tokens=options.tokens, sinks=options.sink, seed=options.seed
        )
        statistics = collect(checkpoint, wanted, report=report)
        corpus, tokens = str(statistics.metadata["corpus"]), statistics.tokens
        plan = _fitted(plan, options, statistics)
    elif method != "aware":
        plan = alike(plan, options.everywhere())
    else:
        windows, offsets = text_windows(checkpoint, options.data, options.tokens, options.seed)
        corpus, tokens = calibration_text(options.data).id, windows.numel()
        texts = (windows, offsets, options.seed, report)
        allowed = allowed_bytes(plan, options, budget_bytes, itemsize)
        if latents.latents_of(plan):
            plan, found = latents.shared(plan, latents.harms(checkpoint, plan, *texts), allowed)
        elif plan.codes:
            measured = code_bits.harms(checkpoint, plan, *texts)
            plan, found = code_bits.shared(plan, *measured, allowed, itemsize)
        else:
            offered = head_bits.offered(options.everywhere())
            harm = head_bits.harms(checkpoint, plan, offered, *texts)
            bits, found = head_bits.shared(plan, offered, harm, allowed)
            plan = packed(plan, bits)
    asked = {**asdict(options), "budget_bytes": budget_bytes, "itemsize": itemsize}
    said = provenance_of(method, asked, corpus, tokens, **found)
    return replace(plan, provenance=(*before, said))


def _fitted(plan: Plan, options: QuantizationOptions, statistics: Statistics) -> Plan:
    """The plan with what a method makes of statistics, for the heads that keep everything."""
    if options.method == FP8:
        return fp8_scales.of_statistics(statistics, plan, options.window)
    first, fit = options.everywhere(), _FITTED[options.method]
    bits = [first] * len(plan.layers)
    for index in (i for i, layer in enumerate(plan.layers) if layer.full_heads):
        bits[index] = fit(first, statistics.layer(index), plan.base)
    return packed(plan, bits)


def packed(plan: Plan, bits: Sequence[Bits]) -> Plan:
    """The plan with these bits for the heads of each layer that keep everything."""
    layers = [
        replace(layer, bits=own if layer.full_heads else None)
        for layer, own in zip(plan.layers, bits, strict=True)
    ]
    return replace(plan, layers=tuple(layers))


def alike(plan: Plan, bits: Bits) -> Plan:
    """The plan with the same bits everywhere; of latents and codes those of keys."""
    if latents.latents_of(plan):
        return latents.alike(plan, bits.keys)
    if plan.codes:
        return replace(plan, codes=tuple(replace(code, bits=bits.keys) for code in plan.codes))
    return packed(plan, [bits] * len(plan.layers))


def plan_ahead(
    plan: Plan, options: QuantizationOptions, budget_bytes: int | None, itemsize: int
) -> Plan:
    """The plan with the same bits or any scales everywhere: without a budget, it takes the bytes
    of the one that will be made, and with one it keeps as many tokens exactly.

    Raises:
        UsageError: There is nothing to pack, or it is packed already; the options are out of range,
            or the budget is too small.
    """
    already = any(layer.packed for layer in plan.layers)
    if already or any(code.bits is not None for code in plan.codes):
        raise UsageError("the plan of --plan has bits already", hint="Give the one it was made of.")
    if any(layer.sparse is not None for layer in plan.layers):
        raise UsageError("the plan of --plan reads sparsely, which few bits do not go with yet")
    options.check()
    plan = _with_states(plan, options)
    if not options.heads:
        return plan
    if latents.latents_of(plan):
        _check_for_latents(options)
    same = options.bits is None or options.bits[0] == options.bits[1]
    if latents.latents_of(plan):
        if options.method not in ("aware", "kivi") or options.read != "absorbed":
            raise UsageError(
                "latents get their bits by what predictions feel, or the same for all, and are "
                "read as stored",
                hint="--method aware or kivi, and no --read rebuilt",
            )
        if not same:
            raise UsageError("latents are keys and values at once, which have the same bits")
    elif plan.codes:
        if options.method != "aware":
            raise UsageError(
                f"{options.named} is for keys and values, and the plan of --plan stores codes "
                "instead",
                hint="--method aware with bits such as 4",
            )
        if not same:
            raise UsageError("the numbers of a code have the same bits, of keys and of values")
    elif not any(layer.full_heads for layer in plan.layers):
        raise UsageError("in the plan of --plan no head keeps everything, so none can be packed")
    if options.method == FP8:
        return fp8_scales.any_scales(plan, options.window)
    first = options.everywhere()
    planned = alike(plan, first)
    if budget_bytes is None:
        return planned
    fewest = replace(first, keys=min(BITS), values=min(BITS), kept=None)
    needed = alike(plan, fewest).cache_bytes(options.context, itemsize)
    if needed > budget_bytes:
        raise UsageError(
            f"a budget of {budget_bytes} bytes at {options.context} tokens is too small: with "
            f"{min(BITS)} bits everywhere, the cache takes {needed}"
        )
    return planned


def allowed_bytes(
    plan: Plan, options: QuantizationOptions, budget_bytes: int | None, itemsize: int
) -> int:
    """Bytes that a block of tokens, or a token with codes, may take in all layers together."""
    first = options.everywhere()
    same = alike(plan, first)
    if kept := latents.latents_of(same):
        units, each = kept[0].blocks(options.context), sum(x.block_bytes() for x in kept)
    elif plan.codes:
        units, each = options.context, sum(code.token_bytes(itemsize) for code in same.codes)
    else:
        size, heads = plan.base.head_dim, sum(len(layer.full_heads) for layer in plan.layers)
        units, each = first.blocks(options.context), heads * first.block_bytes(size)
    if budget_bytes is None:
        return each
    return each + (budget_bytes - same.cache_bytes(options.context, itemsize)) // max(1, units)


def memory_bytes(checkpoint: Checkpoint, options: QuantizationOptions) -> int:
    """About what a calibration holds at once, besides Python and its libraries."""
    static = options.method == FP8 and is_static(checkpoint.cache_scheme)
    if static or options.method not in ("aware", FP8, *_FITTED):
        return 0
    if options.method != "aware":
        return memory_of_statistics(LayerStream(checkpoint), options.tokens)
    weights = 4 * checkpoint.parameters
    config = model_config(checkpoint)
    length = min(WINDOW, int(config.max_position_embeddings))
    return weights + 4 * 4 * sum(x.cached_values for x in describe(config)) * length
