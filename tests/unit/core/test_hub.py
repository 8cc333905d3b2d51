"""Where the files of a component are looked up, the error when they are missing, and how they are fetched."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from fmg.core import hub as hub_assets
from fmg.core.cache import cache_dir
from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.core.hub import (
    Asset,
    Download,
    HubSource,
    PackageSource,
    UrlSource,
    check_digest,
    check_space,
    exact,
    fetch,
    locate,
    parse_source,
    problem,
)
from fmg.registry import rewards
from fmg.rewards.configs import NetworkConfig

NETWORKS = ("aesthetic", "clipscore", "deqa", "geneval2", "hpsv2", "hpsv3", "imagereward", "pickscore", "unifiedreward")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHA = "0" * 40


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an empty fmg cache; nothing may be downloaded."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    for name in ("hf_hub_download", "HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(hub_assets, "urlopen", refuse)
    return tmp_path / "hub"


def put_in_hub(hub: Path, name: str, text: str, revision: str = SHA) -> Path:
    repository = hub / "models--owner--name"
    file = repository / "snapshots" / revision / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    return file


def asset(source: str, *files: str, sha256: str | None = None, optional: tuple[str, ...] = ()) -> Asset:
    return Asset("checkpoint", "weights", source, files or ("a.pt|b.pt", "c.json"), optional, sha256=sha256)


def test_local_folder_and_file(tmp_path: Path) -> None:
    for name in ("b.pt", "c.json", "d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "other.pt").write_text("")
    in_folder = locate(asset(str(tmp_path), optional=("d.txt", "e.txt")), "reward", "hpsv2")
    assert in_folder.path == tmp_path / "b.pt"
    assert in_folder.folder == tmp_path
    assert in_folder.files["d.txt"] == tmp_path / "d.txt"
    assert "e.txt" not in in_folder.files
    (tmp_path / "a.pt").write_text("")
    assert locate(asset(str(tmp_path)), "reward", "hpsv2").path == tmp_path / "a.pt"
    beside = locate(asset(str(tmp_path / "other.pt")), "reward", "hpsv2")
    assert beside.path == tmp_path / "other.pt"
    assert beside.files["c.json"] == tmp_path / "c.json"


def test_local_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="The reward 'hpsv2' needs its checkpoint, but there is no file or folder"
    ):
        locate(asset(str(tmp_path / "none")), "reward", "hpsv2")
    with pytest.raises(CheckpointError, match=r"lacks a\.pt or b\.pt, c\.json. Set weights to"):
        locate(asset(str(tmp_path)), "reward", "hpsv2")
    (tmp_path / "x.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"lacks c\.json"):
        locate(asset(str(tmp_path / "x.pt")), "reward", "hpsv2")


def test_hub_files_are_found_in_the_cache_by_revision(hub: Path) -> None:
    put_in_hub(hub, "a.pt", "old", revision="1" * 40)
    newest = put_in_hub(hub, "a.pt", "new")
    put_in_hub(hub, "c.json", "{}")
    for revision in ("", "@main", f"@{SHA}"):
        assert locate(asset(f"owner/name{revision}"), "reward", "hpsv2").path == newest
    old = f"owner/name@{'1' * 40}"
    assert problem(asset(old)) == f"'{old}' lacks c.json"


@pytest.mark.parametrize("name", NETWORKS)
def test_what_has_not_been_fetched_is_one_line_with_the_command(name: str) -> None:
    config = rewards.config(name)
    assert isinstance(config, NetworkConfig)
    assert len({item.what for item in config.assets()}) == len(config.assets())
    for item in config.assets():
        with pytest.raises(MissingDependencyError) as caught:
            locate(item, "reward", name)
        text = str(caught.value)
        assert "\n" not in text
        assert item.source in text
        assert all(name.partition("|")[0] in text for name in item.files[:1])
        command = (
            "pip install --no-deps hpsv3==1.0.0"
            if isinstance(item.place, PackageSource)
            else f"`fmg fetch reward {name}`"
        )
        assert command in text


def test_a_source_that_is_a_model_itself_needs_its_config_and_every_shard(hub: Path) -> None:
    part = Asset("weights", "weights", f"owner/name@{SHA}", folders=(".",), patterns=("*.safetensors", "*.json"))
    assert "has not been fetched" in str(problem(part))
    root = put_in_hub(hub, "config.json", '{"architectures": ["Some"]}').parent
    assert str(problem(part)).endswith("lacks model.safetensors")
    put_in_hub(hub, "model.safetensors.index.json", '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    put_in_hub(hub, "1.safetensors", "")
    assert str(problem(part)).endswith("lacks 2.safetensors")
    put_in_hub(hub, "2.safetensors", "")
    assert locate(part, "reward", "geneval2").folder == root
    assert locate(replace(part, source=str(root)), "reward", "geneval2").folder == root


def test_fetch_from_the_hub_takes_the_first_alternative_and_the_options(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def list_repo_files(self, repository: str, revision: str | None) -> list[str]:
            assert (repository, revision) == ("owner/name", SHA)
            return ["b.pt", "c.json", "d.txt", "unused.bin"]

    taken = []

    def download(repository: str, name: str, revision: str | None) -> None:
        taken.append(name)
        put_in_hub(hub, name, name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    wanted = asset(f"owner/name@{SHA}", optional=("d.txt", "e.txt"))
    located = fetch(wanted, "reward", "hpsv2")
    assert taken == ["b.pt", "c.json", "d.txt"]
    assert located.path.read_text() == "b.pt"
    assert located.pinned == f"owner/name@{SHA}"
    fetch(wanted, "reward", "hpsv2")
    assert len(taken) == 3


def test_fetch_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def list_repo_files(self, repository: str, revision: str | None) -> list[str]:
            raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(MissingDependencyError, match="cannot be fetched from 'owner/name': no route"):
        fetch(asset("owner/name"), "reward", "hpsv2")

    def unreachable(url: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(hub_assets, "urlopen", unreachable)
    with pytest.raises(MissingDependencyError, match="no route"):
        fetch(asset("https://example.org/a.pth", "a.pth"), "reward", "aesthetic")
    assert not [file for file in cache_dir().rglob("*") if file.is_file()]


def test_fetch_checks_a_download_against_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_assets, "urlopen", lambda url, timeout: io.BytesIO(b"weights"))
    good = asset("https://example.org/a.pth", "a.pth", sha256=hashlib.sha256(b"weights").hexdigest())
    located = fetch(good, "reward", "aesthetic")
    assert located.path.read_bytes() == b"weights"
    monkeypatch.setattr(hub_assets, "urlopen", lambda url, timeout: pytest.fail("it is there already"))
    assert fetch(good, "reward", "aesthetic") == located
    bad = asset("https://example.org/a.pth", "a.pth", sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is not the published file"):
        fetch(bad, "reward", "aesthetic")
    check_digest(located)


def test_files_of_a_package_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset("package:never_imported==1.0", "never_imported/data/text.py")
    assert problem(source) == "'package:never_imported==1.0' (never_imported/data/text.py) is not installed"
    (tmp_path / "never_imported" / "data").mkdir(parents=True)
    (tmp_path / "never_imported" / "__init__.py").write_text("raise AssertionError('imported')")
    text = tmp_path / "never_imported" / "data" / "text.py"
    text.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(source, "reward", "hpsv3").path == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubSource("owner/name", None, None)),
        (f"owner/some-name.v1@{SHA}", HubSource("owner/some-name.v1", SHA, None)),
        ("~/weights", Path.home() / "weights"),
        ("/weights", Path("/weights")),
        ("weights/hps.pth", Path("weights/hps.pth")),
        ("a/b/c", Path("a/b/c")),
        ("https://example.org/a.pt", UrlSource("https://example.org/a.pt")),
        ("package:hpsv3==1.0.0", PackageSource("hpsv3==1.0.0")),
        ("owner/name@main", HubSource("owner/name", "main", None)),
        ("owner/name@v1.0:sub/file.pt", HubSource("owner/name", "v1.0", "sub/file.pt")),
        ("owner/name:file.safetensors", HubSource("owner/name", None, "file.safetensors")),
        ("weights/student.pt", Path("weights/student.pt")),
        ("./owner/name", Path("./owner/name")),
        ("/owner/name", Path("/owner/name")),
        ("name", Path("name")),
    ],
)
def test_kinds_of_sources(text: str, expected: object) -> None:
    assert parse_source(text) == expected


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_source("owner/name") == Path("owner/name")


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of owner/name in a separate hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_fetched_folder_is_found_and_an_interrupted_fetch_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Asset("teacher", "teacher", "owner/name@main", folders=("vae",))
    assert problem(part) == "'owner/name@main' has not been fetched"
    (snapshot / "vae").mkdir()
    (snapshot / "vae" / "config.json").write_text("{}")
    with pytest.raises(
        MissingDependencyError, match=r"lacks vae/diffusion_pytorch_model.safetensors.*fmg fetch some-model"
    ):
        locate(part, "model", "some-model")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "vae" / "one.safetensors").touch()
    assert problem(part) == "'owner/name@main' lacks vae/two.safetensors"
    (snapshot / "vae" / "two.safetensors").touch()
    assert locate(part, "model", "some-model").path == snapshot


def test_a_fetched_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Asset("student", "student", "owner/name:student.pt")
    assert problem(part) is not None
    (snapshot / "student.pt").touch()
    assert locate(part, "model", "m").path == snapshot / "student.pt"


def test_a_local_source_is_never_reported_as_fetchable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Set model\.student") as caught:
        locate(Asset("student", "model.student", str(tmp_path / "no.pt")), "model", "m")
    assert "fmg fetch" not in str(caught.value)


def test_the_hub_states_the_size_of_what_would_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"x.pt": 10**9, "y.pt": 10**10, "vae/m.safetensors": 2 * 10**9, "tokenizer/t.json": 10**6, "b.pt": 10**8}

    class Api:
        def model_info(self, *_: object, **__: object) -> object:
            files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
            return SimpleNamespace(siblings=files, card_data=SimpleNamespace(license="mit"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    student, teacher = (
        Asset("s", "s", "a/b:x.pt"),
        Asset("t", "t", "a/b", patterns=("vae/*.safetensors", "tokenizer/*")),
    )
    named, lacking = Asset("n", "n", "a/b", ("a.pt|b.pt",), ("x.pt", "z")), Asset("n", "n", "a/b", ("a.pt|c.pt",))
    stated = [exact(Download(one, 0.0, "")) for one in (student, teacher, named)]
    assert [one.size_gb for one in stated] == pytest.approx([1.0, 2.001, 1.1])
    assert {one.licence for one in stated} == {"mit"}
    with pytest.raises(MissingDependencyError, match=r"'a/b' has no file 'a\.pt or c\.pt'; it has b\.pt, vae/m"):
        exact(Download(lacking, 0.0, ""))


def test_space_is_needed_where_the_files_will_be(monkeypatch: pytest.MonkeyPatch, hub: Path, tmp_path: Path) -> None:
    hub.mkdir()
    free = {hub: 3 * 10**9, tmp_path: 10**9}
    monkeypatch.setattr(hub_assets.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    on_hub = Download(asset("owner/name"), 2.0, "")
    check_space([on_hub, Download(asset("https://example.org/a.pt", "a.pt"), 0.5, "")])
    with pytest.raises(UsageError, match=r"take about 4\.0 GB.*set HF_HOME"):
        check_space([on_hub, on_hub])
    with pytest.raises(UsageError, match=r"take about 2\.0 GB.*set FMG_CACHE"):
        check_space([Download(asset("https://example.org/a.pt", "a.pt"), 2.0, "")])


def test_a_link_to_a_file_that_is_gone_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Asset("teacher", "teacher", "owner/name@main", folders=("vae",), patterns=("vae/*", "tokenizer/*"))
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    for number, name in enumerate(("vae/config.json", f"vae/{WEIGHTS}", "tokenizer/tokenizer.json", "other.txt")):
        file = snapshot / name
        file.parent.mkdir(exist_ok=True)
        (blobs / str(number)).write_text("{}")
        file.symlink_to(f"{'../' * (2 + name.count('/'))}blobs/{number}")
    assert problem(part) is None
    # what the part does not read does not matter
    (blobs / "3").unlink()
    assert problem(part) is None
    (blobs / "2").unlink()
    assert problem(part) == "'owner/name@main' lacks tokenizer/tokenizer.json"
    (blobs / "1").unlink()
    assert problem(part) == f"'owner/name@main' lacks vae/{WEIGHTS}, tokenizer/tokenizer.json"


def test_a_variant_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors")).touch()
    part = Asset("teacher", "teacher", str(tmp_path), folders=("vae",))
    assert problem(part) == f"'{tmp_path}' lacks vae/{WEIGHTS} (it has the variant fp16)"
