"""`score`: rewards and metrics of images that exist already, whoever drew them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import inside
from fmg.core.json_io import read_objects
from fmg.core.prompt import Prompt
from fmg.eval.options import chosen_extractors, chosen_rewards
from fmg.eval.reference import WORLD, batches, folder_reference, picture_files, reference_files
from fmg.eval.results import Metric, Result, TagResult, plain
from fmg.eval.rows import metric_rows, result_rows, tag_rows
from fmg.eval.scoring import Collected, Scores, prompt_clusters, score_images
from fmg.eval.set_metrics import FeatureSet, SetMetrics
from fmg.inference.devices import pick_device
from fmg.rewards.base import build_rewards, check_prompts

SCHEMA = 1
METADATA = "metadata.jsonl"
_NAME_KEYS, _TEXT_KEYS = ("file_name", "path"), ("prompt", "text", "caption")


@dataclass(frozen=True)
class Captioned:
    """A picture file and its prompt; None when nothing says what it should show."""

    file: Path
    prompt: Prompt | None


@dataclass(frozen=True)
class ScoreReport:
    """What `fmg score --json` prints. Rows have 0 steps: nothing was drawn here.

    Attributes:
        images: each file with its prompt and the total of each reward.
        results: means of every part of every reward.
        tags: the same by tag of the prompts, when there are several.
        metrics: of the set as a whole, with feature extractors.
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
    """Scores picture files.

    Args:
        paths: picture files, folders of them, or GenEval trees. Prompts come from `metadata.jsonl`: that of GenEval in
            each prompt's folder, or lines with `file_name` and `prompt` beside the pictures. A picture with two lines
            is scored twice.
        rewards: by name.
        prompt: of every picture, instead of what the folders say.
        options: options of rewards and extractors by name.
        extractors: feature extractors by name; each adds metrics of the whole set.
        reference: folder of real pictures for Fréchet distance, precision and recall.
        device: `auto`, `cpu`, `cuda`, ...
        observer: receives `StageProgress` events.

    Raises:
        UsageError: nothing to measure, no pictures, pictures that cannot be read or lack a prompt, also when only some
            of a folder's do; unknown names.
        RewardError: when a reward fails, or reports other parts for some pictures than for others.
    """
    if not rewards and not extractors:
        raise UsageError("There is nothing to measure", "Give --reward, or --features, or both.")
    if reference is not None and not extractors:
        raise UsageError("A reference set is compared through features", "Name an extractor: --features clip.")
    given = dict(options or {})
    features = chosen_extractors(extractors, given)
    scorers = build_rewards(chosen_rewards(rewards, (), given, taken=features))
    where = pick_device(device)
    found = [entry for path in paths for entry in captioned(Path(path), everything=prompt is not None)]
    entries = [_prompted(entry, prompt, needed=bool(scorers)) for entry in found]
    texts = [entry.text for entry in entries]
    for name, reward in scorers.items():
        check_prompts(name, reward, texts)
    if reference == WORLD:
        raise UsageError("The reference 'world' belongs to prompts of an embedded world", "Name a folder.")
    real = [] if reference is None else reference_files(reference)
    references = {name: folder_reference(real, extractor, where) for name, extractor in features.items() if real}
    sets = {name: FeatureSet(extractor, prompt_clusters(texts)) for name, extractor in features.items()}
    collected = Collected()
    for rows, batch in batches([entry.file for entry in found]):
        images = batch.to(where)
        collected.add(score_images(scorers, images, texts[rows]))
        for features_of in sets.values():
            features_of.take(images)
        observer(StageProgress("scoring", rows.stop, len(found)))
    scores = Scores(collected.parts(), tuple(texts), tuple(entry.tag for entry in entries))
    metrics = {name: SetMetrics.of(s, references.get(name)) for name, s in sets.items()}
    return ScoreReport(
        images=tuple(_image_rows(found, scores)),
        results=tuple(result_rows(0, scores)),
        tags=tuple(tag_rows(0, scores)),
        metrics=tuple(metric_rows(0, metrics)),
    )


def captioned(path: Path, *, everything: bool = False) -> list[Captioned]:
    """The pictures under a path with their prompts; of a file, those that the `metadata.jsonl` beside it has.

    Args:
        path: a picture file, a folder, or a GenEval tree.
        everything: whether to take all pictures of a folder and leave prompts aside.

    Raises:
        UsageError: no such path, no pictures in it, a `metadata.jsonl` that does not fit, or one that gives only some
            of the pictures a prompt.
    """
    if not path.exists():
        raise UsageError(f"There is no picture or folder '{path}'", "Check the path.")
    if path.is_file():
        beside = [] if everything else [x for x in _listed(path.parent) if x.file.resolve() == path.resolve()]
        return beside or [Captioned(path, None)]
    files = picture_files(path)
    if everything:
        return [Captioned(file, None) for file in files]
    trees = sorted(file.parent for file in path.glob(f"*/{METADATA}") if (file.parent / "samples").is_dir())
    found = [entry for tree in trees for entry in _geneval(tree)] if trees else list(_listed(path))
    if not found:
        return [Captioned(file, None) for file in files]
    missing = next((entry.file for entry in found if not entry.file.is_file()), None)
    if missing is not None:
        raise UsageError(f"'{path / METADATA}' names '{missing}', which is not there", "Correct the file.")
    named = {entry.file.resolve() for entry in found}
    left = [file for file in files if file.resolve() not in named]
    if left:
        where = "GenEval tree" if trees else METADATA
        raise UsageError(
            f"The {where} in '{path}' gives no prompt for '{left[0]}', the first of {len(left)} such pictures",
            "Add them there, move them elsewhere, or give --prompt for all.",
        )
    return found


def _listed(folder: Path) -> Iterator[Captioned]:
    """One entry for each line of the `metadata.jsonl` of a folder, none without the file."""
    file = folder / METADATA
    if not file.is_file():
        return
    for name, text in _captions(file):
        yield Captioned(inside(folder, name, named_in=file, links=True), Prompt(text, "", {}))


def _geneval(tree: Path) -> Iterator[Captioned]:
    file = tree / METADATA
    ((_, entry),) = list(read_objects(file))[:1] or [(0, {})]
    text = entry.get("prompt")
    if not isinstance(text, str):
        raise UsageError(f"'{file}' has no prompt", "GenEval writes one JSON object with a prompt there.")
    for picture in picture_files(tree / "samples"):
        yield Captioned(picture, Prompt(text, str(entry.get("tag", "")), entry))


def _captions(file: Path) -> Iterator[tuple[str, str]]:
    for number, entry in read_objects(file):
        name, text = _text_under(entry, _NAME_KEYS), _text_under(entry, _TEXT_KEYS)
        if name is None or text is None:
            raise UsageError(f"{file}:{number}: no file_name and prompt", 'Write {"file_name": "a.png", "prompt": ""}.')
        yield name, text


def _text_under(entry: Mapping[str, object], keys: Sequence[str]) -> str | None:
    return next((value for key in keys if isinstance(value := entry.get(key), str)), None)


def _prompted(entry: Captioned, prompt: str | None, *, needed: bool) -> Prompt:
    if prompt is not None:
        return Prompt(prompt, "", {})
    if entry.prompt is None and needed:
        raise UsageError(
            f"Nothing says what '{entry.file}' should show",
            f"Give --prompt, or a {METADATA} with file_name and prompt beside the pictures.",
        )
    return entry.prompt or Prompt("", "", {})


def _image_rows(found: Sequence[Captioned], scores: Scores) -> Iterator[dict[str, object]]:
    totals = {reward: values for (reward, part), values in scores.parts.items() if part == "total"}
    for row, (entry, prompt) in enumerate(zip(found, scores.prompts, strict=True)):
        yield {"path": str(entry.file), "prompt": prompt, "scores": {n: float(v[row]) for n, v in totals.items()}}
