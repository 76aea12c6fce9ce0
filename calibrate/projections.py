"""Plans that store a code of every token: which widths a budget allows, and the codes of a method.

A method reads the statistics alone and gives a :class:`Fitted` per layer at full width, so that a
smaller budget is a slice of the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from torch import Tensor

from kvtool.calibrate import cskv, pca
from kvtool.calibrate.statistics import LayerStatistics, StatisticsOptions, collect
from kvtool.checkpoint import Checkpoint
from kvtool.codes import Fitted
from kvtool.errors import PlanError, UsageError
from kvtool.plan import (
    Base,
    CodeKind,
    CodePlan,
    LayerPlan,
    Plan,
    base_of,
    check_can_drop,
    provenance_of,
)

Method = Literal["pca", "cskv"]
METHODS: tuple[Method, ...] = get_args(Method)
_FIT: dict[Method, tuple[CodeKind, Callable[[LayerStatistics, int], tuple[Fitted, Fitted]]]] = {
    "pca": ("rotated", pca.fit),
    "cskv": ("unrotated", cskv.fit),
}

Report = Callable[[str, int, int], None]
"""Told (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class ProjectionOptions:
    """Everything that determines the codes besides the model.

    Attributes:
        sink, window: Tokens that are kept exactly.
        context: Tokens of the sequence that a budget is for.
    """

    method: Method = "cskv"
    sink: int = 4
    window: int = 64
    context: int = 4096
    data: str | None = None
    tokens: int = 16384
    seed: int = 0


def calibrate_projections(
    checkpoint: Checkpoint,
    options: ProjectionOptions,
    budget_bytes: int,
    itemsize: int,
    *,
    report: Report = lambda stage, done, total: None,
) -> Plan:
    """A plan whose cache takes at most `budget_bytes` for a sequence of `context` tokens.

    Args:
        itemsize: Bytes per cached number that the budget is stated for.

    Raises:
        UnsupportedModelError: Layers have a sliding window.
        UsageError: The budget is too small.
    """
    base = base_of(checkpoint)
    check_can_drop(checkpoint)
    code = planned_code(base, options, budget_bytes, itemsize)
    wanted = StatisticsOptions(
        data=options.data, tokens=options.tokens, sinks=options.sink, seed=options.seed
    )
    statistics = collect(checkpoint, wanted, report=report)
    _, fit = _FIT[options.method]
    tensors: dict[str, Tensor] = {}
    report("fitting", 0, base.layers)
    for index in range(base.layers):
        for name, fitted in zip(
            ("keys", "values"), fit(statistics.layer(index), base.kv_heads), strict=True
        ):
            tensors |= fitted.tensors(f"layers.{index}.{name}")
        report("fitting", index + 1, base.layers)
    layer = LayerPlan((False,) * base.kv_heads, code=code)
    asked = {**asdict(options), "budget_bytes": budget_bytes, "itemsize": itemsize}
    corpus, tokens = statistics.metadata["corpus"], statistics.tokens
    provenance = provenance_of(options.method, asked, corpus, tokens)
    return Plan(base, (layer,) * base.layers, provenance=(provenance,), tensors=tensors)


def planned_code(
    base: Base, options: ProjectionOptions, budget_bytes: int, itemsize: int
) -> CodePlan:
    """The code that a budget allows in every layer: as many numbers of keys as of values.

    Raises:
        UsageError: The budget is too small.
    """
    kind, _ = _FIT[options.method]
    try:
        half = CodePlan(kind, 1, 1, options.sink, options.window)
        return half.within(budget_bytes, base, itemsize, options.context)
    except PlanError as error:
        raise UsageError(str(error)) from error
