"""Plans that store keys and values as integers of few bits: which layer gets how many.

* **kivi** (arXiv 2402.02750): keys with a scale per channel, values with one per token, the same
  bits in every layer.
* **rotatekv** (IJCAI 2025): keys and values with scales per token, behind a Hadamard transform of
  each head and with the channels of keys in the order of their means, so that those that share a
  scale are alike. The order lies within a head, where the paper's goes over several.
* **zipcache** (arXiv 2405.14256): kivi's axes in two tiers of tokens, and the channel-separable
  quantiser for values: each channel is divided by c = √max|v_c| before a token's numbers share a
  scale. The maximum is that of a calibration text, where the paper's is that of the text at hand:
  it takes no bytes, and brings half (2 bits) to most (4 bits) of what factors per block would.
* **mikv** (arXiv 2402.18096): two tiers of tokens with scales per token, ranked as for zipcache,
  where the paper asks a policy that would evict the lower one. What an outlier channel of
  keys does to the others is evened out between keys and queries: with the balancer
  b_c = √(max|q_c| / max|k_c|), b ∘ k is stored and q / b reads it.
* **gear** (arXiv 2403.05527): kivi's codes, and of what they leave out of a block of keys or values
  an approximation of rank r.
* **mustafar** (arXiv 2505.22913): kivi's keys; of each value the numbers of largest magnitude,
  exactly, and a bitmap. The paper leaves numbers of keys out as well.
* **aware**: kivi's axes; bits of keys and of values layer by layer, how far their ranges are
  clipped, and whether values are transformed, by the harm that predictions feel.

With g the gradient of a prediction by what a token has left in the cache (`felt.py`), and e the
error with which that is read, an option of a layer does the harm ½ Σ_tokens (gᵀ e)² nats per
prediction. So all options of all layers are compared after one backward pass per window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvtool.attention import Rope, describe
from kvtool.bits import Bits, Factors, Tier, Turned, read_keys, read_values, turn
from kvtool.calibrate import latents
from kvtool.calibrate.allocate import choose
from kvtool.calibrate.felt import far_reads, joined
from kvtool.calibrate.levelled import levelled_rows
from kvtool.calibrate.projections import Read, Report, text_windows
from kvtool.calibrate.statistics import WINDOW, LayerStatistics, StatisticsOptions, collect
from kvtool.calibrate.statistics import memory_bytes as memory_of_statistics
from kvtool.calibrate.stream import LayerStream
from kvtool.calibrate.tail import TailModel
from kvtool.calibrate.whole import Kept, WholeModel
from kvtool.checkpoint import Checkpoint
from kvtool.codes import CodePlan, Fitted, Part, Projection
from kvtool.corpus import calibration_text
from kvtool.errors import PlanError, UsageError
from kvtool.factored import latent_sizes, model_config
from kvtool.kernels.quantise import BITS, fake_quantise
from kvtool.latent_bits import LatentPlan
from kvtool.mamba import shape_of
from kvtool.plan import Base, LayerPlan, Plan, check_can_drop, provenance_of
from kvtool.states import CHUNKS, StatePlan

Method = Literal["aware", "kivi", "rotatekv", "zipcache", "mikv", "gear", "mustafar"]
METHODS: tuple[Method, ...] = get_args(Method)
SALIENT: dict[Method, float] = {"zipcache": 0.6, "mikv": 0.5}
"""Of methods with two tiers of tokens, the share of the upper one."""
RANK = 2
"""Of gear, as GEAR's code has for blocks that come while it decodes."""
CLIPS = {2: (1.0, 0.85, 0.7), 3: (1.0, 0.85)}
"""Shares of a range to choose from: few codes are better spent on where most numbers are, if
predictions do not feel the others."""
_BLIND = ("kivi", "gear", "mustafar")  # ask no text
AUTO = "auto"
"""As many bits as a budget allows."""


@dataclass(frozen=True)
class QuantizationOptions:
    """Everything that determines the bits besides the model and the plan of its heads.

    Attributes:
        bits: Of keys and of values; of `aware` their mean, as bytes. None if a budget says it. Of
            mustafar, both are those of keys.
        group: See :class:`~kvtool.bits.Bits`.
        rest: Of a method with two tiers of tokens, the bits of the lower one, 2 if not given.
        salient: Tokens of a block of `group` that are in the upper one; :data:`SALIENT` if not
            given.
        rank: Of gear; :data:`RANK` if not given.
        kept: Of mustafar, which needs it: numbers of each value that are kept.
        read: Whether keys are stored after RoPE and read as they are, or before it and rebuilt.
        context: Tokens of the sequence that a budget is for.
        sink, window: Tokens that are kept exactly.
        states: Bits of the states of Mamba-2 layers.
        heads: Whether heads are packed: those of a hybrid may be left as they are.
    """

    method: Method = "aware"
    bits: tuple[int, int] | None = (4, 4)
    group: int = 64
    read: Read = "absorbed"
    context: int = 4096
    sink: int = 4
    window: int = 64
    data: str | None = None
    tokens: int = 16384
    seed: int = 0
    rest: tuple[int, int] | None = None
    salient: int | None = None
    rank: int | None = None
    states: int | None = None
    heads: bool = True
    kept: int | None = None


def parse_tiers(text: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Bits from what :func:`parse_bits` reads, or from two of them such as `4/2`: those of the
    tokens with most attention, and of the others.

    Raises:
        UsageError: It is none of them.
    """
    upper, *lower = text.split("/")
    found = [parse_bits(x) for x in (upper, *lower)]
    if len(found) > 2 or (lower and None in found):
        raise UsageError(f"--bits {text} is not possible: two tiers have bits such as 4/2")
    most, rest = found[0], found[-1]
    if (
        most is not None
        and rest is not None
        and any(x < y for x, y in zip(most, rest, strict=True))
    ):
        raise UsageError(f"--bits {text} gives tokens with more attention fewer bits")
    return found[0], found[1] if lower else None


def split_states(text: str) -> tuple[str, int | None]:
    """What a text such as `K4V2S8` says of heads, and of states: None where it does not."""
    found = re.fullmatch(r"(.*)[sS](\d)", text)
    if not found:
        return text, None
    heads, bits = found[1], int(found[2])
    if bits not in CHUNKS:
        raise UsageError(f"--bits {text} is not possible: states have 4 or 8 bits")
    return heads, bits


def parse_bits(text: str) -> tuple[int, int] | None:
    """Bits of keys and values from `4`, `K4V2` or `auto`.

    Raises:
        UsageError: It is none of them.
    """
    if text == AUTO:
        return None
    found = re.fullmatch(r"(\d)|[kK](\d)[vV](\d)", text)
    if found:
        both, keys, values = found.groups()
        pair = int(keys or both), int(values or both)
        if all(bits in BITS for bits in pair):
            return pair
    raise UsageError(
        f"--bits {text} is not possible: it is 2, 3, 4 or 8, keys and values apart such as K4V2, "
        f"or {AUTO}"
    )


def everything(checkpoint: Checkpoint, base: Base, options: QuantizationOptions) -> Plan:
    """The plan that every layer keeps what it keeps without one; latents with 8 bits."""
    if sizes := latent_sizes(checkpoint):
        ring = options.group, options.sink, options.window
        kept = [LatentPlan(r, rope, (max(BITS),) * (r + rope), *ring) for r, rope in sizes]
        return Plan(base, tuple(LayerPlan((), kept=one) for one in kept))
    config, heads = model_config(checkpoint), LayerPlan((False,) * base.kv_heads)
    layers = tuple(
        LayerPlan((), kept=StatePlan.of(shape_of(config))) if layout.kind == "mamba" else heads
        for layout in describe(config)
    )
    return Plan(base, layers)


def with_states(plan: Plan, bits: int | None) -> Plan:
    """The plan with so many bits for all states; None for 8 where they have none yet."""
    layers = []
    for layer in plan.layers:
        if isinstance(state := layer.kept, StatePlan) and (bits or state.bits is None):
            width = bits or 8
            layer = replace(layer, kept=replace(state, bits=width, chunk=CHUNKS[width]))
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


def calibrate_quantization(
    checkpoint: Checkpoint,
    options: QuantizationOptions,
    plan: Plan,
    budget_bytes: int | None,
    itemsize: int,
    *,
    report: Report = lambda stage, done, total: None,
) -> Plan:
    """The plan with bits for all heads that it keeps everything of.

    Args:
        plan: Which heads those are.
        budget_bytes: Of a sequence of `context` tokens, where `options` have no bits.
        itemsize: Bytes per exact number that the budget is stated for.

    Raises:
        UnsupportedModelError: Layers have a sliding window.
        UsageError: The budget is too small, the text too short, or all heads drop tokens.
    """
    check_can_drop(checkpoint, other=True)
    plan_ahead(plan, options, budget_bytes, itemsize)
    try:
        first = uniform(options)
    except PlanError as error:
        raise UsageError(f"--method {options.method}: {error}") from error
    plan = with_states(plan, options.states)
    corpus, tokens = None, 0
    found: dict[str, Any] = {}
    asked = {**asdict(options), "budget_bytes": budget_bytes, "itemsize": itemsize}
    if plan.codes:
        return _codes(checkpoint, options, plan, budget_bytes, itemsize, asked, report)
    if not options.heads:
        return replace(plan, provenance=(*plan.provenance, provenance_of("states", asked, None, 0)))
    if latents.latents_of(plan):
        harm_of = latents.harms(
            checkpoint, plan, options.data, options.tokens, options.seed, report
        )
        allowed = _latent_bytes(plan, options, budget_bytes, itemsize)
        made, found = latents.shared(plan, harm_of, allowed)
        corpus = calibration_text(options.data).id
        said = provenance_of(options.method, asked, corpus, options.tokens, **found)
        return replace(made, provenance=(*plan.provenance, said))
    if options.method in _BLIND:
        bits = [first] * len(plan.layers)
    elif options.method != "aware":
        wanted = StatisticsOptions(
            data=options.data, tokens=options.tokens, sinks=options.sink, seed=options.seed
        )
        statistics = collect(checkpoint, wanted, report=report)
        corpus, tokens = str(statistics.metadata["corpus"]), statistics.tokens
        fitted = {"rotatekv": ordered, "zipcache": separated, "mikv": balanced}[options.method]
        layers = range(len(plan.layers))
        bits = [fitted(first, statistics.layer(index), plan.base) for index in layers]
    else:
        windows, offsets = text_windows(checkpoint, options.data, options.tokens, options.seed)
        first.check_windows(windows.shape[1])
        offered = options_of(first)
        harm = harms(checkpoint, plan, offered, windows, offsets, options, report)
        bits, found = shared(plan, options, harm, budget_bytes, itemsize)
        corpus, tokens = calibration_text(options.data).id, windows.numel()
    return packed(plan, bits, provenance_of(options.method, asked, corpus, tokens, **found))


def uniform(options: QuantizationOptions) -> Bits:
    """Every layer of a method alike, at 4 bits if the options have none."""
    keys, values = options.bits or (4, 4)
    turned: Turned = "both" if options.method == "rotatekv" else "none"
    rest = None
    if options.method in SALIENT:
        salient = options.salient
        if salient is None:
            salient = int(SALIENT[options.method] * options.group)
        rest = Tier(options.group - salient, *(options.rest or (2, 2)))
    return Bits(
        keys,
        values if options.kept is None else 16,
        options.group,
        "token" if options.method in ("rotatekv", "mikv") else "channel",
        "unrotated" if options.read == "rebuilt" else "rotated",
        turned,
        sink=options.sink,
        window=options.window,
        rest=rest,
        rank=(RANK if options.rank is None else options.rank) if options.method == "gear" else 0,
        kept=options.kept,
    )


def ordered(first: Bits, statistics: LayerStatistics, base: Base) -> Bits:
    """RotateKV: the transformed channels of keys in the order of their means."""
    means = statistics.joint if first.kind == "unrotated" else statistics.rotated_keys
    heads = means.mean[: base.channels].float().unflatten(0, (base.kv_heads, -1))
    order = turn(heads).argsort(dim=-1, stable=True)
    return replace(first, order=tuple(map(tuple, order.tolist())))


def separated(first: Bits, statistics: LayerStatistics, base: Base) -> Bits:
    """ZipCache: values divided by c = √max|v_c|."""
    peaks = statistics.joint.peak[base.channels :].unflatten(0, (base.kv_heads, -1))
    return replace(first, value_balance=_factors(peaks.sqrt()))


def balanced(first: Bits, statistics: LayerStatistics, base: Base) -> Bits:
    """MiKV: keys divided by 1 / b_c = √(max|k_c| / max|q_c|), with the largest q_c of all query
    heads that read a KV head.
    """
    keys = statistics.rotated_keys.peak.unflatten(0, (base.kv_heads, -1))
    queries = statistics.rotated_queries.peak.unflatten(0, (base.kv_heads, -1)).amax(dim=1)
    return replace(first, key_balance=_factors((keys / queries).sqrt()))


def _factors(x: Tensor) -> Factors:
    """`[H, D]` as a plan holds it; 1 where a channel is dead."""
    alive = x.isfinite() & (x > 0)
    return tuple(tuple(float(f"{y:.4g}") for y in row) for row in x.where(alive, 1.0).tolist())


def plan_ahead(
    plan: Plan, options: QuantizationOptions, budget_bytes: int | None, itemsize: int
) -> int:
    """Bytes that a sequence of `context` tokens will take at most; nothing is measured for it.

    Raises:
        UsageError: There is nothing to pack, or it is packed already; the options are out of range,
            or the budget is too small.
    """
    already = any(layer.bits is not None for layer in plan.layers)
    if already or any(code.bits is not None for code in plan.codes):
        raise UsageError("the plan of --plan has bits already", hint="Give the one it was made of.")
    tiered = options.rest is not None or options.salient is not None
    if tiered and options.method not in SALIENT:
        raise UsageError(
            f"--method {options.method} has the same bits for all tokens",
            hint=f"--method {' or '.join(SALIENT)}",
        )
    if options.rank is not None and options.method != "gear":
        raise UsageError(f"--method {options.method} has no factors", hint="--method gear")
    sparse = options.method == "mustafar"
    if options.kept is not None and not sparse:
        raise UsageError(
            f"--method {options.method} keeps all numbers of a value", hint="--method mustafar"
        )
    if sparse and not options.kept:
        raise UsageError(
            "--method mustafar keeps some numbers of each value, so --sparsity is below 100%"
        )
    if sparse and options.bits is not None and options.bits[0] != options.bits[1]:
        raise UsageError(
            "--method mustafar keeps numbers of values exactly: --bits are those of keys, such as 4"
        )
    try:
        first = uniform(options)
    except PlanError as error:
        raise UsageError(f"--method {options.method}: {error}") from error
    plan = with_states(plan, options.states)
    if not options.heads:
        return plan.cache_bytes(options.context, itemsize)
    measured = options.method == "rotatekv" or options.method in SALIENT
    if measured and any(layer.kept is not None for layer in plan.layers):
        raise UsageError(f"--method {options.method} is for models whose layers all have KV heads")
    if latents.latents_of(plan):
        if options.method != "aware" or options.read != "absorbed":
            raise UsageError(
                "latents get their bits by what predictions feel, and are read as stored",
                hint="--method aware, and no --read rebuilt",
            )
        if options.bits is not None and first.keys != first.values:
            raise UsageError("latents are keys and values at once, which have the same bits")
        least, same = latents.alike(plan, min(BITS)), latents.alike(plan, first.keys)
        return _within(least, same, budget_bytes, options, itemsize)
    if plan.codes:
        if options.method != "aware":
            raise UsageError(
                f"--method {options.method} is for keys and values, and the plan of --plan stores "
                "codes instead",
                hint="--method aware",
            )
        if options.bits is not None and first.keys != first.values:
            raise UsageError("the numbers of a code have the same bits, of keys and of values")
        least = replace(plan, codes=_at(plan.codes, min(BITS)))
        alike = replace(plan, codes=_at(plan.codes, first.keys))
    else:
        if not any(layer.full_heads for layer in plan.layers):
            raise UsageError(
                "in the plan of --plan no head keeps everything, so none can be packed"
            )
        fewest = replace(first, keys=min(BITS), values=min(BITS), kept=None)
        least, alike = (packed(plan, [x] * len(plan.layers), {}) for x in (fewest, first))
    return _within(least, alike, budget_bytes, options, itemsize)


def _latent_bytes(
    plan: Plan, options: QuantizationOptions, budget_bytes: int | None, itemsize: int
) -> int:
    """Bytes that a block of tokens may take in all layers together."""
    same = latents.alike(plan, uniform(options).keys)
    each = sum(kept.block_bytes() for kept in latents.latents_of(same))
    if budget_bytes is None:
        return each
    blocks = latents.latents_of(plan)[0].blocks(options.context)
    return each + (budget_bytes - same.cache_bytes(options.context, itemsize)) // max(1, blocks)


def _within(
    least: Plan,
    alike: Plan,
    budget_bytes: int | None,
    options: QuantizationOptions,
    itemsize: int,
) -> int:
    """Bytes of what is asked for: the same bits everywhere, or a budget that leaves room for
    the least.
    """
    if budget_bytes is None:
        return alike.cache_bytes(options.context, itemsize)
    needed = least.cache_bytes(options.context, itemsize)
    if needed > budget_bytes:
        raise UsageError(
            f"a budget of {budget_bytes} bytes at {options.context} tokens is too small: with "
            f"{min(BITS)} bits everywhere, the cache takes {needed}"
        )
    return budget_bytes


def options_of(first: Bits) -> list[Bits]:
    """What a layer may be given: keys and values of any bits, clipped or not, values transformed or
    not.
    """
    turns: tuple[Turned, ...] = ("none", "values")
    return [
        replace(first, keys=n, values=n, key_clip=clip, value_clip=clip, hadamard=turned)
        for n in BITS
        for clip in CLIPS.get(n, (1.0,))
        for turned in turns
    ]


def harms(
    checkpoint: Checkpoint,
    plan: Plan,
    offered: Sequence[Bits],
    windows: Tensor,
    offsets: Sequence[int],
    options: QuantizationOptions,
    report: Report,
) -> Tensor:
    """Nats per prediction that each option does to keys and to values, `[L, 2, options]`.

    Only of the heads that the plan keeps everything of.
    """
    ring = (options.sink, options.window)
    first = offered[0]
    sums = torch.zeros(len(plan.layers), 2, len(offered), dtype=torch.float64)
    predictions = 0
    report("measuring", 0, len(windows))
    rope, reads = _reads(checkpoint, plan, windows, offsets, ring, options.seed)
    for done, (seen, felt, count) in enumerate(reads):
        predictions += count
        blocks = (windows.shape[1] - first.sink) // first.group
        own = slice(first.sink, first.sink + blocks * first.group)
        cos, sin = rope.tables(torch.arange(own.start, own.stop) + offsets[done])
        for index, layer in enumerate(plan.layers):
            if not (full := layer.full_heads):
                continue
            (k, v), (to_keys, to_values) = (
                [x[0, full, own] for x in pair] for pair in (seen[index], felt[index])
            )
            errors: dict[tuple[int, float], float] = {}  # of keys: other options do not touch them
            for at, bits in enumerate(offered):
                own_bits = bits.keys, bits.key_clip
                if own_bits not in errors:
                    read = read_keys(k, bits, None, cos, sin, rope.scale)
                    errors[own_bits] = _felt(read - k, to_keys)
                sums[index, 0, at] += errors[own_bits]
                sums[index, 1, at] += _felt(read_values(v, bits) - v, to_values)
        report("measuring", done + 1, len(windows))
    return sums / predictions


def _reads(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Tensor,
    offsets: Sequence[int],
    ring: tuple[int, int],
    seed: int,
) -> tuple[Rope, Iterator[tuple[Sequence[Kept], Sequence[Kept], int]]]:
    """The model's RoPE, and what its predictions feel of what all layers keep."""
    if any(layer.kept is not None for layer in plan.layers):
        whole = WholeModel(checkpoint)
        return whole.rope, whole.far_reads(windows, offsets, ring, seed)
    model = TailModel(LayerStream(checkpoint))
    return model.rope, far_reads(model, windows, offsets, ring, seed)


def _felt(error: Tensor, gradient: Tensor) -> float:
    """½ Σ_tokens (gᵀ e)², of `[H, tokens, D]`."""
    moved = (error * gradient).sum(dim=(0, 2)).double()
    return float((moved * moved).sum()) / 2


def shared(
    plan: Plan,
    options: QuantizationOptions,
    harm: Tensor,
    budget_bytes: int | None,
    itemsize: int,
) -> tuple[list[Bits], dict[str, Any]]:
    """Bits of all layers that do least harm within the budget.

    Args:
        harm: `[L, 2, options]`, see :func:`harms`.

    Returns:
        Them, and by layer the harm of its keys and values, in nats.
    """
    size, offered = plan.base.head_dim, options_of(uniform(options))
    costs, losses = [], []
    for layer, own in zip(plan.layers, harm.tolist(), strict=True):
        for part, loss in enumerate(own):
            each = [x.value_bytes(size) if part else x.key_bytes(size) for x in offered]
            costs.append([len(layer.full_heads) * n for n in each])
            losses.append(loss)
    allowed = _allowed(plan, options, budget_bytes, itemsize)
    chosen = choose(costs, losses, allowed)
    bits = [
        replace(offered[values], keys=offered[keys].keys, key_clip=offered[keys].key_clip)
        for keys, values in zip(chosen[::2], chosen[1::2], strict=True)
    ]
    felt = [loss[at] for loss, at in zip(losses, chosen, strict=True)]
    return bits, {"harm": {"keys": felt[::2], "values": felt[1::2]}}


def _allowed(
    plan: Plan, options: QuantizationOptions, budget_bytes: int | None, itemsize: int
) -> int:
    """Bytes that a block of tokens may take in all layers together."""
    first = uniform(options)
    alike = sum(
        len(layer.full_heads) * first.block_bytes(plan.base.head_dim) for layer in plan.layers
    )
    if budget_bytes is None:
        return alike
    blocks = first.blocks(options.context)
    taken = packed(plan, [first] * len(plan.layers), {}).cache_bytes(options.context, itemsize)
    return alike + (budget_bytes - taken) // max(1, blocks)


def packed(plan: Plan, bits: Sequence[Bits], provenance: dict[str, Any]) -> Plan:
    """The plan with these bits for the heads of each layer that keep everything."""
    layers = [
        replace(layer, bits=own if layer.full_heads else None)
        for layer, own in zip(plan.layers, bits, strict=True)
    ]
    return replace(plan, layers=tuple(layers), provenance=(*plan.provenance, provenance))


# ----------------------------------------------------------------------------------- of codes


def _at(codes: Sequence[CodePlan], bits: int) -> tuple[CodePlan, ...]:
    return tuple(replace(code, bits=bits) for code in codes)


def _codes(
    checkpoint: Checkpoint,
    options: QuantizationOptions,
    plan: Plan,
    budget_bytes: int | None,
    itemsize: int,
    asked: dict[str, Any],
    report: Report,
) -> Plan:
    """The plan with its codes levelled, and bits for each of them by the harm that they do.

    A code is measured with its rows at the widths of the plan. What a code leaves out is lost
    already, so the harm of bits is that of rounding alone.
    """
    windows, offsets = text_windows(checkpoint, options.data, options.tokens, options.seed)
    model = TailModel(LayerStream(checkpoint))
    ring = plan.codes[0].sink, plan.codes[0].window
    fitted = [_fitted(plan, index) for index in range(len(plan.codes))]
    levels: list[dict[Part, Fitted]] = []
    harm = torch.zeros(len(plan.codes), len(BITS), dtype=torch.float64)
    predictions = 0
    report("measuring", 0, len(windows))
    reads = far_reads(model, windows, offsets, ring, options.seed)
    for done, (seen, felt, count) in enumerate(reads):
        predictions += count
        first = 0
        for index, code in enumerate(plan.codes):
            own = slice(first, first + code.layers)
            first += code.layers
            scale = model.rope.scale**-2
            y, g = (
                joined(model, x[own], offsets[done], code.kind, by)[ring[0] :]
                for x, by in ((seen, scale), (felt, 1.0))
            )
            places = torch.arange(y.shape[1]).chunk(len(code.parts))
            if not done:  # the first window says how large the rows are
                levels.append(
                    {
                        part: _levelled(one, y[:, at])
                        for (part, one), at in zip(fitted[index].items(), places, strict=True)
                    }
                )
            coded = []
            for part, width, place in zip(code.parts, code.widths, places, strict=True):
                used = levels[index][part].projection.cut(width).to(y)
                z = (y[:, place] - used.mean) @ used.encode.T
                coded.append((z, g[:, place] @ used.decode))
            for at, bits in enumerate(BITS):
                moved = torch.zeros(len(y), dtype=torch.float64, device=y.device)
                for z, gradient in coded:
                    error = fake_quantise(z, bits, code.group) - z
                    moved += (error * gradient).sum(dim=1).double()
                harm[index, at] += float((moved * moved).sum()) / 2
        report("measuring", done + 1, len(windows))
    harm /= predictions
    costs = [
        [replace(code, bits=bits).token_bytes(itemsize) for bits in BITS] for code in plan.codes
    ]
    if budget_bytes is None:
        allowed = sum(x.token_bytes(itemsize) for x in _at(plan.codes, uniform(options).keys))
    else:
        exact = replace(plan, codes=_at(plan.codes, BITS[0])).cache_bytes(0, itemsize)
        allowed = (budget_bytes - exact) // options.context
    chosen = choose(costs, harm.tolist(), allowed)
    codes = tuple(replace(code, bits=BITS[at]) for code, at in zip(plan.codes, chosen, strict=True))
    tensors: dict[str, Tensor] = {}
    for index, parts in enumerate(levels):
        for part, one in parts.items():
            tensors |= one.tensors(index, part)
    felt_by = [float(x[at]) for x, at in zip(harm, chosen, strict=True)]
    provenance = provenance_of(
        options.method, asked, calibration_text(options.data).id, windows.numel(), harm=felt_by
    )
    return replace(plan, codes=codes, tensors=tensors, provenance=(*plan.provenance, provenance))


def _fitted(plan: Plan, index: int) -> dict[Part, Fitted]:
    """The code with this index, with all rows that the plan has."""
    found: dict[Part, Fitted] = {}
    for part in plan.codes[index].parts:
        name = f"codes.{index}.{part}"
        parts = (plan.tensors[f"{name}.{x}"] for x in ("encode", "decode", "mean"))
        found[part] = Fitted(Projection(*parts), plan.tensors[f"{name}.spectrum"])
    return found


def _levelled(fitted: Fitted, y: Tensor) -> Fitted:
    """By the tokens `[T, W]` that it codes."""
    own = fitted.projection.to(y)
    z = (y - own.mean) @ own.encode.T
    return levelled_rows(fitted, z.double().square().mean(dim=0).cpu())


def memory_bytes(checkpoint: Checkpoint, base: Base, options: QuantizationOptions) -> int:
    """About what a calibration holds at once, besides Python and its libraries."""
    if options.method in _BLIND:
        return 0
    if options.method != "aware":
        return memory_of_statistics(LayerStream(checkpoint), options.tokens)
    weights = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    length = min(WINDOW, int(model_config(checkpoint).max_position_embeddings))
    return weights + 4 * 4 * 2 * base.layers * base.channels * length
