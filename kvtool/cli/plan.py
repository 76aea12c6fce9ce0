"""``kvtool plan``: look at a plan, slice another size from it, put two together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_plan
from kvtool.errors import UsageError
from kvtool.sizes import BF16

plan_app = typer.Typer(
    name="plan",
    help="Show plans, cut other sizes from them, put two together.",
    no_args_is_help=True,
)

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")]
Context = Annotated[
    int, typer.Option("--context", min=1, help="Tokens of a sequence for which sizes are stated.")
]


@plan_app.command("show")
def show(plan: PlanFile, context: Context = 4096, json: _options.Json = False) -> None:
    """Show what PLAN keeps, head by head, and what its cache costs."""
    from kvtool.plan import Plan

    emit_plan(Plan.read(plan), plan, context, json)


@plan_app.command("slice")
def slice_(
    plan: PlanFile,
    output: _options.Output,
    kv_budget: Annotated[str | None, _options.kv_budget(panel=None)] = None,
    streaming_heads: Annotated[
        str | None,
        typer.Option(
            "--streaming-heads",
            help="How many heads stream: a share of all KV heads (50%), or their number.",
        ),
    ] = None,
    context: Context = 4096,
    overwrite: _options.Overwrite = False,
    json: _options.Json = False,
) -> None:
    """Cut another size from PLAN: its streaming heads, or the width of its codes.

    Nothing is calibrated again: scores and full spectra are in the file.
    """
    from kvtool import slices
    from kvtool.plan import Plan
    from kvtool.sizes import parse_budget, parse_share

    if (kv_budget is None) == (streaming_heads is None):
        raise UsageError("either --kv-budget or --streaming-heads says how large the slice is")
    source = Plan.read(plan)
    if kv_budget is not None:
        budget = parse_budget(kv_budget, source.native_bytes(context, BF16))
        sliced = slices.cut(source, budget, context, BF16)
    else:
        assert streaming_heads is not None
        count = parse_share(streaming_heads, source.planned_heads)
        sliced = slices.stream_heads(source, count, *slices.ring_of(source))
    sliced.write(output, overwrite=overwrite)
    emit_plan(sliced, output, context, json)


@plan_app.command("compose")
def compose(
    heads: Annotated[
        Path, typer.Argument(metavar="HEADS", help="The plan that says which heads stream.")
    ],
    budgets: Annotated[
        Path, typer.Argument(metavar="BUDGETS", help="The plan with a token budget per head.")
    ],
    output: _options.Output,
    context: Context = 4096,
    overwrite: _options.Overwrite = False,
    json: _options.Json = False,
) -> None:
    """Give the heads of HEADS that do not stream their token budgets from BUDGETS."""
    from kvtool import slices
    from kvtool.plan import Plan

    composed = slices.compose(Plan.read(heads), Plan.read(budgets))
    composed.write(output, overwrite=overwrite)
    emit_plan(composed, output, context, json)
