"""Plans that store the latents of MLA layers as integers of few bits, number by number.

Let y be what a layer keeps of a token, latent and rotated shared key, and g what a prediction feels
of it (`felt.py`). A number that is read with an error e_j does the harm ½ E (g_j e_j)². It is
measured for all widths of all numbers after one backward pass per window, and bits are shared among
the numbers of all layers by it: those of a large spectrum that matter get more, the others fewer.

Turning a latent to its principal axes first, in its own metric or in that of g, gains nothing: it
is made of the directions that its conversion ranked, and widths chosen on one text in a basis made
from few gradients do more harm on the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvtool.calibrate.allocate import choose
from kvtool.calibrate.far_reads import WholeModel
from kvtool.checkpoint import Checkpoint
from kvtool.kernels.quantise import BITS, fake_quantise
from kvtool.latent_bits import LatentPlan
from kvtool.plan import Plan
from kvtool.progress import Progress, telling


def harms(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Tensor,
    offsets: Sequence[int],
    seed: int,
    report: Progress,
) -> list[Tensor]:
    """Nats per prediction that each width of each number does, by layer `[R, widths]`, float64.

    Raises:
        UsageError: The windows have no block.
    """
    kept = latents_of(plan)
    first = kept[0]
    first.check_windows(windows.shape[1])
    own = first.whole_blocks(windows.shape[1])
    sums = [torch.zeros(x.width, len(BITS), dtype=torch.float64) for x in kept]
    predictions = 0
    reads = WholeModel(checkpoint).far_reads(windows, offsets, (first.sink, first.window), seed)
    for seen, felt, count in telling(report, "measuring", reads, len(windows)):
        predictions += count
        for total, (y,), (g,) in zip(sums, seen, felt, strict=True):
            total += _harm(y[0, 0, own], g[0, 0, own], first.group)
    return [total / predictions for total in sums]


def _harm(y: Tensor, g: Tensor, group: int) -> Tensor:
    """½ Σ_tokens (g_j e_j)², of `[n · N, R]`."""
    blocks = y.unflatten(0, (-1, group)).mT  # [n, R, N]
    found = []
    for bits in BITS:
        error = (fake_quantise(blocks, bits, group) - blocks).mT.flatten(0, 1)
        found.append((error * g).double().square().sum(dim=0) / 2)
    return torch.stack(found, dim=-1)


def latents_of(plan: Plan) -> list[LatentPlan]:
    """Of all layers."""
    return [layer.kept for layer in plan.layers if isinstance(layer.kept, LatentPlan)]


def alike(plan: Plan, bits: int) -> Plan:
    """The plan with so many bits for every number."""
    return with_bits(plan, [(bits,) * kept.width for kept in latents_of(plan)])


def with_bits(plan: Plan, bits: list[tuple[int, ...]]) -> Plan:
    """The plan with these bits, by layer."""
    layers = tuple(
        replace(layer, kept=replace(kept, bits=own))
        for layer, kept, own in zip(plan.layers, latents_of(plan), bits, strict=True)
    )
    return replace(plan, layers=layers)


def shared(plan: Plan, harm: list[Tensor], allowed: int) -> tuple[Plan, dict[str, Any]]:
    """The plan with the bits that do least harm in so many bytes per block of all layers.

    Returns:
        It, and by layer the harm of the latent and of the shared key, in nats.
    """
    kept = latents_of(plan)
    one = [replace(kept[0], rank=1, rope_dim=0, bits=(bits,)).block_bytes() for bits in BITS]
    numbers = sum(x.width for x in kept)
    losses = [loss for own in harm for loss in own.tolist()]
    chosen = torch.tensor(choose([one] * numbers, losses, allowed))
    widths = [x.width for x in kept]
    bits = [tuple(BITS[i] for i in own.tolist()) for own in chosen.split(widths)]
    felt: dict[str, list[float]] = {"latent": [], "shared_key": []}
    for own, choice, x in zip(harm, chosen.split(widths), kept, strict=True):
        each = own.gather(1, choice[:, None])[:, 0]
        felt["latent"].append(float(each[: x.rank].sum()))
        felt["shared_key"].append(float(each[x.rank :].sum()))
    return with_bits(plan, bits), {"harm": felt}
