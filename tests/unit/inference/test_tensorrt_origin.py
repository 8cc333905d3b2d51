"""What this computer remembers of the engines that it built."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.inference.tensorrt.records import built_here, note_built


@pytest.mark.parametrize("digest", ["", ".", "../built", "/etc/passwd", "A" * 64, "0" * 64])
def test_a_digest_that_nobody_noted_is_foreign(digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path))
    note_built("1" * 64)
    assert built_here("1" * 64)
    assert not built_here(digest)
