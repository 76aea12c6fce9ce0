"""``kvtool calibrate layer-importance``: which attention layers a model can do without."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from kvtool.cli import _console, _options

_METHOD = "Method"
_BAR = 12


def layer_importance(
    model: _options.Model,
    count: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Layers to rank by replacing them for a trial; default: half of all. 0: rank "
            "by leaving layers out alone.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(
            min=1,
            help="Layers that are chosen before the others are ranked again.",
            rich_help_panel=_METHOD,
        ),
    ] = 4,
    steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps that a mixer is taught in a trial.", rich_help_panel=_METHOD
        ),
    ] = 40,
    data: _options.Data = None,
    tokens: _options.Tokens = 16384,
    device: _options.Device = "auto",
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Rank the layers of MODEL by what it costs to replace their attention by Mamba-2."""
    from kvtool.calibrate.layer_importance import ImportanceOptions, rank_layers, reaches
    from kvtool.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    device = _options.resolve_device(device)
    options = ImportanceOptions(count, at_once, steps, data, tokens, seed)
    with _console.progress(quiet) as report:
        started = time.perf_counter()
        reach = [] if count == 0 else reaches(checkpoint, options, report)
        ranked = rank_layers(checkpoint, options, reach, device=device, report=report)
        seconds = time.perf_counter() - started
    table = Table(
        title=f"layers of {model}, the least important first: KL in nats",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("layer", "left out: text", "recall", "replaced beside those above", "round"):
        table.add_column(column, justify="right")
    table.add_column("left out")
    most = max(score.left_out for score in ranked)
    for score in ranked:
        table.add_row(
            str(score.layer),
            f"{score.text:.4f}",
            f"{score.recall:.4f}",
            "" if score.probe is None else f"{score.probe:.4f}",
            "" if score.round is None else str(score.round),
            "#" * round(_BAR * (score.left_out / most) ** 0.5 if most else 0),
        )
    result = {
        "model": checkpoint.source,
        "layers": [score.layer for score in ranked],
        "scores": [{**asdict(score), "left_out": score.left_out} for score in ranked],
        "seconds": seconds,
    }
    _console.emit(result, json, table)
