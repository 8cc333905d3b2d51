from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.protocols import Model
from fmg.inference.torch_backend import TorchBackend
from fmg.models.embedded import EmbeddedConfig
from fmg.models.flux.model import FluxModel
from fmg.registry import models

NAMES = ("meanflow-shapes", "scm-shapes")
CPU = torch.device("cpu")


@pytest.fixture(params=NAMES)
def embedded(request: pytest.FixtureRequest) -> tuple[str, Model]:
    """A model that ships with the package, or a random one of the same kind where the weights are not built yet."""
    name: str = request.param
    options: dict[str, object] = {}
    if not cast(EmbeddedConfig, models.config(name)).directory().is_dir():
        fixture = "two_time_folder" if name == "meanflow-shapes" else "single_time_folder"
        options["folder"] = str(request.getfixturevalue(fixture))
    return name, models.build(name, options).load(CPU, torch.float32)


def test_an_embedded_model_generates_images_that_depend_on_the_prompt(embedded: tuple[str, Model]) -> None:
    name, model = embedded
    assert model.spec.anchors == ("any" if name == "meanflow-shapes" else "endpoint")
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    cond = model.encode(["a red circle left", "a blue square right"])
    with torch.no_grad():
        images = model.decode(model.flow_map.jump(noise, torch.ones(2), torch.zeros(2), cond))
    side = model.spec.resolution
    assert images.shape == (2, 3, side, side)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert not torch.equal(images[0], images[1])


def test_a_complete_prompt_is_distinguished_from_a_truncated_one(embedded: tuple[str, Model]) -> None:
    model = cast(FluxModel, embedded[1])
    limit = model.components.conventions.max_sequence_length
    # a word and its end
    fitting = " ".join(["red"] * (limit - 1))
    assert model.components.text.count(fitting) == limit
    assert TorchBackend(model).cut_prompts(["a red circle", fitting]) == ""
    longer = f"{fitting} red"
    said = TorchBackend(model).cut_prompts(["a red circle", longer])
    assert said.startswith(f"1 of 2 prompts have more than {limit} tokens ('{longer:.60}' has {limit + 1});")
    # its beginning is read
    encoded = [TorchBackend(model).encode([prompt]).tensors["tokens"] for prompt in (longer, f"{longer} blue")]
    assert torch.equal(*encoded)


def test_lora_round_trip_on_an_embedded_model(embedded: tuple[str, Model], tmp_path: Path) -> None:
    _, model = embedded
    assert model.attach_adapter(rank=2, alpha=4.0, targets=["attention"], dropout=0.0, seed=0) > 0
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05)
    saved = {name: parameter.detach().clone() for name, parameter in model.trainable()}
    model.save_adapter(tmp_path / "adapter")
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.zero_()
    model.load_adapter(tmp_path / "adapter")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.trainable())


def test_a_missing_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = models.build("meanflow-shapes", {"folder": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match=r"nowhere is not a flow-map model folder.*fmg pretrain"):
        _ = source.spec


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'folder'"):
        models.build("scm-shapes", {"foldr": "x"})


def test_specs_are_known_without_importing_torch(two_time_folder: Path) -> None:
    code = (
        "import sys; from fmg.registry import models;"
        f"source = models.build('meanflow-shapes', {{'folder': {str(two_time_folder)!r}}});"
        "assert source.spec.anchors == 'any'; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
