"""Adapters of one loaded model: each gives the images of its run, and none is exchanged in the middle of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("prometheus_client", reason="needs the packages of flow-map-grpo[server]")

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import ignore
from fmg.data.checkpoints import chosen_checkpoint
from fmg.inference import load
from fmg.inference.service.limits import Limits
from fmg.inference.service.models import ServedModels
from fmg.inference.service.opening import named_targets, open_models, open_served
from fmg.inference.service.server import ImageServer
from fmg.inference.target import merged_target
from fmg.serving.server import Address
from tests.support.artifact import make_run, shapes_recipe
from tests.support.image_service import image_service, pixels, post, running
from tests.support.reward_service import call
from tests.support.tiny_artifact import build_tiny_artifact

pytestmark = pytest.mark.slow

PROMPT, SEEDS = "a red circle left", (3, 4, 5)
TOKEN = {"Authorization": "Bearer secret"}


def opened(stack: ExitStack, *targets: str) -> ServedModels:
    options = {"device": "cpu", "backend": "torch"}
    return ServedModels(open_models(named_targets(targets), options, stack, ignore), max_adapters=3)


def added(models: ServedModels, name: str, run: Path, model: str | None = None) -> None:
    models.install(models.read_adapter(name, [str(run)], model))


def images(models: ServedModels, name: str) -> NDArray[np.float32]:
    served = models.get(name)
    assert served is not None
    served.use()
    return served.generator.generate([PROMPT] * len(SEEDS), SEEDS, progress=False).image_array


@pytest.fixture(scope="module")
def alone(shapes_run: Path, other_shapes_run: Path) -> dict[str, NDArray[np.float32]]:
    """The images of the base and of the two runs, each loaded by itself."""
    made = {}
    for name, target in {"base": "meanflow-shapes", "one": str(shapes_run), "two": str(other_shapes_run)}.items():
        with load(target, device="cpu") as generator:
            made[name] = generator.generate([PROMPT] * len(SEEDS), SEEDS, progress=False).image_array
    assert abs(made["base"] - made["one"]).max() > 0.05
    assert abs(made["two"] - made["one"]).max() > 0.05
    return made


@pytest.fixture
def models() -> Iterator[ServedModels]:
    with ExitStack() as stack:
        yield opened(stack, "meanflow-shapes")


def test_adapters_of_other_ranks_and_modules_give_the_images_of_their_runs(
    models: ServedModels, alone: dict[str, NDArray[np.float32]], shapes_run: Path, other_shapes_run: Path
) -> None:
    added(models, "one", shapes_run)
    added(models, "two", other_shapes_run)
    assert models.names() == ["meanflow-shapes", "meanflow-shapes:one", "meanflow-shapes:two"]
    for name in ("one", "two", "base", "two", "one", "base"):
        served = "meanflow-shapes" + ("" if name == "base" else f":{name}")
        assert np.array_equal(images(models, served), alone[name]), name
    # the steps are those of the run
    assert models.get("meanflow-shapes:two").generator.steps == 3  # type: ignore[union-attr]


def test_a_sum_of_adapters_is_served(models: ServedModels, shapes_run: Path, other_shapes_run: Path) -> None:
    parts = [(shapes_run, 0.6), (other_shapes_run, 0.4)]
    models.install(models.read_adapter("mix", [f"{run}={weight}" for run, weight in parts]))
    with load(merged_target(parts), device="cpu") as generator:
        made = generator.generate([PROMPT] * len(SEEDS), SEEDS, progress=False).image_array
    assert np.array_equal(images(models, "meanflow-shapes:mix"), made)
    facts = models.get("meanflow-shapes:mix").facts()  # type: ignore[union-attr]
    assert facts["target"] == f"0.6 {shapes_run.name} + 0.4 {other_shapes_run.name}"


def test_a_replaced_adapter_leaves_nothing_behind(
    models: ServedModels, alone: dict[str, NDArray[np.float32]], shapes_run: Path, other_shapes_run: Path
) -> None:
    network = models.default.generator.backend.model.network  # type: ignore[attr-defined]
    added(models, "x", shapes_run)
    sizes = []
    for run, name in ((other_shapes_run, "two"), (shapes_run, "one"), (other_shapes_run, "two")):
        added(models, "x", run)
        assert np.array_equal(images(models, "meanflow-shapes:x"), alone[name])
        assert np.array_equal(images(models, "meanflow-shapes"), alone["base"])
        sizes.append(sum(parameter.numel() for parameter in network.parameters()))
    assert sizes[0] == sizes[2]
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_a_run_is_also_served_without_its_adapter(
    alone: dict[str, NDArray[np.float32]], shapes_run: Path, other_shapes_run: Path
) -> None:
    with ExitStack() as stack:
        models = opened(stack, f"mine={shapes_run}")
        assert models.names() == ["mine", "mine:base"]
        added(models, "two", other_shapes_run)
        for served, name in {"mine": "one", "mine:base": "base", "mine:two": "two"}.items():
            assert np.array_equal(images(models, served), alone[name])
        assert models.get("mine:two").facts()["base"] == "mine:base"  # type: ignore[union-attr]


def test_an_adapter_with_an_embedder_of_its_own_takes_it_along(
    models: ServedModels, alone: dict[str, NDArray[np.float32]], shapes_run: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", shapes_recipe(**{"train.trainable": "lora+duration"}), 5, "duration")
    with load(run, device="cpu") as generator:
        whole = generator.generate([PROMPT] * len(SEEDS), SEEDS, progress=False).image_array
    added(models, "whole", run)
    added(models, "one", shapes_run)
    for name, made in (("whole", whole), ("one", alone["one"]), ("whole", whole)):
        assert np.array_equal(images(models, f"meanflow-shapes:{name}"), made)
        assert np.array_equal(images(models, "meanflow-shapes"), alone["base"])


def test_a_full_fine_tune_is_a_model_of_its_own(models: ServedModels, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", shapes_recipe(**{"train.trainable": "full"}), 6, "full")
    with pytest.raises(CheckpointError, match="a whole transformer, not an adapter"):
        models.read_adapter("x", [str(run)])
    with load(run, device="cpu") as generator:
        made = generator.generate([PROMPT] * len(SEEDS), SEEDS, progress=False).image_array
    with ExitStack() as stack:
        tuned = opened(stack, f"tuned={run}")
        assert tuned.names() == ["tuned"]
        assert np.array_equal(images(tuned, "tuned"), made)


def test_adapters_of_the_command_line_leave_artifacts_alone_and_replace_nothing(
    shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    artifact = build_tiny_artifact(tmp_path / "tiny").folder
    targets, options = named_targets([f"tiny={artifact}", "meanflow-shapes"]), {"device": "cpu"}
    with ExitStack() as stack:
        models = open_served(targets, {(None, "one"): [str(shapes_run)]}, options, 3, stack, ignore)
        assert [one.name for one in models] == ["tiny", "meanflow-shapes", "meanflow-shapes:one"]
        assert [one.generator.backend.name for one in models] == ["onnxruntime", "torch", "torch"]
    twice = {(None, "one"): [str(shapes_run)], ("meanflow-shapes", "one"): [str(other_shapes_run)]}
    with ExitStack() as stack, pytest.raises(UsageError, match="Two adapters are called 'meanflow-shapes:one'"):
        open_served(targets[1:], twice, options, 3, stack, ignore)


def test_what_does_not_fit_is_refused(models: ServedModels, shapes_run: Path, tmp_path: Path) -> None:
    for name in ("", "base", "a:b", "../x"):
        with pytest.raises(UsageError, match="cannot be the name of an adapter"):
            models.read_adapter(name, [str(shapes_run)])
    with pytest.raises(UsageError, match="no run folder"):
        models.read_adapter("x", ["meanflow-shapes"])
    with pytest.raises(UsageError, match="no model 'meanflow'"):
        models.read_adapter("x", [str(shapes_run)], "meanflow")
    added(models, "a", shapes_run)
    with pytest.raises(UsageError, match="no model 'meanflow-shapes:a'"):
        models.read_adapter("x", [str(shapes_run)], "meanflow-shapes:a")
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        models.read_adapter("x", ["x" * 300])
    with ExitStack() as stack, pytest.raises(CheckpointError, match="different weights"):
        opened(stack, "scm-shapes").read_adapter("x", [str(shapes_run)])
    for name in ("a", "b", "c"):
        added(models, name, shapes_run)
    with pytest.raises(UsageError, match="has 3 adapters already"):
        added(models, "d", shapes_run)
    added(models, "c", shapes_run)


def test_an_adapter_is_replaced_under_load(models: ServedModels, shapes_run: Path, other_shapes_run: Path) -> None:
    """Every image is that of the adapter whose digest the answer states, wherever the swap comes."""
    runs = {_digest(run): run for run in (shapes_run, other_shapes_run)}
    expected = {}
    for digest, run in runs.items():
        with load(str(run), device="cpu") as generator:
            expected[digest] = [np.asarray(i) for i in generator.generate(PROMPT, 0, num=40, steps=2).to_pil()]
    served = ImageServer(models, Address("127.0.0.1", 0), limits=Limits(max_batch=4), token="secret")
    request: dict[str, Any] = {"prompt": PROMPT, "model": "meanflow-shapes:x", "steps": 2, "n": 2}
    with running(served), ThreadPoolExecutor(4) as pool:
        url = served.url
        assert post(url, {**request, "seed": 0}, TOKEN)[0] == 404
        assert _add(url, shapes_run)["adapter_sha256"] == _digest(shapes_run)
        answers = [pool.submit(post, url, {**request, "seed": seed}, TOKEN) for seed in range(0, 40, 2)]
        for run in (other_shapes_run, shapes_run, other_shapes_run):
            assert _add(url, run)["adapter_sha256"] == _digest(run)
        last = post(url, {**request, "seed": 0}, TOKEN)[2]
        assert last["adapter_sha256"] == _digest(other_shapes_run)
        for answer in answers:
            status, _, found = answer.result()
            assert status == 200
            for entry in found["data"]:
                difference = pixels(entry).astype(int) - expected[found["adapter_sha256"]][entry["seed"]]
                assert abs(difference).max() <= 1
        listed = json.loads(call(url, "GET", "/v1/models", None, TOKEN)[2])["data"]
        assert [model["id"] for model in listed] == ["meanflow-shapes", "meanflow-shapes:x"]
        assert listed[1]["base"] == "meanflow-shapes"
        body = json.dumps({"name": "y", "run": "/"}).encode()
        assert post(url, body, TOKEN, "/v1/adapters")[0] == 400
        assert post(url, body, None, "/v1/adapters")[0] == 401


def test_without_a_token_nobody_adds_an_adapter(models: ServedModels, shapes_run: Path) -> None:
    with image_service(*models) as server:
        status, _, answer = post(server.url, {"name": "x", "run": str(shapes_run)}, path="/v1/adapters")
        assert (status, answer["error"]["type"]) == (403, "permission_error")


def _digest(run: Path) -> str:
    folder = chosen_checkpoint(run)
    assert folder is not None
    return hashlib.sha256((folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()


def _add(url: str, run: Path) -> dict[str, Any]:
    status, _, answer = post(url, {"name": "x", "run": str(run)}, TOKEN, "/v1/adapters")
    assert status == 200, answer
    found: dict[str, Any] = answer
    return found
