"""Several reports beside each other: which ones may be compared, and which are Pareto-optimal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from kvtool.errors import UsageError
from kvtool.evaluate.tables import margin, narrow_table

READS = (1, 2, 3)  # format versions; up to 2, shares are of bytes as run
ABSENT = "–"
# The settings that decide numbers; how often speed is measured decides none of them.
DECIDING = (
    "corpus",
    "windows",
    "prefill",
    "continuation",
    "seed",
    "passkey_lengths",
    "passkey_depths",
    "needle_lengths",
    "needle_contexts",
)
# One original measured on two devices: kernels sum in other orders, in bfloat16 above all.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Row:
    """One report in a comparison; None is what it did not measure, or what was not finite.

    Attributes:
        bytes_share: Of the original's cache of one evaluated sequence, both as bfloat16.
        kl: Mean KL(original || measured) in nats, and its standard error over windows.
        decode_ratio: Tokens/s over the original's in the same runtime.
        optimal: No other report has as few bytes and as low a KL, and less of one of them.
    """

    label: str
    file: str
    source: str
    bytes_share: float
    bytes_per_token_bf16: float
    kl: float | None
    kl_error: float | None
    perplexity_ratio: float | None
    perplexity_ratio_error: float | None
    recall_share: float | None
    chat_share: float | None
    decode_ratio: float | None
    optimal: bool = False


@dataclass(frozen=True)
class Comparison:
    """Reports measured alike against one original, by growing bytes.

    Attributes:
        conditions: What all of them share: the original, and the settings that decide numbers.
    """

    conditions: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """What ``kvtool compare --json`` prints."""
        return {"conditions": self.conditions, "reports": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """One row per report, the Pareto-optimal ones marked."""
        given = self.conditions
        numbers = (
            "cache,\nbfloat16" if given["bytes"] == "as bfloat16" else "cache\nas run",
            "bytes per\ntoken,\nbfloat16",
            "KL\nin nats",
            "perplexity\nratio",
            "recall\nkept",
            "chat\nends\nkept",
            "decode\nspeed",
        )
        table = narrow_table(
            f"against {given['original']} ({given['dtype']}, {given['prefill']}"
            f"+{given['continuation']} tokens, {given['windows']} windows)",
            ("report", "Pareto"),
            numbers,
            caption="● no other report has both a smaller cache and a lower KL",
            caption_justify="left",
        )
        for row in self.rows:
            table.add_row(
                row.label,
                "●" if row.optimal else "",
                f"{row.bytes_share:.1%}",
                f"{row.bytes_per_token_bf16:,.0f}",
                estimate(row.kl, row.kl_error),
                estimate(row.perplexity_ratio, row.perplexity_ratio_error, 4),
                share(row.recall_share),
                share(row.chat_share),
                ABSENT if row.decode_ratio is None else f"{row.decode_ratio:.2f} x",
            )
        return table


def compare(files: Sequence[Path]) -> Comparison:
    """Read reports and put them beside each other.

    Raises:
        UsageError: A file is no report, has no original, or was measured unlike another one.
    """
    reports = [_read(file) for file in files]
    given = [conditions for conditions, _ in reports]
    for (file, mine), (other, theirs) in combinations(zip(files, given, strict=True), 2):
        differing = [
            f"{name} is {_shown(theirs[name])} instead of {_shown(mine[name])}"
            for name in mine
            if _differ(mine[name], theirs[name])
        ]
        if differing:
            raise UsageError(f"{other} cannot be compared with {file}: {', '.join(differing)}")
    rows = [row for _, row in reports]
    rows = [replace(row, label=label) for row, label in zip(rows, _labels(rows), strict=True)]
    rows.sort(key=lambda row: (row.bytes_share, row.kl is None, row.kl))
    return Comparison(given[0], [replace(row, optimal=_optimal(row, rows)) for row in rows])


def estimate(value: float | None, error: float | None, digits: int = 3) -> str:
    """A number and its standard error, as far as there are any."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}g}" + ("" if error is None else f" ± {margin(error)}")


def share(value: float | None) -> str:
    """A share in percent."""
    return ABSENT if value is None else f"{value:.1%}"


def _read(file: Path) -> tuple[dict[str, Any], Row]:
    """What decides the numbers of a report, and its row, labelled by nothing yet."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file}: cannot be read as a report: {why}") from error
    try:
        version = report["format_version"]
        if version not in READS:
            raise UsageError(
                f"{file}: is of format {version}, but this kvtool reads {READS[0]} to {READS[-1]}"
            )
        if report["base"] is None:
            raise UsageError(
                f"{file}: measured without an original, so there is nothing to compare by",
                hint="'kvtool evaluate' takes one with --against",
            )
        return _conditions(report), _row(file, report)
    except KeyError as error:
        raise UsageError(f"{file}: not a report of 'kvtool evaluate', it has no {error}") from error
    except (AttributeError, TypeError) as error:
        raise UsageError(f"{file}: not a report of 'kvtool evaluate': {error}") from error


def _conditions(report: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in two reports; None where one does not have it."""
    chat = report.get("chat")
    return {
        "original": report["base"],
        "dtype": report["environment"]["dtype"],
        "bytes": "as bfloat16" if report["format_version"] > 2 else "as run",
        **{name: report["settings"].get(name) for name in DECIDING},
        "chat tokens": chat["max_new_tokens"] if chat else None,
        "chat prompts": len(chat["prompts"]) if chat else None,
        # Two models may have one name.
        "the original's cache": report["divergence"].get("base_cache_bytes"),
        "the original's perplexity": _number(report["divergence"]["base_perplexity"], "value"),
    }


def _differ(mine: Any, theirs: Any) -> bool:
    """Whether two reports tell different things of one condition, if both tell of it."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return not math.isclose(mine, theirs, rel_tol=TOLERANCE)
    return None not in (mine, theirs) and bool(mine != theirs)


def _row(file: Path, report: Mapping[str, Any]) -> Row:
    divergence, speed = report["divergence"], report["speed"]
    kl, ratio = divergence["kl"], divergence["perplexity_ratio"]
    dense = speed["dense"] if speed else None
    return Row(
        label="",
        file=str(file),
        source=str(report["source"]),
        bytes_share=_size(report, "bytes_share"),
        bytes_per_token_bf16=_size(report["cache"], "bytes_per_token_bf16"),
        kl=_number(kl, "value"),
        kl_error=_number(kl, "standard_error"),
        perplexity_ratio=_number(ratio, "value"),
        perplexity_ratio_error=_number(ratio, "standard_error"),
        recall_share=_number(report, "recall_share"),
        chat_share=_number(report, "chat_share") if "chat_share" in report else None,
        decode_ratio=_ratio(speed["ours"], dense) if dense else None,
    )


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    rate, original = (_number(speed, "decode_tokens_per_second") for speed in (ours, theirs))
    return rate / original if rate is not None and original else None


def _size(fields: Mapping[str, Any], name: str) -> float:
    """A number that every report has."""
    value = _number(fields, name)
    if value is None:
        raise TypeError(f"its {name} is not a number")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None."""
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise TypeError(f"its {name} is not a number")
    return float(value) if math.isfinite(value) else None


def _labels(rows: Sequence[Row]) -> list[str]:
    """The shortest names that tell the reports apart."""
    paths = [row.file for row in rows]
    sources = [row.source for row in rows]
    names = ([Path(path).stem for path in paths], [Path(s).name for s in sources], sources)
    return next((found for found in names if len(set(found)) == len(rows)), paths)


def _optimal(row: Row, rows: Sequence[Row]) -> bool:
    if row.kl is None:
        return False
    here = (row.bytes_share, row.kl)
    return not any(
        other.kl is not None
        and other.bytes_share <= row.bytes_share
        and other.kl <= row.kl
        and (other.bytes_share, other.kl) != here
        for other in rows
    )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
