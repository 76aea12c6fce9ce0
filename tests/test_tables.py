"""Tables on a terminal of 80 columns: no number is cut."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from test_evaluate import a_report
from test_explain import JUDGED, a_plan
from test_html_report import FIRST

from kvtool.evaluate.compare import compare
from kvtool.evaluate.explain import explain
from kvtool.evaluate.report import speed_table
from kvtool.evaluate.tables import margin
from kvtool.evaluate.throughput import Speed, Timing


def shown(table: Table, width: int) -> list[str]:
    """The lines of a table on a terminal of that width."""
    to = io.StringIO()
    Console(file=to, width=width, force_terminal=False).print(table)
    return to.getvalue().splitlines()


def report_table(tmp_path: Path) -> Table:
    report = a_report(kl=0.0123456, ratio=1.0234567)
    large = replace(report.divergence, cache_bytes=82_575_360)
    table = replace(report, divergence=large).table()
    table.add_row("KV heads that stream (prompts are read densely, then dropped)", "0", "6/90", "–")
    return table


def comparison(tmp_path: Path) -> Table:
    files = [tmp_path / f"{name}-of-the-heads-stream.json" for name in ("half", "most")]
    for file in files:
        file.write_text(json.dumps(FIRST), encoding="utf-8")
    return compare(files).table()


def explanation(tmp_path: Path) -> Table:
    return explain(a_plan(**JUDGED), "p").table()


def speeds(tmp_path: Path) -> Table:
    ours, theirs = Timing(0.1, 12345.6, 0.1234, 1234.5), Timing(0.2, 10234.5, 0.2345, 1034.5)
    speed = Speed(4096, 1, 32, 3, ours, theirs, theirs, 1.21, 1.19, 10**9, 10.0**9, 0.1123, 0.91)
    return speed_table([speed], "speed")


@pytest.mark.parametrize(("streaming", "said"), [(0, "how prompts are read"), (2, "2/6")])
def test_heads_that_stream_have_a_row_if_there_are_any(streaming: int, said: str) -> None:
    plan = {"codes": [], "streaming_heads": streaming, "kv_heads": 6, "prefill": "streamed"}
    report = replace(a_report(), plan={**plan, "policy": None, "layers": []})
    lines = "\n".join(shown(report.table(), 100))
    assert said in lines
    assert ("KV heads that stream" in lines) == (streaming > 0)


def test_a_report_says_which_bits_a_plan_has() -> None:
    plan = {"codes": [], "streaming_heads": 0, "kv_heads": 6, "prefill": "dense", "policy": None}
    layers = [
        {"bits": {"keys": 8, "values": 4, "rest": {"keys": 4, "values": 2}, "kept": None}},
        {"bits": {"keys": 3, "values": 4, "rest": None, "kept": 9}},
        {"bits": None, "scales": {"window": 0}},
    ]
    report = replace(
        a_report(), plan={**plan, "layers": [{"sparse": None, "scales": None, **x} for x in layers]}
    )
    lines = [" ".join(line.split()) for line in shown(report.table(), 100)]
    assert "│ bits of keys │ – │ 3, 8/4 │ – │" in lines
    assert "│ bits of values │ – │ 4, 9 kept, 4/2 │ – │" in lines
    assert "│ keys and values │ – │ fp8 │ – │" in lines


@pytest.mark.parametrize("made", [report_table, comparison, explanation, speeds])
def test_no_number_is_cut_at_80_columns(made, tmp_path: Path) -> None:
    table = made(tmp_path)
    lines = shown(table, 80)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    words = set(" ".join(lines).split())
    numbers = [column for column in table.columns if column.justify == "right"]
    assert {word for column in numbers for cell in column.cells for word in cell.split()} <= words


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.00421, "0.0042"), (0.14, "0.14"), (21.4, "21"), (99.6, "100"), (163.7, "164")],
)
def test_an_error_has_two_digits_and_no_exponent(error: float, text: str) -> None:
    assert margin(error) == text
