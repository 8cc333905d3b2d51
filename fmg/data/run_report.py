"""The report of a run, `report.html` in its folder: what was trained, what it gained, and how. Imports no torch."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Image

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.files import write_atomic
from fmg.core.images import decoded
from fmg.core.machine import read_environment
from fmg.data.charts import Curve, chart, curve_figure, figure_bytes, write_figure
from fmg.data.checkpoints import CheckpointIndex, read_index
from fmg.data.metrics_log import MetricsLog
from fmg.data.page import Block, Gallery, Listing, Picture, Section, Table, Text, Tile, inline_image, inline_svg, page
from fmg.data.pictures import kept_grids
from fmg.data.prompt_sets import spread
from fmg.data.run_folder import RunFolder, RunState
from fmg.data.run_metrics import AVERAGED, PREFIX, REWARD, SUFFIX, Outcome, headline

BANDS = (
    "Bands are 95 % intervals of each mean, stars the kept checkpoint. A curve of more than 200 points is drawn as the"
    " means of equal parts, inside a lighter band from the lowest to the highest value of each."
)

_TWO_SIDED_95 = 1.96
_GRIDS = 4
_GRID_SIDE = 1000
_MAX_CURVES = 6
_UPDATE_CHARTS = {
    "approx_kl": ("approximate KL to the policy that drew the rollout", "nats"),
    "clip_frac": ("share of clipped rows", "share of rows"),
    "grad_norm": ("norm of the gradient before clipping", "L2 norm"),
    "kl_ref": ("KL to the base", "nats"),
    "zero_std_ratio": ("share of groups whose rewards are all equal", "share of groups"),
    "skipped_updates": ("updates that were skipped", "updates an iteration"),
    "branch/completion_agreement": ("agreement of a jump with the grid", "correlation within groups"),
}
_STEP_CHARTS = {
    r"branch/step_(\d+)_reward_std": ("reward of siblings by branching step", "mean std within a group"),
    r"branch/zero_std_ratio_(\d+)": ("groups with equal rewards by branching step", "share of groups"),
    r"branch/step_(\d+)_groups": ("groups by branching step", "groups an iteration"),
}
if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of a run."""

    path: Path
    state: RunState
    log: MetricsLog
    index: CheckpointIndex | None
    recipe: str

    @staticmethod
    def read(run: RunFolder) -> RunRecord:
        """The record of a run, in whatever state.

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
            text = f"'{run.path / name}' was changed after it was written; figures from it may be others than the run's"
            warnings.warn(text, FmgWarning, stacklevel=2)
        return RunRecord(run.path, state, MetricsLog.read(run.metrics, strict=True), index, recipe)

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return self.log.done

    @cached_property
    def outcome(self) -> Outcome:
        """What the run gained: its base, the checkpoint that it keeps and its last evaluation."""
        return Outcome.of(self.log.evaluations, self.index.entry(self.index.best) if self.index else None)

    def logged(self, key: str) -> str:
        """The key under which the log has a score `eval/...` of the kind of weights that the run keeps."""
        return AVERAGED + key.removeprefix(PREFIX) if self.outcome.averaged and key.startswith(PREFIX) else key

    def tiles(self) -> Iterator[Tile]:
        """Headline scores of the checkpoint that the run keeps, with those of the base."""
        before, which = headline(self.outcome.base), self.outcome.title
        for name, value in headline(self.outcome.kept).items():
            note = f"base {before[name]:.3f}, {which}" if name in before else which
            yield Tile(f"{name}, held out", f"{value:.3f}", note)


def write_run_report(run: RunFolder) -> Path:
    """Writes `report.html` of a run, in place of an older one.

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
    done = f"{record.iterations} iterations, {record.state.state}{kept}, began {began}"
    sections = [
        Section("Before and after", list(_before_after(record))),
        Section("Held-out scores", list(_scores(record))),
        Section("Curves", list(_curves(record))),
        Section("Samples on the way", list(_grids(record))),
        Section("Where the time went", list(_timings(record))),
        Section("Recipe, with the source of each value", [Listing(list(_recipe_lines(record.recipe)))], folded=True),
        Section("Environment", list(_environment(record)), folded=True),
    ]
    return page(
        f"{record.state.model}: {record.path.name}", done, list(record.tiles()), [s for s in sections if s.blocks]
    )


def _before_after(record: RunRecord) -> Iterator[Block]:
    if pictures := before_after_pictures(record):
        yield Text("The same prompts and seeds, by the base and by the checkpoint that the run keeps.")
        yield Gallery(pictures)


def before_after_pictures(record: RunRecord) -> list[Picture]:
    """Samples by the base and by the checkpoint that a run keeps, for a page; none where one of them is missing."""
    grids = kept_grids(RunFolder(record.path), record.outcome)
    found = []
    for title, image in grids.items():
        source, pixelated = inline_image(image, _GRID_SIDE)
        found.append(Picture(source, title, f"samples of the {title}", pixelated, "wide"))
    return found


def _scores(record: RunRecord) -> Iterator[Block]:
    first, last, kept = record.outcome.base, record.outcome.last, record.outcome.kept
    if not first:
        yield Text("There is no evaluation yet.")
        return
    if not kept:
        yield Text(f"The run keeps the checkpoint of {record.outcome.title}, which was not evaluated.")
        return
    which = record.outcome.title if record.outcome.iteration is not None else f"iteration {kept['iteration']:.0f}"
    yield Text(
        f"The result of the run is the checkpoint that it keeps: {which}. The interval of the gain takes the"
        " two evaluations as independent; they share prompts and seeds, so it is on the wide side."
    )
    ended = f"last (iteration {last['iteration']:.0f})"
    columns = ("score", "base", f"kept ({which})", "gain", "95 % interval", ended)
    rows = []
    known = [key for key in kept if key.startswith(PREFIX) and key.endswith(SUFFIX) and key in first]
    headlines = list(headline(kept))
    # headline scores first; the others in the order of the log, which keeps a reward's parts together
    known.sort(key=lambda key: headlines.index(label(key)) if label(key) in headlines else len(headlines))
    for key in known:
        stem = key.removesuffix(SUFFIX)
        gain = kept[key] - first[key]
        errors = [line[f"{stem}_se"] for line in (first, kept) if f"{stem}_se" in line]
        half = _TWO_SIDED_95 * math.hypot(*errors) if len(errors) == 2 else None
        between = (
            "-"
            if half is None or kept["iteration"] == first["iteration"]
            else f"[{gain - half:+.3f}, {gain + half:+.3f}]"
        )
        shown = [label(key), f"{first[key]:.3f}", f"{kept[key]:.3f}", f"{gain:+.3f}", between]
        rows.append((*shown, f"{last[key]:.3f}" if key in last else "-"))
    yield Table(columns, rows, frozenset(columns) - {"score"})


def _curves(record: RunRecord) -> Iterator[Block]:
    if found := list(charts(record)):
        yield Text(BANDS)
        yield Gallery(found)


def charts(record: RunRecord) -> Iterator[Picture]:
    """The curves of a run, one chart for what belongs together."""
    lines = record.log
    yield from _chart([curve(lines, REWARD, "reward/se", "mean reward")], "reward on training prompts", "mean reward")
    shown: set[str] = set()
    measured = record.outcome.kept or record.outcome.base
    for name in headline(measured):
        key = next((k for k in measured if k.startswith(PREFIX) and k.endswith(SUFFIX) and label(k) == name), None)
        if key is not None:
            shown.add(key)
            both = (key, AVERAGED + key.removeprefix(PREFIX))
            yield from _chart([_held_out(record, one) for one in both], f"{name}, held out", "mean score")
    for reward, keys in _parts(measured, shown):
        parts = [_held_out(record, record.logged(key)) for key in keys]
        yield from _chart(parts, f"{reward} by part, held out", "mean score")
    for key, (title, unit) in _UPDATE_CHARTS.items():
        yield from _chart([curve(lines, key, None, key)], title, unit)
    logged = lines.iterations.logged()
    for pattern, (title, unit) in _STEP_CHARTS.items():
        steps = sorted((int(match[1]), match[0]) for key in logged if (match := re.fullmatch(pattern, key)))
        by_step = [curve(lines, key, None, f"step {step}") for step, key in steps]
        yield from _chart(by_step[:_MAX_CURVES], title, unit)


def run_figure(log: MetricsLog, outcome: Outcome, title: str) -> Figure:
    """The curves of a run in one figure: `curve.png`. Held-out scores are without bands, which the report has."""
    known = [key for key in log.evaluations.logged() if key.startswith((PREFIX, AVERAGED)) and key.endswith(SUFFIX)]
    first = headline(log.evaluations[0]) if log.evaluations else {}
    known.sort(key=lambda key: (label(key) not in first, list(first).index(label(key)) if label(key) in first else 0))
    held_out: list[Curve] = []
    for key in known:
        found = _marked(curve(log, key, None, label(key)), key, outcome)
        # parts that are the whole of a reward coincide with its total
        if len(held_out) < _MAX_CURVES and not any(np.array_equal(found.y, one.y) for one in held_out):
            held_out.append(found)
    return curve_figure([curve(log, REWARD, "reward/se", "mean reward")], held_out, title)


def write_run_figure(record: RunRecord, path: Path) -> None:
    """Writes the curves of a run in the format that the ending names."""
    write_figure(run_figure(record.log, record.outcome, f"{record.state.model}: {record.path.name}"), path)


def run_picture(record: RunRecord) -> Image:
    """The same figure as a picture."""
    png = figure_bytes(run_figure(record.log, record.outcome, f"{record.state.model}: {record.path.name}"), "png")
    return decoded(png, lambda picture: picture.convert("RGB"))


def _marked(found: Curve, key: str, outcome: Outcome) -> Curve:
    """The curve with a star at the kept checkpoint, when it is of the kind of weights that was kept."""
    own = key.startswith(AVERAGED if outcome.averaged else PREFIX)
    return replace(found, kept=outcome.iteration) if own else found


def curve(log: MetricsLog, key: str, error: str | None, name: str) -> Curve:
    """A metric over iterations with a band of 95 %."""
    at, values, errors = log.columns(key, error)
    return Curve(name, at, values, _TWO_SIDED_95 * errors)


def label(key: str) -> str:
    """A log key for people: `eval/shapes_strict_mean` is `shapes strict`, that of a moving average `... (EMA)`."""
    name = key.removeprefix(PREFIX).removeprefix(AVERAGED).removesuffix(SUFFIX).replace("_", " ")
    return f"{name} (EMA)" if key.startswith(AVERAGED) else name


def _held_out(record: RunRecord, key: str) -> Curve:
    found = curve(record.log, key, f"{key.removesuffix(SUFFIX)}_se", label(key))
    return _marked(found, key, record.outcome)


def _parts(line: Line, shown: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Rewards with the keys of their parts that no other chart shows and that differ from the total."""
    keys = [key for key in line if key.startswith(PREFIX) and key.endswith(SUFFIX)]
    totals = [key for key in keys if label(key) in headline(line)]
    for total in totals:
        stem = total.removesuffix(SUFFIX)
        parts = [k for k in keys if k.startswith(f"{stem}_") and k not in shown and line[k] != line[total]]
        if parts:
            yield label(total), parts


def _chart(curves: Sequence[Curve], title: str, y_label: str) -> Iterator[Picture]:
    drawn = [found for found in curves if len(found.y) > 1]
    # a line that is zero throughout says nothing
    if any(np.nan_to_num(found.y).any() for found in drawn):
        image = figure_bytes(chart(drawn, title, y_label=y_label), "svg")
        yield Picture(inline_svg(image), "", title, layout="wide")


def _grids(record: RunRecord) -> Iterator[Block]:
    files = spread(RunFolder(record.path).sampled(), _GRIDS)
    pictures = [inlined(file, _GRID_SIDE, file.stem.replace("-", " ")) for file in files]
    if any(pictures):
        yield Gallery([picture for picture in pictures if picture is not None])


def inlined(file: Path, side: int, alt: str) -> Picture | None:
    """A picture file for a page, or None when it is missing or damaged."""
    try:
        source, pixelated = decoded(file, lambda image: inline_image(image, side))
    except UsageError:
        return None
    return Picture(source, "", alt, pixelated, "wide")


def _timings(record: RunRecord) -> Iterator[Block]:
    logged = {*record.log.iterations.logged(), *record.log.evaluations.logged()}
    stages = sorted(key for key in logged if key.startswith("time/") and key.endswith("_s"))
    spent = {stage: record.log.columns(stage)[1] for stage in stages}
    whole = "time/iteration_s"
    total = sum(float(spent[stage].sum()) for stage in (whole, "time/eval_s") if stage in spent)
    if not total:
        return
    rows = []
    for stage, seconds in sorted(spent.items(), key=lambda entry: -float(entry[1].sum())):
        name = stage.removeprefix("time/").removesuffix("_s")
        name = "iteration, all stages" if stage == whole else name
        share = f"{100 * seconds.sum() / total:.0f} %"
        rows.append((name, str(len(seconds)), f"{np.median(seconds):.2f}", f"{seconds.sum():.1f}", share))
    columns = ("stage", "times", "median s", "sum s", "share")
    yield Table(columns, rows, frozenset(columns) - {"stage"})


def _recipe_lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines of YAML with their comments apart; a `#` inside quotes is no comment."""
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
