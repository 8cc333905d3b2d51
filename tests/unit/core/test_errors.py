from __future__ import annotations

import pytest

from fmg.core.errors import FmgError, UsageError, WrongTypeError, python_call, python_words, suggestion


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("Give --num of at least 1.", "Give 'num' of at least 1."),
        ("Give --batch-size a value.", "Give 'batch_size' a value."),
        ("the benchmark draws 4 a prompt: --num 12.", "the benchmark draws 4 a prompt: num=12."),
        ("Use --device cuda: each takes its own.", "Use device='cuda': each takes its own."),
        ("use --backend onnxruntime or torch.", "use backend='onnxruntime' or torch."),
        ("Export with --precision or --swap-weights.", "Export with 'precision' or 'swap_weights'."),
        ("Name an extractor: --features clip, or pixels.", "Name an extractor: extractors='clip', or pixels."),
        ("If you trust it, give --allow-code; or", "If you trust it, give allow_code=True; or"),
        # shell commands and quoted user input are not changed
        (
            "Go on with `fmg train --resume runs/a --allow-code`.",
            "Go on with `fmg train --resume runs/a --allow-code`.",
        ),
        ("Build it again: fmg export --trt.", "Build it again: fmg export --trt."),
        ("There is no file '--num' here.", "There is no file '--num' here."),
        ("The run's --run and the model's own.", "The run's 'run' and the model's own."),
        ("Run: pip install --no-deps hpsv3==1.0.0", "Run: pip install --no-deps hpsv3==1.0.0"),
    ],
)
def test_options_become_arguments(shell: str, python: str) -> None:
    assert python_words(shell) == python


def test_an_error_that_leaves_a_python_call_names_arguments_and_the_command_line_its_options() -> None:
    @python_call
    def call() -> None:
        raise UsageError("The number is 0", "Give --num of at least 1.")

    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == "The number is 0. Give 'num' of at least 1."
    assert caught.value.text == "The number is 0. Give --num of at least 1."
    assert str(FmgError("a", "--num")) == "a. --num."


def test_a_wrong_type_is_both_a_usage_error_and_a_type_error() -> None:
    error = WrongTypeError("steps", 1.5, "an integer")
    assert isinstance(error, TypeError)
    assert isinstance(error, UsageError)
    assert str(error) == "The argument 'steps' is of type float. Give an integer."


@pytest.mark.parametrize("typed", ["demo", "dem", "demo-", "runs/dem"])
def test_a_suggestion_finds_a_path_by_its_last_word(typed: str) -> None:
    assert suggestion(typed, ["meanflow-shapes", "runs/demo", "runs/other"]).startswith("Did you mean 'runs/demo'?")


def test_a_suggestion_lists_no_thousand_names() -> None:
    said = suggestion("x", [f"runs/{number:04d}" for number in range(1000)])
    assert said.endswith("runs/0039 and 960 more.")
    assert suggestion("x", []) == "Known: none."
