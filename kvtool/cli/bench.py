"""`kvtool bench`: prefill and decode against transformers' own `generate`, in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from kvtool.cli import _options as options
from kvtool.cli._console import emit, err, progress
from kvtool.errors import UsageError


def bench(
    model: options.Model,
    plan: options.PlanFile = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="The model that transformers runs; default: the one that MODEL's manifest "
            "names, or MODEL.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Lengths in tokens, comma-separated; default: 512,4096,8000, as far as they fit."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated per run.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side, taken in turn.")] = 3,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also time the original in kvtool's own runtime.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offline: options.Offline = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time prefill and decode against transformers, and against what memory allows."""
    from dataclasses import asdict

    import torch

    from kvtool.checkpoint import Checkpoint
    from kvtool.evaluate import throughput
    from kvtool.evaluate.evaluation import manifest_base
    from kvtool.evaluate.report import plan_facts, speed_table
    from kvtool.factored import model_config
    from kvtool.runtime import Engine

    device = options.resolve_device(device)
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    kept = options.read_plan(plan, checkpoint)
    source = against if against is not None else manifest_base(checkpoint)
    original = (
        checkpoint
        if source is None
        else Checkpoint.open(source, offline=offline, trust_remote_code=trust_remote_code)
    )
    lengths = None if context is None else _lengths(context)
    configs = [model_config(opened) for opened in (checkpoint, original)]
    max_context = min(int(config.max_position_embeddings) for config in configs)
    contexts, note = throughput.fit_contexts(lengths, new_tokens, max_context)
    if note is not None and not quiet:
        err.print(note)

    precision = options.resolve_dtype(dtype, device)
    bandwidth = throughput.measure_bandwidth(torch.device(device))
    engine = Engine.load(checkpoint, dtype=precision, device=device, plan=kept)
    rival = throughput.load_rival(original, precision, device)
    reference = Engine.load(original, dtype=precision, device=device) if dense else None
    with progress(quiet) as report:
        speeds = list(
            throughput.compare_speed(
                engine,
                rival,
                contexts=contexts,
                new_tokens=new_tokens,
                batch=batch,
                repeats=repeats,
                bandwidth=bandwidth,
                dense=reference,
                report=report,
            )
        )
    environment = throughput.environment(engine.device, precision)
    result = {
        "model": checkpoint.source,
        "original": original.source,
        "plan": None if kept is None else plan_facts(kept),
        "environment": environment,
        "bandwidth": asdict(bandwidth),
        "speeds": [asdict(speed) for speed in speeds],
        "peak_memory": throughput.peak_memory(engine.device),
    }
    with_plan = "" if plan is None else f" with {plan}"
    title = (
        f"{checkpoint.source}{with_plan} in kvtool, {original.source} in transformers "
        f"{environment['versions']['transformers']}, {environment['dtype']}, batch {batch}, "
        f"{new_tokens} new tokens, median of {repeats}\n{environment['cpu']}, "
        f"{environment['device']}, threads: {environment['threads']}, "
        f"torch {environment['versions']['torch']}, memory read at {bandwidth.best / 1e9:.1f} GB/s"
    )
    emit(result, json, speed_table(speeds, title))


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--context takes whole numbers like 512,4096, got '{text}'") from error
