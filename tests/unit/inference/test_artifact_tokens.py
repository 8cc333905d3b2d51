"""Tokenizers of an artifact: impossible lengths, and manifests that a command refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fmg.core.errors import CheckpointError
from fmg.inference.artifact.backend import PromptTokenizer
from fmg.inference.artifact.manifest import MANIFEST, TokenizerFacts
from tests.support.cli import fmg
from tests.support.tiny_artifact import build_tiny_artifact, reseal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tokenizer that adds two special tokens to a prompt."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "red": 3}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_without_room_for_a_word_is_refused(length: int, file: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"adds 2 special tokens to a prompt, but the manifest allows {length} in all"
    ):
        PromptTokenizer(file, TokenizerFacts("tokenizer.json", length, 0, "<pad>"))


def test_prompts_are_padded_cut_and_measured_with_special_tokens(file: Path) -> None:
    tokenizer = PromptTokenizer(file, TokenizerFacts("tokenizer.json", 4, 0, "<pad>"))
    assert tokenizer(["red", "red red red"]).tolist() == [[1, 3, 2, 0], [1, 3, 3, 2]]
    assert tokenizer.cut_prompts(["red red"]) == ""
    assert "The prompt 'red red red' has 5 tokens; the model reads the first 4." in tokenizer.cut_prompts(
        ["red red red"]
    )
    several = tokenizer.cut_prompts(["red", "red red red", "red red red", "red red red red"])
    assert several.startswith(
        "2 of 3 prompts have more than 4 tokens ('red red red' has 5); the model reads the first 4."
    )


@pytest.mark.parametrize("command", ["generate", "verify"])
@pytest.mark.parametrize("hostile", ["length", "resolutions", "nested"])
def test_a_command_refuses_a_hostile_manifest_in_one_line(command: str, hostile: str, tmp_path: Path) -> None:
    folder = build_tiny_artifact(tmp_path / "artifact").folder
    raw = json.loads((folder / MANIFEST).read_text())
    raw["tokenizers"]["text_encoder"]["length"] = 10**12 if hostile == "length" else 8
    raw["sampling"]["resolutions"] = [] if hostile == "resolutions" else [8, 16]
    text = json.dumps(raw)
    (folder / MANIFEST).write_text(text)
    reseal(folder)
    if hostile == "nested":
        (folder / MANIFEST).write_text(text.replace('"schema": 1', f'"x": {"[" * 100_000}'))
    words = ["a red circle", "--from", str(folder), "--resolution", "8", "--out", str(tmp_path / "out")]
    done = fmg("generate", *words) if command == "generate" else fmg("verify", str(folder), "--alone")
    assert done.code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "manifest.json cannot be used" in line
    assert not (tmp_path / "out").exists()
