"""`score`: rewards and metrics of existing images from any generator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.prompt import Prompt
from fmg.eval.image_folders import METADATA, Captioned, batches, captioned
from fmg.eval.results import Metric, Result, TagResult, plain
from fmg.eval.scoring import (
    ScoreCollector,
    Scores,
    chosen_extractors,
    chosen_rewards,
    prompt_clusters,
    result_rows,
    score_images,
    tag_rows,
)
from fmg.eval.set_metrics import FeatureSet, SetMetrics, metric_rows, references
from fmg.inference.torch_backend import pick_device
from fmg.rewards.base import build_rewards, check_prompts

SCHEMA = 1


@dataclass(frozen=True)
class ScoreReport:
    """What `fmg score --json` prints. Rows have 0 steps, since nothing is generated.

    Attributes:
        images: each file with its prompt and the total of each reward.
        results: means of every part of every reward.
        tags: the same by tag of the prompts, when there are several.
        metrics: metrics of the set as a whole, with feature extractors.
    """

    images: tuple[Mapping[str, object], ...]
    results: tuple[Result, ...]
    tags: tuple[TagResult, ...]
    metrics: tuple[Metric, ...]

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values (docs/schemas/score.schema.json)."""
        rows = {"results": plain(self.results), "tags": plain(self.tags), "metrics": plain(self.metrics)}
        bare = {name: [{k: v for k, v in row.items() if k != "steps"} for row in part] for name, part in rows.items()}
        return {"schema": SCHEMA, "num": len(self.images), "images": [dict(image) for image in self.images], **bare}


def score(
    paths: Sequence[str | Path],
    *,
    rewards: Sequence[str] = (),
    prompt: str | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
    extractors: Sequence[str] = (),
    reference: str | None = None,
    device: str = "auto",
    observer: Observer = ignore,
) -> ScoreReport:
    """Scores image files.

    Args:
        paths: image files, folders of them, or GenEval trees. Prompts come from `metadata.jsonl`: GenEval's in each
            prompt's folder, or lines with `file_name` and `prompt` beside the images. An image with two lines is scored
            twice.
        rewards: rewards by name.
        prompt: the prompt of every image, in place of those in the folders.
        options: options of rewards and extractors by name.
        extractors: feature extractors by name; each adds metrics of the whole set.
        reference: folder of real images for Fréchet distance, precision and recall.
        device: `auto`, `cpu`, `cuda`, ...
        observer: receives `StageProgress` events.

    Raises:
        UsageError: there is nothing to measure, there are no images, some (even a few of a folder) cannot be read or
            lack a prompt, or a name is unknown.
        RewardError: a reward fails, or reports different parts for different images.
    """
    if not rewards and not extractors:
        raise UsageError("There is nothing to measure", "Give --reward, or --features, or both.")
    given = dict(options or {})
    features = chosen_extractors(extractors, given)
    scorers = build_rewards(chosen_rewards(rewards, (), given, taken=features))
    where = pick_device(device)
    found = [entry for path in paths for entry in captioned(Path(path), everything=prompt is not None)]
    entries = [_prompted(entry, prompt, needed=bool(scorers)) for entry in found]
    texts = [entry.text for entry in entries]
    for name, reward in scorers.items():
        check_prompts(name, reward, texts)
    real = references(reference, features, where)
    sets = {name: FeatureSet(extractor, prompt_clusters(texts)) for name, extractor in features.items()}
    collected = ScoreCollector()
    for rows, batch in batches([entry.file for entry in found]):
        images = batch.to(where)
        collected.add(score_images(scorers, images, texts[rows]))
        for features_of in sets.values():
            features_of.take(images)
        observer(StageProgress("scoring", rows.stop, len(found)))
    scores = Scores(collected.parts(), tuple(texts), tuple(entry.tag for entry in entries))
    metrics = {name: SetMetrics.of(s, real.get(name)) for name, s in sets.items()}
    return ScoreReport(
        images=tuple(_image_rows(found, scores)),
        results=tuple(result_rows(0, scores)),
        tags=tuple(tag_rows(0, scores)),
        metrics=tuple(metric_rows(0, metrics)),
    )


def _prompted(entry: Captioned, prompt: str | None, *, needed: bool) -> Prompt:
    if prompt is not None:
        return Prompt(prompt, "", {})
    if entry.prompt is None and needed:
        raise UsageError(
            f"There is no prompt for '{entry.file}'",
            f"Give --prompt, or a {METADATA} with file_name and prompt beside the images.",
        )
    return entry.prompt or Prompt("", "", {})


def _image_rows(found: Sequence[Captioned], scores: Scores) -> Iterator[dict[str, object]]:
    totals = {reward: values for (reward, part), values in scores.parts.items() if part == "total"}
    for row, (entry, prompt) in enumerate(zip(found, scores.prompts, strict=True)):
        yield {"path": str(entry.file), "prompt": prompt, "scores": {n: float(v[row]) for n, v in totals.items()}}
