"""The report of a run, `report.html` in its folder: what was trained, what it gained, and how. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.image_files import decoded
from fmg.core.unfinished import write_atomic
from fmg.data.charts import line_chart
from fmg.data.checkpoints import CheckpointIndex, read_index
from fmg.data.environment import read_environment
from fmg.data.page import Block, Gallery, Listing, Picture, Section, Table, Text, Tile, inline_image, inline_svg, page
from fmg.data.pictures import Curve, kept_picture, metric_curve
from fmg.data.prompt_sets import spread
from fmg.data.run_folder import RunFolder, RunState, read_numbers
from fmg.data.run_metrics import AVERAGED, PREFIX, REWARD, SUFFIX, Outcome, headline, is_evaluation

_TWO_SIDED_95 = 1.96
_GRIDS = 4
_WIDE_SIDE = 1600
_GRID_SIDE = 1000
_UPDATE_CHARTS = {
    "approx_kl": "approximate KL to the policy that drew the rollout",
    "clip_frac": "share of clipped rows",
    "grad_norm": "norm of the gradient before clipping",
    "kl_ref": "KL to the base",
    "zero_std_ratio": "share of groups whose rewards are all equal",
    "skipped_updates": "updates that were skipped",
}

Line = Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of a run."""

    path: Path
    state: RunState
    lines: tuple[Line, ...]
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
        # what was not finite is not drawn
        lines = tuple(
            {key: value for key, value in line.items() if math.isfinite(value)} for line in read_numbers(run.metrics)
        )
        index = read_index(run.path)
        for name in index.changed_files(run.path) if index else ():
            text = f"'{run.path / name}' was changed after it was written; figures from it may be others than the run's"
            warnings.warn(text, FmgWarning, stacklevel=2)
        return RunRecord(run.path, state, lines, index, recipe)

    @property
    def evaluations(self) -> list[Line]:
        """The lines of evaluations, in order."""
        return [line for line in self.lines if is_evaluation(line)]

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return int(max((line.get("iteration", 0) for line in self.lines), default=0))

    @cached_property
    def outcome(self) -> Outcome:
        """What the run gained: its base, the checkpoint that it keeps and its last evaluation."""
        return Outcome.of(self.evaluations, self.index.entry(self.index.best) if self.index else None)

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
        Section("Curves", [Text("Bands cover 95 % of the uncertainty of each mean."), Gallery(list(charts(record)))]),
        Section("Samples on the way", list(_grids(record))),
        Section("Where the time went", list(_timings(record))),
        Section("Recipe, with the source of each value", [Listing(list(_recipe_lines(record.recipe)))], folded=True),
        Section("Environment", list(_environment(record)), folded=True),
    ]
    return page(
        f"{record.state.model}: {record.path.name}", done, list(record.tiles()), [s for s in sections if s.blocks]
    )


def _before_after(record: RunRecord) -> Iterator[Block]:
    if picture := before_after_picture(record, "the same prompts and seeds before and after"):
        which = record.outcome.title
        yield Text(f"The same prompts and seeds, by the base and by the checkpoint that the run keeps ({which}).")
        yield Gallery([picture])


def before_after_picture(record: RunRecord, alt: str) -> Picture | None:
    """Samples by the base and by the checkpoint that a run keeps, for a page; None where there are none."""
    image = kept_picture(RunFolder(record.path), record.outcome)
    if image is None:
        return None
    source, pixelated = inline_image(image, _WIDE_SIDE)
    return Picture(source, "", alt, pixelated, "panorama")


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


def charts(record: RunRecord) -> Iterator[Picture]:
    """The curves of a run, one chart for what belongs together."""
    lines = list(record.lines)
    yield from _chart([curve(lines, REWARD, "reward/se", "mean reward")], "reward on training prompts")
    shown: set[str] = set()
    measured = record.outcome.kept or record.outcome.base
    for name in headline(measured):
        key = next((k for k in measured if k.startswith(PREFIX) and k.endswith(SUFFIX) and label(k) == name), None)
        if key is not None:
            shown.add(key)
            both = (key, AVERAGED + key.removeprefix(PREFIX))
            yield from _chart([_held_out(lines, one) for one in both], f"{name}, held out")
    for reward, keys in _parts(measured, shown):
        yield from _chart([_held_out(lines, record.logged(key)) for key in keys], f"{reward} by part, held out")
    for key, title in _UPDATE_CHARTS.items():
        yield from _chart([metric_curve(lines, key, key)], title)


def curve(lines: Sequence[Line], key: str, error: str, name: str) -> Curve:
    """A metric over iterations with a band of 95 %."""
    found = metric_curve(lines, key, name, error)
    return Curve(found.label, found.x, found.y, [_TWO_SIDED_95 * half for half in found.band])


def label(key: str) -> str:
    """A log key for people: `eval/shapes_strict_mean` is `shapes strict`, that of a moving average `... (EMA)`."""
    name = key.removeprefix(PREFIX).removeprefix(AVERAGED).removesuffix(SUFFIX).replace("_", " ")
    return f"{name} (EMA)" if key.startswith(AVERAGED) else name


def _held_out(lines: Sequence[Line], key: str) -> Curve:
    return curve(lines, key, f"{key.removesuffix(SUFFIX)}_se", label(key))


def _parts(line: Line, shown: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Rewards with the keys of their parts that no other chart shows and that differ from the total."""
    keys = [key for key in line if key.startswith(PREFIX) and key.endswith(SUFFIX)]
    totals = [key for key in keys if label(key) in headline(line)]
    for total in totals:
        stem = total.removesuffix(SUFFIX)
        parts = [k for k in keys if k.startswith(f"{stem}_") and k not in shown and line[k] != line[total]]
        if parts:
            yield label(total), parts


def _chart(curves: Sequence[Curve], title: str) -> Iterator[Picture]:
    drawn = [found for found in curves if len(found.y) > 1]
    # a line that is zero throughout says nothing
    if any(any(found.y) for found in drawn):
        yield Picture(inline_svg(line_chart(drawn, title)), "", title, layout="wide")


def _grids(record: RunRecord) -> Iterator[Block]:
    files = spread(RunFolder(record.path).sampled(), _GRIDS)
    pictures = [inlined(file, _GRID_SIDE, file.stem.replace("-", " ")) for file in files]
    if any(pictures):
        yield Gallery([picture for picture in pictures if picture is not None])


def inlined(file: Path, side: int, alt: str, layout: Literal["wide", "panorama"] = "wide") -> Picture | None:
    """A picture file for a page, or None when it is missing or damaged."""
    try:
        source, pixelated = decoded(file, lambda image: inline_image(image, side))
    except UsageError:
        return None
    return Picture(source, "", alt, pixelated, layout)


def _timings(record: RunRecord) -> Iterator[Block]:
    stages = sorted({key for line in record.lines for key in line if key.startswith("time/") and key.endswith("_s")})
    spent = {stage: [line[stage] for line in record.lines if stage in line] for stage in stages}
    whole = "time/iteration_s"
    total = sum(spent.get(whole, [])) + sum(spent.get("time/eval_s", []))
    if not total:
        return
    rows = []
    for stage, seconds in sorted(spent.items(), key=lambda entry: -sum(entry[1])):
        name = stage.removeprefix("time/").removesuffix("_s")
        name = "iteration, all stages" if stage == whole else name
        share = f"{100 * sum(seconds) / total:.0f} %"
        rows.append((name, str(len(seconds)), f"{np.median(seconds):.2f}", f"{sum(seconds):.1f}", share))
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
