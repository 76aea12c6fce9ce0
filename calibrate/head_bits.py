"""Bits of the heads of a layer that keep every token, by method.

* **kivi** (arXiv 2402.02750): keys with a scale per channel, values with one per token, the same
  bits in every layer.
* **rotatekv** (IJCAI 2025, arXiv 2501.16383): keys and values with scales per token, behind a
  Hadamard transform of each head and with the channels of keys in the order of their means, so that
  those that share a scale are alike. Transform and order of keys lie within a head, where the
  paper's go over several; as in the paper, keys are those before RoPE, if they are to be rebuilt.
* **zipcache** (arXiv 2405.14256): kivi's axes in two tiers of tokens, and the channel-separable
  quantiser for values: each channel is divided by c = √max|v_c| before a token's numbers share a
  scale. The maximum is that of a calibration text, where the paper's is that of the text at hand:
  it takes no bytes, and brings half (2 bits) to most (4 bits) of what factors per block would.
* **mikv** (arXiv 2402.18096): two tiers of tokens with scales per token, ranked as for zipcache,
  where the paper asks a policy that would evict the lower one. What an outlier channel of
  keys does to the others is evened out between keys and queries: with the balancer
  b_c = √(max|q_c| / max|k_c|), b ∘ k is stored and q / b reads it.
* **gear** (arXiv 2403.05527): kivi's codes, and of what they leave out of a block of keys or values
  an approximation of rank r, without the paper's sparse outliers (its GEAR-L).
* **mustafar** (arXiv 2505.22913): kivi's keys; of each value the numbers of largest magnitude,
  exactly, and a bitmap. The paper leaves numbers of keys out as well.
* **aware**: kivi's axes; bits of keys and of values layer by layer, how far their ranges are
  clipped, and whether values are transformed, by the harm that predictions feel.

With g the gradient of a prediction by what a token has left in the cache (`felt.py`), and e the
error with which that is read, an option of a layer does the harm ½ Σ_tokens (gᵀ e)² nats per
prediction. So all options of all layers are compared after one backward pass per window. What a
layer keeps that others read as well, they read with the same error: g is the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvtool.bits import Bits, Factors, Turned, read_keys, read_values
from kvtool.calibrate.allocate import choose
from kvtool.calibrate.far_reads import WholeModel
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.checkpoint import Checkpoint
from kvtool.kernels.hadamard import turn
from kvtool.kernels.quantise import BITS
from kvtool.plan import Base, Plan
from kvtool.progress import Progress

CLIPS = {2: (1.0, 0.85, 0.7), 3: (1.0, 0.85)}
"""Shares of a range to choose from: few codes are better spent on where most numbers are, if
predictions do not feel the others."""
UNCLIPPED = 3
"""With more bytes than those of so many bits nothing is clipped. What is clipped errs to one side
for every token, which adds up, where errors are taken for independent: 2 bits look better than they
are, and layers that need not have them get them."""


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
    heads of the layer that read a KV head.
    """
    keys = statistics.rotated_keys.peak.unflatten(0, (base.kv_heads, -1))
    queries = statistics.rotated_queries.peak.unflatten(0, (base.kv_heads, -1)).amax(dim=1)
    return replace(first, key_balance=_factors((keys / queries).sqrt()))


def _factors(x: Tensor) -> Factors:
    """`[H, D]` as a plan holds it; 1 where a channel is dead."""
    alive = x.isfinite() & (x > 0)
    return tuple(tuple(float(f"{y:.4g}") for y in row) for row in x.where(alive, 1.0).tolist())


def offered(first: Bits) -> list[Bits]:
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
    options: Sequence[Bits],
    windows: Tensor,
    offsets: Sequence[int],
    seed: int,
    report: Progress,
) -> Tensor:
    """Nats per prediction that each option does to keys and to values, `[L, 2, options]`.

    Only of the heads that the plan keeps everything of.

    Raises:
        UsageError: The windows have no block.
    """
    first = options[0]
    first.check_windows(windows.shape[1])
    sums = torch.zeros(len(plan.layers), 2, len(options), dtype=torch.float64)
    predictions = 0
    report("measuring", 0, len(windows))
    model = WholeModel(checkpoint)
    reads = model.far_reads(windows, offsets, (first.sink, first.window), seed)
    for done, (seen, felt, count) in enumerate(reads):
        predictions += count
        own = first.whole_blocks(windows.shape[1])
        positions = torch.arange(own.start, own.stop) + offsets[done]
        for index, (layer, rope) in enumerate(zip(plan.layers, model.ropes, strict=True)):
            if not (full := layer.full_heads):
                continue
            cos, sin = rope.tables(positions)
            (k, v), (to_keys, to_values) = (
                [x[0, full, own] for x in pair] for pair in (seen[index], felt[index])
            )
            errors: dict[tuple[int, float], float] = {}  # of keys: other options do not touch them
            for at, bits in enumerate(options):
                own_bits = bits.keys, bits.key_clip
                if own_bits not in errors:
                    read = read_keys(k, bits, None, cos, sin, rope.scale)
                    errors[own_bits] = _felt(read - k, to_keys)
                sums[index, 0, at] += errors[own_bits]
                sums[index, 1, at] += _felt(read_values(v, bits) - v, to_values)
        report("measuring", done + 1, len(windows))
    return sums / predictions


def _felt(error: Tensor, gradient: Tensor) -> float:
    """½ Σ_tokens (gᵀ e)², of `[H, tokens, D]`."""
    moved = (error * gradient).sum(dim=(0, 2)).double()
    return float((moved * moved).sum()) / 2


def shared(
    plan: Plan, options: Sequence[Bits], harm: Tensor, allowed: int
) -> tuple[list[Bits], dict[str, Any]]:
    """Bits of all layers that do least harm.

    Args:
        harm: `[L, 2, options]`, see :func:`harms`.
        allowed: Bytes that a block of tokens may take in all layers together.

    Returns:
        Them, and by layer the harm of its keys and values, in nats.
    """
    size = plan.base.head_dim
    more = replace(options[0], keys=UNCLIPPED, values=UNCLIPPED).block_bytes(size)
    if allowed > more * sum(len(layer.full_heads) for layer in plan.layers):
        plain = [i for i, x in enumerate(options) if min(x.key_clip, x.value_clip) == 1]
        options, harm = [options[i] for i in plain], harm[..., plain]
    costs, losses = [], []
    for layer, own in zip(plan.layers, harm.tolist(), strict=True):
        for part, loss in enumerate(own):
            each = [x.value_bytes(size) if part else x.key_bytes(size) for x in options]
            costs.append([len(layer.full_heads) * n for n in each])
            losses.append(loss)
    chosen = choose(costs, losses, allowed)
    bits = [
        replace(options[values], keys=options[keys].keys, key_clip=options[keys].key_clip)
        for keys, values in zip(chosen[::2], chosen[1::2], strict=True)
    ]
    felt = [loss[at] for loss, at in zip(losses, chosen, strict=True)]
    return bits, {"harm": {"keys": felt[::2], "values": felt[1::2]}}
