"""Where the files of a reward are looked for, what is said when they are not there, and how they are fetched."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from fmg.core.cache import cache_dir
from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.core.events import Event, StageProgress
from fmg.registry import rewards
from fmg.rewards import weights
from fmg.rewards.affine import affine_head
from fmg.rewards.checkpoints import read_tensors
from fmg.rewards.model_configs import AESTHETIC_HEAD, NetworkConfig
from fmg.rewards.weights import Asset, check_digest, fetch, locate, missing

NETWORKS = ("aesthetic", "clipscore", "hpsv2", "hpsv3", "imagereward", "pickscore")
SHA = "0" * 40


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an empty cache of ours; nothing may be downloaded."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    for name in ("hf_hub_download", "HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(weights, "urlopen", refuse)
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
    return Asset("checkpoint", "weights", source, files or ("a.pt|b.pt", "c.json"), optional, sha256)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("owner/name", "hub"),
        ("owner/name@main", "hub"),
        (f"owner/some-name.v1@{SHA}", "hub"),
        ("./owner/name", "path"),
        ("~/weights", "path"),
        ("/weights", "path"),
        ("weights/hps.pt", "path"),
        ("weights", "path"),
        ("a/b/c", "path"),
        ("https://example.org/a.pt", "url"),
        ("package:hpsv3==1.0.0", "package"),
    ],
)
def test_kinds_of_sources(source: str, kind: str) -> None:
    assert asset(source).kind == kind


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert asset("owner/name").kind == "path"


def test_local_folder_and_file(tmp_path: Path) -> None:
    for name in ("b.pt", "c.json", "d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "other.pt").write_text("")
    in_folder = locate(asset(str(tmp_path), optional=("d.txt", "e.txt")), "hpsv2")
    assert in_folder.first == tmp_path / "b.pt"
    assert in_folder.folder == tmp_path
    assert in_folder.get("d.txt") == tmp_path / "d.txt"
    assert in_folder.get("e.txt") is None
    (tmp_path / "a.pt").write_text("")
    assert locate(asset(str(tmp_path)), "hpsv2").first == tmp_path / "a.pt"
    beside = locate(asset(str(tmp_path / "other.pt")), "hpsv2")
    assert beside.first == tmp_path / "other.pt"
    assert beside.files["c.json"] == tmp_path / "c.json"


def test_local_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file or folder"):
        locate(asset(str(tmp_path / "none")), "hpsv2")
    with pytest.raises(UsageError, match=r"has no a\.pt or b\.pt, c\.json, which the reward 'hpsv2' needs"):
        locate(asset(str(tmp_path)), "hpsv2")
    (tmp_path / "x.pt").write_text("")
    with pytest.raises(UsageError, match=r"has no c\.json"):
        locate(asset(str(tmp_path / "x.pt")), "hpsv2")


def test_hub_files_are_found_in_the_cache_by_revision(hub: Path) -> None:
    put_in_hub(hub, "a.pt", "old", revision="1" * 40)
    newest = put_in_hub(hub, "a.pt", "new")
    put_in_hub(hub, "c.json", "{}")
    for revision in ("", "@main", f"@{SHA}"):
        assert locate(asset(f"owner/name{revision}"), "hpsv2").first == newest
    assert missing(asset(f"owner/name@{'1' * 40}")) == ("c.json",)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_has_not_been_fetched_is_one_line_with_the_command(name: str) -> None:
    config = rewards.config(name)
    assert isinstance(config, NetworkConfig)
    assert len({item.what for item in config.assets()}) == len(config.assets())
    for item in config.assets():
        with pytest.raises(MissingDependencyError) as caught:
            locate(item, name)
        text = str(caught.value)
        assert "\n" not in text
        assert item.source in text
        assert item.files[0].partition("|")[0] in text
        command = "pip install --no-deps hpsv3==1.0.0" if item.kind == "package" else f"`fmg fetch reward {name}`"
        assert command in text


@pytest.mark.parametrize("name", NETWORKS)
def test_published_sources_are_pinned(name: str) -> None:
    config = rewards.config(name)
    assert isinstance(config, NetworkConfig)
    for item in config.assets():
        if item.kind == "hub":
            assert len(item.source.partition("@")[2]) == 40
        else:
            assert item.sha256 is not None or item.kind == "package"
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
    events: list[Event] = []
    wanted = asset(f"owner/name@{SHA}", optional=("d.txt", "e.txt"))
    (located,) = fetch("hpsv2", [wanted], events.append)
    assert taken == ["b.pt", "c.json", "d.txt"]
    assert located.first.read_text() == "b.pt"
    assert events == [StageProgress("fetch", 0, 1), StageProgress("fetch", 1, 1)]
    fetch("hpsv2", [wanted])
    assert len(taken) == 3


def test_fetch_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def list_repo_files(self, repository: str, revision: str | None) -> list[str]:
            raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(MissingDependencyError, match="cannot be fetched from owner/name: no route"):
        fetch("hpsv2", [asset("owner/name")])

    def unreachable(url: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(weights, "urlopen", unreachable)
    with pytest.raises(MissingDependencyError, match="no route"):
        fetch("aesthetic", [asset("https://example.org/a.pth", "a.pth")])
    assert not [file for file in cache_dir().rglob("*") if file.is_file()]


def test_fetch_checks_a_download_against_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "urlopen", lambda url, timeout: io.BytesIO(b"weights"))
    good = asset("https://example.org/a.pth", "a.pth", sha256=hashlib.sha256(b"weights").hexdigest())
    (located,) = fetch("aesthetic", [good])
    assert located.first.read_bytes() == b"weights"
    monkeypatch.setattr(weights, "urlopen", lambda url, timeout: pytest.fail("it is there already"))
    assert fetch("aesthetic", [good]) == (located,)
    bad = asset("https://example.org/a.pth", "a.pth", sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is not the published file"):
        fetch("aesthetic", [bad])
    check_digest(located)


def test_files_of_a_package_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = asset("package:never_imported==1.0", "never_imported/data/text.py")
    assert missing(source) == ("never_imported/data/text.py",)
    (tmp_path / "never_imported" / "data").mkdir(parents=True)
    (tmp_path / "never_imported" / "__init__.py").write_text("raise AssertionError('imported')")
    text = tmp_path / "never_imported" / "data" / "text.py"
    text.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate(source, "hpsv3").first == text


def test_listing_and_checking_imports_no_torch() -> None:
    code = (
        "import sys; from fmg.registry import rewards; "
        f"[rewards.config(name).assets() for name in {NETWORKS!r}]; [rewards.describe(name) for name in {NETWORKS!r}]; "
        "sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
