"""The pictures of reports and comparisons, drawn in the colours of the light theme.

In a page each of these colours becomes a variable of the style sheet, so that a picture follows the
theme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from rich.filesize import decimal

from kvtool._staging import write_file
from kvtool.evaluate.compare import ABSENT, Comparison, Row

LIGHT = {
    "page": "#ffffff",
    "card": "#f3f5f7",
    "ink": "#1a1f25",
    "muted": "#5a646f",
    "line": "#d8dde3",
    "band": "#eef1f4",
    "base": "#7b858f",
    "ours": "#0069a8",
    "ours-soft": "#d9ebf7",
    "lost": "#b84a00",
    "lost-soft": "#fde6d5",
}


DARK = {
    "page": "#13171c",
    "card": "#1d232a",
    "ink": "#e7eaee",
    "muted": "#9ca7b3",
    "line": "#343c46",
    "band": "#1b2128",
    "base": "#8e99a5",
    "ours": "#5cb8ec",
    "ours-soft": "#12364d",
    "lost": "#f5914a",
    "lost-soft": "#4a2812",
}
"""Blue against orange, apart for every kind of colour vision (after Okabe and Ito)."""


STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # wide, so that what fits here fits in a reader's font
    "font.size": 11.5,
    "text.parse_math": False,  # a name may hold dollar signs
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["base"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlesize": "medium",
    "axes.titlecolor": LIGHT["muted"],
    "axes.titlelocation": "left",
    "grid.color": LIGHT["line"],
    "xtick.color": LIGHT["base"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.left": False,
    "ytick.labelcolor": LIGHT["muted"],
    "figure.dpi": 72,  # one unit of an SVG is one CSS pixel
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "kvtool",
}
SIZE = (420 / 72, 250 / 72)
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")
LOWEST_KL = 1e-4  # nats; on one axis with less than this, all else would look the same
LONGEST_NAME = 32
# Where a name may stand, in pixels from its point; behind FAR a line leads to it.
FAR = 6
PLACES = [(5, 3), (-5, -3), (5, -3), (-5, 3), (0, 6), (0, -6)]
PLACES += [(x, y) for y in (16, -16, 30, -30) for x in (8, -8)]


@dataclass(frozen=True)
class Point:
    """A report in a panel: bytes in percent, a measured value, its standard error."""

    row: Row
    y: float
    error: float | None
    name: str | None = None

    @property
    def x(self) -> float:
        return 100 * self.row.bytes_share


Panel = Callable[[Axes, Sequence[Row]], list[Point]]


@dataclass(frozen=True)
class Picture:
    """A drawing for a page, with its words; `description` is for those who cannot see it."""

    title: str
    caption: str
    description: str
    svg: Markup

    @classmethod
    def of(cls, title: str, caption: str, description: str, figure: Figure) -> Picture:
        """The figure as an SVG element; no other picture of a page has its ids."""
        drawn = _save(figure, "svg").decode()
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<style.*?</style>", "", drawn)  # it would hold for the whole page
        for role, colour in LIGHT.items():
            drawn = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{role})", drawn)
        name = re.sub(r"\W+", "-", title.lower())
        drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
        start = f'<svg role="img" aria-labelledby="{name}-title {name}-description"'
        words = (
            f'<title id="{name}-title">{escape(title)}</title>'
            f'<desc id="{name}-description">{escape(description)}</desc>'
        )
        drawn = drawn.replace("<svg", start, 1).replace(">", f">{words}", 1)
        return cls(title, caption, description, Markup(drawn))  # noqa: S704


def save_comparison(comparison: Comparison, file: Path) -> None:
    """Write the picture of a comparison as .svg or .png, as the suffix says, on white."""
    with style():
        figure = pareto(comparison.rows, [kl_panel, ratio_panel])
        figure.suptitle(f"against {comparison.conditions['original']}", fontsize="medium")
        save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as .svg or .png, as the suffix says, on white."""
    write_file(file, _save(figure, file.suffix[1:], facecolor=LIGHT["page"], dpi=144))


@contextmanager
def style() -> Iterator[None]:
    """Figures drawn in here look alike wherever they are drawn."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's fonts may have it
        matplotlib.rcdefaults()  # pictures do not depend on anybody's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        yield


def _save(figure: Figure, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    unstamped = {"Date": None, "Creator": None, "Format": None, "Type": None}
    metadata = unstamped if suffix == "svg" else {"Software": None}
    figure.savefig(buffer, format=suffix, metadata=metadata, **options)
    return buffer.getvalue()


def position_picture(
    title: str, caption: str, buckets: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> Picture | None:
    """Lines over a window's positions, one per name that was measured; None if none was."""
    names = {key: name for key, name in names.items() if _known(buckets, key)}
    if not names:
        return None
    figure, axes = _axes()
    roles = {"measured": "ours", "original": "base"}
    ends = []
    for key, name in names.items():
        for judged in ("prompt", "cache"):
            part = [bucket for bucket in buckets if bucket["judged"] == judged]
            middles = [(bucket["start"] + bucket["end"]) / 2 for bucket in part]
            axes.plot(middles, _values(part, key), "o-", color=LIGHT[roles[name]], markersize=3.5)
        ends.append((_last(buckets, key), name, roles[name]))
    start = next((b["start"] for b in buckets if b["judged"] == "cache"), buckets[-1]["end"])
    axes.axvspan(start, buckets[-1]["end"], color=LIGHT["band"], linewidth=0, zorder=0)
    axes.set_xlim(0, buckets[-1]["end"])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for the two words
    for x, word, side in ((0.01, "prompt", "left"), (0.99, "cache", "right")):
        axes.text(x, 0.97, word, transform=axes.transAxes, ha=side, va="top", color=LIGHT["muted"])
    axes.set(title="nats per token", xlabel="position in the window, tokens")
    _name_ends(axes, ends if len(ends) > 1 else [])
    cached = [bucket for bucket in buckets if bucket["judged"] == "cache"]
    means = ", ".join(
        f"{name} {_mean(cached, key)} behind the prompt" for key, name in names.items()
    )
    return Picture.of(title, caption, f"{title}, nats per token: {means}.", figure)


def damage_picture(layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    if not _known(layers, "kl"):
        return None
    figure, axes = _axes()
    damage = _values(layers, "kl")
    axes.bar(range(len(layers)), damage, color=LIGHT["ours"], width=0.75)
    axes.set_ylim(bottom=0)
    _layer_axis(axes, len(layers))
    axes.set(title="KL, nats per token")
    worst = max(range(len(layers)), key=lambda layer: layers[layer]["kl"] or 0.0)
    return Picture.of(
        "Damage by layer",
        "KL of the original with only this layer taken from the model under test.",
        f"Largest in layer {worst}: {damage[worst]:.3g} nats per token.",
        figure,
    )


def error_picture(layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    errors = (("output_error", "output", "ours"), ("score_error", "scores", "lost"))
    lines = [line for line in errors if _known(layers, line[0])]
    if not lines:
        return None
    figure, axes = _axes()
    for (key, _, role), marker in zip(lines, "os", strict=False):
        values = _values(layers, key)
        axes.plot(range(len(layers)), values, f"{marker}-", color=LIGHT[role], markersize=3.5)
    axes.set_ylim(bottom=0)
    _layer_axis(axes, len(layers))
    axes.set(title="relative error")
    _name_ends(axes, [(_last(layers, key), name, role) for key, name, role in lines])
    means = ", ".join(f"{name} {_mean(layers, key)}" for key, name, _ in lines)
    return Picture.of(
        "Error of attention by layer",
        "Of the scores and of the output, given what the original gives the layer.",
        f"Mean relative error over layers: {means}.",
        figure,
    )


def bytes_picture(layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    if not layers:
        return None
    figure, axes = _axes()
    count = len(layers)
    ours = _values(layers, "bytes_per_token_bf16")
    axes.bar(range(count), ours, color=LIGHT["ours"], width=0.75)
    ends = [(ours[-1], "measured", "ours")]
    if _known(layers, "base_bytes_per_token_bf16"):
        base = _values(layers, "base_bytes_per_token_bf16")
        edges = [layer - 0.5 for layer in range(count + 1)]
        axes.stairs(base, edges, color=LIGHT["base"], linewidth=1.5)
        ends.append((base[-1], "original", "base"))
    _layer_axis(axes, count)
    axes.set(title="bytes per token, bfloat16")
    _name_ends(axes, ends)
    constant = sum(layer["constant_bytes"] for layer in layers)
    return Picture.of(
        "Bytes by layer",
        "What every further token takes"
        + (f"; {decimal(int(constant))} more per sequence do not grow." if constant else "."),
        f"{sum(ours):,.0f} bytes per token in all {count} layers.",
        figure,
    )


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _layer_axis(axes: Axes, count: int) -> None:
    axes.set_xlim(-0.6, count - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name to the right of its last value, one above the other."""
    low, high = axes.get_ylim()
    place = low - high
    for value, name, role in sorted(ends):
        place = max(value, place + 0.09 * (high - low))
        axes.annotate(
            name,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=LIGHT[role],
        )


def _known(items: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(item.get(key) is not None for item in items)


def _values(items: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if item[key] is None else item[key] for item in items]


def _last(items: Sequence[Mapping[str, Any]], key: str) -> float:
    known: list[float] = [item[key] for item in items if item[key] is not None]
    return known[-1]


def _mean(items: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [item[key] for item in items if item[key] is not None]
    return f"{sum(values) / len(values):.3g}" if values else ABSENT


def pareto(rows: Sequence[Row], panels: Sequence[Panel]) -> Figure:
    """Panels side by side over the bytes of the cache, with every point's name beside it."""
    width, height = SIZE
    figure = Figure(figsize=(width * len(panels), height * 1.25), layout="constrained")
    drawn = []
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.margins(0.12)
        axes.set_xlabel("cache, % of the original's bytes")
        axes.grid(visible=True, axis="both")
        drawn.append((axes, panel(axes, rows)))
        axes.yaxis.set_major_formatter(PLAIN)
    figure.draw_without_rendering()  # only now is known where everything is, and what is free
    for axes, points in drawn:
        _name_points(axes, points)
    return figure


def kl_panel(axes: Axes, rows: Sequence[Row]) -> list[Point]:
    """KL on a logarithmic axis, and the front; what is next to nothing is put under the rest."""
    judged = [(row, row.kl) for row in rows if row.kl is not None]
    seen = [kl for _, kl in judged if kl >= LOWEST_KL]
    floor = min(seen) / 3 if seen else LOWEST_KL
    points = [
        Point(row, kl, row.kl_error)
        if kl >= LOWEST_KL
        else Point(row, floor, None, f"{row.label}: {kl:.1g}")
        for row, kl in judged
    ]
    axes.set_yscale("log")
    wide = bool(seen) and max(seen) > 300 * floor
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    _draw_points(axes, points)
    # What a report reaches holds for every larger cache, until the next one reaches more.
    front = [(point.x, point.y) for point in points if point.row.optimal]
    edge = [(axes.get_xlim()[1], y) for _, y in front[-1:]]
    axes.set_xlim(axes.get_xlim())
    xs, ys = [x for x, _ in front + edge], [y for _, y in front + edge]
    axes.step(xs, ys, where="post", color=LIGHT["ours"], linewidth=1, zorder=1)
    axes.set_title("KL, nats per token")
    return points


def ratio_panel(axes: Axes, rows: Sequence[Row]) -> list[Point]:
    points = [
        Point(row, row.perplexity_ratio, row.perplexity_ratio_error)
        for row in rows
        if row.perplexity_ratio is not None
    ]
    axes.axhline(1, color=LIGHT["base"], linewidth=1)
    _draw_points(axes, points)
    axes.set_title("perplexity ratio")
    return points


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    for point in points:
        axes.errorbar(
            point.x,
            point.y,
            # A bar may not reach zero, which a logarithmic axis does not have.
            yerr=min(point.error or 0.0, 0.99 * point.y),
            fmt="v" if point.name else "o",
            color=LIGHT["ours" if point.row.optimal else "base"],
            markersize=6,
            elinewidth=1,
        )


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each name near its point, where it covers the least."""
    frame = axes.get_window_extent()
    places = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]

    def covered(text: Annotation, place: tuple[float, float]) -> float:
        box = _put(text, place)
        outside = box.width * box.height - overlap(box, frame)
        return abs(place[1]) + outside + sum(overlap(box, other) for other in taken)

    for point in points:
        name = point.name or point.row.label
        text = axes.annotate(
            name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…",
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": LIGHT["base"], "shrinkA": 0, "shrinkB": 8},
        )
        text.set_in_layout(False)
        taken.append(_put(text, min(PLACES, key=partial(covered, text))))


def _put(text: Annotation, place: tuple[float, float]) -> Bbox:
    """Moves a name off its point and returns the box of its letters."""
    x, y = place
    text.xyann = place
    text.set(
        ha="left" if x > 0 else "right" if x < 0 else "center", va="bottom" if y > 0 else "top"
    )
    assert text.arrow_patch is not None
    text.arrow_patch.set_visible(abs(y) > FAR)
    text.get_window_extent()  # moves it; this box also holds the line to the point
    return Text.get_window_extent(text)


def overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)
