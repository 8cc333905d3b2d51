"""Mutated run folders, artifacts, recipes, prompt files and pictures: the right result or one clear line, always."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.fuzz import Fuzz, Trial, say, table

TRIALS = {"run": 60, "artifact": 160, "recipe": 100, "prompts": 100, "image": 100}
SEED = 12


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.filterwarnings("default")
def test_a_mutation_changes_nothing_or_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # both are changed by the trials and restored at the end
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fuzz = Fuzz(tmp_path, tuple(TRIALS), SEED)
    counts: dict[str, Counter[str]] = {name: Counter() for name in TRIALS}
    failed: list[Trial] = []
    for name, number in ((name, number) for name, count in TRIALS.items() for number in range(count)):
        trial = fuzz.trial(name, number)
        counts[name][trial.outcome] += 1
        failed += [trial] if trial.outcome == "FAILED" else []
    with capsys.disabled():
        say(f"\n{table(counts)}")
    assert not failed, "\n".join(trial.said for trial in failed)
