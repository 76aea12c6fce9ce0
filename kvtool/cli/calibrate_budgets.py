"""``kvtool calibrate budgets``: plan how many tokens of a prompt each head keeps."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_made, emit_planned
from kvtool.sizes import BF16

_METHOD = "Method"


def budgets(
    model: _options.Model,
    output: _options.Output,
    kv_budget: Annotated[str, _options.kv_budget()],
    method: Annotated[
        Literal["uniform", "pyramidkv", "adakv", "prefixkv", "compresskv", "uncomp", "mass"],
        typer.Option(
            help="How heads and layers share it. uniform: evenly. pyramidkv: along a line. "
            "adakv: heads of a layer, by attention mass. prefixkv: layers, by one "
            "threshold of it. compresskv: layers, by eviction error. uncomp: two to one, "
            "by entropy. mass: all heads, so that most attention mass is kept.",
            rich_help_panel=_METHOD,
        ),
    ] = "adakv",
    policy: Annotated[
        Literal["snapkv", "expected"],
        typer.Option(
            help="How tokens are chosen at the end of a prompt. snapkv: by the attention of its "
            "last queries. expected: by what queries like its own would look at.",
            rich_help_panel=_METHOD,
        ),
    ] = "snapkv",
    context: _options.BudgetContext = None,
    minimum: Annotated[
        int,
        typer.Option(min=1, help="Tokens that every head keeps.", rich_help_panel=_METHOD),
    ] = 64,
    data: _options.Data = None,
    tokens: _options.Tokens = 16384,
    seed: _options.Seed = 0,
    overwrite: _options.Overwrite = False,
    dry_run: _options.DryRun = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Plan how many tokens of a prompt every head of MODEL keeps."""
    from kvtool.calibrate.budgets import (
        BudgetOptions,
        budget_tokens,
        calibrate_budgets,
        left_alone,
    )
    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import Plan, base_of, check_can_drop, whole_layers
    from kvtool.plan_file import check_plan_output
    from kvtool.sizes import parse_budget

    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    context = _options.context_of(checkpoint, context)
    check_can_drop(checkpoint)
    whole = Plan(base_of(checkpoint), whole_layers(checkpoint))
    native = whole.native_bytes(context, BF16)
    options = BudgetOptions(method, policy, context, minimum, data, tokens, seed)
    allowed = parse_budget(kv_budget, native)
    kept = budget_tokens(whole, options, allowed, BF16)
    if dry_run:
        dropped = whole.planned_heads * context - kept
        planned = {
            "method": method,
            "policy": policy,
            "context": context,
            "bytes": native - dropped * 2 * BF16 * whole.base.head_dim,
            "native_bytes": native,
            "left_alone": left_alone(whole),
        }
        emit_planned(output, checkpoint.source, planned, json)
        return
    emit_made(
        lambda report: calibrate_budgets(checkpoint, options, allowed, BF16, report=report),
        output, context, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip
