"""What the codes of a plan keep and lose, read from the plan alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kvtool.codes import CodePlan
from kvtool.errors import UsageError
from kvtool.evaluate.compare import ABSENT
from kvtool.evaluate.tables import narrow_table
from kvtool.plan import Plan
from kvtool.sizes import BF16

BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ExplainedPart:
    """Keys, values, or both of the layers of a code.

    Attributes:
        part: `keys`, `values` or `joint`.
        width: Numbers that are stored of a token.
        full: Numbers that they stand for.
        spectrum: What is lost without each row; the first `width` rows are kept.
    """

    part: str
    width: int
    full: int
    spectrum: list[float]

    @property
    def tail(self) -> float:
        """What is lost without the rows that are not kept."""
        return math.fsum(self.spectrum[self.width :])


@dataclass(frozen=True)
class ExplainedCode:
    """One code of a plan.

    Attributes:
        layers: Those that share it.
        bytes_per_token: Of a code without bits as bfloat16.
        lost_share: Of the spectrum, behind the cut.
        predicted: Loss at these widths, in the unit of the spectrum.
        measured: Nats that this code alone cost when it was calibrated, with `measured_width`
            numbers per token; None where nobody measured.
    """

    layers: list[int]
    kind: str
    parts: list[ExplainedPart]
    bytes_per_token: int
    lost_share: float
    predicted: float
    measured: float | None
    measured_width: int | None

    @property
    def name(self) -> str:
        """Its layers."""
        first, last = self.layers[0], self.layers[-1]
        if last - first + 1 > len(self.layers):  # others lie between
            return ", ".join(map(str, self.layers))
        return f"{first}" if first == last else f"{first}–{last}"


@dataclass(frozen=True)
class Explained:
    """All codes of a plan.

    Attributes:
        model_layers: Of the model, also those with a window or a state, which have no code.
        nats: Whether spectra are in nats.
        measured_together: Nats that all codes together cost when they were calibrated.
    """

    model: str
    model_layers: int
    method: str
    allocation: str
    nats: bool
    codes: list[ExplainedCode]
    measured_together: float | None
    bytes_per_token: int
    native_bytes_per_token: int

    @property
    def measured_sum(self) -> float | None:
        """Of the codes measured alone; None where one was not."""
        alone = [code.measured for code in self.codes if code.measured is not None]
        return math.fsum(alone) if len(alone) == len(self.codes) else None

    @property
    def additivity(self) -> float | None:
        """The measured parts over the measured whole: 1 where losses add up."""
        if self.measured_sum is None or not self.measured_together:
            return None
        return self.measured_sum / self.measured_together

    def to_dict(self) -> dict[str, Any]:
        """What ``kvtool calibrate explain --json`` prints."""
        return {
            **asdict(self),
            "measured_sum": self.measured_sum,
            "additivity": self.additivity,
        }

    def words(self) -> str:
        """Whether losses add up, in one line."""
        if self.additivity is None:
            return "no code was measured alone, so whether losses add up is not known"
        return (
            f"measured alone the codes cost {self.measured_sum:.3g} nats in all, together "
            f"{self.measured_together:.3g}: a ratio of {self.additivity:.2f}"
        )

    def table(self) -> Table:
        """One row per code."""
        numbers = (
            "numbers\nper token",
            "of",
            "bytes\nper token",
            "spectrum\nlost",
            f"predicted\nloss,\n{'nats' if self.nats else 'own unit'}",
            "measured\nalone,\nnats",
            "at\nnumbers",
        )
        table = narrow_table(
            f"codes of {self.model} by {self.method}, {self.bytes_per_token:,} bytes per "
            f"token (native {self.native_bytes_per_token:,})",
            ("layers", "keys"),
            numbers,
        )
        for code in self.codes:
            table.add_row(
                code.name,
                "after RoPE" if code.kind == "rotated" else "before RoPE",
                " + ".join(f"{part.width}" for part in code.parts),
                " + ".join(f"{part.full}" for part in code.parts),
                f"{code.bytes_per_token:,}",
                f"{100 * code.lost_share:.2g} %",
                f"{code.predicted:.3g}",
                ABSENT if code.measured is None else f"{code.measured:.3g}",
                ABSENT if code.measured_width is None else f"{code.measured_width}",
            )
        return table

    def picture(self) -> str:
        """A row per part, a column per layer: the higher, the more of the numbers are stored."""
        rows: dict[str, list[str]] = {}
        for code in self.codes:
            for part in code.parts:
                height = min(len(BLOCKS) * part.width // part.full, len(BLOCKS) - 1)
                row = rows.setdefault(part.part, [" "] * self.model_layers)
                for layer in code.layers:
                    row[layer] = BLOCKS[height]
        names = max(map(len, rows))
        lines = [f"{name:>{names}} {''.join(row)}" for name, row in rows.items()]
        legend = f"columns: layers; {BLOCKS[-1]} all numbers stored, {BLOCKS[0]} next to none"
        return "\n".join([*lines, f"{'':>{names}} {legend}"])


def explain(plan: Plan, name: str) -> Explained:
    """What the codes of a plan keep and lose.

    Args:
        name: What the user calls the plan.

    Raises:
        UsageError: It has no codes.
    """
    if plan.allocation is None:
        raise UsageError(
            f"{name} has no codes to explain: it is a plan of heads",
            hint="'kvtool plan show' tells what its heads keep",
        )
    made = plan.provenance[-1] if plan.provenance else {}
    measured = _numbers(made.get("measured"), len(plan.codes))
    widths = _numbers(_totals(made.get("widths")), len(plan.codes))
    (together,) = _numbers([made.get("measured_together")], 1)
    codes: list[ExplainedCode] = []
    for index, (code, layers) in enumerate(zip(plan.codes, plan.coded_layers, strict=True)):
        parts = _parts(plan, index, code)
        total = math.fsum(x for part in parts for x in part.spectrum)
        lost = math.fsum(part.tail for part in parts)
        width = widths[index]
        codes.append(
            ExplainedCode(
                layers,
                code.kind,
                parts,
                code.token_bytes(BF16),
                lost / total if total else 0.0,
                lost,
                measured[index],
                None if width is None else int(width),
            )
        )
    return Explained(
        plan.base.source,
        plan.base.layers,
        str(made.get("method", "unknown")),
        plan.allocation,
        together is not None,
        codes,
        together,
        plan.bytes_per_token(BF16),
        plan.native_bytes_per_token(BF16),
    )


def _parts(plan: Plan, index: int, code: CodePlan) -> list[ExplainedPart]:
    full = code.full_width(plan.base.channels)
    return [
        ExplainedPart(
            part, width, full, plan.tensors[f"codes.{index}.{part}.spectrum"].double().tolist()
        )
        for part, width in zip(code.parts, code.widths, strict=True)
    ]


def _totals(said: Any) -> Any:
    """Numbers of codes whose parts are told one by one; anything else as it is."""
    if not isinstance(said, list):
        return said
    return [
        sum(x) if isinstance(x, list) and x and all(isinstance(n, int) for n in x) else None
        for x in said
    ]


def _numbers(said: Any, count: int) -> Sequence[float | None]:
    """So many numbers of a provenance, which may say anything; None for those that are none."""
    given = said if isinstance(said, list) and len(said) == count else [None] * count
    return [
        float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None for x in given
    ]
