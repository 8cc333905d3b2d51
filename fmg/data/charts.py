"""Line charts as SVG, for pages."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from fmg.core.shown import plot_label
from fmg.data.pictures import Curve

_SIZE = (5.6, 3.1)
_INK, _SOFT = "#1c2330", "#dde2ea"


def line_chart(curves: Sequence[Curve], title: str, x_label: str = "iteration") -> bytes:
    """An SVG of curves with their bands, which are drawn as half-widths around the line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    # a fixed salt and no date: the same run gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "fmg"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            x, y, band = (np.asarray(values, dtype=float) for values in (curve.x, curve.y, curve.band))
            (line,) = axes.plot(
                x, y, label=plot_label(curve.label), linewidth=1.7, marker="o" if len(y) < 30 else None, ms=3
            )
            if band.any():
                axes.fill_between(x, y - band, y + band, color=line.get_color(), alpha=0.18, linewidth=0)
        axes.set_title(plot_label(title), fontsize=10, loc="left", color=_INK)
        axes.set_xlabel(x_label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color=_SOFT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            # below the axes, where it hides no curve
            figure.legend(loc="outside lower center", ncols=min(len(curves), 3), frameon=False, fontsize=8)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
