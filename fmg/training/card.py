"""The model card of a checkpoint: base, terms, recipe, scores, samples, and the commands that use it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fmg.core import metric_keys as keys
from fmg.core.display import counted
from fmg.core.files import write_atomic
from fmg.core.protocols import PromptSet
from fmg.data.checkpoints import SavedCheckpoint, read_index
from fmg.data.prompt_sets import shared_prompts
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import read_metrics
from fmg.recipe import Recipe
from fmg.registry.config import About
from fmg.version import DISTRIBUTION, __version__

CARD = "README.md"
SAMPLES = "samples.png"
_NOT_STATED = "not stated by its authors"


def write_cards(run: RunFolder, recipe: Recipe, prompts: PromptSet, eval_prompts: PromptSet) -> None:
    """Writes `README.md` and `samples.png` into every checkpoint that the run kept."""
    index = read_index(run.path)
    seen = shared_prompts(prompts, eval_prompts)
    held_out = "that training did not see" if not seen else f"of which training saw {seen} of {len(eval_prompts)}"
    if index is None:
        return
    for saved in index.saved:
        folder = saved.path(run.path)
        samples = run.sample(saved.iteration, averaged=saved.score_key != keys.SCORE)
        pictured = samples.is_file()
        if pictured:
            shutil.copyfile(samples, folder / SAMPLES)
        scores = _scores(read_metrics(run.metrics), saved)
        text = card_text(recipe, saved, scores, prompts=held_out, pictured=pictured, kept=index.entry(index.best))
        write_atomic(folder / CARD, text.encode())


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
        recipe: of the run.
        saved: the checkpoint.
        scores: scores on the evaluation prompts by log key, of the base and of the checkpoint.
        prompts: a description of these prompts, to follow the word "prompts".
        pictured: whether there is a `samples.png` beside the card.
        kept: the checkpoint that the run keeps.
    """

    def lines() -> Iterator[str]:
        name = recipe.model.name
        full = recipe.train.trainable == "full"
        yield _front_matter(recipe, "finetune" if full else "adapter", () if full else ("lora",))
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
        yield from ("", "## Use", "", "```sh", "# RUN is the run folder that holds this checkpoint")
        yield from ('fmg generate "PROMPT" --from RUN', f"fmg eval RUN --against {name}")
        if recipe.model.config.mergeable:
            yield "fmg export --diffusers RUN OUT"
        yield from ("```", "")
        yield from _in_diffusers(recipe)
        # as JSON, which is YAML too: the values without the paths of the machine that made them
        yield from ("", "## Recipe", "", "```json", json.dumps(_shareable(recipe.plain()), indent=2), "```")

    return "\n".join(lines()) + "\n"


def folder_card(recipe: Recipe, adapter_card: str | None) -> str:
    """The card of an exported pipeline folder: how to use it, and the scores from the adapter's card.

    Args:
        recipe: of the run, or of the base model if nothing was merged.
        adapter_card: of the merged checkpoint, empty if it has none; None if nothing was merged.
    """
    name, tuned = recipe.model.name, adapter_card is not None
    made = " with trained weights merged into its transformer" if tuned else ""
    lines = [
        _front_matter(recipe, "finetune" if tuned else None, ()),
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
        *_terms_table(recipe),
    ]
    for section in re.split(r"^(?=## )", adapter_card or "", flags=re.MULTILINE):
        if section.startswith(("## Scores", "## Recipe")):
            lines += ["", section.rstrip()]
    return "\n".join(lines) + "\n"


def _front_matter(recipe: Recipe, relation: str | None, tags: tuple[str, ...]) -> str:
    facts: dict[str, Any] = dict(recipe.model.config.card_facts())
    if "base_model" in facts and relation is not None:
        facts["base_model_relation"] = relation
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, "flow-map", "few-step", "reinforcement-learning", "fmg"],
        **facts,
    )
    return f"---\n{data.to_yaml()}\n---"


def _title(recipe: Recipe) -> str:
    rewards = " + ".join(f"{reward.weight:g} {reward.label}" for reward in recipe.rewards)
    return f"{recipe.model.name}, tuned for {rewards}"


def _grid(recipe: Recipe) -> str:
    grid = recipe.rollout.grid
    return repr(grid if isinstance(grid, str) else list(grid))


def _in_diffusers(recipe: Recipe) -> Iterator[str]:
    """How to use the checkpoint in diffusers and other tools."""
    config, trainable = recipe.model.config, recipe.train.trainable
    if not config.flow_map_pipeline:
        if trainable == "full":
            yield "In diffusers: the folder `transformer/` in place of the pipeline's own transformer."
        elif config.in_diffusers:
            yield (
                f"In diffusers: `pipe.load_lora_weights(FOLDER)` on {config.in_diffusers}; `peft/` is the same adapter"
                " for PEFT."
            )
        return
    options = _shareable(config.model_dump(mode="json", exclude_defaults=True))
    assert isinstance(options, dict)
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    yield from (f"In diffusers, with the Python package `{DISTRIBUTION}` (imported as `fmg`):", "", "```python")
    yield "from fmg import FlowMapPipeline"
    if trainable == "full":
        yield "from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel"
    yield from ("", f'pipe = FlowMapPipeline.from_model("{recipe.model.name}"{arguments})')
    if trainable == "full":
        yield "# FOLDER is the folder of this card"
        yield 'pipe.transformer = FlowMapFluxTransformer2DModel.from_pretrained("FOLDER", subfolder="transformer")'
    else:
        yield 'pipe.load_lora_weights("FOLDER")  # the folder of this card'
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
    return (
        f"{what} the few-step flow map `{name}`{averaged} after iteration {saved.iteration} of"
        f" `{recipe.objective.name}` on `{recipe.stochasticizer.name}` transitions, made with fmg {__version__}. When"
        f" it was saved, {verified}"
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


def _shareable(value: object) -> object:
    """The values, with absolute paths reduced to their last component."""
    if isinstance(value, dict):
        return {key: _shareable(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_shareable(child) for child in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
