"""Where a server's token comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.serving.access import secret_from


def test_a_secret_can_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    monkeypatch.setenv("TOKEN_FILE", str(file))
    assert secret_from("TOKEN", required=True) == "s3cret"
    monkeypatch.setenv("TOKEN", "given")
    assert secret_from("TOKEN", required=True) == "given"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "which TOKEN_FILE names, cannot be read: No such file or directory"),
        (b"\n", "The file that TOKEN_FILE names is empty"),
        (b"hidden\xff", "The file that TOKEN_FILE names does not contain a valid secret"),
        (b"hidden\nhidden", "The file that TOKEN_FILE names does not contain a valid secret"),
    ],
)
def test_an_unusable_file_is_an_error_without_the_secret(
    content: bytes | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("TOKEN_FILE", str(file))
    with pytest.raises(UsageError) as caught:
        secret_from("TOKEN", required=False)
    assert what in caught.value.what
    assert "hidden" not in caught.value.text
