"""Sums of adapters against W + sum_i w_i (alpha_i / r_i) B_i A_i, and their artifacts against torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.data.checkpoints import chosen_checkpoint
from fmg.export.kohya import export_kohya
from fmg.export.loaded_source import LoadedSource
from fmg.export.push import pack
from fmg.export.source import find_source
from fmg.export.swap import swap_weights
from fmg.export.verify import verify
from fmg.inference import load
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.target import chosen_target, load_model, merged_target, resolve_target, weighted_run
from fmg.models.common.adapter import base_tensors, merged_tensors
from fmg.models.common.merged_adapters import merged_adapter
from fmg.recipe import Recipe
from tests.support.artifact import copied, make_run, shapes_recipe
from tests.support.cli import fmg
from tests.tiny_flux2 import FLUX2_CASE

PROMPT, SEEDS = "a red circle left", (3, 4)


def checkpoint(run: Path) -> Path:
    folder = chosen_checkpoint(run)
    assert folder is not None
    return folder


def plainly_merged(
    base: Mapping[str, Tensor], parts: Sequence[tuple[Path, float]], only: str | None = None
) -> dict[str, Tensor]:
    """The formula in fp64, from the files, for one weight or all."""
    merged = {name: x.double() for name, x in base.items()}
    for run, weight in parts:
        folder = checkpoint(run)
        stated = json.loads((folder / "fmg_adapter.json").read_text())
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        for name in (name for name in tensors if name.endswith(".lora_A.weight")):
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            if only not in (None, f"{module}.weight"):
                continue
            merged[f"{module}.weight"] += weight * stated["alpha"] / stated["rank"] * b @ a
    return merged


@pytest.fixture(scope="module")
def swapped(
    shapes_artifact: Artifact, shapes_run: Path, other_shapes_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """An artifact with the sum of two adapters, made by the command line."""
    folder = copied(shapes_artifact, tmp_path_factory.mktemp("merged") / "artifact")
    result = fmg(
        "export",
        "meanflow-shapes",
        *("--swap-weights", str(folder), "--adapter", f"{shapes_run}=0.7", "--adapter", f"{other_shapes_run}=-0.3"),
        "--json",
    )
    assert result.code == 0, result.stderr
    stated = json.loads(result.stdout)["adapters"]
    assert [(part["run"], part["weight"]) for part in stated] == [(str(shapes_run), 0.7), (str(other_shapes_run), -0.3)]
    return open_artifact(folder)


@pytest.mark.slow
@pytest.mark.compile
def test_an_artifact_has_the_weights_of_the_formula_and_the_images_of_torch(
    swapped: Artifact, shapes_run: Path, other_shapes_run: Path
) -> None:
    source = find_source(resolve_target("meanflow-shapes"))
    base = {name: source.reader.read(name) for name in source.stored}
    expected = plainly_merged(base, [(shapes_run, 0.7), (other_shapes_run, -0.3)])
    exported = load_file(swapped.path("transformer.safetensors"))
    assert exported.keys() == expected.keys()
    for name, x in expected.items():
        assert (exported[name] - x).abs().max() <= 2e-7 * x.abs().max()
    changed = [name for name, x in base.items() if not torch.equal(exported[name], x)]
    assert len(changed) > 10
    # the manifest names the runs and weights, from which torch loads the same sum
    report = verify(swapped.folder, num=2, progress=False)
    assert report.passed, report
    assert {check.name for check in report.checks} >= {"facts", "weights/transformer", "images"}


@pytest.mark.slow
@pytest.mark.compile
def test_the_order_of_the_adapters_does_not_matter(swapped: Artifact, shapes_run: Path, other_shapes_run: Path) -> None:
    parts = [(shapes_run, 0.7), (other_shapes_run, -0.3)]
    one, other = (merged_target(order) for order in itertools.permutations(parts))
    assert one == other
    assert one.label == f"0.7 {shapes_run} + -0.3 {other_shapes_run}"
    assert (one.recipe.rollout.steps, one.adapter) == (resolve_target(shapes_run).recipe.rollout.steps, other.adapter)
    # and an artifact does not depend on it either
    before = swapped.manifest
    assert swap_weights(swapped.folder, other).manifest.weights_digest() == before.weights_digest()


@pytest.mark.slow
@pytest.mark.compile
def test_a_card_and_a_lora_file_name_the_runs_without_their_folders(
    swapped: Artifact, shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    parcel = pack(swapped, "someone/something")
    card, manifest = (parcel.files[name] for name in ("README.md", "manifest.json"))
    assert isinstance(card, bytes)
    assert isinstance(manifest, bytes)
    adapter = json.loads(manifest)["adapter"]
    assert adapter["run"] == f"0.7 {shapes_run.name} + -0.3 {other_shapes_run.name}"
    for part, run in zip(adapter["parts"], (shapes_run, other_shapes_run), strict=True):
        assert part["run"] == run.name
        assert f"| {run.name} | {part['weight']:g} | `{part['digest']}` |" in card.decode()

    parts = [(shapes_run, 0.7), (other_shapes_run, -0.3)]
    made = export_kohya(merged_target(parts), tmp_path / "lora.safetensors").file
    with safe_open(made, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == adapter["run"]
    tensors, module = load_file(made), "lora_unet_double_blocks_0_img_attn_proj"
    down, up, alpha = (tensors[f"{module}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    name = "transformer_blocks.0.attn.to_out.0.weight"
    expected = plainly_merged({name: torch.zeros(up.shape[0], down.shape[1])}, parts, only=name)[name]
    assert (alpha / down.shape[0] * up @ down - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_one_adapter_is_the_run_itself_or_a_part_of_it(shapes_run: Path) -> None:
    assert merged_target([(shapes_run, 1.0)]) == resolve_target(shapes_run)
    half = chosen_target(str(shapes_run), (), 0.5)
    source = find_source(half)
    assert source.delta is not None
    base = {name: source.reader.read(name) for name in source.stored}
    for name, x in plainly_merged(base, [(shapes_run, 0.5)]).items():
        assert (source.delta.apply(name, base[name], torch.float32) - x).abs().max() <= 2e-7 * x.abs().max()


def test_generate_takes_the_same_sum(shapes_run: Path, other_shapes_run: Path, tmp_path: Path) -> None:
    options = (
        "--adapter",
        f"{shapes_run}=0.5",
        "--adapter",
        f"{other_shapes_run}=0.5",
        "--out",
        str(tmp_path / "images"),
    )
    result = fmg("generate", PROMPT, "--seed", "3", "--device", "cpu", *options)
    assert result.code == 0, result.stderr
    with load(merged_target([(other_shapes_run, 0.5), (shapes_run, 0.5)]), device="cpu") as generator:
        (picture,) = generator.generate(PROMPT, 3, progress=False).to_pil()
    from PIL import Image

    (file,) = (tmp_path / "images").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture))


@pytest.mark.slow
def test_adapters_of_another_family_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FLUX.2 a suffix also names lists of modules, so PEFT gets whole names, different ones in each run."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    model = {f"model.{key}": value for key, value in FLUX2_CASE.build(tmp_path / "folder").items()}
    model |= {"model.text_cache": False, "rewards": ["jpeg-incompressibility"], "train.dtype": "fp32"}
    runs = []
    for seed, rank, targets in ((1, 2, ["attn.to_q", "attn.to_out"]), (2, 3, "attention-mlp")):
        recipe = Recipe.default(FLUX2_CASE.model, **model, **{"lora.rank": rank, "lora.targets": targets})
        runs.append(make_run(tmp_path / f"run{seed}", recipe, seed))
    target = merged_target([(runs[0], 0.7), (runs[1], 0.4)])
    base: Any = load_model(target.base(), device="cpu")
    merged: Any = load_model(target, device="cpu")
    expected = plainly_merged(base_tensors(base.network), [(runs[0], 0.7), (runs[1], 0.4)])
    made = merged_tensors(merged.network, torch.float32)
    assert made.keys() == expected.keys()
    for name, x in expected.items():
        assert (made[name] - x).abs().max() <= 2e-7 * x.abs().max()
    facts = LoadedSource(target, merged).adapter
    assert facts is not None
    assert (facts.rank, facts.scale, [part.weight for part in facts.parts]) == (5, 1.0, [0.7, 0.4])


def test_embedders_are_averaged_and_never_scaled(shapes_run: Path, tmp_path: Path) -> None:
    recipe = shapes_recipe(**{"train.trainable": "lora+duration"})
    one, two = (make_run(tmp_path / f"run{seed}", recipe, seed, "duration") for seed in (5, 6))
    target = merged_target([(one, 0.7), (two, 0.3), (shapes_run, 0.4)])
    delta = find_source(target).delta
    assert delta is not None
    stored = [load_file(checkpoint(run) / "fmg_extra.safetensors") for run in (one, two)]
    assert {f"transformer.{name}" for name in delta.replaced} == stored[0].keys()
    for name, x in delta.replaced.items():
        first, second = (tensors[f"transformer.{name}"].double() for tensors in stored)
        assert torch.equal(x, (0.7 * first + 0.3 * second).float())
    with load(target, device="cpu") as generator:
        generator.generate(PROMPT, SEEDS[0], progress=False).check_finite()
    with pytest.raises(UsageError, match=r"add up to 0\.5 instead of 1"):
        merged_target([(one, 0.5), (shapes_run, 0.5)])


def test_what_cannot_be_added_is_refused(shapes_run: Path, other_shapes_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are the same"):
        merged_target([(shapes_run, 0.5), (checkpoint(shapes_run), 0.5)])
    with pytest.raises(UsageError, match="belong to meanflow-shapes, not to scm-shapes"):
        merged_target([(shapes_run, 0.5), (other_shapes_run, 0.5)], "scm-shapes")
    with pytest.raises(UsageError, match="'meanflow-shapes' has no LoRA"):
        merged_target([("meanflow-shapes", 0.5)])
    full = make_run(tmp_path / "full", shapes_recipe(**{"train.trainable": "full"}), 6, "full")
    with pytest.raises(UsageError, match="has no LoRA"):
        merged_target([(full, 0.5)])
    for text in ("=0.5", "x=nan", "x=0", "x=inf"):
        with pytest.raises(UsageError, match="has no valid weight"):
            weighted_run(text)
    assert weighted_run("runs/a=b") == ("runs/a=b", 1.0)
    result = fmg("export", str(shapes_run), "--adapter", str(other_shapes_run), "--lora-scale", "0.5")
    assert (result.code, "--lora-scale cannot be used" in result.stderr) == (2, True)


@pytest.mark.parametrize("damage", ["module", "half", "rank", "nan", "base"])
def test_a_damaged_adapter_is_never_a_part(
    damage: str, shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    """Without a module, the sum would silently be another model."""
    source = checkpoint(other_shapes_run)
    file, manifest = "pytorch_lora_weights.safetensors", json.loads((source / "fmg_adapter.json").read_text())
    tensors = load_file(source / file)
    module = next(name for name in tensors if name.endswith("attn.to_q.lora_A.weight")).removesuffix(".lora_A.weight")
    if damage in ("module", "half"):
        del tensors[f"{module}.lora_A.weight"]
    if damage == "module":
        del tensors[f"{module}.lora_B.weight"]
    if damage == "rank":
        manifest["rank"] = 3
    if damage == "nan":
        tensors[f"{module}.lora_B.weight"][0, 0] = torch.nan
    if damage == "base":
        manifest["base"]["digest"] = "0" * 64
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / file)
    (folder / "fmg_adapter.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="different weights" if damage == "base" else "damaged"):
        merged_adapter([(checkpoint(shapes_run), 0.5), (folder, 0.5)])
