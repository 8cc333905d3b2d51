from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from fmg.core.errors import FmgError, FmgWarning, RewardError, UsageError
from fmg.core.stdout_redirect import fenced, prints_aside, torch_as_new
from fmg.registry import rewards
from fmg.rewards.base import build_rewards
from fmg.rewards.functions import check_module

MODULE = """
import numpy as np
import torch


def brightness(images, prompts):
    assert isinstance(prompts, list)
    return images.mean(dim=(1, 2, 3))


def listed(images, prompts):
    return [len(prompt) for prompt in prompts]


def array(images, prompts):
    return np.arange(len(prompts), dtype=np.float64)


def words(images, prompts):
    return prompts


def nothing(images, prompts):
    return None


def broken(images, prompts):
    return helper(images)


def helper(images):
    return torch.ones(2) @ torch.ones(3)


class Holder:
    @staticmethod
    def score(images, prompts):
        return images.amax(dim=(1, 2, 3))


def talking(images, prompts):
    print("scoring")
    return images.mean(dim=(1, 2, 3))


def leaving(images, prompts):
    raise SystemExit(0)


CONSTANT = 3


def hungry(images, prompts):
    raise MemoryError
"""


GLOBALS = """
import os
import torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


def threads(images, prompts):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return images.mean(dim=(1, 2, 3))


def everything(images, prompts):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)
    torch.backends.cudnn.benchmark = True
    torch.autocast("cpu", torch.bfloat16).__enter__()
    torch.manual_seed(0)
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    return images.mean(dim=(1, 2, 3))


def failing(images, prompts):
    torch.set_grad_enabled(False)
    raise ValueError("no")
"""


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # whatever other tests sampled
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {
        "my_rewards": MODULE,
        "my_syntax": "def f(:\n",
        "my_import": "import surely_not_installed\n",
        "my_crash": "value = 1\nvalue / 0\n",
        "my_talk": "print('imported')\nfrom my_rewards import talking\n",
        "my_exit": "raise SystemExit(0)\ndef f(images, prompts): ...\n",
        "my_globals": GLOBALS,
    }
    for name, text in files.items():
        Path(f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)


def score(target: str) -> torch.Tensor:
    images = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    (reward,) = build_rewards([f"python:{target}"]).values()
    return reward(images, ("a", "bcd")).total


def test_functions_of_all_return_types() -> None:
    torch.testing.assert_close(score("my_rewards:brightness"), torch.tensor([0.2474, 0.7526]), atol=1e-3, rtol=0)
    assert score("my_rewards:listed").tolist() == [1.0, 3.0]
    assert score("my_rewards:array").tolist() == [0.0, 1.0]
    assert score("my_rewards:Holder.score")[1] == 1.0


def test_what_a_function_prints_is_kept_out_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """stdout may be a JSON document."""
    score("my_talk:talking")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "imported\nscoring\n"
    sys.stdout.write("heard")
    assert capsys.readouterr().out == "heard"


def state() -> list[object]:
    """Process-wide settings that user code must not change."""
    torch_state = [
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_rng_state().tolist(),
    ]
    return [*torch_state, Path.cwd()]


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.core.stdout_redirect._told", set())


@pytest.mark.usefixtures("untold")
def test_a_module_that_changes_torch_is_named_once_and_its_changes_are_put_back() -> None:
    before = state()
    with pytest.warns(FmgWarning, match=r"The reward 'my_globals:threads' changed gradients, the default dtype for"):
        (reward,) = build_rewards(["python:my_globals:threads"]).values()
    assert state() == before
    with pytest.warns(FmgWarning, match="changed the number of threads for the whole process"):
        reward(torch.zeros(1, 3, 4, 4), ["a"])
    # once is enough for a run of many iterations
    reward(torch.zeros(1, 3, 4, 4), ["a"])
    assert state() == before


@pytest.mark.usefixtures("untold")
def test_every_setting_that_a_call_changes_is_put_back() -> None:
    with pytest.warns(FmgWarning):
        (reward,) = build_rewards(["python:my_globals:everything"]).values()
    before = state()
    with pytest.warns(FmgWarning) as caught:
        reward(torch.zeros(1, 3, 4, 4), ["a"])
    assert state() == before
    (warning,) = caught
    for what in ("default device", "autocast", "deterministic", "anomaly", "cuDNN", "working directory"):
        assert what in str(warning.message)
    assert "seed" not in str(warning.message)


@pytest.mark.usefixtures("untold")
def test_a_call_that_fails_leaves_nothing_changed_either() -> None:
    with pytest.warns(FmgWarning):
        (reward,) = build_rewards(["python:my_globals:failing"]).values()
    with pytest.raises(RewardError, match="ValueError: no"):
        reward(torch.zeros(1, 3, 4, 4), ["a"])
    assert torch.is_grad_enabled()


def test_sampling_random_numbers_is_not_a_change() -> None:
    torch.manual_seed(3)
    with fenced("The reward 'dice'"):
        first = torch.rand(3)
    with fenced("The reward 'dice'"):
        assert not torch.equal(torch.rand(3), first)


def test_work_of_fmg_does_not_depend_on_what_a_program_set() -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch_as_new():
            assert torch.ones(1, requires_grad=True).sum().requires_grad
            assert torch.zeros(1).dtype == torch.float32
        assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_threads_that_overlap_leave_stdout_as_it_was() -> None:
    before, entered, left = sys.stdout, threading.Event(), threading.Event()

    def other() -> None:
        with prints_aside():
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with prints_aside():
        thread.start()
        assert entered.wait(10)
    assert sys.stdout is sys.stderr
    left.set()
    thread.join()
    assert sys.stdout is before


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("my_missing:fn", UsageError, "no module 'my_missing'"),
        ("my_rewards.inner:fn", UsageError, "no module 'my_rewards.inner'"),
        ("my_rewards:missing", UsageError, "has no function 'missing'"),
        ("my_rewards:CONSTANT", UsageError, "is a int, not a function"),
        ("my_syntax:f", UsageError, "cannot be imported: SyntaxError"),
        ("my_import:f", UsageError, "cannot be imported at my_import.py:1: ModuleNotFoundError"),
        ("my_crash:f", UsageError, "cannot be imported at my_crash.py:2: ZeroDivisionError"),
        ("my_exit:f", UsageError, "cannot be imported at my_exit.py:1: SystemExit: 0"),
        ("my_rewards:leaving", RewardError, "failed at my_rewards.py:47: SystemExit: 0"),
        ("my_rewards", UsageError, "target"),
        ("my_rewards:", UsageError, "target"),
        ("../my_rewards:fn", UsageError, "target"),
        ("my_rewards:words", RewardError, "returned list, which is not numbers"),
        ("my_rewards:nothing", RewardError, r"'my_rewards:nothing' returned nothing \(None\)"),
        ("my_rewards:broken", RewardError, "failed at my_rewards.py:32: RuntimeError"),
        ("my_rewards:hungry", RewardError, "Memory ran out in the reward 'my_rewards:hungry': MemoryError"),
    ],
)
def test_every_mistake_is_one_line(target: str, kind: type[FmgError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        score(target)
    assert "\n" not in str(caught.value)


def test_target_is_described() -> None:
    fields = {field.name: field.required for field in rewards.describe("python").fields}
    assert fields == {"target": True, "gradient": False}


def test_a_module_is_found_without_running_it() -> None:
    Path("my_package").mkdir()
    Path("my_package/__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    Path("my_package/inner.py").write_text("def f(images, prompts): ...\n", encoding="utf-8")
    for target in ("my_exit:f", "my_package.inner:f", "json:loads", "sys:exit", "torch.nn.functional:relu"):
        check_module(target)
    for target in ("my_missing:f", "my_package.outer:f", "my_exit.inner:f"):
        with pytest.raises(UsageError, match="There is no module"):
            check_module(target)
