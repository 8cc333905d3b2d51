"""The rule of the reward-hacking monitor, on scores whose true values are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fmg.data.run_metrics import ERRORS, HackingLimits, hacked
from fmg.training.hacking_monitor import HackingMonitor, HackingVerdict
from fmg.training.state_files import read_state, write_state

Course = Callable[[int], float]
N = 1000
STD = 0.2


def new_monitor() -> HackingMonitor:
    return HackingMonitor(tolerance=0.15, min_diversity=0.1)


def scores(rng: np.random.Generator, common: NDArray[np.float64], mean: float, own: float = 0.1) -> NDArray[np.float64]:
    """Scores of the same prompts and noise: a part that evaluations share, and one that is new in each."""
    values: NDArray[np.float64] = mean + STD * (common + own * rng.standard_normal(len(common)))
    return values


def run(
    trained: Course, held_out: Course, evaluations: Sequence[int], seed: int = 0, monitor: HackingMonitor | None = None
) -> list[HackingVerdict]:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((2, N))
    monitor = monitor or new_monitor()
    return [
        monitor.judge(i, scores(rng, shared[0], trained(i)), {"held": scores(rng, shared[1], held_out(i))})
        for i in evaluations
    ]


def test_a_gap_is_reported_with_where_it_began() -> None:
    verdicts = run(lambda i: 0.01 * i, lambda i: 0.8 - 0.01 * max(0, i - 4), range(0, 20, 2))
    found = next(v for v in verdicts if v.hacked)
    # it is confidently beyond 0.15 stds = 3 points soon after it has passed them, which is at iteration 7
    assert found.iteration in (8, 10)
    assert found.began == 6
    assert "after iteration 6" in found.text()
    assert "held fell from 0.799" in found.text()
    assert all(v.eligible for v in verdicts if v.iteration <= 6)
    assert not any(v.eligible for v in verdicts if v.iteration >= 8)


def test_what_rose_first_is_compared_with_its_peak() -> None:
    verdicts = run(lambda i: 0.01 * i, lambda i: 0.7 + 0.02 * min(i, 10) - 0.02 * max(0, i - 10), range(0, 20, 2))
    found = next(v for v in verdicts if v.hacked)
    (lost,) = found.hacked
    assert lost.before == pytest.approx(0.9, abs=0.02)
    assert 10 <= lost.since <= 12
    # still above the start of the run
    assert lost.now > 0.7


def test_a_run_that_loses_everything_is_not_hacking() -> None:
    assert not any(v.hacked for v in run(lambda i: 0.8 - 0.01 * i, lambda i: 0.8 - 0.01 * i, range(0, 20, 2)))
    reversed_later = run(
        lambda i: 0.5 + 0.02 * min(i, 8) - 0.04 * max(0, i - 8), lambda i: 0.8 - 0.02 * max(0, i - 8), range(0, 14, 2)
    )
    assert not any(v.hacked for v in reversed_later)


def test_the_log_shows_what_the_monitor_found() -> None:
    """`fmg doctor run` reads the log by the same rule."""
    courses: list[tuple[Course, Course]] = [
        (lambda i: 0.01 * i, lambda i: 0.8 - 0.01 * max(0, i - 4)),
        (lambda i: 0.01 * i, lambda i: 0.8 - 0.0015 * i),
        (lambda i: 0.8 - 0.01 * i, lambda i: 0.8 - 0.01 * i),
        (lambda i: 0.5 + 0.02 * min(i, 8) - 0.04 * max(0, i - 8), lambda i: 0.8 - 0.02 * max(0, i - 8)),
    ]
    limits, caught = HackingLimits(0.15, 0.1), 0
    for trained, held_out in courses:
        for verdict in run(trained, held_out, range(0, 20, 2)):
            named = [name for name, _ in hacked(verdict.metrics(), limits)]
            assert named == [reading.name for reading in verdict.hacked]
            caught += len(named)
    assert caught > 3


def test_false_alarms_are_rare_at_the_bound_and_absent_below_it() -> None:
    """The stated probability is for a true loss of exactly the tolerance; half of it is practically never reported."""
    at, below = 0, 0
    for seed in range(400):
        flat = run(lambda i: 0.1 * (i > 0), lambda i: 0.8 - 0.15 * STD * (i > 0), (0, 1), seed)
        half = run(lambda i: 0.1 * (i > 0), lambda i: 0.8 - 0.075 * STD * (i > 0), range(6), seed)
        at += bool(flat[-1].hacked)
        below += any(v.hacked for v in half)
    assert ERRORS == 3
    # 400 x 0.00135 is half a run
    assert at <= 4
    assert below == 0


def test_few_images_are_not_enough_to_stop_a_run() -> None:
    monitor = new_monitor()
    low, high = np.array([0.0, 1.0, 0.5, 0.2]), np.array([0.9, 0.2, 0.7, 0.6])
    monitor.judge(0, low, {"held": high})
    assert not monitor.judge(1, low + 1, {"held": high - np.array([0.1, 0.5, 0.0, 0.3])}).hacked
    one = new_monitor()
    one.judge(0, low[:1], {"held": high[:1]})
    assert not one.judge(1, low[:1] + 1, {"held": high[:1] - 1}).hacked


def test_a_strict_score_that_was_zero_for_every_image_has_a_scale() -> None:
    monitor = new_monitor()
    zero, held = np.zeros(N), np.linspace(0, 1, N)
    monitor.judge(0, zero, {"held": held})
    verdict = monitor.judge(1, (np.arange(N) % 2).astype(np.float64), {"held": held - 0.3})
    assert verdict.gain.value == pytest.approx(1.0)
    assert [r.name for r in verdict.hacked] == ["held"]


@pytest.mark.parametrize(
    ("later", "lost"),
    [
        # 240 x 0.1 in fp64 has a standard deviation of 1e-17
        (np.full(240, 0.1 - 1e-6), False),
        (np.full(240, 0.09), True),
        (np.full(240, 0.1) - 0.02 * (np.arange(240) % 2), True),
    ],
)
def test_equal_scores_are_not_a_unit_for_a_fall(later: NDArray[np.float64], lost: bool) -> None:
    monitor, trained = new_monitor(), np.linspace(0, 1, 240)
    monitor.judge(0, trained, {"held": np.full(240, 0.1)})
    verdict = monitor.judge(1, trained + 0.1, {"held": later})
    assert bool(verdict.hacked) == lost
    assert verdict.eligible != lost


@pytest.mark.parametrize(("later", "lost"), [(980, False), (930, True)])
def test_a_saturated_reward_may_lose_a_few_images(later: int, lost: bool) -> None:
    monitor, images = new_monitor(), np.arange(N)
    monitor.judge(0, images / N, {"held": (images < 995).astype(np.float64)})
    verdict = monitor.judge(1, images / N + 0.1, {"held": (images < later).astype(np.float64)})
    assert bool(verdict.hacked) == lost
    assert verdict.eligible != lost


@pytest.mark.parametrize(("later", "caught"), [(0.5, False), (0.02, True)])
def test_collapsed_diversity(later: float, caught: bool) -> None:
    monitor, rng = new_monitor(), np.random.default_rng(0)
    base = rng.standard_normal(N)
    assert not monitor.judge(0, base, {}).readings
    for iteration in range(1, 5):
        groups = (1.0 if iteration < 3 else later) * rng.uniform(0.8, 1.2, 24)
        monitor.add_rollout(len(groups), groups.sum(), np.square(groups).sum())
        if iteration % 2 == 0:
            verdict = monitor.judge(iteration, base + iteration, {})
            assert bool(verdict.hacked) == (caught and iteration == 4)
    assert verdict.metrics()["watch/diversity_loss"] == pytest.approx(1 - later, abs=0.1)
    if caught:
        assert verdict.began == 2


def test_a_restored_monitor_continues_like_the_saved_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    def feed(monitor: HackingMonitor, iterations: range) -> list[HackingVerdict]:
        rng = np.random.default_rng(5)
        found = []
        for i in iterations:
            base = np.random.default_rng(1).standard_normal((2, N))
            monitor.add_rollout(4, 2.0 + 0.1 * i, 1.2)
            trained, held = base[0] + 0.1 * i, base[1] - 0.1 * i + 0.01 * rng.standard_normal(N)
            found.append(monitor.judge(i, trained, {"held": held}))
        return found

    whole, before, after = new_monitor(), new_monitor(), new_monitor()
    for early in (whole, before):
        feed(early, range(3))
        early.add_rollout(4, 1.0, 0.5)
    folder = tmp_path_factory.mktemp("state")
    write_state(folder, {"tripwire": before.state()})
    after.restore(read_state(folder)["tripwire"])
    assert feed(after, range(3, 8)) == feed(whole, range(3, 8))


def test_what_was_found_first_is_kept_through_a_saved_state(tmp_path: Path) -> None:
    monitor, resumed, healthy = new_monitor(), new_monitor(), new_monitor()
    verdicts = run(lambda i: 0.01 * i, lambda i: 0.8 - 0.01 * i, range(0, 20, 2), monitor=monitor)
    first = next(v for v in verdicts if v.hacked)
    assert monitor.found is first is not verdicts[-1]
    write_state(tmp_path, {"hacked": monitor.state(), "healthy": healthy.state()})
    states = read_state(tmp_path)
    resumed.restore(states["hacked"])
    assert resumed.found == first
    assert resumed.found.text() == first.text()
    resumed.restore(states["healthy"])
    assert resumed.found is None
