"""The report of a run, its figures, and the page that compares runs. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Image

from fmg.core import metric_keys as keys
from fmg.core.display import counted, data_uri
from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.files import write_atomic
from fmg.core.images import decoded
from fmg.core.machine import read_environment
from fmg.data.charts import Curve, chart, curve_figure, figure_bytes, grid_figure, write_figure
from fmg.data.checkpoints import CheckpointIndex, read_index
from fmg.data.metrics_log import MetricsLog
from fmg.data.page import Block, Gallery, Listing, Picture, Section, Table, Text, Tile, inline_image, page
from fmg.data.pictures import before_after
from fmg.data.prompt_sets import spread
from fmg.data.run_folder import RunFolder, RunState
from fmg.data.run_metrics import TWO_SIDED_95, Line, Outcome, headline, headline_keys, score_labels
from fmg.recipe.document import leaves

BANDS = (
    "Bands are 95 % intervals of the mean; stars mark the kept checkpoint. A curve of more than 200 points is shown as"
    " the means of equal segments, with a lighter band from the lowest to the highest value of each."
)

_GRIDS = 4
_GRID_SIDE = 1000
_MAX_CURVES = 6
_UPDATE_CHARTS = {
    keys.APPROX_KL: ("approximate KL to the rollout policy", "nats"),
    keys.CLIP_FRACTION: ("share of clipped or masked rows", "share of rows"),
    keys.GRAD_NORM: ("norm of the gradient before clipping", "L2 norm"),
    keys.LR: ("learning rate", "of the last update"),
    keys.KL_REF: ("KL to the base", "nats"),
    keys.GRADIENT_REWARD: ("reward of the images that gradients went through", "mean reward"),
    keys.LAST_STEP_REWARD: ("reward of the images of the last step", "mean reward"),
    keys.L2_REF: ("distance of jumps from those of the base", "mean square"),
    keys.OLD_DISTANCE: ("distance of velocities from the old policy", "mean square"),
    keys.BASE_DISTANCE: ("distance of velocities from the base", "mean square"),
    keys.ZERO_STD_RATIO: ("share of groups whose rewards are all equal", "share of groups"),
    keys.SKIPPED_UPDATES: ("skipped updates", "per iteration"),
    keys.COMPLETION_AGREEMENT: ("agreement of one jump with the full grid", "correlation within groups"),
}
_STEP_CHARTS = {
    keys.STEP_REWARD_STD: ("reward of siblings by branching step", "mean std within a group"),
    keys.STEP_ZERO_STD_RATIO: ("groups with equal rewards by branching step", "share of groups"),
    keys.STEP_GROUPS: ("groups by branching step", "per iteration"),
}
if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunRecord:
    """The record of a run, from its folder."""

    path: Path
    state: RunState
    log: MetricsLog
    index: CheckpointIndex | None
    recipe: str

    @staticmethod
    def read(run: RunFolder) -> RunRecord:
        """The record of a run in any state.

        Raises:
            CheckpointError: when it is not a run folder, or a file in it is damaged.
        """
        state = run.state()
        try:
            recipe = run.recipe.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"'{run.recipe}' cannot be read", "Restore it from a copy.") from None
        index = read_index(run.path)
        for name in index.changed_files(run.path) if index else ():
            text = f"'{run.path / name}' was changed after it was written; its figures may not be those of the run"
            warnings.warn(text, FmgWarning, stacklevel=2)
        return RunRecord(run.path, state, MetricsLog.read(run.metrics, strict=True), index, recipe)

    @property
    def title(self) -> str:
        return f"{self.state.model}: {self.path.name}"

    @property
    def iterations(self) -> int:
        return self.log.done

    @cached_property
    def outcome(self) -> Outcome:
        """What the run gained: scores of its base, of the kept checkpoint and of the last evaluation."""
        return Outcome.of(self.log.evaluations, self.index.entry(self.index.best) if self.index else None)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Labels of the held-out scores by log key."""
        return score_labels(self.log.evaluations.logged())

    def logged(self, key: str) -> str:
        """The log key of the score `eval/...` for the kind of weights that the run keeps: raw or averaged."""
        if not self.outcome.averaged or not key.startswith(keys.EVAL):
            return key
        return keys.EVAL_EMA + key.removeprefix(keys.EVAL)

    def tiles(self) -> Iterator[Tile]:
        """Headline scores of the kept checkpoint beside those of the base."""
        before, which = headline(self.outcome.base), self.outcome.title
        for name, value in headline(self.outcome.kept).items():
            note = f"base {before[name]:.3f}, {which}" if name in before else which
            yield Tile(f"{name}, held out", f"{value:.3f}", note)


def write_run_report(run: RunFolder) -> Path:
    """Writes `report.html` of a run, replacing an older one.

    Raises:
        CheckpointError: when the folder is not that of a run, or a file in it is damaged.
    """
    path = run.report
    write_atomic(path, run_page(RunRecord.read(run)).encode())
    return path


def run_page(record: RunRecord) -> str:
    """The HTML of a run's report."""
    began = record.state.created[:16].replace("T", " ")
    kept = "" if record.outcome.iteration is None else f", keeps {record.outcome.title}"
    done = f"{counted(record.iterations, 'iteration')}, {record.state.state}{kept}, started {began}"
    sections = [
        Section("Before and after", list(_before_after(record))),
        Section("Held-out scores", list(_scores(record))),
        Section("Curves", list(_curves(record))),
        Section("Samples during training", list(_grids(record))),
        Section("Where the time went", list(_timings(record))),
        Section("Recipe, with the source of each value", [Listing(list(_recipe_lines(record.recipe)))], folded=True),
        Section("Environment", list(_environment(record)), folded=True),
    ]
    return page(record.title, done, list(record.tiles()), [section for section in sections if section.blocks])


def _before_after(record: RunRecord) -> Iterator[Block]:
    if pictures := before_after_pictures(record):
        yield Text("The same prompts and seeds, generated by the base model and by the kept checkpoint.")
        yield Gallery(pictures)


def kept_grids(run: RunFolder, outcome: Outcome) -> dict[str, Image]:
    """Sample grids of the base and of the kept checkpoint, by title; none where one of the two is missing."""
    if outcome.iteration is None:
        return {}
    kept = run.sample(outcome.iteration, averaged=outcome.averaged and outcome.iteration > 0)
    title = "kept: the base model" if outcome.iteration == 0 else f"kept: {outcome.title}"
    try:
        return {
            name: decoded(path, lambda image: image.convert("RGB"))
            for name, path in (("base", run.sample(0)), (title, kept))
        }
    except UsageError:
        return {}


def kept_picture(run: RunFolder, outcome: Outcome) -> Image | None:
    """The image `before_after.png`: both grids side by side, or None."""
    grids = kept_grids(run, outcome)
    if not grids:
        return None
    (base, left), (kept, right) = grids.items()
    return before_after(left, right, (base, kept))


def before_after_pictures(record: RunRecord) -> list[Picture]:
    """The grids of `kept_grids` for a page."""
    grids = kept_grids(RunFolder(record.path), record.outcome)
    found = []
    for title, image in grids.items():
        source, pixelated = inline_image(image, _GRID_SIDE)
        found.append(Picture(source, title, f"samples of the {title}", pixelated, "wide"))
    return found


def _scores(record: RunRecord) -> Iterator[Block]:
    first, last, kept = record.outcome.base, record.outcome.last, record.outcome.kept
    if not first:
        yield Text("The run has not been evaluated yet.")
        return
    if not kept:
        yield Text(f"The kept checkpoint ({record.outcome.title}) has not been evaluated.")
        return
    which = record.outcome.title if record.outcome.iteration is not None else f"iteration {kept['iteration']:.0f}"
    yield Text(
        f"The result of the run is the kept checkpoint ({which}). The interval of the gain treats the two evaluations"
        " as independent; they share prompts and seeds, so it is, if anything, too wide."
    )
    ended = f"last (iteration {last['iteration']:.0f})"
    columns = ("score", "base", f"kept ({which})", "gain", "95 % interval", ended)
    rows = []
    for key, label in score_labels(kept).items():
        if key not in first:
            continue
        gain = kept[key] - first[key]
        error = keys.error_of(key)
        errors = [line[error] for line in (first, kept) if error in line]
        half = TWO_SIDED_95 * math.hypot(*errors) if len(errors) == 2 else None
        between = (
            "-"
            if half is None or kept["iteration"] == first["iteration"]
            else f"[{gain - half:+.3f}, {gain + half:+.3f}]"
        )
        shown = [label, f"{first[key]:.3f}", f"{kept[key]:.3f}", f"{gain:+.3f}", between]
        rows.append((*shown, f"{last[key]:.3f}" if key in last else "-"))
    yield Table(columns, rows, frozenset(columns) - {"score"})


def _curves(record: RunRecord) -> Iterator[Block]:
    if found := list(charts(record)):
        yield Text(BANDS)
        yield Gallery(found)


def charts(record: RunRecord) -> Iterator[Picture]:
    """The curves of a run, one chart per group of related metrics."""
    lines = record.log
    yield from _chart(
        [curve(lines, keys.REWARD, keys.REWARD_SE, "mean reward")], "reward on training prompts", "mean reward"
    )
    shown: set[str] = set()
    measured = record.outcome.kept or record.outcome.base
    for label, key in headline_keys(measured).items():
        shown.add(key)
        both = (key, keys.EVAL_EMA + key.removeprefix(keys.EVAL))
        yield from _chart([_held_out(record, one) for one in both], f"{label}, held out", "mean score")
    for reward, names in _parts(measured, shown):
        parts = [_held_out(record, record.logged(key)) for key in names]
        yield from _chart(parts, f"{reward} by part, held out", "mean score")
    for key, (title, unit) in _UPDATE_CHARTS.items():
        found = curve(lines, key, None, key)
        # a constant rate is in the recipe
        if key != keys.LR or np.unique(found.y).size > 1:
            yield from _chart([found], title, unit)
    logged = lines.iterations.logged()
    for template, (title, unit) in _STEP_CHARTS.items():
        steps = sorted((step, key) for key in logged if (step := keys.step_of(key, template)) is not None)
        by_step = [curve(lines, key, None, f"step {step}") for step, key in steps]
        yield from _chart(by_step[:_MAX_CURVES], title, unit)


def run_figure(log: MetricsLog, outcome: Outcome, title: str) -> Figure:
    """The curves of a run in one figure: `curve.png`. Held-out scores have no bands here; those in the report do."""
    held_out: list[Curve] = []
    for key, label in score_labels(log.evaluations.logged()).items():
        found = _marked(curve(log, key, None, label), key, outcome)
        # parts that are the whole of a reward coincide with its total
        if len(held_out) < _MAX_CURVES and not any(np.array_equal(found.y, one.y) for one in held_out):
            held_out.append(found)
    return curve_figure([curve(log, keys.REWARD, keys.REWARD_SE, "mean reward")], held_out, title)


def write_run_figure(record: RunRecord, path: Path) -> None:
    """Writes the curves of a run in the format that the suffix names."""
    write_figure(run_figure(record.log, record.outcome, record.title), path)


def run_picture(record: RunRecord) -> Image:
    """The same figure as an image."""
    png = figure_bytes(run_figure(record.log, record.outcome, record.title), "png")
    return decoded(png, lambda picture: picture.convert("RGB"))


def _marked(found: Curve, key: str, outcome: Outcome) -> Curve:
    """The curve with a star at the kept checkpoint, if it belongs to the kind of weights that was kept."""
    own = key.startswith(keys.EVAL_EMA if outcome.averaged else keys.EVAL)
    return replace(found, kept=outcome.iteration) if own else found


def curve(log: MetricsLog, key: str, error: str | None, name: str) -> Curve:
    """A metric over iterations with its 95 % band."""
    at, values, errors = log.columns(key, error)
    return Curve(name, at, values, TWO_SIDED_95 * errors)


def _held_out(record: RunRecord, key: str) -> Curve:
    found = curve(record.log, key, keys.error_of(key), record.labels.get(key, key))
    return _marked(found, key, record.outcome)


def _parts(line: Line, shown: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Rewards with the keys of parts that no other chart shows and that differ from the total."""
    for label, total in headline_keys(line).items():
        stem = total.removesuffix(keys.MEAN)
        parts = [
            k for k in score_labels(line) if k.startswith(f"{stem}_") and k not in shown and line[k] != line[total]
        ]
        if parts:
            yield label, parts


def _chart_picture(title: str, y_label: str, curves: Sequence[Curve]) -> Picture:
    image = figure_bytes(chart(curves, title, y_label), "svg")
    return Picture(data_uri("svg+xml", image), "", title, layout="wide")


def _chart(curves: Sequence[Curve], title: str, y_label: str) -> Iterator[Picture]:
    shown = [found for found in curves if len(found.y) > 1]
    # a line that is zero throughout says nothing
    if any(np.nan_to_num(found.y).any() for found in shown):
        yield _chart_picture(title, y_label, shown)


def _grids(record: RunRecord) -> Iterator[Block]:
    files = spread(RunFolder(record.path).sampled(), _GRIDS)
    pictures = [inlined(file, _GRID_SIDE, file.stem.replace("-", " ")) for file in files]
    if any(pictures):
        yield Gallery([picture for picture in pictures if picture is not None])


def inlined(file: Path, side: int, alt: str) -> Picture | None:
    """An image file for a page, or None when it is missing or damaged."""
    try:
        source, pixelated = decoded(file, lambda image: inline_image(image, side))
    except UsageError:
        return None
    return Picture(source, "", alt, pixelated, "wide")


def _timings(record: RunRecord) -> Iterator[Block]:
    logged = {*record.log.iterations.logged(), *record.log.evaluations.logged()}
    stages = sorted(key for key in logged if key.startswith(keys.TIME) and key.endswith(keys.SECONDS))
    spent = {stage: record.log.columns(stage)[1] for stage in stages}
    whole = keys.TIME_ITERATION
    total = sum(float(spent[stage].sum()) for stage in (whole, keys.TIME_EVAL) if stage in spent)
    if not total:
        return
    rows = []
    for stage, seconds in sorted(spent.items(), key=lambda entry: -float(entry[1].sum())):
        name = stage.removeprefix(keys.TIME).removesuffix(keys.SECONDS)
        name = "iteration, all stages" if stage == whole else name
        share = f"{100 * seconds.sum() / total:.0f} %"
        rows.append((name, str(len(seconds)), f"{np.median(seconds):.2f}", f"{seconds.sum():.1f}", share))
    columns = ("stage", "times", "median s", "sum s", "share")
    yield Table(columns, rows, frozenset(columns) - {"stage"})


def _recipe_lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines of YAML with comments separated; a `#` inside quotes is not a comment."""
    for line in text.splitlines():
        quoted: str | None = None
        for at, char in enumerate(line):
            if quoted:
                quoted = None if char == quoted else quoted
            elif char in "'\"":
                quoted = char
            elif char == "#" and (at == 0 or line[at - 1] == " "):
                yield line[:at], line[at:]
                break
        else:
            yield line, ""


def _environment(record: RunRecord) -> Iterator[Block]:
    found = read_environment(record.path)
    if found:
        yield Table(("what", "version"), list(found.items()))


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
    pictures = [_chart_picture(*one) for one in _comparison_charts(records, names)]
    sections = [
        Section("Scores", [_comparison_scores(records, names)]),
        Section("Curves", [Text(BANDS), Gallery(pictures)] if pictures else []),
        Section("Where the recipes differ", list(_differences(records, names))),
        Section("Before and after", list(_comparison_pictures(records, names))),
    ]
    title = f"Comparison of {len(records)} runs"
    return page(title, ", ".join(names), [], [section for section in sections if section.blocks])


def write_comparison_figure(runs: Sequence[RunFolder], path: Path) -> None:
    """Writes the curves of several runs into one figure, in the format that the suffix names.

    Raises:
        CheckpointError: when a folder is not that of a run, or a file in it is damaged.
    """
    records = [RunRecord.read(run) for run in runs]
    names = _names(records)
    write_figure(grid_figure(list(_comparison_charts(records, names)), f"Comparison of {len(records)} runs"), path)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The folder name of each run, or its path where two share a name."""
    short = [record.path.name for record in records]
    return [name if short.count(name) == 1 else str(record.path) for name, record in zip(short, records, strict=True)]


def _comparison_scores(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """One row per run: each headline score before and after."""
    scores = list(dict.fromkeys(name for record in records for name in headline(record.outcome.kept)))
    columns = ("run", "model", "state", "iterations", "kept", *scores)
    rows = []
    for record, name in zip(records, names, strict=True):
        before, after = headline(record.outcome.base), headline(record.outcome.kept)
        cells = [f"{before[s]:.3f} → {after[s]:.3f}" if s in before and s in after else "-" for s in scores]
        kept = "-" if record.outcome.iteration is None else f"{record.outcome.iteration}{_whose(record)}"
        rows.append((name, record.state.model, record.state.state, str(record.iterations), kept, *cells))
    return Table(columns, rows, frozenset(columns) - {"run", "model", "state"})


def _comparison_charts(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, str, list[Curve]]]:
    """Title, label of y and one curve per run, for the reward and for every headline score."""

    def over(key: str, error: str) -> list[Curve]:
        found = (
            replace(
                curve(r.log, r.logged(key), r.logged(error), name if r.logged(key) == key else name + _whose(r)),
                kept=r.outcome.iteration if key.startswith(keys.EVAL) else None,
                look=number,
            )
            for number, (r, name) in enumerate(zip(records, names, strict=True))
        )
        return [one for one in found if len(one.y) > 1]

    scores = {key: label for record in records for label, key in headline_keys(record.outcome.kept).items()}
    wanted = [(keys.REWARD, keys.REWARD_SE, "reward on training prompts", "mean reward")]
    wanted += [(key, keys.error_of(key), f"{name}, held out", "mean score") for key, name in scores.items()]
    for key, error, title, unit in wanted:
        if curves := over(key, error):
            yield title, unit, curves


def _whose(record: RunRecord) -> str:
    return " (moving average)" if record.outcome.averaged else ""


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Block]:
    flat = [{path: str(value) for path, value in leaves(RunFolder(record.path).values())} for record in records]
    paths = list(dict.fromkeys(path for values in flat for path in values))
    rows = [
        (path, *(values.get(path, "-") for values in flat))
        for path in paths
        if len({values.get(path) for values in flat}) > 1
    ]
    if rows:
        yield Table(("value", *names), rows)
    else:
        yield Text("The recipes are identical.")


def _comparison_pictures(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Block]:
    for record, name in zip(records, names, strict=True):
        if pictures := before_after_pictures(record):
            yield Gallery(pictures, name)
