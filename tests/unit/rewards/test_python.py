from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from fmg.core.aside import prints_aside
from fmg.core.errors import FmgError, RewardError, UsageError
from fmg.registry import rewards
from fmg.rewards.base import build_rewards
from fmg.rewards.python_module import check_module

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


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {
        "my_rewards": MODULE,
        "my_syntax": "def f(:\n",
        "my_import": "import surely_not_installed\n",
        "my_crash": "value = 1\nvalue / 0\n",
        "my_talk": "print('imported')\nfrom my_rewards import talking\n",
        "my_exit": "raise SystemExit(0)\n",
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
        ("my_rewards:nothing", RewardError, r"'my_rewards:nothing' is torch.float32 shaped \(\)"),
        ("my_rewards:broken", RewardError, "failed at my_rewards.py:32: RuntimeError"),
        ("my_rewards:hungry", RewardError, "Memory ran out in the reward 'my_rewards:hungry': MemoryError"),
    ],
)
def test_every_mistake_is_one_line(target: str, kind: type[FmgError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        score(target)
    assert "\n" not in str(caught.value)


def test_target_is_described() -> None:
    (field,) = rewards.describe("python").fields
    assert (field.name, field.required) == ("target", True)


def test_a_module_is_found_without_running_it() -> None:
    Path("my_package").mkdir()
    Path("my_package/__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    Path("my_package/inner.py").touch()
    for target in ("my_exit:f", "my_package.inner:f", "json:loads", "sys:exit", "torch.nn.functional:relu"):
        check_module(target)
    for target in ("my_missing:f", "my_package.outer:f", "my_exit.inner:f"):
        with pytest.raises(UsageError, match="There is no module"):
            check_module(target)
