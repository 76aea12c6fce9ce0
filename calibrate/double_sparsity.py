"""Plans that read few of the tokens they keep, found by few channels of their keys.

After Double Sparsity (arXiv 2408.07092, section 3.1). A few channels S, always the same ones, make
most of q·k = Σ_c q_c k_c, so they are found offline; what they alone make of it says which tokens a
query reads. All is behind RoPE, and the query heads of a KV head share S.

The paper ranks channels by E|q_c k_c|, with q and k of the same token. But what S leaves out,
e_t = Σ_{c∉S} q_c k_tc, moves a token in the ranking only by how it differs from that of others, and
errors of channels may cancel: so what counts is the variance of e over tokens t. With the queries
and keys of a text drawn independently of each other, as they are where tokens are far apart,

    E_q Var_t(e) = Σ_{c,c'∉S} A_cc',    A = Σ_heads E[q qᵀ] ∘ Cov(k),

which the two halves of a RoPE pair enter with what they have in common. S is found greedily. No
text is read for it beyond the statistics that other methods use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.checkpoint import Checkpoint
from kvtool.errors import UsageError
from kvtool.plan import Plan, check_can_drop, provenance_of
from kvtool.progress import Progress, silent
from kvtool.sparse import SparseReading


def calibrate_double_sparsity(
    checkpoint: Checkpoint,
    plan: Plan,
    channels: int,
    tokens: int,
    text: StatisticsOptions,
    *,
    report: Progress = silent,
) -> Plan:
    """The plan with label channels for all heads; those that keep everything use them.

    Args:
        plan: Which heads those are.
        channels: r, label channels of a KV head.
        tokens: k, that a query reads.
        text: That statistics are of.

    Raises:
        UnsupportedModelError: No layer has KV heads that see the whole past.
        UsageError: The numbers are out of range, or the plan leaves no head to read sparsely.
    """
    check_can_drop(checkpoint)
    check_options(checkpoint, plan, channels, tokens)
    statistics = collect(checkpoint, text, report=report)
    labels = [
        label_orders(statistics.layer(index), plan.base.kv_heads)[:, :channels]
        if layer.kept is None
        else None
        for index, layer in enumerate(plan.layers)
    ]
    made = labelled(plan, labels, tokens)
    asked = {"channels": channels, "tokens_read": tokens, "data": text.data, "seed": text.seed}
    corpus = str(statistics.metadata["corpus"])
    said = provenance_of("double-sparsity", asked, corpus, statistics.tokens)
    return replace(made, provenance=(*plan.provenance, said))


def labelled(plan: Plan, labels: Sequence[Tensor | None], tokens: int) -> Plan:
    """The plan with label channels `[H, r]` of every layer, by which so many tokens are read.

    Layers that are not planned need none.
    """
    layers = [
        replace(layer, sparse=SparseReading(tuple(map(tuple, own.tolist())), tokens))
        if own is not None and layer.kept is None
        else layer
        for layer, own in zip(plan.layers, labels, strict=True)
    ]
    return replace(plan, layers=tuple(layers))


def plan_ahead(checkpoint: Checkpoint, plan: Plan, channels: int, tokens: int) -> Plan:
    """The plan with any label channels: its bytes are those of the right ones.

    Raises:
        UsageError: See :func:`calibrate_double_sparsity`.
    """
    check_options(checkpoint, plan, channels, tokens)
    any_ones = torch.arange(channels).expand(plan.base.kv_heads, -1)
    return labelled(plan, [any_ones] * len(plan.layers), tokens)


def check_options(checkpoint: Checkpoint, plan: Plan, channels: int, tokens: int) -> None:
    """Refuses what cannot work before any weight is read.

    Raises:
        UsageError: See :func:`calibrate_double_sparsity`.
    """
    size, positions = plan.base.head_dim, int(checkpoint.hf_config().max_position_embeddings)
    if not 1 <= channels <= size:
        raise UsageError(f"--channels {channels} is not possible: a head has 1 to {size}")
    least = SparseReading.sink + SparseReading.window
    if tokens < least:
        raise UsageError(
            f"--tokens-read {tokens} is not possible: the first {SparseReading.sink} and the last "
            f"{SparseReading.window} are always read"
        )
    if tokens >= positions:
        raise UsageError(
            f"--tokens-read {tokens} is no less than all that {checkpoint.source} has positions "
            "for, so none would be left out"
        )
    if any(layer.sparse for layer in plan.layers):
        raise UsageError("the plan of --plan is read sparsely", hint="Give the one it was made of.")
    if plan.codes or any(layer.packed or layer.budget for layer in plan.layers):
        raise UsageError(
            "the plan of --plan has codes, few bits or token budgets, which are not read sparsely",
            hint="Give one that says which heads stream.",
        )
    if not any(layer.full_heads for layer in plan.layers if layer.kept is None):
        raise UsageError("all heads of the plan of --plan stream, so none is left to read sparsely")


def label_orders(statistics: LayerStatistics, kv_heads: int) -> Tensor:
    """The channels of each KV head `[H, D]`, the best label first."""
    queries, keys = statistics.rotated_queries, statistics.rotated_keys
    asked = (queries.second / queries.tokens).unflatten(0, (kv_heads, -1)).sum(1)  # [H, D, D]
    size = asked.shape[-1]
    blocks = keys.covariance.unflatten(0, (kv_heads, size)).unflatten(2, (kv_heads, size))
    return torch.stack([ordered(asked[h] * blocks[h, :, h]) for h in range(kv_heads)])


def ordered(errors: Tensor) -> Tensor:
    """Channels `[D]`, each next one such that those behind it err least: min Σ_{c,c'∉S} A_cc'.

    Args:
        errors: A `[D, D]`.
    """
    left = torch.ones_like(errors[0])
    order = []
    for _ in range(len(errors)):
        gain = 2 * (errors @ left) - errors.diagonal()  # by which the sum falls
        best = int(gain.masked_fill(left == 0, -torch.inf).argmax())
        left[best] = 0
        order.append(best)
    return torch.tensor(order)
