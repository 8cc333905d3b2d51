"""What is read from a stand-in for the model hub: artifacts, the cache, and repositories of strangers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fmg.core.errors import FmgError
from fmg.core.files import SUMS, sums_text
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.layout import write_manifest
from fmg.inference.artifact.manifest import MANIFEST
from fmg.inference.hub_target import hub_source
from tests.support.artifact import copied
from tests.support.fake_hub import FakeHub, fails
from tests.support.hub_commands import LORA, PROMPT, fresh_cache, picture, refused, succeeds


def test_without_the_network_the_newest_commit_in_the_cache_is_used(
    hub: FakeHub, shapes_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeds("push", str(shapes_run), "me/shapes")
    before = picture("me/shapes")
    hub.before = fails(503, "*", "/")
    assert picture("me/shapes") == before
    assert "failed with status 503" in refused("eval", "me/other")
    hub.before = None
    assert "--offline or HF_HUB_OFFLINE forbids" in refused("eval", "me/other", "--offline")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}",
    )
    error = refused("eval", "me/other")
    assert "The hub at http://127.0.0.1:1 cannot be reached: " in error
    assert "HTTPS_PROXY" in error


def test_an_artifact_goes_there_and_back(
    hub: FakeHub, shapes_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(shapes_artifact, tmp_path / "artifact")
    base = replace(shapes_artifact.manifest.base, options={"folder": str(tmp_path / "models" / "mine")})
    write_manifest(folder, replace(shapes_artifact.manifest, base=base))
    (folder / "engines").mkdir()
    (folder / "engines" / "a.plan").write_bytes(b"code")
    done = succeeds("push", str(folder), "me/onnx")
    assert "engines/ is not sent" in done.stderr
    files = hub.repositories["me/onnx"].files()
    assert set(files) == {*shapes_artifact.manifest.files, MANIFEST, "README.md", ".gitattributes"}
    run = shapes_artifact.manifest.adapter.run if shapes_artifact.manifest.adapter else ""
    assert Path(run).is_absolute()
    for place in (Path(run).parent, tmp_path):
        assert all(str(place).encode() not in data for data in files.values())
    facts = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (facts["library_name"], facts["license"]) == ("onnx", "apache-2.0")
    before = picture(folder)
    fresh_cache(monkeypatch, hub, tmp_path / "other")
    assert picture("me/onnx") == before
    assert picture("me/onnx", "--offline") == before
    alone = json.loads(succeeds("verify", "me/onnx", "--alone", "--json").stdout)
    assert alone["passed"]
    kept = [path for path in (tmp_path / "other" / "fmg" / "hub").rglob("*") if not path.is_dir()]
    assert {path.name for path in kept} >= {MANIFEST, "transformer.onnx"}
    # runtimes refuse weights behind links of either kind
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in kept)
    assert "is an exported artifact" in refused("eval", "me/onnx")
    error = refused("verify", "me/onnx")
    assert "is not here" in error
    assert "--against RUN" in error


def test_a_pushed_artifact_verifies_against_its_pushed_run(
    hub: FakeHub, shapes_run: Path, shapes_artifact: Artifact
) -> None:
    from fmg.export.source import find_source
    from fmg.export.verify_source import check_source
    from fmg.inference.loading import find_artifact
    from fmg.inference.target import resolve_target

    succeeds("push", str(shapes_artifact.folder), "me/onnx")
    succeeds("push", str(shapes_run), "me/shapes")
    pulled = open_artifact(find_artifact("me/onnx"))
    checks = {check.name: check.note for check in check_source(pulled, find_source(resolve_target("me/shapes")))}
    assert not any(checks.values()), checks


def test_a_killed_download_is_finished_later(hub: FakeHub, shapes_run: Path) -> None:
    succeeds("push", str(shapes_run), "me/shapes")
    hub.before = fails(403, "GET", "/store/")
    assert "may not read 'me/shapes'" in refused("generate", PROMPT, "--from", "me/shapes")
    error = refused("generate", PROMPT, "--from", "me/shapes", "--offline")
    assert "has not been fetched completely" in error
    hub.before = None
    assert picture("me/shapes") == picture(shapes_run)


class Evil:
    """What a stranger may put into a repository."""

    def __init__(self, hub: FakeHub, run: Path) -> None:
        succeeds("push", str(run), "me/shapes")
        self.hub, self.files = hub, dict(hub.repositories["me/shapes"].files())

    def with_(self, files: dict[str, bytes], *, sums: bool = True) -> str:
        """The name of a repository with some other files, whose digests fit."""
        made = {**self.files, **files}
        if sums:
            listed = [line.partition("  ")[2] for line in made[SUMS].decode().splitlines()]
            made[SUMS] = sums_text({name: hashlib.sha256(made[name]).hexdigest() for name in listed}).encode()
        name = f"evil/number-{len(self.hub.repositories)}"
        self.hub.add(name, made)
        return name


def test_repositories_of_strangers_are_read_with_care(hub: FakeHub, shapes_run: Path, tmp_path: Path) -> None:
    evil = Evil(hub, shapes_run)
    damaged = evil.with_({LORA: b"\0" * len(evil.files[LORA])}, sums=False)
    assert "is damaged" in refused("generate", PROMPT, "--from", damaged)
    escaping = evil.with_({SUMS: evil.files[SUMS] + b"0" * 64 + b"  ../../../stolen\n"}, sums=False)
    assert "is not a path within" in refused("generate", PROMPT, "--from", escaping)
    garbage = evil.with_({SUMS: b"\xff\0not a list"}, sums=False)
    assert "cannot be read" in refused("generate", PROMPT, "--from", garbage)
    empty = evil.with_({SUMS: b""}, sums=False)
    assert "names no recipe" in refused("generate", PROMPT, "--from", empty)
    lacking = evil.with_({SUMS: evil.files[SUMS] + b"0" * 64 + b"  fmg_extra.safetensors\n"}, sums=False)
    assert "lacks fmg_extra.safetensors" in refused("generate", PROMPT, "--from", lacking)
    endless = evil.with_({SUMS: evil.files[SUMS] + b"#" * 5_000_000}, sums=False)
    assert "SHA256SUMS has more than 4 MB" in refused("generate", PROMPT, "--from", endless)
    recipe = evil.files["recipe.yaml"].decode()
    code = recipe.replace("rewards:\n", 'rewards:\n  - {name: python, target: "os:getcwd"}\n', 1)
    assert "runs Python code" in refused("eval", evil.with_({"recipe.yaml": code.encode()}))
    followed = recipe.replace("trackers: []", "trackers:\n  - {name: wandb, entity: evil}")
    watching = evil.with_({"recipe.yaml": followed.encode()})
    error = refused("train", "--config", watching, "--dry-run")
    assert "recipe.yaml:" in error
    assert "names the tracker 'wandb'. Choose your own with --tracker" in error
    succeeds("train", "--config", watching, "--dry-run", "--tracker", "tensorboard")
    succeeds("train", "--config", watching, "--dry-run", "--set", "trackers=[]")
    hub.add("evil/pickles", {"pytorch_lora_weights.bin": b"cposix\nsystem\n", "model.pkl": b"", "README.md": b""})
    error = refused("generate", PROMPT, "--from", "evil/pickles")
    assert "neither a run nor an artifact" in error
    assert "pickled weights are never read" in error
    assert not any(path.endswith((".bin", ".pkl")) for path in hub.paths())


def test_a_strangers_artifact_brings_only_files_of_artifacts(hub: FakeHub, shapes_artifact: Artifact) -> None:
    from fmg.core.json_io import sealed

    succeeds("push", str(shapes_artifact.folder), "me/onnx")
    files = dict(hub.repositories["me/onnx"].files())
    stated = json.loads(files[MANIFEST])
    del stated["sha256"]
    stated["files"]["evil.pkl"] = {"sha256": "0" * 64, "size": 4}
    hub.add("evil/onnx", {**files, MANIFEST: json.dumps(sealed(stated)).encode(), "evil.pkl": b"code"})
    assert "lists evil.pkl, which no artifact has" in refused("generate", PROMPT, "--from", "evil/onnx")
    assert not any("evil.pkl" in path for path in hub.paths())


def test_names_of_the_hub_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    assert hub_source("you/shapes") is not None
    assert hub_source("you/shapes@v1.2") is not None
    # below a folder of this computer, or where runs are by default, it is a mistyped path
    assert hub_source("me/shapes") is None
    assert hub_source("runs/typo") is None
    assert hub_source("artifacts/typo") is None
    for text in ("shapes", "./you/shapes", "/you/shapes", "a/b/c", "you/shapes:file.pt", "you/x.safetensors", ""):
        assert hub_source(text) is None
    forced = hub_source("hub:me/shapes@main")
    assert forced is not None
    assert (forced.repository, forced.revision) == ("me/shapes", "main")
    with pytest.raises(FmgError, match="names no repository"):
        hub_source("hub:shapes")
