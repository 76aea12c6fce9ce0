"""`kvtool evaluate`: what a model's cache costs and what it keeps, beside its original."""

from __future__ import annotations

import os
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvtool._staging import write_file
from kvtool.cli import _options as options
from kvtool.cli._console import dump_json, emit, out, progress
from kvtool.cli._plans import head_picture
from kvtool.errors import GateError, UsageError


def evaluate(
    model: options.Model,
    plan: options.PlanFile = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="The original; default: the one that MODEL's manifest names, or with --plan "
            "MODEL itself without the plan.",
        ),
    ] = None,
    data: options.Data = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text; default: 8, or 4 with --quick.")
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a window that are stored first; default: 1536, less in a short "
            "context.",
        ),
    ] = None,
    continuation: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens behind them that are predicted from the cache; default: 256, less in a "
            "short context.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Less text and fewer lengths: a first look, too little for a claim."
        ),
    ] = False,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            min=1,
            help="Tokens of the retrieval tasks; may be given more than once. Default: 512, 1024 "
            "and 2048 for the pass-key, 1400 and 700 for the needle.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option(help="Measure what each layer alone loses.")] = True,
    chat_prompts: Annotated[bool, typer.Option(help="Ask a few questions in chat.")] = True,
    speed: Annotated[bool, typer.Option(help="Time generation as well.")] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0.0, help="Fail (exit code 6) above this KL, in nats per token."),
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(min=0.0, help="Fail above this ratio of perplexities.")
    ] = None,
    min_recall: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Fail below this share of the answers that the original knows."
        ),
    ] = None,
    min_chat_end: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Fail below this share of answers that end, among the chat prompts whose "
            "answer the original ends.",
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the report to this .json or .html file, in place of an older one; "
            "may be given more than once.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    offline: options.Offline = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure bytes per token, KL, perplexity, retrieval and speed, beside the original."""
    from dataclasses import replace

    from kvtool.checkpoint import Checkpoint
    from kvtool.corpus import evaluation_text
    from kvtool.evaluate.evaluation import Settings, manifest_base
    from kvtool.evaluate.evaluation import evaluate as measure
    from kvtool.evaluate.report import Gates

    if min_chat_end is not None and not chat_prompts:
        raise UsageError("--min-chat-end judges what --no-chat-prompts leaves out")
    for file in output or ():
        check_output(file, (".json", ".html"))
    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    kept = options.read_plan(plan, checkpoint)
    source = against if against is not None else manifest_base(checkpoint)
    if source is None and kept is not None:
        source = model  # without its plan
    gates = Gates(max_kl, max_ppl_ratio, min_recall, min_chat_end)
    if source is None and gates.judge:
        raise UsageError(
            f"{model} names no original to be judged against", hint="give it with --against"
        )
    base = None
    if source is not None:
        of_base = revision if source == model else None
        base = Checkpoint.open(
            source, revision=of_base, offline=offline, trust_remote_code=trust_remote_code
        )
    settings = Settings.quick() if quick else Settings()
    if lengths:
        settings = replace(settings, passkey_lengths=tuple(lengths), needle_lengths=tuple(lengths))
    settings = replace(
        settings, windows=windows or settings.windows, prefill=prefill, continuation=continuation,
        layers=layers, chat=chat_prompts, speed=speed, seed=seed,
    )  # fmt: skip
    device = options.resolve_device(device)
    with progress(quiet) as report_progress:
        report = measure(
            checkpoint,
            base,
            evaluation_text(data),
            plan=kept,
            settings=settings,
            dtype=options.resolve_dtype(dtype, device),
            device=device,
            report=report_progress,
        )
    if report.plan is not None:
        report = replace(report, plan={"file": str(plan), **report.plan})
    result = report.to_dict()
    # What was measured for long must outlive a file that cannot be written, and a closed pipe.
    try:
        emit(result, json, report.table())
        if kept is not None and kept.knows_heads and not json:
            out.print(head_picture(kept), soft_wrap=True)
    finally:
        _write(output or (), result, report.table())
    if failed := report.failures(gates):
        raise GateError(f"{model}: {'; '.join(failed)}")


def _write(files: Sequence[Path], result: dict[str, Any], table: Table) -> None:
    """Writes a report into files, pages last: numbers must outlive what draws them."""
    for file in sorted(files, key=lambda file: file.suffix == ".html"):
        text = dump_json(result) + "\n"
        if file.suffix == ".html":
            from kvtool.evaluate.html import report_page

            text = report_page(loads(text), table)
        write_file(file, text.encode())


def check_output(file: Path, suffixes: Sequence[str]) -> None:
    """Refuses, before any work, a file that cannot be written or is of no known kind.

    Raises:
        UsageError: It is a folder, lies in none, is read-only, ends otherwise, or is JSON that is
            no report, such as the `config.json` of a checkpoint.
    """
    parent = file.absolute().parent
    if file.is_dir() or not parent.is_dir():
        raise UsageError(f"{file} cannot be written: it must be a file in an existing folder")
    # It is written beside, then renamed; a file that is there must allow it all the same.
    if not all(os.access(path, os.W_OK) for path in (parent, file) if path.exists()):
        raise UsageError(f"{file} cannot be written: permission is denied")
    if file.suffix not in suffixes:
        raise UsageError(f"{file} cannot be written: it must end in {' or '.join(suffixes)}")
    if file.suffix == ".json" and file.exists() and not _is_report(file):
        raise UsageError(
            f"{file} is not a report of 'kvtool evaluate', so none is written in its place",
            hint="name another file",
        )


def _is_report(file: Path) -> bool:
    """Whether a file holds a report, or nothing yet."""
    text = file.read_bytes()
    try:
        return not text or "format_version" in loads(text)
    except (ValueError, TypeError):
        return False
