"""`fmg fetch` against a hub that is a stub: what is shown, asked and downloaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fmg.models import fetch as work
from tests.support.cli import fmg

TEACHER = "Freepik/flux.1-lite-8B"
STUDENTS = "Alibaba-DAMO-Academy/T2I-Distill"


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the two download functions; the hub states sizes and licences."""
    calls: list[tuple[Any, ...]] = []
    files = {
        STUDENTS: {"flux1lite_meanflow.pt": 16_400_000_000, "README.md": 10},
        TEACHER: {"vae/diffusion_pytorch_model.safetensors": 170_000_000, "flux.1-lite-8B.safetensors": 10**10},
    }

    def model_info(_: object, repository: str, **__: object) -> object:
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files[repository].items()]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="some-licence"))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kw: calls.append((*args, kw)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kw: calls.append((*args, kw)))
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    return calls


def test_size_and_licence_are_shown_before_anything_is_fetched(hub: list[tuple[Any, ...]]) -> None:
    asked = fmg("fetch", "meanflow-flux")
    assert asked.code == 2
    assert "Give --yes" in asked.stderr
    assert "16.4 GB" in asked.stdout
    assert "0.2 GB" in asked.stdout, "files that the model does not read were counted"
    assert asked.stdout.count("some-licence") == 2
    assert not hub
    done = fmg("fetch", "meanflow-flux", "--yes")
    assert done.code == 0, done.stderr
    assert hub[0] == (STUDENTS, "flux1lite_meanflow.pt", {"revision": "main"})
    assert hub[1][0] == TEACHER
    assert "vae/*.safetensors" in hub[1][1]["allow_patterns"]
    assert "transformer/*.safetensors" not in hub[1][1]["allow_patterns"]


def test_a_file_that_the_repository_lacks_is_answered_with_those_it_has(hub: list[tuple[Any, ...]]) -> None:
    done = fmg("fetch", "scm-flux", "--yes")
    assert done.code == 2
    assert "it has flux1lite_meanflow.pt" in done.stderr
    assert not hub


def test_too_little_space_is_said_before_the_download(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    done = fmg("fetch", "meanflow-flux", "--yes")
    assert "take about 16.6 GB" in done.stderr
    assert not hub


def test_offline_is_one_line_after_the_known_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fmg("fetch", "meanflow-flux", "--yes")
    assert done.code == 2
    assert done.stderr == (
        "error: HF_HUB_OFFLINE is set, so nothing can be fetched. Unset it, or copy the files here.\n"
    )
    assert "about 16.3 GB" in done.stdout


def test_a_hub_that_cannot_be_reached_is_one_line(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    done = fmg("fetch", "meanflow-flux", "--yes")
    assert done.code == 2
    assert "about 16.3 GB" in done.stdout
    assert "no route to host" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_embedded_model_needs_nothing() -> None:
    assert "is on this computer" in fmg("fetch", "meanflow-shapes").stdout


def test_words_that_name_nothing_are_refused() -> None:
    assert fmg("fetch", "meanflow-flx").code == 2
    assert fmg("fetch", "a", "b", "c").code == 2
    assert "is on this computer" in fmg("fetch", "reward", "jpeg-compressibility").stdout
