from __future__ import annotations

from pathlib import Path

import pytest

from fmg.cli.options import checked_folder, checked_prompts, parse_steps
from fmg.core.errors import UsageError


def test_steps_are_a_comma_separated_list() -> None:
    assert parse_steps("1, 2,4") == (1, 2, 4)


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,2", "1.5", "two", "1,2,1", "²", "1001", "9" * 5000])
def test_steps_refuse_what_is_not_a_list_of_different_counts(text: str) -> None:
    with pytest.raises(UsageError, match="--steps"):
        parse_steps(text)


def test_a_blank_prompt_is_refused() -> None:
    assert checked_prompts([" a red circle "]) == ["a red circle"]
    with pytest.raises(UsageError, match="empty"):
        checked_prompts(["a red circle", "\t"])


def test_a_file_anywhere_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert checked_folder(str(tmp_path / "a" / "b"), "--out") == tmp_path / "a" / "b"
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"'.*file' is a file"):
            checked_folder(str(folder), "--out")
