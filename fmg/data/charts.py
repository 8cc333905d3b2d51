"""Figures: one style for all, curves with bands, and how they are written. Imports no torch.

Colours are those of Okabe and Ito, which can be told apart with any kind of colour vision; markers and dashes repeat
them, so that a figure can be printed in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.display import plot_label
from fmg.core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_FORMATS = ("png", "svg", "pdf")
"""Formats of figures, chosen by a file's suffix."""
GREY = "#707070"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00", GREY)
"""Okabe and Ito, with the yellow darkened to show on white, and a grey."""
MAX_POINTS = 200
"""A longer curve is shown as the means of this many equal segments, with the lowest and highest value of each."""

_MARKERS = "osD^vPX*p<"
_DASHES: Sequence[Any] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARKS = 12
_WIDTH, _HEIGHT = 5.6, 2.9
_SCALES = 8.0
_SHORT_LABEL = 26
_INK, _SOFT = "#1c2330", "#dde2ea"
_BAND, _RANGE = "95 % interval of the mean", "lowest to highest"

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A curve of a figure.

    Attributes:
        label: label in the legend.
        x: iterations.
        y: one value for each `x`.
        band: half-width of the 95 % interval; zeros for none.
        kept: where the kept checkpoint is; it is marked with a star.
        look: number of its style, so that a run looks the same in several figures; None: its position in the figure.
        low, high: the lowest and highest values behind a point that is a mean of several.
    """

    label: str
    x: Values
    y: Values
    band: Values
    kept: float | None = None
    look: int | None = None
    low: Values | None = None
    high: Values | None = None


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure of a size in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the curve number `index`, distinct for the first 36."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 1.6,
        "markersize": 4,
    }


def frame(axes: Axes, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """The grid, the labels and the spines that all figures share."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(plot_label(title), fontsize=10, loc="left", color=_INK)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(plot_label(y_label), fontsize=9)
    axes.tick_params(labelsize=8)
    if x_label == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_SOFT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(axes: Axes, curves: Sequence[Curve], first: int = 0) -> None:
    """Draws curves in the styles from number `first` on; long ones are shortened to `MAX_POINTS`."""
    for index, curve in enumerate(map(shortened, curves), start=first):
        x, y, band = (np.asarray(values, dtype=float) for values in (curve.x, curve.y, curve.band))
        look = style(index if curve.look is None else curve.look)
        every = max(1, len(x) // _MARKS)
        # markers of two curves that coincide do not hide each other
        axes.plot(x, y, markevery=(index % every, every), zorder=3, **look)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(x, curve.low, curve.high, color=look["color"], alpha=0.1, linewidth=0)
        if band.any():
            axes.fill_between(x, y - band, y + band, color=look["color"], alpha=0.22, linewidth=0)
        if curve.kept is not None and len(x):
            at = int(np.abs(x - curve.kept).argmin())
            axes.plot(
                x[at], y[at], marker="*", ms=13, color=look["color"], mec="white", mew=1, linestyle="none", zorder=4
            )


def legend(figure: Any, curves: Sequence[Curve]) -> None:
    """A legend below the figure, where it hides no curve: the curves, what the bands are, and the star."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = [shortened(curve) for curve in curves]
    handles: list[Any] = []
    if len(shown) > 1:
        looks = (style(index if curve.look is None else curve.look) for index, curve in enumerate(shown))
        names = (plot_label(curve.label) for curve in shown)
        handles += [Line2D([], [], label=name, **look) for name, look in zip(names, looks, strict=True)]
    if any(np.any(curve.band) for curve in shown):
        handles.append(Patch(facecolor=GREY, alpha=0.35, linewidth=0, label=_BAND))
    if any(curve.low is not None for curve in shown):
        handles.append(Patch(facecolor=GREY, alpha=0.15, linewidth=0, label=_RANGE))
    kept = list(dict.fromkeys(curve.kept for curve in shown if curve.kept is not None))
    if kept:
        where = f": iteration {kept[0]:.0f}" if len(kept) == 1 else ""
        star: dict[str, Any] = {"marker": "*", "ms": 11, "color": GREY, "mec": "white", "linestyle": "none"}
        handles.append(Line2D([], [], label=f"kept checkpoint{where}", **star))
    if handles:
        place, longest = "outside lower center", max(len(str(handle.get_label())) for handle in handles)
        columns = min(len(handles), 3 if longest <= _SHORT_LABEL or len(handles) == 3 else 2)
        figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, fontsize=8)


def shortened(curve: Curve) -> Curve:
    """The curve; one of more than `MAX_POINTS` as the means of equal segments, with lowest and highest values.

    The last segment ends at the last value. A segment without a finite value is a gap.
    """
    if len(curve.y) <= MAX_POINTS:
        return curve
    x, y, band = (np.asarray(values, dtype=float) for values in (curve.x, curve.y, curve.band))
    starts = np.linspace(0, len(y), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(y)))
    known = np.isfinite(y)
    number = np.add.reduceat(known, starts).astype(float)
    number[number == 0] = np.nan
    mean = np.add.reduceat(np.where(known, y, 0), starts) / number
    low = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    low, high = (np.where(np.isfinite(bound), bound, np.nan) for bound in (low, high))
    widths = np.add.reduceat(np.nan_to_num(band), starts) / counts
    return replace(curve, x=np.add.reduceat(x, starts) / counts, y=mean, band=widths, low=low, high=high)


def by_scale(curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves in panels, so that a large curve does not flatten a small one."""
    panels: list[tuple[float, list[Curve]]] = []
    for curve in curves:
        y = np.abs(np.asarray(curve.y, dtype=float))
        size = float(y[np.isfinite(y)].max(initial=0.0))
        for known, panel in panels:
            if size == known == 0 or (min(size, known) > 0 and max(size, known) / min(size, known) <= _SCALES):
                panel.append(curve)
                break
        else:
            panels.append((size, [curve]))
    return [panel for _, panel in panels]


def chart(curves: Sequence[Curve], title: str, y_label: str = "") -> Figure:
    """A figure of curves over iterations: one panel, or one per scale where the scales differ."""
    panels = by_scale(curves) or [[]]
    figure = new_figure(_WIDTH, 0.4 + _HEIGHT * (1 + 0.65 * (len(panels) - 1)))
    _stack(figure, panels, title, y_label)
    if len(panels) > 1:
        for axes, panel in zip(figure.axes, panels, strict=True):
            axes.set_title(", ".join(plot_label(curve.label) for curve in panel), fontsize=8, loc="right", color=GREY)
    return figure


def curve_figure(trained: Sequence[Curve], heldout: Sequence[Curve], title: str) -> Figure:
    """The figure of a run: the reward on training prompts on the left, the held-out scores on the right."""
    panels = by_scale(heldout) or [[]]
    figure = new_figure(11, max(4.2, 2.6 * len(panels) + 0.8))
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    _stack(left, [trained], "training prompts", "mean reward of an iteration")
    _stack(right, panels, "held-out prompts", "mean score")
    figure.suptitle(plot_label(title), fontsize=12)
    return figure


def _stack(figure: Any, panels: Sequence[Sequence[Curve]], title: str, y_label: str) -> None:
    """Draws panels over iterations below each other, with a common legend."""
    first = 0
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0], panels, strict=True):
        draw(axes, panel, first)
        frame(axes, title if first == 0 else "", "iteration" if panel is panels[-1] else "", y_label)
        first += len(panel)
    legend(figure, [curve for panel in panels for curve in panel])


def grid_figure(charts: Sequence[tuple[str, str, Sequence[Curve]]], title: str) -> Figure:
    """Several charts (title, label of y, curves) in one figure, two per row, with a common legend.

    Curves with the same label have the same style.
    """
    panels = [(name, unit, panel) for name, unit, curves in charts for panel in by_scale(curves)]
    rows = max(1, -(-len(panels) // 2))
    figure = new_figure(11, 3.2 * rows + 0.9)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for empty in axes[len(panels) :]:
        empty.set_visible(False)
    for place, (name, unit, panel) in zip(axes, panels, strict=False):
        draw(place, panel)
        frame(place, name, "iteration", unit)
    named = {curve.label: curve for _, _, panel in panels for curve in panel}
    legend(figure, list(named.values()))
    figure.suptitle(plot_label(title), fontsize=12)
    return figure


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file of one of `FIGURE_FORMATS`; the same figure gives the same bytes."""
    import matplotlib

    file = BytesIO()
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    # `savefig` would draw everything twice, the first time only for the layout
    backend = import_module(f"matplotlib.backends.backend_{'agg' if kind == 'png' else kind}")
    # a fixed salt and no date; fonts that journals accept
    with matplotlib.rc_context({"svg.hashsalt": "fmg", "pdf.fonttype": 42}):
        getattr(backend.FigureCanvas(figure), f"print_{kind}")(file, metadata=dated)
    return file.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, in the format of the suffix.

    Raises:
        StorageError: the system refused; no partial file is left.
    """
    write_atomic(path, figure_bytes(figure, path.suffix.removeprefix(".").lower() or "png"))
