"""``kvtool calibrate explain``: why the codes of a plan are as wide as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtool._staging import write_file
from kvtool.cli import _console, _options
from kvtool.cli.evaluate import check_output
from kvtool.cli.plan import PlanFile


def explain(
    plan: PlanFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also draw spectra, their cuts and the losses here: .html, .svg or .png.",
        ),
    ] = None,
    json: _options.Json = False,
) -> None:
    """Explain the codes of PLAN: spectra, widths, predicted and measured loss, by layer."""
    from kvtool.evaluate.explain import explain as read_codes
    from kvtool.plan import Plan

    if output is not None:
        check_output(output, (".html", ".svg", ".png"))
    explained = read_codes(Plan.read(plan), str(plan))
    _console.emit({"plan": str(plan), **explained.to_dict()}, json, explained.table())
    if not json:
        _console.out.print(explained.words(), soft_wrap=True)
        _console.out.print(explained.picture(), soft_wrap=True)
    if output is None:
        return
    if output.suffix == ".html":
        from kvtool.evaluate.html import explain_page

        write_file(output, explain_page(explained).encode())
    else:
        from kvtool.evaluate.spectra import save_explained

        save_explained(explained, output)
