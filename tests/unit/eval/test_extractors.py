from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from fmg.core.errors import CheckpointError, MissingDependencyError, RewardError, UsageError
from fmg.core.protocols import FeatureExtractor
from fmg.eval.set_metrics import within_groups
from fmg.registry import feature_extractors
from fmg.rewards.images import normalize
from tests.tiny_rewards import SIDE, write_clip_folder


def pictures(n: int, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return levels / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
        model = Dinov2Model(Dinov2Config(**sizes, patch_size=14))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(params=["pixels", "clip", "dinov2"])
def extractor(request: pytest.FixtureRequest) -> FeatureExtractor:
    options: dict[str, Callable[[], dict[str, object]]] = {
        "pixels": lambda: {"side": 8},
        "clip": lambda: {"weights": str(request.getfixturevalue("clip_folder")), "batch_size": 2},
        "dinov2": lambda: {"weights": str(request.getfixturevalue("dinov2_folder")), "side": 56, "batch_size": 2},
    }
    return feature_extractors.build(request.param, options[request.param]())


def test_features_do_not_depend_on_the_batch_and_tell_pictures_apart(extractor: FeatureExtractor) -> None:
    images = pictures(5)
    together, alone = extractor(images), [extractor(image[None]) for image in images]
    assert torch.allclose(together.vectors, torch.cat([f.vectors for f in alone]), atol=1e-5)
    assert torch.allclose(together.maps, torch.cat([f.maps for f in alone]), atol=1e-5)
    assert together.vectors.dtype == together.maps.dtype == torch.float32
    assert torch.pdist(together.vectors).min() > 1e-3
    assert torch.pdist(together.maps).min() > 1e-3


def test_a_picture_and_its_noisier_copies_move_apart(extractor: FeatureExtractor) -> None:
    image = pictures(1)
    copies = [torch.cat([image, (image + size * (pictures(1, seed=1) - 0.5)).clamp(0, 1)]) for size in (0.0, 0.1, 0.6)]
    distances = [float(within_groups(extractor(pair).maps.numpy(), np.zeros(2, int))[0]) for pair in copies]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]


def test_pixels_is_the_mean_squared_difference() -> None:
    images = pictures(2)
    features = feature_extractors.build("pixels", {"side": SIDE})(images)
    distance = within_groups(features.maps.numpy(), np.zeros(2, int))
    assert distance == pytest.approx(float(((images[0] - images[1]) ** 2).mean()), rel=1e-5)
    assert features.vectors.shape == (2, 3 * SIDE * SIDE)
    with pytest.raises(RewardError, match="4 x 0"):
        feature_extractors.build("pixels")(torch.zeros(1, 3, 0, 4))


def test_clip_gives_the_published_embedding(clip_folder: Path) -> None:
    images = pictures(3)
    features = feature_extractors.build("clip", {"weights": str(clip_folder)})(images)
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=normalize(images)).pooler_output
    assert torch.allclose(features.vectors, F.normalize(wanted, dim=-1), atol=1e-5)


def test_dinov2_gives_the_class_token_after_the_last_norm(dinov2_folder: Path) -> None:
    images = pictures(2, side=56)
    features = feature_extractors.build("dinov2", {"weights": str(dinov2_folder), "side": 56})(images)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.no_grad():
        output = model(pixel_values=(images - mean) / std, output_hidden_states=True)
    assert torch.allclose(features.vectors, output.last_hidden_state[:, 0], atol=1e-5)
    # the distance of maps, written out: unit channels, mean over places and over the three layers
    layers = [F.normalize(hidden[:, 1:], dim=-1) for hidden in output.hidden_states[1:]]
    wanted = torch.stack([((x[0] - x[1]) ** 2).sum(-1).mean() for x in layers]).mean()
    assert within_groups(features.maps.numpy(), np.zeros(2, int)) == pytest.approx(float(wanted), rel=1e-4)


def test_wrong_options_and_weights_are_named(dinov2_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    images = pictures(1)
    with pytest.raises(UsageError, match="multiple of 14"):
        feature_extractors.build("dinov2", {"weights": str(dinov2_folder), "side": 30})(images)
    with pytest.raises(CheckpointError, match="keys"):
        feature_extractors.build("dinov2", {"weights": str(clip_folder), "side": 56})(images)
    with pytest.raises(MissingDependencyError, match="fmg fetch feature-extractor clip"):
        feature_extractors.build("clip", {"weights": "nobody/nothing@main"})(images)
