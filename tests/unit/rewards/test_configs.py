"""Statements of network rewards about their published files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmg.core.hub import HubSource, PackageSource
from fmg.registry import rewards
from fmg.rewards.clip import affine_head
from fmg.rewards.configs import NetworkConfig
from fmg.rewards.network import read_tensors
from fmg.rewards.published import AESTHETIC_HEAD

NETWORKS = ("aesthetic", "clipscore", "deqa", "geneval2", "hpsv2", "hpsv3", "imagereward", "pickscore", "unifiedreward")


@pytest.mark.parametrize("name", NETWORKS)
def test_published_sources_are_pinned(name: str) -> None:
    config = rewards.config(name)
    assert isinstance(config, NetworkConfig)
    for item in config.assets():
        if isinstance(item.place, HubSource):
            assert len(item.source.partition("@")[2]) == 40
        else:
            assert item.sha256 is not None or isinstance(item.place, PackageSource)
    assert config.about.licence
    assert "arXiv" in config.about.citation
    assert config.about.weights


def test_digests_belong_to_the_published_sources_only() -> None:
    def digest(name: str, **options: str) -> str | None:
        config = rewards.config(name, options)
        assert isinstance(config, NetworkConfig)
        return next(item.sha256 for item in config.assets() if item.what in ("checkpoint", "head"))

    assert digest("hpsv2") is not None
    assert digest("hpsv2", weights="owner/name") is None
    assert digest("hpsv2", version="v2.0") is None
    assert digest("aesthetic") is not None
    assert digest("aesthetic", head="head.pth") is None


def test_the_published_aesthetic_head_is_the_known_affine_map() -> None:
    """Runs where `fmg fetch reward aesthetic` has been run: |w| and b from rewards.md, measured on the file."""
    home = Path(os.environ.get("FMG_TEST_CACHE", "~/.cache/fmg")).expanduser()
    folder = hashlib.sha256(AESTHETIC_HEAD.encode()).hexdigest()[:16]
    file = home / "downloads" / folder / "sac+logos+ava1-l14-linearMSE.pth"
    if not file.is_file():
        pytest.skip("the published head has not been fetched")
    head = affine_head(read_tensors(file))
    assert float(head.weight.norm()) == pytest.approx(17.9956, abs=1e-4)
    assert head.bias == pytest.approx(5.23665, abs=1e-5)


def test_listing_and_checking_imports_no_torch() -> None:
    code = (
        "import sys; from fmg.registry import rewards; "
        f"[rewards.config(name).assets() for name in {NETWORKS!r}]; [rewards.describe(name) for name in {NETWORKS!r}]; "
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
