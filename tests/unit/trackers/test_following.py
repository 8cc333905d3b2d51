"""The two ends of a tracker: what a follower gives it, and what a run hears of it."""

from __future__ import annotations

import errno
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fmg.core.errors import FmgWarning
from fmg.core.events import Evaluated, Event, Finished, IterationDone, Notice, Resumed, StageProgress
from fmg.core.protocols import TrackedRun
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.registry import Row, TrackerConfig, trackers
from fmg.trackers import follower as followers
from fmg.trackers.follower import Follower, Job, MetricsTail
from fmg.trackers.following import Identity, followed, identity_of


class Recorded:
    """A tracker that fails as often as it is told to."""

    first = 0
    failures: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    calls: list[tuple[object, ...]] = []  # noqa: RUF012

    def __init__(self, config: TrackerConfig) -> None:
        self._left = list(type(self).failures)

    def _called(self, *call: object) -> None:
        type(self).calls.append(call)
        if self._left and self._left[0] == call[0]:
            self._left.pop(0)
            raise ConnectionError("the server is gone")

    def open(self, run: TrackedRun) -> tuple[int, str]:
        self._called("open", list(run.iterations), run.logged)
        for problem in self.problems:
            run.warn(problem)
        return self.first, "somewhere"

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        self._called("log", index, dict(line), None if grid is None else grid.name)

    def close(self, ended: bool) -> None:
        self._called("close", ended)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(Recorded, "calls", [])
    folder = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    folder.sample(0).touch()
    (folder.path / "trackers").mkdir()
    return folder


def follower(run: RunFolder, lines: int = 0) -> tuple[Follower, io.StringIO]:
    reports = io.StringIO()
    config, factory = "fmg.registry.config:TrackerConfig", f"{__name__}:Recorded"
    job = Job(str(run.path), "0123abcd", "run", 1, lines, "recorded", config, factory, {})
    return Follower(job, reports), reports


def said(reports: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in reports.getvalue().splitlines()]


def test_a_follower_logs_each_line_once_and_grids_of_evaluations(run: RunFolder) -> None:
    one, reports = follower(run)
    run.append_metrics({"iteration": 0, "eval/score": 0.5})
    one.catch_up()
    run.append_metrics({"iteration": 1, "reward/mean": math.nan})
    one.catch_up()
    one.catch_up(last=True)
    (opened, first, second, closed) = Recorded.calls
    assert opened == ("open", [], 0)
    assert first == ("log", 0, {"iteration": 0.0, "eval/score": 0.5}, "iteration-0000.png")
    assert second[:2] == ("log", 1)
    assert math.isnan(second[2]["reward/mean"])  # type: ignore[index]
    assert closed == ("close", False)
    assert said(reports) == [{"where": "somewhere"}]
    assert json.loads((run.path / "trackers" / "recorded.json").read_text()) == {"logged": 2}


def test_a_line_is_read_when_it_is_complete(run: RunFolder) -> None:
    tail = MetricsTail(run.metrics)
    assert list(tail.new()) == []
    run.metrics.write_text('{"iteration": 0}\n{"iterat')
    assert list(tail.new()) == [(0, {"iteration": 0.0})]
    run.metrics.write_text('{"iteration": 0}\n{"iteration": 1}\n')
    assert list(tail.new()) == [(1, {"iteration": 1.0})]


def test_a_resumed_follower_starts_where_the_tracker_wants(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in range(4):
        run.append_metrics({"iteration": iteration})
    (run.path / "trackers" / "recorded.json").write_text('{"logged": 3}')
    monkeypatch.setattr(Recorded, "first", 3)
    # the run resumed from two lines, and has written two more by now
    one, _ = follower(run, lines=2)
    one.catch_up()
    assert Recorded.calls == [("open", [0, 1], 3), ("log", 3, {"iteration": 3.0}, None)]


@pytest.mark.parametrize("step", ["open", "log"])
def test_a_tracker_that_fails_is_tried_again_later(step: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "failures", (step,))
    run.append_metrics({"iteration": 0})
    one, reports = follower(run)
    one.catch_up()
    tried = len(Recorded.calls)
    one.catch_up()
    assert len(Recorded.calls) == tried
    monkeypatch.setattr(Recorded, "failures", ())
    monkeypatch.setattr(followers, "RETRY_AFTER", 0.0)
    run.append_metrics({"iteration": 1})
    run.set_state("finished")
    one.catch_up(last=True)
    delivered = [call[1] for call in Recorded.calls if call[0] == "log"]
    assert delivered == ([0, 1] if step == "open" else [0, 0, 1])
    assert Recorded.calls[-1] == ("close", True)
    assert {"problem": "ConnectionError: the server is gone"} in said(reports)


def test_every_problem_is_in_the_log_of_the_tracker(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the run prints the first alone
    monkeypatch.setattr(Recorded, "problems", ("the login failed", "the disk is full"))
    one, reports = follower(run)
    one.catch_up()
    assert capsys.readouterr().err == "the login failed\nthe disk is full\n"
    assert [content["problem"] for content in said(reports) if "problem" in content] == list(Recorded.problems)


def test_a_log_on_a_full_disk_does_not_hide_the_problem(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recorded, "problems", ("the login failed",))
    monkeypatch.setattr(Recorded, "failures", ("close",))
    monkeypatch.setattr(sys, "stderr", Full())
    one, reports = follower(run)
    one.catch_up(last=True)
    problems = [content["problem"] for content in said(reports) if "problem" in content]
    assert problems == ["the login failed", "ConnectionError: the server is gone"]


def test_the_identity_of_a_run_comes_from_its_folder_then_from_its_state(tmp_path: Path) -> None:
    refs = Recipe.default(trackers=["tensorboard"]).trackers
    saved = {"id": "0123abcd", "name": "before"}
    with followed(tmp_path, refs, saved, print):
        assert identity_of(tmp_path) == Identity("0123abcd", "before")
    with followed(tmp_path, refs, {"id": "ffffffff", "name": "other"}, print):
        assert identity_of(tmp_path) == Identity("0123abcd", "before")


@pytest.mark.parametrize(
    "content", [None, [], {"id": "0123abcd"}, {"id": "../../ab", "name": "x"}, {"id": 1, "name": ""}]
)
def test_a_damaged_identity_is_replaced(content: object, tmp_path: Path) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "tracked_run.json").write_text(json.dumps(content))
    with followed(tmp_path, Recipe.default(trackers="tensorboard").trackers, content, print):
        found = identity_of(tmp_path)
    assert found is not None
    assert found.name == tmp_path.name
    assert len(found.id) == 8


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with followed(tmp_path, (), None, print) as told:
        assert told is print
    assert list(tmp_path.iterdir()) == []


class Broken(Recorded):
    """A tracker whose process ends at once."""

    def open(self, run: TrackedRun) -> tuple[int, str]:
        raise SystemExit(7)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    row = Row("tracker", "broken", "fmg.registry.config:TrackerConfig", f"{__name__}:Broken", "ends at once")
    monkeypatch.setitem(trackers._rows, "broken", row)
    return "broken"


def test_one_warning_for_each_tracker_and_never_an_error(run: RunFolder, broken: str) -> None:
    heard: list[Event] = []
    refs = Recipe.default(trackers=[broken]).trackers

    def follow() -> None:
        with followed(run.path, refs, None, heard.append) as told:
            for iteration in (1, 2, 3):
                run.append_metrics({"iteration": iteration})
                told(IterationDone(iteration, 3, {}))
            told(Finished(run.path, False, {}))

    with pytest.warns(
        FmgWarning, match=r"'broken' has a problem: its process ended with code 7\..* Details: "
    ) as warned:
        follow()
    assert len(warned) == 1
    assert [type(event) for event in heard] == [IterationDone] * 3 + [Finished, StageProgress]


def test_a_warning_that_is_an_error_becomes_a_notice(run: RunFolder, broken: str) -> None:
    heard: list[Event] = []
    with followed(run.path, Recipe.default(trackers=[broken]).trackers, None, heard.append) as told:
        told(Resumed(0, ()))
        told(Evaluated(0, {}, None))
    assert len([event for event in heard if isinstance(event, Notice) and event.level == "warning"]) == 1


@pytest.mark.parametrize("given", ["tensorboard", ["tensorboard"], {"name": "tensorboard"}, [{"name": "tensorboard"}]])
def test_one_tracker_may_stand_for_a_list(given: object) -> None:
    assert [ref.name for ref in Recipe.default(trackers=given).trackers] == ["tensorboard"]
