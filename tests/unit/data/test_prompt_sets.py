from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fmg.core.errors import FmgWarning, UsageError
from fmg.core.types import Prompt
from fmg.data.prompt_sets import PromptList, load_prompts, overlap_warning
from fmg.recipe.sections import PromptsRef


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_text_file(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "\ufeffa red circle\r\n  two\u2028lines \r\nrosé\n")
    assert [p.text for p in load_prompts(file)] == ["a red circle", "two\u2028lines", "rosé"]
    assert load_prompts(write(tmp_path / "q.txt", "no newline at the end"))[0].tag == ""


def test_json_lines_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a cat", "tag": "single_object", "metadata": {"include": [{"class": "cat", "count": 1}]}}\n'
        '{"prompt": " a dog "}\n',
    )
    prompts = load_prompts(file)
    assert prompts[0] == Prompt("a cat", "single_object", {"include": [{"class": "cat", "count": 1}]})
    assert prompts[1] == Prompt("a dog", "", {})
    assert len(prompts) == 2


def test_by_reference_of_a_recipe(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a\nb\n")
    reference = PromptsRef.model_validate({"name": "file", "path": file})
    assert [p.text for p in load_prompts(reference)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "a\n\nb\n", r"p.txt:2: the line is blank"),
        ("p.txt", "a\nb\n   \n", r"p.txt:3: the line is blank"),
        ("p.txt", "a\nb\n\n", r"p.txt:3: the line is blank"),
        ("p.txt", "a\n\u200b\u2060\ufeff\n", r"p.txt:2: the line is blank"),
        (
            "p.txt",
            "a" * (1 << 20) + "\nb" * 2 + "\n" + "c" * (2 << 20),
            r"p.txt:4: the line has more than 1,048,576 bytes",
        ),
        ("p.txt", "", "is empty"),
        ("p.txt", "\n", r"p.txt:1: the line is blank"),
        ("p.txt", b"caf\xe9\n", r"not UTF-8 \(byte 3\)"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "tag": "x"}\n',
            r"p.jsonl:2: the prompt 'a' is on line 1 with another tag or metadata",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "include": [], "n": 1}\n{"prompt": "a", "include": [{}]}\n',
            r"p.jsonl:2: the prompt 'a' is on line 1 with another tag or metadata",
        ),
        ("p.jsonl", '{"prompt": "a", "metadata": {"x": ' + "[" * 99 + "]" * 99 + "}}", r"p.jsonl:1: .*nested deeper"),
        ("p.jsonl", '{"prompt": "a", "metadata": {"x": ' + "9" * 5000 + "}}", r"p.jsonl:1: .*5000 digits"),
        ("p.jsonl", r'{"prompt": "a \ud83d"}', r"p.jsonl:1: .*unpaired surrogate"),
        ("p.jsonl", '{"prompt": "\u200b"}', r"p.jsonl:1: 'prompt' must be non-empty text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"p.jsonl:2: not JSON"),
        ("p.jsonl", '["a"]\n', r"p.jsonl:1: the line is not a JSON object"),
        ("p.jsonl", '{"text": "a"}\n', r"p.jsonl:1: unknown key 'text'"),
        ("p.jsonl", '{"tag": "a"}\n', r"p.jsonl:1: 'prompt' must be non-empty text"),
        ("p.jsonl", '{"prompt": "  "}\n', r"p.jsonl:1: 'prompt' must be non-empty text"),
        ("p.jsonl", '{"prompt": 3}\n', r"p.jsonl:1: 'prompt' must be non-empty text"),
        ("p.jsonl", '{"prompt": "a", "tag": 1}\n', r"p.jsonl:1: 'tag' must be text"),
        ("p.jsonl", '{"prompt": "a", "metadata": []}\n', r"p.jsonl:1: .*'metadata' an object"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_prompts(write(tmp_path / name, data))


def test_repeated_prompts_are_read_once_and_counted(tmp_path: Path) -> None:
    line = '{"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]'
    file = write(tmp_path / "p.jsonl", "".join(f'{line}, "seed": {seed}}}\n' for seed in range(4)))
    with pytest.warns(FmgWarning, match="has 1 prompt on 4 lines"):
        prompts = load_prompts(file)
    assert [prompt.text for prompt in prompts] == ["a photo of a bench"]
    assert prompts[0].metadata["seed"] == 0


def test_old_line_ends_and_marks_of_joined_files(tmp_path: Path) -> None:
    assert [p.text for p in load_prompts(write(tmp_path / "p.txt", "a\rb\r"))] == ["a", "b"]
    joined = '\ufeff{"prompt": "a"}\r\n\ufeff{"prompt": "b\u2028"}\r\n'
    assert [p.text for p in load_prompts(write(tmp_path / "p.jsonl", joined))] == ["a", "b"]


def test_files_that_are_not_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt file"):
        load_prompts(str(tmp_path / "missing.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompts(str(tmp_path / "folder.txt"))
    with pytest.raises(UsageError, match="unknown suffix"):
        load_prompts(PromptsRef.model_validate({"name": "file", "path": "prompts.csv"}))
    with pytest.raises(UsageError, match="shapes-train"):
        load_prompts("shapes-trian")


def test_prompt_lists_are_not_empty_and_have_no_duplicates() -> None:
    with pytest.raises(UsageError, match="empty"):
        PromptList("mine", [])
    with pytest.raises(UsageError, match="'a' twice"):
        PromptList("mine", [Prompt("a", "", {}), Prompt("b", "", {}), Prompt("a", "x", {})])


def test_overlap_of_training_and_evaluation_is_reported() -> None:
    def named(*texts: str) -> PromptList:
        return PromptList("given", [Prompt(text, "", {}) for text in texts])

    assert overlap_warning(named("a red circle", "two"), named("a blue square")) is None
    said = overlap_warning(named("A red  circle", "two"), named("a red circle", "a blue square", "two"))
    assert said is not None
    assert said.startswith("2 of the 3 evaluation prompts")


def test_files_are_read_without_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a\n")
    program = (
        "import sys; from fmg.data.prompt_sets import load_prompts\n"
        f"load_prompts({file!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
