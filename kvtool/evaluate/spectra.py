"""The pictures of codes: their spectra with the cut, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from kvtool.evaluate.explain import Explained
from kvtool.evaluate.pictures import LIGHT, PLAIN, SIZE, Picture, save, style

_DEEP = 1e-9  # of the largest row; on one axis with less than this, all else would look the same

Panel = Callable[[Axes], None]


def code_pictures(explained: Explained) -> list[Picture]:
    """For a page; call it in :func:`~kvtool.evaluate.pictures.style`."""
    worst = max(explained.codes, key=lambda code: code.predicted)
    pictures = [
        Picture.of(
            f"Spectrum of {_of(part)}",
            "A line per code, the deeper its layers the darker; a dot where it is cut. What is "
            "right of the dot is lost.",
            f"What is lost without each number of {_of(part)}, of {len(explained.codes)} codes.",
            _figure([partial(spectra_panel, explained=explained, part=part)]),
        )
        for part in _part_names(explained)
    ]
    losses = Picture.of(
        "Loss by code",
        "Predicted at these widths by the spectrum; measured alone at the widths of calibration."
        if explained.nats
        else "What the spectrum behind the cut adds up to, of the whole.",
        f"The largest prediction is {worst.predicted:.3g}, of the layers {worst.name}.",
        _figure([partial(loss_panel, explained=explained)]),
    )
    return [*pictures, losses]


def save_explained(explained: Explained, file: Path) -> None:
    """Writes spectra and losses side by side as .svg or .png, as the suffix says, on white."""
    with style():
        panels: list[Panel] = [
            partial(spectra_panel, explained=explained, part=part)
            for part in _part_names(explained)
        ]
        figure = _figure([*panels, partial(loss_panel, explained=explained)])
        figure.suptitle(f"codes of {explained.model} by {explained.method}", fontsize="medium")
        save(figure, file)


def spectra_panel(axes: Axes, explained: Explained, part: str) -> None:
    """Every code's spectrum of a part over the numbers that it stores per token and layer."""
    unit = "nats" if explained.nats else "in the unit of the method"
    axes.set(
        title=f"{_of(part)}: loss without a number, {unit}",
        xlabel="numbers per token and layer",
    )
    top = 0.0
    for index, code in enumerate(explained.codes):
        layers = len(code.layers)
        for own in (x for x in code.parts if x.part == part):
            at = [(row + 1) / layers for row in range(len(own.spectrum))]
            depth = (index + 1) / len(explained.codes)
            axes.plot(at, own.spectrum, color=LIGHT["ours"], alpha=0.15 + 0.85 * depth, linewidth=1)
            axes.plot(
                at[own.width - 1], own.spectrum[own.width - 1], "o", color=LIGHT["lost"],
                markersize=3.5, zorder=3,
            )  # fmt: skip
            top = max(top, *own.spectrum)
    axes.set_xlim(left=0)
    if top:  # a logarithmic axis has no place for zeros alone
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], _DEEP * top))
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN)


def loss_panel(axes: Axes, explained: Explained) -> None:
    """What each code costs, over the layers that share it."""
    if not explained.nats:
        _bars(axes, explained, [100 * code.lost_share for code in explained.codes], "ours", 0, 1)
        axes.set_title("spectrum that is lost, %")
    else:
        _bars(axes, explained, [code.predicted for code in explained.codes], "base", 0, 2)
        alone = [0.0 if code.measured is None else code.measured for code in explained.codes]
        _bars(axes, explained, alone, "ours", 1, 2)
        axes.set_title("loss of a code alone, nats per token")
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the two names
        names = (("predicted for these widths", "base"), ("measured when calibrated", "ours"))
        for place, (name, role) in enumerate(names):
            axes.text(
                0.99, 0.97 - 0.08 * place, name, transform=axes.transAxes, ha="right", va="top",
                color=LIGHT[role],
            )  # fmt: skip
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(bottom=0)


def _bars(
    axes: Axes, explained: Explained, heights: list[float], role: str, place: int, places: int
) -> None:
    """One of several bars beside each other, from the first to the last layer of each code."""
    width = 0.8 / places
    for code, height in zip(explained.codes, heights, strict=True):
        first, last = code.layers[0], code.layers[-1]
        layers = last - first + 1
        left = first - 0.4 * layers + (layers - 1) / 2 + place * width * layers
        axes.bar(left, height, width * layers, align="edge", color=LIGHT[role])


def _figure(panels: list[Panel]) -> Figure:
    width, height = SIZE
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
    return figure


def _part_names(explained: Explained) -> list[str]:
    return list(dict.fromkeys(part.part for code in explained.codes for part in code.parts))


def _of(part: str) -> str:
    return "keys and values" if part == "joint" else part
