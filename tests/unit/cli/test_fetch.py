"""`fmg fetch` against a hub that is a stub: what is shown, asked and downloaded."""

from __future__ import annotations

import io
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fmg.core import hub as hub_assets
from fmg.core.errors import UsageError
from fmg.core.hub import HubSource, PackageSource
from fmg.recipe import Recipe
from fmg.registry import rewards
from fmg.rewards.published import CLIP_VIT_H_14 as TOKENIZER
from fmg.rewards.published import PICKSCORE
from tests.support.cli import fmg

TEACHER = "Freepik/flux.1-lite-8B"
STUDENTS = "Alibaba-DAMO-Academy/T2I-Distill"
SANA = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def in_hub_cache(tmp_path: Path, repository: str, file: str) -> Path:
    """An empty file of a repository, at its only commit."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    path = folder / "snapshots" / COMMIT / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the two download functions; the hub states sizes and licences."""
    calls: list[tuple[Any, ...]] = []
    files = {
        STUDENTS: {"flux1lite_meanflow.pt": 16_400_000_000, "README.md": 10},
        SANA: {
            "vae/diffusion_pytorch_model.safetensors": 1_250_000_000,
            "text_encoder/model-00001-of-00002.safetensors": 5_230_000_000,
            "transformer/diffusion_pytorch_model.safetensors": 1_190_000_000,
            "checkpoints/original.pth": 10**10,
        },
        PICKSCORE.partition("@")[0]: {
            "model.safetensors": 3_940_000_000,
            "pytorch_model.bin": 3_950_000_000,
            "config.json": 4_000,
        },
        TOKENIZER.partition("@")[0]: {"tokenizer.json": 3_000_000, "vocab.json": 900_000, "weights.bin": 10**10},
        TEACHER: {"vae/diffusion_pytorch_model.safetensors": 170_000_000, "flux.1-lite-8B.safetensors": 10**10},
    }

    def model_info(_: object, repository: str, **__: object) -> object:
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files[repository].items()]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="some-licence"))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)

    def download(repository: str, file: str, **named: Any) -> None:
        calls.append((repository, file, named))
        in_hub_cache(tmp_path, repository, file)

    def snapshot(repository: str, **named: Any) -> None:
        calls.append((repository, named))
        for folder in {
            pattern.split("/")[0] for pattern in named["allow_patterns"] if pattern.endswith(".safetensors")
        }:
            for name in ("config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"):
                in_hub_cache(tmp_path, repository, f"{folder}/{name}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(hub_assets.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
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
    # the printed source can be written into a recipe, and always means these files
    assert f"student: {STUDENTS}@{COMMIT}:flux1lite_meanflow.pt\n" in done.stdout
    assert f"teacher: {TEACHER}@{COMMIT}\n" in done.stdout


def test_sana_is_one_folder_without_the_files_of_its_own_code(hub: list[tuple[Any, ...]]) -> None:
    done = fmg("fetch", "sana-sprint", "--yes")
    assert done.code == 0, done.stderr
    assert "7.7 GB" in done.stdout, "files that the model does not read were counted"
    ((repository, named),) = hub
    assert (repository, named["revision"]) == (SANA, "main")
    assert "transformer/diffusion_pytorch_model.safetensors" in named["allow_patterns"]
    assert "transformer/diffusion_pytorch_model-*.safetensors" in named["allow_patterns"]
    assert f"pipeline: {SANA}@{COMMIT}\n" in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "meanflow-flux",
        "scm-flux",
        "flux-fewstep",
        "flux2-klein",
        "flux3-klein",
        "sana-sprint",
        "sd35-meanflow",
        "z-image-turbo",
    ],
)
def test_every_published_model_states_size_and_licence_without_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fmg("fetch", name)
    assert "about " in done.stdout
    assert done.stderr.startswith("error: '")
    parts = Recipe.default(name).model.config.assets()
    assert all(part.size_gb > 1 and part.licence for part in parts)


def _weighty_rewards() -> list[str]:
    return [name for name in rewards.names() if _defaults(name)]


def _defaults(name: str) -> tuple[hub_assets.Asset, ...]:
    try:
        return rewards.config(name).assets()
    except UsageError:
        # options without a default, such as an address
        return ()


@pytest.mark.parametrize("name", _weighty_rewards())
def test_a_reward_states_size_and_licence_then_fetches_and_names_the_commit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    assets = rewards.config(name).assets()
    fetched: list[str] = []

    def listed(_: object, repository: str, **__: object) -> list[str]:
        return [choice.split("|")[0] for a in assets if a.source.startswith(repository) for choice in a.files]

    def download(repository: str, file: str, **_: object) -> None:
        fetched.append(repository)
        in_hub_cache(tmp_path, repository, file)

    def snapshot(repository: str, **named: Any) -> None:
        fetched.append(repository)
        in_hub_cache(tmp_path, repository, "model.safetensors")
        in_hub_cache(tmp_path, repository, "config.json").write_text('{"architectures": ["Qwen3VL"]}')
        assert {"*.safetensors", "*.json"} <= set(named["allow_patterns"])

    def cached(repository: str, file: str, **_: object) -> str | None:
        path = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT / file
        return str(path) if path.is_file() else None

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no figures")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("fmg.core.hub.urlopen", lambda *_, **__: io.BytesIO(b"file"))
    monkeypatch.setattr("fmg.core.hub.check_digest", lambda _: None)
    asked = fmg("fetch", "reward", name)
    assert asked.code == 2
    assert all(asset.licence for asset in assets)
    assert all(asset.size_gb or isinstance(asset.place, PackageSource) for asset in assets)
    assert re.search(r"about \d+(\.\d)? (MB|GB)", asked.stdout), asked.stdout
    assert not fetched
    done = fmg("fetch", "reward", name, "--yes")
    if any(isinstance(asset.place, PackageSource) and hub_assets.problem(asset) for asset in assets):
        assert "pip install" in done.stderr
        return
    assert done.code == 0, done.stderr
    for asset in assets:
        if isinstance(asset.place, HubSource):
            assert f"{asset.what}: {asset.source.partition('@')[0]}@{COMMIT}\n" in done.stdout
    assert "is on this computer" in fmg("fetch", "reward", name).stdout


def test_a_reward_is_treated_as_a_model_is(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size and licence come from the hub, and the disk is checked before anything is downloaded."""
    asked = fmg("fetch", "reward", "pickscore")
    assert asked.code == 2
    assert " 3.9 GB" in asked.stdout
    assert "4 MB" in asked.stdout, "files that the reward does not read were counted"
    assert "about" not in asked.stdout
    assert asked.stdout.count("some-licence") == 2
    monkeypatch.setattr(hub_assets.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    full = fmg("fetch", "reward", "pickscore", "--yes")
    assert full.code == 2
    assert "take about 3.9 GB" in full.stderr
    assert not hub


def test_a_missing_file_of_a_repository_is_reported_with_those_it_has(hub: list[tuple[Any, ...]]) -> None:
    done = fmg("fetch", "scm-flux", "--yes")
    assert done.code == 2
    assert "it has flux1lite_meanflow.pt" in done.stderr
    assert not hub


def test_too_little_space_is_reported_before_the_download(
    hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_assets.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    done = fmg("fetch", "meanflow-flux", "--yes")
    assert "take about 16.6 GB" in done.stderr
    assert not hub


@pytest.mark.parametrize("flag", [True, False])
def test_offline_is_one_line_after_the_known_figures(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flag:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = fmg("fetch", "meanflow-flux", "--yes", *(["--offline"] if flag else []))
    assert done.code == 2
    assert done.stderr == (
        f"error: '{STUDENTS}@main:flux1lite_meanflow.pt', '{TEACHER}@main' must be fetched, but --offline or"
        " HF_HUB_OFFLINE forbids network access. Run `fmg fetch meanflow-flux` without it, or copy the files here.\n"
    )
    assert "about 16.3 GB" in done.stdout
    done = fmg("fetch", "reward", "pickscore", "--yes", *(["--offline"] if flag else []))
    assert done.code == 2
    assert "Run `fmg fetch reward pickscore` without it" in done.stderr


def test_the_command_that_fetches_repeats_the_options_that_choose_the_files() -> None:
    student, folder = "model.student=me/other@v1:a.pt", "rewards.0.weights=me/pick"
    words = ("train", "--model", "meanflow-flux", "--reward", "pickscore", "--device", "cpu", "--dry-run")
    done = fmg(*words, "--set", student, "--set", "model.attention=native", "--set", folder)
    assert done.code == 0
    said = " ".join(done.stderr.split())
    for command in (
        f"fmg fetch meanflow-flux --set {student}",
        "fmg fetch reward pickscore --set weights=me/pick",
    ):
        assert f"`{command}`" in said
        # and that command fetches them
        refused = fmg(*shlex.split(command)[1:], "--offline")
        assert (refused.code, f"Run `{command}` without it" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        "train --model sana-sprint --reward jpeg-incompressibility --device cpu",
        "train --model meanflow-flux --reward jpeg-incompressibility --device cpu",
        "eval sana-sprint --device cpu",
        "generate cat --from scm-flux --device cpu",
        "train --reward pickscore",
    ],
)
def test_offline_names_what_is_missing_and_the_command_that_fetches_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str | None] = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    original = hub_assets.locate
    monkeypatch.setattr(
        hub_assets, "locate", lambda *given: (seen.append(os.environ.get("HF_HUB_OFFLINE")), original(*given))[1]
    )
    done = fmg(*command.split(), "--offline")
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(r"Fetch it with `fmg fetch (reward )?[a-z-]+`", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert set(seen) <= {"1"}
    assert "HF_HUB_OFFLINE" not in os.environ, "one command changed the next"


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


def test_unknown_names_are_refused() -> None:
    assert fmg("fetch", "meanflow-flx").code == 2
    assert fmg("fetch", "a", "b", "c").code == 2
    assert "is on this computer" in fmg("fetch", "reward", "jpeg-compressibility").stdout
