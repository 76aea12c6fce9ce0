"""`kvtool doctor`: what there is on this machine, and what is missing."""

from __future__ import annotations

from dataclasses import asdict

from rich import box
from rich.table import Table

from kvtool.cli import _console, _options


def doctor(json: _options.Json = False) -> int:
    """Show versions, devices, kernels and what is missing; exit code 1 if kvtool cannot work."""
    from kvtool.doctor import examine

    findings = examine()
    table = Table(box=box.SIMPLE, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")  # a path that is cut short leads nowhere
    for finding in findings:
        mark = "!" if finding.wrong else ""
        table.add_row(mark, finding.name, finding.found, finding.hint or "")
    wrong = any(finding.wrong for finding in findings)
    result = {"ok": not wrong, "findings": [asdict(finding) for finding in findings]}
    _console.emit(result, json, table)
    return int(wrong)
