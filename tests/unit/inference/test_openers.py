"""The backends of artifacts without the registry, which needs pydantic."""

from __future__ import annotations

import pytest

from fmg.core.errors import UsageError
from fmg.inference import openers
from fmg.registry import backends


@pytest.fixture
def without_pydantic(monkeypatch: pytest.MonkeyPatch) -> openers.ArtifactBackends:
    monkeypatch.setattr(openers, "find_spec", lambda name: None)
    known = openers.known_backends()
    assert isinstance(known, openers.ArtifactBackends)
    return known


def test_they_are_those_of_the_registry(without_pydantic: openers.ArtifactBackends) -> None:
    ours = [name for name in backends.names() if backends.build(name).opens == "artifact"]
    assert without_pydantic.names() == ours
    for name in ours:
        assert without_pydantic.option_names(name) == backends.option_names(name)
        # the same defaults and preferences
        assert without_pydantic.build(name) == backends.build(name)
        assert without_pydantic.build(name).preference == backends.build(name).preference
        assert without_pydantic.build(name, {"resolution": 64}) == backends.build(name, {"resolution": 64})


def test_unknown_names_are_refused(without_pydantic: openers.ArtifactBackends) -> None:
    with pytest.raises(UsageError, match="no backend named 'torch' that runs artifacts"):
        without_pydantic.build("torch")
    with pytest.raises(UsageError, match="'onnxruntime' has no option 'treads'"):
        without_pydantic.build("onnxruntime", {"treads": 1})
