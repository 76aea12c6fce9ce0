"""``kvtool compare``: several reports beside each other, and which of them are worth choosing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtool._staging import write_file
from kvtool.cli import _options as options
from kvtool.cli._console import emit
from kvtool.cli.evaluate import check_output
from kvtool.errors import UsageError


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...", help="JSON reports of 'kvtool evaluate' against one original."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Also draw bytes against quality here: .html, .svg or .png."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare reports: bytes, quality and speed, and which no other beats in bytes and KL."""
    from kvtool.evaluate.compare import compare as put_together

    if output is not None:
        check_output(output, (".html", ".svg", ".png"))
    if len(reports) < 2:
        raise UsageError("a comparison needs two reports or more")
    comparison = put_together(reports)
    emit(comparison.to_dict(), json, comparison.table())
    if output is not None:
        from kvtool.evaluate.html import compare_page
        from kvtool.evaluate.pictures import save_comparison

        if output.suffix == ".html":
            write_file(output, compare_page(comparison).encode())
        else:
            save_comparison(comparison, output)
