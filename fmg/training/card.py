"""The model card of a checkpoint: base, terms, recipe, scores, samples, and the commands that use it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from fmg.core import metric_keys as keys
from fmg.core.display import counted
from fmg.core.errors import UsageError, reason
from fmg.core.files import write_atomic
from fmg.core.hub import HubSource
from fmg.data.checkpoints import SavedCheckpoint, read_index
from fmg.data.prompt_sets import shared_prompts
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import read_metrics
from fmg.models.common.checkpoint_files import CARD, SAMPLES
from fmg.recipe import Recipe
from fmg.recipe.sharing import shareable
from fmg.registry.config import About
from fmg.version import DISTRIBUTION, __version__

if TYPE_CHECKING:
    from fmg.core.protocols import PromptSet
    from fmg.inference.artifact.manifest import AdapterPart

# what the hub calls them
_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}
_NOT_STATED = "not stated by its authors"


def write_cards(run: RunFolder, recipe: Recipe, prompts: PromptSet, eval_prompts: PromptSet) -> None:
    """Writes `README.md` and `samples.png` into every checkpoint that the run kept."""
    index = read_index(run.path)
    if index is None:
        return
    for saved in index.saved:
        folder = saved.path(run.path)
        samples = samples_of(run, saved)
        if samples is not None:
            shutil.copyfile(samples, folder / SAMPLES)
        text = checkpoint_card(run, recipe, saved, index.entry(index.best), seen_prompts(prompts, eval_prompts))
        write_atomic(folder / CARD, text.encode())


def samples_of(run: RunFolder, saved: SavedCheckpoint) -> Path | None:
    """The images that a checkpoint generated when it was evaluated, or None."""
    samples = run.sample(saved.iteration, averaged=saved.score_key != keys.SCORE)
    return samples if samples.is_file() else None


def seen_prompts(prompts: PromptSet, eval_prompts: PromptSet) -> str:
    """Whether training saw the evaluation prompts, as what follows "prompts"."""
    seen = shared_prompts(prompts, eval_prompts)
    return "that training did not see" if not seen else f"of which training saw {seen} of {len(eval_prompts)}"


def checkpoint_card(run: RunFolder, recipe: Recipe, saved: SavedCheckpoint, kept: SavedCheckpoint, prompts: str) -> str:
    """The card of a checkpoint in its run; `prompts` as `seen_prompts` gives it."""
    scores = _scores(read_metrics(run.metrics), saved)
    pictured = samples_of(run, saved) is not None
    return card_text(recipe, saved, scores, prompts=prompts, pictured=pictured, kept=kept)


def card_text(
    recipe: Recipe,
    saved: SavedCheckpoint,
    scores: Mapping[str, tuple[float | None, float | None]],
    *,
    prompts: str,
    pictured: bool,
    kept: SavedCheckpoint,
) -> str:
    """The card in Markdown, with the front matter that model hubs read.

    Args:
        recipe: recipe of the run.
        saved: the checkpoint.
        scores: scores on the evaluation prompts by log key, of the base and of the checkpoint.
        prompts: a description of these prompts, to follow the word "prompts".
        pictured: whether there is a `samples.png` beside the card.
        kept: the checkpoint that the run keeps.
    """

    def lines() -> Iterator[str]:
        yield _front_matter(_checkpoint_facts(recipe))
        yield f"# {_title(recipe)}"
        yield ""
        yield _origin(recipe, saved)
        yield ""
        if saved == kept:
            yield "This is the checkpoint that the run keeps: its result."
        else:
            yield f"This is not the result of the run: the run keeps `{kept.name}`."
        yield from _terms_table(recipe)
        yield from ("", "## Scores", "")
        steps = recipe.eval.steps or recipe.rollout.steps
        yield f"{counted(recipe.eval.num, 'image')} of prompts {prompts}, {counted(steps, 'step')} each."
        yield from ("", "| score | base | this adapter |", "|---|---|---|")
        for key, (before, after) in scores.items():
            yield f"| {key} | {_number(before)} | {_number(after)} |"
        if pictured:
            yield from ("", f"![Samples at fixed prompts and seeds]({SAMPLES})")
        yield from ("", *_use(recipe), "", *_recipe(recipe))

    return "\n".join(lines()) + "\n"


def folder_card(recipe: Recipe, adapter_card: str | None, merged: Sequence[AdapterPart] = ()) -> str:
    """The card of an exported pipeline folder: how to use it, and the scores from the adapter's card.

    Args:
        recipe: recipe of the run, or of the base model if nothing was merged.
        adapter_card: card of the merged checkpoint, empty if it has none; None if nothing was merged.
        merged: the adapters whose sum is merged, if there are several.
    """
    name, tuned = recipe.model.name, adapter_card is not None
    made = " with trained weights merged into its transformer" if tuned else ""
    lines = [
        _front_matter(_facts(recipe, "finetune" if tuned else None, ())),
        f"# {_title(recipe) if tuned else name}",
        "",
        f"A complete pipeline folder: the few-step flow map `{name}`{made}, written by fmg {__version__}. How it is"
        f" sampled is stated in `fmg_flow_map.json`: {recipe.rollout.steps} steps, grid {_grid(recipe)}.",
        "",
        "## Use",
        "",
        f"With the Python package `{DISTRIBUTION}`, which is imported as `fmg`:",
        "",
        "```python",
        "from fmg import FlowMapPipeline",
        "",
        'pipe = FlowMapPipeline.from_pretrained("FOLDER")  # this one',
        'images = pipe("PROMPT", seeds=0).images',
        "```",
        "",
        "It is a diffusers pipeline. `FluxPipeline` supports neither the times of a flow map nor its grid, and refuses"
        " the folder.",
        *_merged(merged),
        *_terms_table(recipe),
    ]
    for section in re.split(r"^(?=## )", adapter_card or "", flags=re.MULTILINE):
        if section.startswith(("## Scores", "## Recipe")):
            lines += ["", section.rstrip()]
    return "\n".join(lines) + "\n"


def hub_card(card: str, recipe: Recipe, repository: str, pictures: Mapping[str, str]) -> str:
    """The card of a checkpoint for a repository of the hub: as it is, with that repository in its commands.

    Args:
        card: card of the checkpoint; its owner's edits are kept, except in the sections Use and Recipe.
        recipe: recipe of the run, as published.
        repository: id of the repository.
        pictures: caption of each image beside the card, by file; images that the card does not show yet are added.

    Raises:
        UsageError: the front matter of the card is not YAML.
    """
    try:
        known: Any = ModelCard(card)
        stated, text = known.data.to_dict(), known.text.lstrip("\n")
    except Exception as error:
        # the library raises errors of its own and of its YAML parser
        raise UsageError(f"The front matter of the model card is not YAML: {reason(error)}", "Correct it.") from None
    facts = _checkpoint_facts(recipe)
    tags = dict.fromkeys([*facts.pop("tags"), *stated.get("tags", ())])
    widget = [{"text": about, "output": {"url": file}} for file, about in pictures.items()]
    front = _front_matter({**facts, **({"widget": widget} if widget else {}), **stated, "tags": list(tags)})
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    own = [part.rstrip() for part in sections if not part.startswith(("## Use", "## Recipe"))]
    added = [f"![{about}]({file})" for file, about in pictures.items() if f"]({file})" not in text]
    parts = [*own, *added, "\n".join(_use(recipe, repository)), "\n".join(_recipe(recipe))]
    return "\n\n".join([front, *parts]) + "\n"


def artifact_card(
    recipe: Recipe,
    repository: str,
    *,
    tuned: bool,
    precision: str,
    checks: Mapping[str, bool],
    merged: Sequence[AdapterPart] = (),
) -> str:
    """The card of an exported artifact for a repository of the hub.

    Args:
        recipe: recipe of the run, or of the model if nothing was merged.
        repository: id of the repository.
        tuned: whether trained weights are merged.
        precision: precision of the transformer.
        checks: results of `fmg verify` by name.
        merged: the adapters whose sum is merged, if there are several.
    """
    name = recipe.model.name
    facts = {**_facts(recipe, "finetune" if tuned else None, ("onnx",)), "library_name": "onnx"}
    failed = [check for check, passed in checks.items() if not passed]
    verified = "It has not been verified against its source."
    if checks:
        verified = f"`fmg verify`: {counted(len(checks) - len(failed), 'check')} passed"
        verified += f", {', '.join(failed)} failed." if failed else "."
    made = f" with weights tuned for {_goal(recipe)} merged into its transformer" if tuned else ""
    lines = [
        _front_matter(facts),
        f"# {_title(recipe) if tuned else name}, in ONNX",
        "",
        f"The few-step flow map `{name}`{made} as ONNX graphs in {precision}, written by fmg {__version__}. {verified}"
        " `manifest.json` states how it is sampled.",
        *_merged(merged),
        *_terms_table(recipe),
        "",
        "## Use",
        "",
        "```sh",
        f'fmg generate "PROMPT" --from {repository}',
        f"fmg verify {repository} --alone",
        "```",
        "",
        "Engines for TensorRT are not part of it: each fits one kind of GPU. Build them with"
        f" `hf download {repository} --local-dir FOLDER` and `fmg export --trt FOLDER`.",
    ]
    return "\n".join(lines) + "\n"


def _checkpoint_facts(recipe: Recipe) -> dict[str, Any]:
    full = recipe.train.trainable == "full"
    return _facts(recipe, "finetune" if full else "adapter", () if full else ("lora",))


def _facts(recipe: Recipe, relation: str | None, tags: tuple[str, ...]) -> dict[str, Any]:
    """The front matter of a card."""
    facts: dict[str, Any] = dict(recipe.model.config.card_facts())
    if (licence := _hub_licence(recipe)) is not None:
        facts = {"base_model": facts["base_model"], "license": licence}
    if "base_model" in facts and relation is not None:
        facts["base_model_relation"] = relation
    tags = (*tags, "flow-map", "few-step", "reinforcement-learning", "fmg")
    return {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(tags), **facts}


def _hub_licence(recipe: Recipe) -> str | None:
    """The hub's name for the terms of a published base; None for other terms, and for weights of the user's own."""
    ours, theirs = (found.model.config.assets()[:1] for found in (recipe, Recipe.default(recipe.model.name)))
    if not ours or ours[0].licence not in _LICENCES:
        return None
    place, published = ours[0].place, theirs[0].place
    if not (isinstance(place, HubSource) and isinstance(published, HubSource)):
        return None
    return _LICENCES[ours[0].licence] if place.repository == published.repository else None


def _front_matter(facts: Mapping[str, Any]) -> str:
    return f"---\n{ModelCardData(**facts).to_yaml()}\n---"


def _use(recipe: Recipe, repository: str | None = None) -> Iterator[str]:
    """How the checkpoint is used, from its run or from a repository of the hub."""
    name, place = recipe.model.name, repository or "RUN"
    yield from ("## Use", "", "```sh")
    if repository is None:
        yield "# RUN is the run folder that holds this checkpoint"
    elif recipe.model.config.assets():
        yield f"fmg fetch {name}"
    yield from (f'fmg generate "PROMPT" --from {place}', f"fmg eval {place} --against {name}")
    if recipe.model.config.mergeable:
        yield f"fmg export --diffusers {place} OUT"
    yield from ("```", "")
    yield from _in_diffusers(recipe, repository)


def _recipe(recipe: Recipe) -> Iterator[str]:
    # as JSON, which is YAML too: the values without the paths of the machine that made them
    yield from ("## Recipe", "", "```json", json.dumps(shareable(recipe.plain()), indent=2), "```")


def _title(recipe: Recipe) -> str:
    return f"{recipe.model.name}, tuned for {_goal(recipe)}"


def _goal(recipe: Recipe) -> str:
    return " + ".join(f"{reward.weight:g} {reward.label}" for reward in recipe.rewards)


def _grid(recipe: Recipe) -> str:
    grid = recipe.rollout.grid
    return repr(grid if isinstance(grid, str) else list(grid))


def _in_diffusers(recipe: Recipe, repository: str | None) -> Iterator[str]:
    """How to use the checkpoint in diffusers and other tools."""
    folder, note = repository or "FOLDER", "" if repository else "  # the folder of this card"
    config, trainable = recipe.model.config, recipe.train.trainable
    if not config.flow_map_pipeline:
        if trainable == "full":
            yield "In diffusers: the folder `transformer/` in place of the pipeline's own transformer."
        elif config.in_diffusers:
            argument = folder if repository is None else f'"{folder}"'
            yield (
                f"In diffusers: `pipe.load_lora_weights({argument})` on {config.in_diffusers}; `peft/` is the same"
                " adapter for PEFT."
            )
        return
    options = shareable(config.model_dump(mode="json", exclude_defaults=True))
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    yield from (f"In diffusers, with the Python package `{DISTRIBUTION}` (imported as `fmg`):", "", "```python")
    yield "from fmg import FlowMapPipeline"
    if trainable == "full":
        yield "from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel"
    yield from ("", f'pipe = FlowMapPipeline.from_model("{recipe.model.name}"{arguments})')
    if trainable == "full":
        if repository is None:
            yield "# FOLDER is the folder of this card"
        yield f'pipe.transformer = FlowMapFluxTransformer2DModel.from_pretrained("{folder}", subfolder="transformer")'
    else:
        yield f'pipe.load_lora_weights("{folder}"){note}'
    steps = f"num_inference_steps={recipe.rollout.steps}, grid={_grid(recipe)}"
    yield from (f'images = pipe("PROMPT", {steps}, seeds=0).images', "```")
    if trainable == "lora+duration":
        yield (
            "\nThe second-time embedder was trained with the LoRA and is in `fmg_extra.safetensors`. Only fmg"
            " reads it, and without it half of the training is missing: other tools need an export."
        )
    elif trainable == "lora":
        yield (
            "\nComfyUI reads `pytorch_lora_weights.safetensors`, PEFT reads `peft/`, and `fmg export --kohya RUN FILE`"
            " writes the LoRA for Forge and sd-scripts. Those tools use their own samplers; none passes the second time"
            " of a two-time map."
        )


def _merged(parts: Sequence[AdapterPart]) -> Iterator[str]:
    """The adapters that were added up; nothing for that of one run."""
    if parts:
        yield from ("", "## Merged adapters", "", "| run | weight | sha256 |", "|---|---|---|")
        # no folder of this computer
        yield from (f"| {Path(part.run).name} | {part.weight:g} | `{part.digest}` |" for part in parts)


def _terms_table(recipe: Recipe) -> Iterator[str]:
    yield from ("", "## Terms", "", "| part | licence | publication |", "|---|---|---|")
    yield _terms(f"base `{recipe.model.name}`", recipe.model.config.about)
    for reward in recipe.measured_rewards:
        yield _terms(f"reward `{reward.label}`", reward.config.about)


def _origin(recipe: Recipe, saved: SavedCheckpoint) -> str:
    name, rank = recipe.model.name, recipe.lora.rank
    what = {
        "lora": f"A LoRA (rank {rank}, alpha {recipe.lora.alpha:g}) on",
        "lora+duration": f"A LoRA (rank {rank}, alpha {recipe.lora.alpha:g}) and the second-time embedder of",
        "full": "A full fine-tune of",
    }[recipe.train.trainable]
    averaged = ""
    if saved.score_key != keys.SCORE:
        averaged = f", the moving average of its weights (decay {recipe.train.ema_decay:g}),"
    verified = "stock diffusers read it back and reproduced the same image."
    if recipe.train.trainable == "lora+duration":
        verified = (
            "stock diffusers read back its LoRA, and fmg its embedder, which diffusers does not support. Together they"
            " reproduced the same image."
        )
    trained_on = {
        "transitions": f"`{recipe.stochasticizer.name}` transitions",
        # these objectives use no stochasticizer
        "samples": "samples of the map's own sampler",
        "gradients": "gradients of the rewards",
    }[recipe.objective.config.needs]
    return (
        f"{what} the few-step flow map `{name}`{averaged} after iteration {saved.iteration} of"
        f" `{recipe.objective.name}` on {trained_on}, made with fmg {__version__}. When it was saved, {verified}"
    )


def _terms(part: str, about: About) -> str:
    # a component that states neither loads no published weights
    licence = about.licence or (_NOT_STATED if about.weights else "no published weights")
    return f"| {part} | {licence} | {about.citation or '-'} |"


def _scores(lines: list[dict[str, object]], saved: SavedCheckpoint) -> dict[str, tuple[float | None, float | None]]:
    place = saved.score_key.partition("/")[0] + "/"
    evaluated = [line for line in lines if any(key.startswith(place) for key in line)]
    base = next((line for line in evaluated if line.get("iteration") == 0), {})
    own = next((line for line in evaluated if line.get("iteration") == saved.iteration), {})
    names = [key for key in own if key.startswith(place) and not key.endswith(keys.ERROR)]
    return {key.removeprefix(place).removesuffix(keys.MEAN): (_float(base.get(key)), _float(own[key])) for key in names}


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
