"""The curves of a study: dev loss and dev accuracy against forwards, a line for each method, a band over its seeds."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study_runs import Outcome, Point

from zo_ds.errors import MachineError
from zo_ds.files import write_atomically

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
_MARKERS = "osD^vPX*"
_DPI = 120
_SHADES = 128


def figure_class() -> Any:
    """The figure of matplotlib, which draws to files without a screen.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MachineError(
            "a plot needs matplotlib", where="--plot", why=str(error), remedy="pip install matplotlib"
        ) from error


def draw(curves: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Write the plot as PNG.

    Args:
        curves: by label, the finished runs of a method, scored at the same steps: the line is their mean, the band
            reaches from the lowest to the highest.
        path: of the file.

    Raises:
        MachineError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for index, (label, outcomes) in enumerate(curves.items()):
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        points = list(zip(*(outcome.points for outcome in outcomes), strict=True))
        _line(loss, points, "loss", label, style)
        _line(accuracy, points, "accuracy", label, style)
    for axes, title in ((loss, "dev loss"), (accuracy, "dev accuracy")):
        axes.set_xlabel("forwards")
        axes.set_ylabel(title)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    accuracy.legend(fontsize=8, frameon=False)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    # Bands over bands have thousands of shades; with a palette the file is a quarter of the size.
    image = importlib.import_module("PIL.Image").open(drawn).convert("RGB")
    image.quantize(_SHADES, dither=0).save(small, format="png", optimize=True, dpi=(_DPI, _DPI))
    write_atomically(path, small.getvalue())


def _line(axes: Any, points: Sequence[tuple[Point, ...]], score: str, label: str, style: Mapping[str, str]) -> None:
    forwards = [seeds[0].forwards for seeds in points]
    values = [[float(getattr(point, score)) for point in seeds] for seeds in points]
    axes.plot(
        forwards, [sum(seeds) / len(seeds) for seeds in values], label=label, markersize=4, linewidth=1.5, **style
    )
    axes.fill_between(
        forwards, [min(seeds) for seeds in values], [max(seeds) for seeds in values], color=style["color"], alpha=0.15
    )
