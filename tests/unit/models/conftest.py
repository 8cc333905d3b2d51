from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fmg.models.flux.model import FluxModel
from tests.tiny_flux import build_tiny_flux

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def two_time_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("two-time") / "flux")


@pytest.fixture(scope="session")
def single_time_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("single-time") / "flux", second_time="none", guidance_embeds=True)


@pytest.fixture
def scratch_folder(two_time_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(two_time_folder, tmp_path / "model"))


@pytest.fixture
def model(two_time_folder: Path) -> FluxModel:
    return FluxModel.from_folder(two_time_folder, CPU, torch.float32, name="tiny")
