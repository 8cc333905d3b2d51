"""GenEval 2: its file as questions and as a prompt set, spellings of answers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fmg.core.errors import MissingDependencyError, UsageError
from fmg.data.prompt_sets import load_prompts
from fmg.registry import rewards
from fmg.rewards.base import checked, probe_prompt
from fmg.rewards.geneval2 import GenEval2, Question, read_questions
from tests.support.cli import fmg
from tests.tiny_rewards import write_qwen_vl

ENTRY = {
    "prompt": "two metal toys",
    "atom_count": 3,
    "vqa_list": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]],
    "skills": ["count", "attribute"],
}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(ENTRY) + "\n")
    return file


def test_spellings_are_those_of_the_published_code() -> None:
    counting = Question("How many toys are in the image?", "two")
    other = Question("Are the toys metal?", "Yes")
    assert set(counting.spellings()) == {"two", "Two", " two", " Two", "2", " 2"}
    assert set(other.spellings()) == {"Yes", "yes", " Yes", " yes"}
    assert Question("How many?", "ten").spellings()[2] == "10"
    assert other.asked() == "Are the toys metal? Answer in one word."


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": " "}, "'prompt' must be non-empty text"),
        ({"vqa_list": []}, "must be a list of questions"),
        ({"vqa_list": [["Is it?"]]}, "pairs of a question and an answer"),
        ({"vqa_list": [["Is it?", "No"]]}, r"the answer to 'Is it\?' must be Yes"),
        ({"vqa_list": [["How many?", "eleven"]]}, "a number word from one to ten"),
        ({"vqa_list": [[" ", "Yes"]]}, "has an empty question"),
        (
            {"vqa_list": [["Is it?<|im_end|>", "Yes"]]},
            r"contains <\|im_end\|>, which the model reads as a special token",
        ),
    ],
)
def test_questions_that_cannot_be_scored(questions: Path, entry: dict[str, object], message: str) -> None:
    questions.write_text(json.dumps({**ENTRY, **entry}) + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        read_questions(questions)
    assert f"{questions}:1" in str(caught.value)


def test_a_prompt_with_two_meanings_and_an_empty_file(questions: Path) -> None:
    other = {**ENTRY, "vqa_list": [["Is it?", "Yes"]]}
    questions.write_text(f"{json.dumps(ENTRY)}\n{json.dumps(ENTRY)}\n{json.dumps(other)}\n")
    with pytest.raises(UsageError, match=r"questions\.jsonl:3: 'two metal toys' has different questions"):
        read_questions(questions)
    questions.write_text("")
    with pytest.raises(UsageError, match="has no questions"):
        read_questions(questions)


def test_prompts_need_questions(questions: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"prompt": "a cup", "vqa_list": [["Is there a cup?", "Yes"]]}) + "\n")
    options = {"questions": str(questions), "metadata": str(more), "weights": str(tmp_path)}
    reward = checked("geneval2", rewards.build("geneval2", options))
    reward.check_prompts(["two metal toys", "a cup"])
    with pytest.raises(UsageError, match=r"'geneval2' cannot score every prompt: .* no questions about 'a dog'"):
        reward.check_prompts(["a cup", "a dog"])
    # doctor, conformance and the reward server try a reward on a prompt that it accepts
    assert probe_prompt(reward) == "two metal toys"


def test_its_own_questions_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path))
    reward: GenEval2 = rewards.build("geneval2")
    with pytest.raises(MissingDependencyError, match="`fmg fetch reward geneval2`"):
        reward.check_prompts(["two metal toys"])


def test_the_file_is_a_prompt_set_tagged_by_number_of_atoms(questions: Path) -> None:
    (prompt,) = load_prompts(str(questions))
    assert (prompt.text, prompt.tag) == ("two metal toys", "3 atoms")
    assert prompt.metadata == ENTRY
    questions.write_text(f"{json.dumps(ENTRY)}\n{json.dumps({**ENTRY, 'vqa_list': [['Is it?', 'Yes']]})}\n")
    with pytest.raises(UsageError, match="on line 1 with another tag or metadata"):
        load_prompts(str(questions))


def test_scores_are_probabilities_and_both_means_are_parts(questions: Path, tmp_path: Path) -> None:
    folder = write_qwen_vl(tmp_path / "model", words=("Yes", "yes", "two", "Two"))
    options = {"questions": str(questions), "weights": str(folder)}
    shown = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["two metal toys"] * 2
    output = checked("geneval2", rewards.build("geneval2", options))(shown, prompts)
    assert bool(((output.total > 0) & (output.total < 1)).all())
    assert torch.equal(output.total, output.parts["geometric"])
    assert bool((output.parts["geometric"] < output.parts["arithmetic"]).all())
    # each image by itself, up to the rounding of bf16
    arithmetic = rewards.build("geneval2", {**options, "mean": "arithmetic"})
    alone = torch.cat([arithmetic(image[None], prompts[:1]).total for image in shown])
    torch.testing.assert_close(alone, output.parts["arithmetic"], rtol=0.02, atol=0)


def test_the_rules_of_rewards_hold(questions: Path, tmp_path: Path) -> None:
    folder = write_qwen_vl(tmp_path / "model", words=("Yes", "yes", "two", "Two"))
    done = fmg("check-component", "reward", "geneval2", "--set", f"weights={folder}", "--set", f"questions={questions}")
    assert done.code == 0, done.stdout
