"""``kvtool calibrate double-sparsity``: plan how few of the kept tokens a query reads."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool.cli import _options
from kvtool.cli._plans import emit_made, emit_planned
from kvtool.sizes import BF16

_METHOD = "Method"


def double_sparsity(
    model: _options.Model,
    output: _options.Output,
    channels: Annotated[
        int,
        typer.Option(
            help="Channels of each key by which tokens are chosen.",
            rich_help_panel=_METHOD,
        ),
    ] = 16,
    tokens_read: Annotated[
        int,
        typer.Option(
            help="Tokens that are read for each new one, the first and the last ones included.",
            rich_help_panel=_METHOD,
        ),
    ] = 256,
    plan: _options.StartPlan = None,
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
    """Plan by which channels of keys MODEL chooses the few tokens it reads; all are kept."""
    from kvtool.calibrate.double_sparsity import calibrate_double_sparsity, plan_ahead
    from kvtool.calibrate.statistics import StatisticsOptions, memory_bytes
    from kvtool.calibrate.stream import LayerStream
    from kvtool.checkpoint import Checkpoint
    from kvtool.plan import Plan, base_of, check_can_drop, whole_layers
    from kvtool.plan_file import check_plan_output

    check_plan_output(output, overwrite=overwrite)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    check_can_drop(checkpoint)
    start = _options.read_plan(plan, checkpoint)
    if start is None:
        start = Plan(base_of(checkpoint), whole_layers(checkpoint))
    ahead = plan_ahead(checkpoint, start, channels, tokens_read)
    text = StatisticsOptions(data=data, tokens=tokens, seed=seed)
    context = _options.context_of(checkpoint, None)
    if dry_run:
        facts = {
            "channels": channels,
            "tokens_read": tokens_read,
            "context": context,
            "bytes": ahead.cache_bytes(context, BF16),
            "bytes_read": ahead.read_bytes(context, BF16),
            "native_bytes": ahead.native_bytes(context, BF16),
            "memory_bytes": memory_bytes(LayerStream(checkpoint), text.tokens),
        }
        emit_planned(output, checkpoint.source, facts, json)
        return
    emit_made(
        lambda report: calibrate_double_sparsity(
            checkpoint, start, channels, tokens_read, text, report=report
        ),
        output, context, overwrite=overwrite, json=json, quiet=quiet,
    )  # fmt: skip
