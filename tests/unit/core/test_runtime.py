"""What the runtime says about what only the full distribution has."""

from __future__ import annotations

import pytest

from fmg import version
from fmg.core import runtime
from fmg.core.errors import MissingDependencyError
from fmg.inference import loading
from tests.support.cli import fmg

REPLACE = "Run: pip uninstall -y flow-map-grpo-runtime && pip install flow-map-grpo."


@pytest.fixture
def only_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (version, loading, "fmg.cli.main", "fmg.registry.registry"):
        name = place if isinstance(place, str) else place.__name__
        monkeypatch.setattr(f"{name}.is_runtime", lambda: True)
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)


@pytest.mark.usefixtures("only_the_runtime")
def test_install_lines_name_the_distribution_that_has_the_packages() -> None:
    assert version.install_line("server") == "pip install 'flow-map-grpo-runtime[server]'"
    assert version.install_line("onnx") == "pip install flow-map-grpo-runtime"
    assert version.install_line("ocr").endswith("&& pip install 'flow-map-grpo[ocr]'")


@pytest.mark.usefixtures("only_the_runtime")
@pytest.mark.parametrize(
    ("target", "subject"),
    [(None, "No artifact is named; a run"), ("scm-shapes", "'scm-shapes' is not an artifact; a model or a run")],
)
def test_a_model_is_refused_in_one_line(target: str | None, subject: str) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        loading.find(target)
    assert caught.value.text == f"{subject} needs flow-map-grpo, of which only the runtime is installed. {REPLACE}"


@pytest.mark.usefixtures("only_the_runtime")
def test_a_command_whose_modules_are_absent_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fmg.recipe", None)
    done = fmg("schema")
    assert done.code == 2
    what = "`fmg schema` needs flow-map-grpo, of which only the runtime is installed."
    assert done.stderr == f"error: {what} {REPLACE}\n"


@pytest.mark.usefixtures("only_the_runtime")
def test_a_component_whose_module_is_absent_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fmg.trackers.configs", None)
    done = fmg("show", "tensorboard")
    assert done.code == 2
    what = "The tracker 'tensorboard' needs flow-map-grpo, of which only the runtime is installed."
    assert done.stderr == f"error: {what} {REPLACE}\n"


def test_a_checkout_that_the_runtime_hides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_version", lambda name: "0.1.0")
    error = runtime.beyond_runtime("`fmg train`")
    assert "hidden by those of flow-map-grpo-runtime" in error.what
    assert error.fix == "Run: pip uninstall -y flow-map-grpo-runtime"
