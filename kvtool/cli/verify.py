"""``kvtool verify``: is a converted checkpoint still the model that it was made from?"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from kvtool.cli import _console, _options
from kvtool.errors import GateError


def result_of(check: dict[str, Any]) -> str:
    """How a check went, in a word."""
    if not check["passed"]:
        return "FAILED"
    return "ok" if check["judged"] else "measured"


def verify(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that kvtool convert wrote.")
    ],
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="The model it was made from.",
            rich_help_panel="Input",
        ),
    ],
    long_prompt: Annotated[
        bool,
        typer.Option(
            "--long-prompt/--no-long-prompt",
            help="Also read a prompt of more than 2048 tokens.",
            rich_help_panel="Run",
        ),
    ] = True,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    offline: _options.Offline = False,
    revision: _options.Revision = None,
    trust_remote_code: _options.TrustRemoteCode = False,
) -> None:
    """Load OUT with stock transformers and compare it with MODEL; exit code 6 if a check fails."""
    from kvtool.checkpoint import Checkpoint
    from kvtool.convert.verify import verify as run_checks

    base = Checkpoint.open(
        against, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    with _console.waiting(f"verify {output}", quiet):
        report = run_checks(output, base, long_prompt=long_prompt)
    table = Table(title=f"{output} against {against}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("check")
    table.add_column("result")
    table.add_column("measured")
    for check in report.checks:
        table.add_row(check.name, result_of(vars(check)), check.detail)
    _console.emit(report.to_dict(), json, table)
    if not report.passed:
        failed = ", ".join(check.name for check in report.checks if not check.passed)
        raise GateError(f"{output} against {against}: these checks failed: {failed}")
