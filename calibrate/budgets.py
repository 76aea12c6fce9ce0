"""Token budgets: how many tokens of a prompt each KV head keeps, and the plan that says so.

Curves come from the statistics of the model, taken over windows as long as the context that the
budget is for; `allocate.py` turns them into integers. All methods are given the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.calibrate import allocate
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import Statistics
from kvtool.checkpoint import Checkpoint
from kvtool.errors import UsageError
from kvtool.plan import Plan, Policy, base_of, check_can_drop, provenance_of, whole_layers
from kvtool.progress import Progress, silent
from kvtool.sharing import SharedPlan
from kvtool.states import StatePlan
from kvtool.windows import WindowPlan

Method = Literal["uniform", "pyramidkv", "adakv", "prefixkv", "compresskv", "uncomp", "mass"]
METHODS: tuple[Method, ...] = get_args(Method)
_LEFT_ALONE = {
    StatePlan: "with a state",
    WindowPlan: "with a sliding window",
    SharedPlan: "that share keys and values",
}


@dataclass(frozen=True)
class BudgetOptions:
    """Everything that determines the budgets besides the model.

    Attributes:
        method: `uniform` and `pyramidkv` need no data; `adakv` shares a layer's budget among its
            heads by attention mass, `prefixkv` and `compresskv` share among layers, by mass and by
            eviction error; `uncomp` by the entropy of the queries; `mass` shares among all heads of
            all layers so that the retained attention mass is largest.
        policy: How the tokens are chosen at the end of a prompt.
        context: Tokens of the prompt that the budget is for.
        minimum: Tokens that every head keeps at least.
    """

    method: Method = "adakv"
    policy: Policy = "snapkv"
    context: int = 4096
    minimum: int = 64
    data: str | None = None
    tokens: int = 16384
    seed: int = 0


def calibrate_budgets(
    checkpoint: Checkpoint,
    options: BudgetOptions,
    budget_bytes: int,
    itemsize: int,
    *,
    report: Progress = silent,
) -> Plan:
    """A plan whose cache takes `budget_bytes` after a prompt of `context` tokens, to the token.

    Args:
        itemsize: Bytes per cached number that the budget is stated for.

    Raises:
        UnsupportedModelError: No layer sees the whole past, or its heads share a latent.
        UsageError: The budget is too small or too large for the bounds.
    """
    check_can_drop(checkpoint)
    whole = Plan(base_of(checkpoint), whole_layers(checkpoint))
    total = budget_tokens(whole, options, budget_bytes, itemsize)
    statistics = None
    corpus, tokens = None, 0
    if options.method not in ("uniform", "pyramidkv"):
        wanted = StatisticsOptions(
            data=options.data,
            tokens=max(options.tokens, options.context),
            window=options.context,
            context=options.context,
            seed=options.seed,
        )
        statistics = collect(checkpoint, wanted, report=report)
        corpus, tokens = statistics.metadata["corpus"], statistics.tokens
    planned = [index for index, layer in enumerate(whole.layers) if layer.kept is None]
    budgets = share_out(options, planned, whole.base.kv_heads, total, statistics)
    asked = {**asdict(options), "budget_bytes": budget_bytes, "itemsize": itemsize}
    provenance = provenance_of(options.method, asked, corpus, tokens)
    shared = dict(zip(planned, budgets.tolist(), strict=True))
    layers = tuple(
        replace(layer, budget=tuple(shared[index])) if index in shared else layer
        for index, layer in enumerate(whole.layers)
    )
    return replace(whole, layers=layers, policy=options.policy, provenance=(provenance,))


def budget_tokens(whole: Plan, options: BudgetOptions, budget_bytes: int, itemsize: int) -> int:
    """Tokens that all heads of a model keep together in `budget_bytes`.

    Args:
        whole: The plan that keeps everything.

    Raises:
        UsageError: The budget is too small or too large for the bounds.
    """
    heads, unit = whole.planned_heads, 2 * itemsize * whole.base.head_dim
    low = min(options.minimum, options.context)
    native = whole.native_bytes(options.context, itemsize)
    bounded = native - heads * options.context * unit  # of layers that are left alone
    total = (budget_bytes - bounded) // unit
    if not low * heads <= total <= options.context * heads:
        others = f"; left alone, and counted: {x}" if (x := left_alone(whole)) else ""
        raise UsageError(
            f"a budget of {budget_bytes:,} bytes after {options.context} tokens is impossible: all "
            f"of them take {native:,}, and the {low} that every head keeps at "
            f"least {bounded + low * heads * unit:,}{others}",
            hint="--minimum says how many those are",
        )
    return total


def left_alone(whole: Plan) -> str | None:
    """Which layers keep what they keep whatever the budget, in words."""
    kept, named = [type(layer.kept) for layer in whole.layers], []
    for kind, what in _LEFT_ALONE.items():
        if count := kept.count(kind):
            named.append(f"{count} layer{'s' if count > 1 else ''} {what}")
    if not named:
        return None
    return " and ".join(named)


def share_out(
    options: BudgetOptions,
    planned: Sequence[int],
    heads: int,
    total: int,
    statistics: Statistics | None,
) -> Tensor:
    """Budgets `[L, H]` int64 that sum to `total`.

    Args:
        planned: The L layers whose heads share it. heads: H.
        statistics: Of windows of `context` tokens; not needed by `uniform` and `pyramidkv`.
    """
    low, high = min(options.minimum, options.context), options.context
    shape = len(planned), heads
    if options.method == "uniform":
        return allocate.uniform(shape, total, low, high)
    if options.method == "pyramidkv":
        return allocate.pyramid(*shape, total, low, high)
    assert statistics is not None
    layers = [statistics.layer(index) for index in planned]
    if options.method == "uncomp":
        entropy = torch.stack([x.query_entropy.view(shape[1], -1).amax(-1) for x in layers])
        return allocate.uncomp(entropy, total, low, high)
    grid = torch.tensor([0, *statistics.budgets])
    curves = torch.stack([F.pad(x.budget_mass, (1, 0)) for x in layers])  # [L, H, K]
    if options.method == "adakv":
        return allocate.ada_layers(curves, grid, total, low, high)
    if options.method == "mass":
        return allocate.allocate(curves, grid, total, low, high)
    # Layers are the units: all heads of one keep the same number, up to the last odd tokens.
    per_head = total // shape[1]
    if options.method == "prefixkv":
        whole = curves.mean(1)
        held = (1 - whole[:, -1:]).round(decimals=4)  # by sink logits, which nothing drops
        layer = allocate.prefix(whole + held, grid, per_head, low, high)
    else:
        errors = torch.tensor([x.eviction_error for x in layers], dtype=torch.float64)
        layer = allocate.compress(errors, per_head, low, high)
    return allocate.round_exactly(layer[:, None].expand(shape).double(), total, low, high)
