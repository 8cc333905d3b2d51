"""The figure of a path check."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fmg.core.display import plot_label
from fmg.data.charts import GREY, frame, new_figure, style, write_figure
from fmg.eval.path_check import AGAIN, MEAN, PathReport

_COLUMNS = 2
_SPREAD = 0.55


def path_figure(report: PathReport, path: Path) -> None:
    """Writes one panel for each quantity: differences to the reference at each time, from noise to data.

    The stochasticizers stand beside each other at each time, so that no interval hides another.
    """
    # the mean over all coordinates hardly moves; it stands in the table
    quantities = [quantity for quantity in report.quantities() if quantity != MEAN]
    rows = -(-len(quantities) // _COLUMNS)
    figure = new_figure(11, 3.4 * rows + 0.9)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    names, times = report.names(), sorted({row.time for row in report.rows}, reverse=True)
    for panel, quantity in zip(panels, quantities, strict=False):
        frame(
            panel,
            "rms of the latents" if quantity == "rms" else quantity,
            "time (1 noise, 0 data)",
            "relative difference" if quantity == "rms" else "difference of the mean score",
        )
        panel.axhline(0, color="#333", linewidth=0.8)
        for index, name in enumerate(names):
            picked = [r for r in report.rows if (r.stochasticizer, r.quantity) == (name, quantity)]
            shift = _SPREAD * ((index + 0.5) / len(names) - 0.5)
            at = np.asarray([times.index(r.time) + shift for r in picked])
            values = np.asarray([r.difference for r in picked], dtype=float)
            low, high = np.asarray([r.ci95 for r in picked], dtype=float).T
            look = style(index) | ({"color": GREY} if name == AGAIN else {}) | {"linestyle": "none"}
            panel.errorbar(at, values, [values - low, high - values], label=name, elinewidth=1.3, capsize=2, **look)
        panel.set_xticks(range(len(times)), [f"{time:.3g}" for time in times])
        for between in range(len(times) - 1):
            panel.axvline(between + 0.5, color="#dde2ea", linewidth=0.8)
        panel.grid(visible=False, axis="x")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"{plot_label(report.target)}: states minus noised deterministic samples, {report.num} images (95 %)",
        fontsize=12,
    )
    write_figure(figure, path)
