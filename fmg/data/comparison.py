"""A page that compares several runs: scores, curves over each other, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.core.files import write_atomic
from fmg.data.charts import Curve, chart, figure_bytes, grid_figure, write_figure
from fmg.data.page import Block, Gallery, Picture, Section, Table, Text, inline_svg, page
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import PREFIX, REWARD, SUFFIX, headline
from fmg.data.run_report import BANDS, RunRecord, before_after_pictures, curve, label


def write_comparison(runs: Sequence[RunFolder], path: Path) -> None:
    """Writes the comparison of two or more runs.

    Raises:
        UsageError: when the file exists, or a run is named twice.
        CheckpointError: when a folder is not that of a run, or a file in it is damaged.
    """
    if path.exists():
        raise UsageError(f"'{path}' exists already", "Name another --out; nothing is overwritten.")
    places = [run.path.resolve() for run in runs]
    twice = next((run for run in runs if places.count(run.path.resolve()) > 1), None)
    if twice is not None:
        raise UsageError(f"The run '{twice.path}' is named twice", "Name each run once.")
    text = comparison_page([RunRecord.read(run) for run in runs])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def comparison_page(records: Sequence[RunRecord]) -> str:
    """The HTML of a comparison."""
    names = _names(records)
    pictures = [_picture(*one) for one in _charts(records, names)]
    sections = [
        Section("Scores", [_scores(records, names)]),
        Section("Curves", [Text(BANDS), Gallery(pictures)] if pictures else []),
        Section("Where the recipes differ", list(_differences(records, names))),
        Section("Before and after", list(_pictures(records, names))),
    ]
    title = f"Comparison of {len(records)} runs"
    return page(title, ", ".join(names), [], [section for section in sections if section.blocks])


def write_comparison_figure(runs: Sequence[RunFolder], path: Path) -> None:
    """Writes the curves of several runs over each other, in the format that the ending names.

    Raises:
        CheckpointError: when a folder is not that of a run, or a file in it is damaged.
    """
    records = [RunRecord.read(run) for run in runs]
    names = _names(records)
    write_figure(grid_figure(list(_charts(records, names)), f"Comparison of {len(records)} runs"), path)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The last name of each run, or its path where that is not enough."""
    short = [record.path.name for record in records]
    return [name if short.count(name) == 1 else str(record.path) for name, record in zip(short, records, strict=True)]


def _scores(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """One row a run; before and after for every headline score that a run has."""
    scores = list(dict.fromkeys(name for record in records for name in headline(record.outcome.kept)))
    columns = ("run", "model", "state", "iterations", "kept", *scores)
    rows = []
    for record, name in zip(records, names, strict=True):
        before, after = headline(record.outcome.base), headline(record.outcome.kept)
        cells = [f"{before[s]:.3f} → {after[s]:.3f}" if s in before and s in after else "-" for s in scores]
        kept = "-" if record.outcome.iteration is None else f"{record.outcome.iteration}{_whose(record)}"
        rows.append((name, record.state.model, record.state.state, str(record.iterations), kept, *cells))
    return Table(columns, rows, frozenset(columns) - {"run", "model", "state"})


def _charts(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, str, list[Curve]]]:
    """Title, label of y and curves, one a run, of the reward and of every headline score."""

    def over(key: str, error: str) -> list[Curve]:
        found = (
            replace(
                curve(r.log, r.logged(key), r.logged(error), name if r.logged(key) == key else name + _whose(r)),
                kept=r.outcome.iteration if key.startswith(PREFIX) else None,
                look=number,
            )
            for number, (r, name) in enumerate(zip(records, names, strict=True))
        )
        return [one for one in found if len(one.y) > 1]

    keys = {
        key: label(key)
        for record in records
        for key in record.outcome.kept
        if key.startswith(PREFIX) and key.endswith(SUFFIX) and label(key) in headline(record.outcome.kept)
    }
    wanted = [(REWARD, "reward/se", "reward on training prompts", "mean reward")]
    wanted += [(key, f"{key.removesuffix(SUFFIX)}_se", f"{name}, held out", "mean score") for key, name in keys.items()]
    for key, error, title, unit in wanted:
        if curves := over(key, error):
            yield title, unit, curves


def _picture(title: str, unit: str, curves: Sequence[Curve]) -> Picture:
    image = figure_bytes(chart(curves, title, y_label=unit), "svg")
    return Picture(inline_svg(image), "", title, layout="wide")


def _whose(record: RunRecord) -> str:
    return " (moving average)" if record.outcome.averaged else ""


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Block]:
    flat = [dict(_leaves(RunFolder(record.path).values(), ())) for record in records]
    paths = list(dict.fromkeys(path for values in flat for path in values))
    rows = [
        (path, *(values.get(path, "-") for values in flat))
        for path in paths
        if len({values.get(path) for values in flat}) > 1
    ]
    if rows:
        yield Table(("value", *names), rows)
    else:
        yield Text("The recipes are equal.")


def _pictures(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Block]:
    for record, name in zip(records, names, strict=True):
        if pictures := before_after_pictures(record):
            yield Gallery(pictures, name)


def _leaves(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for number, child in enumerate(value):
            yield from _leaves(child, (*path, str(number)))
    else:
        yield ".".join(path), str(value)
