"""The figure of a path check."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmg.core.shown import plot_label
from fmg.data.pictures import write_figure
from fmg.eval.path_check import AGAIN, MEAN, PathReport

_COLUMNS = 2


def path_figure(report: PathReport, path: Path) -> None:
    """Writes a PNG: one panel for each quantity, differences to the reference over time, from noise to data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    # the mean over all coordinates hardly moves; it stands in the table
    quantities = [quantity for quantity in report.quantities() if quantity != MEAN]
    rows = -(-len(quantities) // _COLUMNS)
    figure = Figure(figsize=(11, 3.2 * rows + 0.8), dpi=120, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    for panel, quantity in zip(panels, quantities, strict=False):
        for name in report.names():
            picked = [r for r in report.rows if (r.stochasticizer, r.quantity) == (name, quantity)]
            times, values = ([getattr(r, key) for r in picked] for key in ("time", "difference"))
            low, high = np.asarray([r.ci95 for r in picked], dtype=float).T
            style = {"color": "#888", "linestyle": "--"} if name == AGAIN else {}
            (line,) = panel.plot(times, values, marker="o", ms=4, linewidth=1.6, label=name, **style)
            panel.fill_between(times, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.axhline(0, color="#333", linewidth=0.8)
        panel.set_title("rms of the latents, relative" if quantity == "rms" else quantity, fontsize=11)
        panel.set_xlabel("time (1 noise, 0 data)", fontsize=9)
        panel.set_xlim(1, 0)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"{plot_label(report.target)}: states minus noised deterministic samples, {report.num} images", fontsize=12
    )
    write_figure(figure, path)
