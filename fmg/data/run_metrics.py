"""The lines of `metrics.jsonl`, and what they say about a run: headline scores, outcome, reward hacking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core import metric_keys as keys
from fmg.core.errors import CheckpointError
from fmg.core.json_io import JsonError, located, parse_object, read_lines
from fmg.core.json_io import Line as TextLine

if TYPE_CHECKING:
    from fmg.data.checkpoints import SavedCheckpoint

Line = Mapping[str, float]

MAX_METRICS_BYTES = 1 << 30
"""Maximum bytes of a `metrics.jsonl` that is read: 1 GiB, a million lines."""
TWO_SIDED_95 = 1.96
"""Half-width of a 95 % interval of a mean, in standard errors."""
ERRORS = 3.0
"""Standard errors by which a value must exceed a bound. One evaluation of a run whose true loss equals the tolerance
exceeds it with probability 0.0013; at a true loss of 0 and 1000 images practically never."""


def read_metrics(path: Path) -> list[dict[str, object]]:
    """The lines of a `metrics.jsonl`; an unfinished last line is left out, a missing file has no lines.

    Raises:
        CheckpointError: for any other line that is not a JSON object.
    """
    if not path.is_file():
        return []
    try:
        return [metrics_entry(path, line) for line in read_lines(path, MAX_METRICS_BYTES) if line.ended]
    except JsonError as error:
        raise CheckpointError(located(path, error), "Move the file away, or shorten it.") from None


def read_numbers(path: Path) -> list[dict[str, float]]:
    """The same as numbers; null, written for a value that is not finite, becomes NaN.

    Raises:
        CheckpointError: for a line that is not a JSON object of numbers, or does not name its iteration.
    """
    return [as_numbers(path, number, line) for number, line in enumerate(read_metrics(path), start=1)]


def as_numbers(path: Path, number: int, line: Mapping[str, object], *, strict: bool = True) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`, as `read_numbers` gives them.

    Raises:
        CheckpointError: if `strict`: it contains other values, or does not name its iteration.
    """
    plain = {key: math.nan if value is None else value for key, value in line.items()}
    numbers = {key: float(value) for key, value in plain.items() if isinstance(value, (int, float))}
    if not strict:
        return numbers
    if numbers.keys() != plain.keys():
        raise _damaged(path, number, "it contains values other than numbers")
    if not math.isfinite(numbers.get("iteration", math.nan)):
        raise _damaged(path, number, "it does not state its iteration")
    return numbers


def metrics_entry(path: Path, line: TextLine) -> dict[str, object]:
    """The object of a line of `metrics.jsonl`.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        return parse_object(line.text(), finite=False)
    except JsonError as error:
        raise _damaged(path, line.number, str(error)) from None


def _damaged(path: Path, number: int, why: str) -> CheckpointError:
    return CheckpointError(f"{path}:{number}: the line is damaged: {why}", "Remove it; no other line depends on it.")


@dataclass(frozen=True)
class Change:
    """A difference and its standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """The bound that it exceeds with confidence."""
        return self.value - ERRORS * self.error

    @property
    def high(self) -> float:
        """The bound that it is below with confidence."""
        return self.value + ERRORS * self.error

    @classmethod
    def logged(cls, line: Mapping[str, float], key: str) -> Change:
        """The change that an evaluation logged as `key` and `<key>_se`; unknown where it logged none."""
        return cls(line.get(key, 0.0), line.get(keys.error_of(key), math.inf))


@dataclass(frozen=True)
class HackingLimits:
    """Tolerated losses, from the recipe's `eval` section.

    Attributes:
        tolerance: `eval.hacking_tolerance`: fall of a held-out reward, in standard deviations over images.
        min_diversity: `eval.min_diversity`: share of the first rollout's diversity that must remain.
    """

    tolerance: float
    min_diversity: float

    def of(self, name: str) -> float:
        """The tolerated loss of a held-out reward, or of `diversity`."""
        return 1 - self.min_diversity if name == keys.DIVERSITY else self.tolerance


def is_hacking(gain: Change, loss: Change, limit: float, trained: Change) -> bool:
    """The rule of the reward-hacking monitor and of `fmg doctor run`.

    Args:
        gain: gain of the trained reward since the base model.
        loss: loss of a held-out reward, or of the diversity.
        limit: the tolerated loss.
        trained: change of the trained reward since the gap opened; a run that loses both rewards is not hacking.
    """
    return gain.low > 0 and loss.low > limit and not trained.high < 0


def hacked(line: Mapping[str, float], limits: HackingLimits) -> Iterator[tuple[str, Change]]:
    """Names and losses of the quantities that reward hacking lowered, from the log line of an evaluation."""
    for key in line:
        name = key.removeprefix(keys.WATCH).removesuffix("_loss")
        if key != keys.watched_loss(name):
            continue
        loss, since = Change.logged(line, key), Change.logged(line, keys.watched_trained(name))
        if is_hacking(Change.logged(line, keys.TRAINED_GAIN), loss, limits.of(name), since):
            yield name, loss


@dataclass(frozen=True)
class Outcome:
    """What a run gained. Its result is the kept checkpoint; the last evaluation is reported separately.

    Scores are those of the kept kind of weights, under `eval/...` even where these are a moving average.

    Attributes:
        iteration: iteration of the kept checkpoint, or None before there is one.
        averaged: whether that checkpoint is a moving average of the weights.
        base: the evaluation of the base model; empty before there is one.
        kept: the evaluation of the kept checkpoint: empty if it was not evaluated; the last one where there is no
            checkpoint yet.
        last: the last evaluation.
    """

    iteration: int | None
    averaged: bool
    base: Line
    kept: Line
    last: Line

    @classmethod
    def of(cls, lines: Sequence[Line], best: SavedCheckpoint | None) -> Outcome:
        """The outcome of a run with these log lines and this best checkpoint."""
        averaged = best is not None and best.score_key.startswith(keys.EVAL_EMA)
        # a damaged line may not name its iteration
        scored = [line for line in lines if is_evaluation(line) and math.isfinite(line.get("iteration", math.nan))]
        base, last = (scored[0], scored[-1]) if scored else ({}, {})
        kept = last if best is None else next((x for x in reversed(scored) if x["iteration"] == best.iteration), {})
        views = (_of_weights(line, averaged=averaged) for line in (base, kept, last))
        return cls(None if best is None else best.iteration, averaged, *views)

    @property
    def title(self) -> str:
        """The kept checkpoint, as `iteration 30`, or that there is none."""
        if self.iteration is None:
            return "no checkpoint yet"
        return f"iteration {self.iteration}" + (", moving average" if self.averaged else "")

    @property
    def keeps_last(self) -> bool:
        return self.kept == self.last

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the headline scores: of the base, the kept and, where it differs, the last evaluation.

        A score that was not measured is a dash.
        """
        shown = {"base": self.base, f"kept ({self.title})": self.kept}
        if not self.keeps_last:
            shown[f"last (iteration {self.last['iteration']:.0f})"] = self.last
        scores = [headline(line) for line in shown.values()]
        rows = [[name, *(f"{found[name]:.3f}" if name in found else "-" for found in scores)] for name in scores[0]]
        return ["held out", *shown], rows


def is_evaluation(line: Line) -> bool:
    """Whether a log line belongs to an evaluation on held-out prompts."""
    return any(key.startswith((keys.EVAL, keys.EVAL_EMA)) for key in line)


def _of_weights(line: Line, *, averaged: bool) -> Line:
    own = keys.EVAL_EMA if averaged else keys.EVAL
    others = {key: value for key, value in line.items() if not key.startswith((keys.EVAL, keys.EVAL_EMA))}
    scores = {keys.EVAL + key.removeprefix(own): value for key, value in line.items() if key.startswith(own)}
    # a value that is not finite counts as not measured
    return {key: value for key, value in (others | scores).items() if math.isfinite(value)}


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The headline scores of an evaluation by label, in the order of `headline_keys`."""
    return {label: metrics[key] for label, key in headline_keys(metrics).items()}


def headline_keys(logged: Iterable[str]) -> dict[str, str]:
    """Log keys of the headline scores by label: strict accuracies, then the total of each reward; then their averages.

    The log keys are `eval/<reward>_mean` for totals and `eval/<reward>_<part>_mean` for parts, and `eval_ema/...` for
    the moving average of the weights.
    """
    known = list(logged)
    return _headline_keys(known, keys.EVAL, "") | _headline_keys(known, keys.EVAL_EMA, " (EMA)")


def _headline_keys(logged: Iterable[str], prefix: str, ending: str) -> dict[str, str]:
    names = {key.removeprefix(prefix).removesuffix(keys.MEAN): key for key in _score_keys(logged, prefix)}
    strict = {f"{name.removesuffix('_strict')} strict": key for name, key in names.items() if name.endswith("_strict")}
    totals = {
        name: key
        for name, key in names.items()
        if not any(name != other and name.startswith(f"{other}_") for other in names)
    }
    return {f"{label}{ending}": key for label, key in (strict | totals).items()}


def score_labels(logged: Iterable[str]) -> dict[str, str]:
    """Labels of the held-out scores by log key: headline scores first, then the others in the order of the log."""
    known = list(logged)
    labels = {key: label for label, key in headline_keys(known).items()}
    for prefix, ending in ((keys.EVAL, ""), (keys.EVAL_EMA, " (EMA)")):
        for key in _score_keys(known, prefix):
            name = key.removeprefix(prefix).removesuffix(keys.MEAN).replace("_", " ")
            labels.setdefault(key, f"{name}{ending}")
    return labels


def _score_keys(logged: Iterable[str], prefix: str) -> list[str]:
    return [key for key in logged if key.startswith(prefix) and key.endswith(keys.MEAN)]
