"""Other sizes of a plan without calibrating again, and plans put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvtool.codes import fit_codes
from kvtool.errors import PlanError, UsageError
from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan

_CUTTABLE = "Plans of retrieval heads and of projections can be cut; calibrate others again."


def stream_heads(plan: Plan, count: int, sink: int, window: int) -> Plan:
    """The plan whose `count` lowest-scored heads stream, and all others keep everything.

    Among equal scores the earlier head, by layer, streams first. So the heads that stream for
    one count also do for every larger one.

    Raises:
        PlanError: There are no scores, or token budgets or bits, which were made for the heads that
            are full now.
        UsageError: There are fewer heads than `count`.
    """
    heads = plan.planned_heads
    if plan.scores is None:
        raise PlanError(
            "the plan has no scores, so its heads cannot be chosen anew",
            hint=_CUTTABLE,
        )
    if plan.policy is not None:
        raise PlanError(
            "the plan has token budgets for the heads that are full now",
            hint="Slice the plan that it was composed from, and compose again.",
        )
    if any(layer.bits is not None for layer in plan.layers):
        raise PlanError(
            "the bits of the plan were chosen for the heads that are full now",
            hint="Slice the plan of the heads, and calibrate the bits again with --plan.",
        )
    if not 0 <= count <= heads:
        raise UsageError(f"{count} heads cannot stream: the model has {heads}")
    planned = torch.tensor([layer.kept is None for layer in plan.layers])
    scores = plan.scores[planned]
    streaming = torch.zeros(heads, dtype=torch.bool)
    streaming[scores.flatten().argsort(stable=True)[:count]] = True
    rows = iter(streaming.view(scores.shape).tolist())
    layers = tuple(
        LayerPlan(tuple(next(rows)), sink, window, sparse=layer.sparse, scales=layer.scales)
        if layer.kept is None
        else layer
        for layer in plan.layers
    )
    return replace(plan, layers=layers)


def ring_of(plan: Plan) -> tuple[int, int]:
    """Sink and window of the heads that stream, or that the calibration had in mind.

    Raises:
        PlanError: That is not known, or not all heads stream with the same.
    """
    rings = {(layer.sink, layer.window) for layer in plan.layers if any(layer.streaming)}
    if not rings:
        rings = {ring for item in plan.provenance if (ring := _intended_ring(item))}
    if len(rings) != 1:
        why = "no head streams" if not rings else "heads stream with different windows"
        raise PlanError(
            f"{why}, so what another streaming head would keep is unknown",
            hint=_CUTTABLE if plan.scores is None else None,
        )
    return rings.pop()


def cut(plan: Plan, budget_bytes: int, context: int, itemsize: int) -> Plan:
    """The plan with the fewest streaming heads, or the widest codes, that fits a budget.

    Sinks and windows stay as they are.

    Args:
        budget_bytes: Largest :meth:`Plan.cache_bytes` of one sequence.
        context: Tokens of that sequence.
        itemsize: Bytes per number.

    Raises:
        UsageError: It does not fit even if all heads stream.
        PlanError: See :func:`stream_heads`.
    """
    if plan.codes:
        return _cut_codes(plan, budget_bytes, context, itemsize)
    sink, window = ring_of(plan)
    heads, per_token = plan.planned_heads, 2 * itemsize * plan.base.head_dim
    saved = per_token * (context - sink - window)  # by each head that streams
    native = plan.native_bytes(context, itemsize)
    for count in range(heads + 1):
        if native - count * saved <= budget_bytes:
            return stream_heads(plan, count, sink, window)
    raise UsageError(
        f"a budget of {budget_bytes} bytes at {context} tokens is too small: the model takes "
        f"{native}, and {native - heads * saved} if every head keeps only the first {sink} "
        f"and last {window} tokens"
    )


def _cut_codes(plan: Plan, budget_bytes: int, context: int, itemsize: int) -> Plan:
    assert plan.allocation is not None
    spectra = [
        [plan.tensors[f"codes.{i}.{part}.spectrum"] for part in code.parts]
        for i, code in enumerate(plan.codes)
    ]
    codes = fit_codes(
        plan.codes, spectra, plan.allocation, budget_bytes, context, plan.base.channels,
        itemsize, plan.bounded_bytes(context, itemsize),
    )  # fmt: skip
    return replace(plan, codes=codes)


def compose(heads: Plan, budgets: Plan) -> Plan:
    """The heads of one plan with the token budgets of another, but for heads that stream.

    How prompts are read is for the heads to say: budgeted heads read them densely anyway.

    Raises:
        PlanError: The plans are for different models, both choose heads or both have budgets, or
            are in the wrong order.
    """
    if heads.base != budgets.base:
        raise PlanError(
            f"one plan is for {heads.base.source}, the other for {budgets.base.source}, "
            "and these are different models"
        )
    if heads.codes or budgets.codes:
        raise PlanError("a plan with codes cannot be composed with another one yet")
    kept = [layer.kept for layer in (*heads.layers, *budgets.layers)]
    if any(isinstance(one, LatentPlan) for one in kept):
        raise PlanError(
            "plans of latents are not composed",
            hint="Give the first to the calibration of the second with --plan.",
        )
    if any(layer.packed for layer in (*heads.layers, *budgets.layers)):
        raise PlanError(
            "few bits come last, and are chosen for the heads that keep everything",
            hint="Compose the other plans, and give the result to calibrate quantization.",
        )
    if any(layer.sparse is not None for layer in (*heads.layers, *budgets.layers)):
        raise PlanError(
            "label channels come last, and are for the heads that keep everything",
            hint="Give the plan that says which heads stream to calibrate double-sparsity.",
        )
    if kept[: len(heads.layers)] != kept[len(heads.layers) :]:
        raise PlanError(
            "the plans do not keep the same states and sliding windows",
            hint="What states keep comes last: give the other plan to its calibration with --plan.",
        )
    if budgets.streaming_heads and heads.streaming_heads:
        raise PlanError("both plans choose heads that stream")
    if heads.policy is not None and budgets.policy is not None:
        raise PlanError("both plans have token budgets")
    if budgets.streaming_heads or heads.policy is not None:
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
        for mine, theirs in zip(heads.layers, budgets.layers, strict=True)
    )
    shared = any(layer.budget is not None for layer in layers)
    return replace(
        heads,
        layers=layers,
        policy=budgets.policy if shared else None,
        provenance=heads.provenance + budgets.provenance,
    )


def _intended_ring(provenance: dict[str, Any]) -> tuple[int, int] | None:
    """The sink and window that a calibration measured with, if it says so."""
    options = provenance.get("options")
    if not isinstance(options, dict):
        return None
    sink, window = options.get("sink"), options.get("window")
    if isinstance(sink, int) and isinstance(window, int) and sink >= 0 and window >= 1:
        return sink, window
    return None
