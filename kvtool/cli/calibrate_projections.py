"""``kvtool calibrate projections``: plan a code that stands for keys and values."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from kvtool.cli import _console, _options
from kvtool.cli.plan import emit_plan, planned_facts

_METHOD = "Method"
_BF16 = 2


def projections(
    model: _options.Model,
    output: _options.Output,
    method: Annotated[
        Literal["pca", "cskv"],
        typer.Option(
            help="pca: keys after RoPE and values, head by head (where MatryoshkaKV starts). cskv: "
            "keys before RoPE and values, all heads of a layer together (CSKV's optimum).",
            rich_help_panel=_METHOD,
        ),
    ] = "cskv",
    kv_budget: Annotated[
        str,
        typer.Option(
            "--kv-budget",
            help="Size of the cache at --context: a share of the native one (50%), or bytes "
            "(300MB); exact tokens included.",
            rich_help_panel=_METHOD,
        ),
    ] = "50%",
    context: _options.BudgetContext = None,
    sink: Annotated[
        int,
        typer.Option(min=0, help="First tokens that are kept exactly.", rich_help_panel=_METHOD),
    ] = 4,
    window: Annotated[
        int,
        typer.Option(min=1, help="Last tokens that are kept exactly.", rich_help_panel=_METHOD),
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
    """Plan a low-rank code of every token of MODEL, with the first and last tokens kept exactly."""
    from kvtool.calibrate.projections import ProjectionOptions, calibrate_projections, planned_code
    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import base_of, check_can_drop, check_plan_output, parse_budget

    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    context = _options.context_of(checkpoint, context)
    base = base_of(checkpoint)
    check_can_drop(checkpoint)
    native = base.native_bytes(context, _BF16)
    options = ProjectionOptions(method, sink, window, context, data, tokens, seed)
    allowed = parse_budget(kv_budget, native)
    code = planned_code(base, options, allowed, _BF16)
    if dry_run:
        planned = {
            "plan": str(output),
            "model": checkpoint.source,
            "method": method,
            "context": context,
            "keys": code.keys,
            "values": code.values,
            "bytes": base.layers * _BF16 * code.numbers(context, base),
            "native_bytes": native,
            "dry_run": True,
        }
        _console.emit(planned, json, planned_facts("nothing written", planned))
        return
    with _console.progress(quiet) as report:
        started = time.perf_counter()
        plan = calibrate_projections(checkpoint, options, allowed, _BF16, report=report)
        seconds = time.perf_counter() - started
    plan.write(output, overwrite=overwrite)
    emit_plan(plan, output, context, json, {"seconds": seconds})
