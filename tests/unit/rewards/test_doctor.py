from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fmg.core.errors import UsageError
from fmg.core.events import StageProgress
from fmg.registry import rewards
from fmg.rewards import doctor
from fmg.rewards.doctor import KNOWN_ANSWERS, PICTURES, Diagnosis, KnownAnswer, diagnose
from tests.support.cli import fmg
from tests.tiny_rewards import write_clip_folder


def one(name: str, **options: object) -> Diagnosis:
    (found,) = diagnose([name], {name: options} if options else None)
    return found


@pytest.fixture(autouse=True)
def empty_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("FMG_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_scores_are_reproduced(name: str) -> None:
    found = one(name)
    number = len(KNOWN_ANSWERS[name])
    assert (found.outcome, found.installed, found.known_scores) == ("ok", "yes", f"{number} of {number}")
    assert found.advice == ""
    assert found.ms_per_image is not None
    assert 0 < found.ms_per_image < 10_000
    assert found.memory_mib is not None
    assert found.memory_mib >= 0


def test_every_known_answer_can_be_wrong() -> None:
    """A tolerance that accepts the score of another picture would prove nothing."""
    for answers in KNOWN_ANSWERS.values():
        assert all(answer.tolerance <= max(0.05 * abs(answer.value), 0.05) for answer in answers)
        assert all(answer.origin and answer.picture in PICTURES for answer in answers)


def test_another_score_than_the_known_one_fails_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = KnownAnswer("gradient", "anything", 2.0, 0.1, "a test")
    monkeypatch.setattr(doctor, "KNOWN_ANSWERS", {"jpeg-incompressibility": (wrong,)})
    found = one("jpeg-incompressibility")
    assert (found.outcome, found.known_scores) == ("failed", "0 of 1")
    assert "is 1.028, not 2 ± 0.1 (a test)" in found.advice


def test_missing_weights_are_not_verified_unless_named() -> None:
    everything = {found.reward: found for found in diagnose()}
    assert set(everything) == set(rewards.names())
    assert (everything["hpsv2"].outcome, everything["hpsv2"].weights) == ("not verified", "missing")
    assert everything["remote"].outcome == "not verified"
    assert [name for name, found in everything.items() if found.outcome == "failed"] == []
    named = one("hpsv2")
    assert (named.outcome, named.weights) == ("failed", "missing")
    assert "fmg fetch reward hpsv2" in named.advice


def test_weights_that_are_there_without_a_known_score_are_not_verified(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    found = one("clipscore", weights=str(folder))
    assert (found.outcome, found.weights, found.known_scores) == ("not verified", "present", "none recorded")
    assert found.ms_per_image is not None


def test_damaged_weights_fail(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"damaged")
    found = one("clipscore", weights=str(folder))
    assert (found.outcome, found.known_scores) == ("failed", "fails")
    assert "model.safetensors" in found.advice


def test_weights_with_another_hash_than_published_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, head = write_clip_folder(tmp_path / "clip"), tmp_path / "head.pth"
    torch.save({}, head)
    monkeypatch.setattr("fmg.rewards.configs.SHA256", {(str(head), "sac+logos+ava1-l14-linearMSE.pth"): "0" * 64})
    found = one("aesthetic", weights=str(clip), head=str(head))
    assert (found.outcome, found.weights) == ("failed", "not usable")
    assert "is not the published file" in found.advice


def test_a_missing_required_option_is_reported() -> None:
    found = one("remote")
    assert (found.outcome, found.known_scores) == ("failed", "needs the option url")


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'pickscore'"):
        diagnose(["ocr", "pickscor"])
    with pytest.raises(UsageError, match="no option 'thread'"):
        diagnose(["ocr"], {"ocr": {"thread": 2}})


def test_progress_is_reported() -> None:
    events: list[object] = []
    diagnose(["jpeg-compressibility"], observer=events.append)
    assert events == [StageProgress("doctor", 0, 1), StageProgress("doctor", 1, 1)]


def test_the_command_prints_a_table_and_returns_1_when_something_fails() -> None:
    good = fmg("doctor", "rewards", "jpeg-compressibility", "shapes")
    assert good.code == 0, good.stderr
    assert [line.split()[:2] for line in good.stdout.splitlines()[2:4]] == [
        ["jpeg-compressibility", "ok"],
        ["shapes", "ok"],
    ]
    bad = fmg("doctor", "rewards", "jpeg-compressibility", "pickscore")
    assert bad.code == 1
    assert "pickscore: The reward 'pickscore' needs its model" in bad.stdout


def test_the_command_as_json() -> None:
    done = fmg("doctor", "rewards", "jpeg-compressibility", "--json", "--set", "jpeg-compressibility.quality=50")
    (entry,) = json.loads(done.stdout)
    assert (entry["reward"], entry["outcome"]) == ("jpeg-compressibility", "not verified")


@pytest.mark.parametrize(
    "args",
    [
        ("doctor", "rewards", "nothing"),
        ("doctor", "rewards", "ocr", "--set", "ocr"),
        ("doctor", "rewards", "ocr", "--set", "ocr=3"),
        ("doctor", "rewards", "ocr", "--set", "ocr.threads=many"),
        ("reward-server",),
        ("reward-server", "--reward", "nothing"),
        ("reward-server", "--reward", "jpeg-compressibility", "--set", "ocr.threads=1"),
        ("reward-server", "--reward", "jpeg-compressibility", "--port", "99999"),
        ("reward-server", "--reward", "jpeg-compressibility", "--host", "0.0.0.0"),
        ("reward-server", "--reward", "remote"),
        ("reward-server", "--reward", "python:no.such:thing"),
    ],
)
def test_wrong_uses_are_one_line(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FMG_REWARD_TOKEN", raising=False)
    done = fmg(*args)
    assert done.code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
