"""``kvtool calibrate statistics``: measure a model once, for every method that reads it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.errors import UsageError

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint

_INPUT = "Input"


def statistics(
    model: _options.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A file that the statistics are copied to; they are kept in kvtool's cache in "
            "any case.",
            rich_help_panel="Output",
        ),
    ] = None,
    data: _options.Data = None,
    tokens: _options.Tokens = 16384,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a window; default: 2048, or the model's context.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Windows start at random positions and end within so many tokens; default: "
            "8192, or the model's context.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    sinks: Annotated[
        int,
        typer.Option(
            min=0,
            help="First tokens of each window, which are summed up apart.",
            rich_help_panel=_INPUT,
        ),
    ] = 4,
    chat_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Share of the text that is put into conversations, if the model has a chat "
            "template.",
            rich_help_panel=_INPUT,
        ),
    ] = 0.25,
    seed: _options.Seed = 0,
    overwrite: _options.Overwrite = False,
    resume: _options.Resume = True,
    dry_run: _options.DryRun = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Measure queries, keys, values and attention of MODEL in one pass over text."""
    from kvtool.calibrate import statistics as measured
    from kvtool.checkpoint import Checkpoint
    from kvtool.progress import peak_memory

    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    options = measured.StatisticsOptions(data, tokens, window, context, sinks, chat_share, seed)
    planned = measured.plan(checkpoint, options)
    planned["reused"] &= resume
    if output is not None:
        _check_file(output, checkpoint, overwrite=overwrite)
    if dry_run:
        _console.emit(planned, json, _table(f"{model}: nothing written", planned))
        return
    started = time.perf_counter()
    with _console.progress(quiet) as report:
        found = measured.collect(checkpoint, options, report, resume)
    file = found.path
    if output is not None:
        unfinished = output.with_name(output.name + ".unfinished")
        shutil.copyfile(file, unfinished)
        unfinished.replace(output)
        file = output
    result = {
        **planned,
        "file": str(file),
        "bytes": file.stat().st_size,
        "fingerprint": found.fingerprint,
        "corpus": found.metadata["corpus"],
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    _console.emit(result, json, _table(f"Statistics of {model}", result))


def _check_file(output: Path, checkpoint: Checkpoint, *, overwrite: bool) -> None:
    """Raises UsageError where no file may be written."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder, the statistics are a file.")
    if output.exists() and not overwrite:
        raise UsageError(
            f"The output {output} exists already.", hint="Name another one, or give --overwrite."
        )
    if not output.parent.is_dir():
        raise UsageError(f"There is no folder {output.parent} to write {output.name} into.")
    if checkpoint.path.resolve() in output.resolve().parents:
        raise UsageError(
            f"{output} lies in the checkpoint it is made from.",
            hint="Some engines load every safetensors file there; name another place.",
        )


def _table(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("file", f"{facts['file']} ({decimal(facts['bytes'])})")
    table.add_row("measured before", "yes, reused" if facts["reused"] else "no")
    table.add_row(
        "text",
        f"{facts['tokens']} tokens: {facts['windows']} windows of {facts['window']}, "
        f"the first {facts['sinks']} positions of each apart",
    )
    table.add_row("in conversations", f"{facts['chat']:.0%}" if facts["chat"] else "none")
    table.add_row("positions", f"within {facts['context']}")
    if "seconds" in facts:
        table.add_row("seconds", f"{facts['seconds']:.1f}")
        table.add_row("peak memory", decimal(facts["peak_memory_bytes"]))
    else:
        table.add_row("disk needed", decimal(facts["disk_bytes"]))
        table.add_row("memory needed, about", decimal(facts["memory_bytes"]))
    return table
