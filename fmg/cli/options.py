"""Option types that several commands share, and the checks that need nothing but the text that was typed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.core.errors import UsageError, suggestion
from fmg.core.files import check_place
from fmg.core.hub import OFFLINE
from fmg.core.prompt import is_blank


def _go_offline(asked: bool) -> bool:
    """Tells huggingface_hub, transformers and diffusers in this process, and in those that it starts."""
    if asked:
        os.environ[OFFLINE] = "1"
    return asked


def _device_name(name: str) -> str:
    """Refuses what is no device on any machine before torch is imported, which knows those of this one."""
    from fmg.registry.sections import device_name

    try:
        return device_name(name)
    except ValueError as error:
        raise UsageError(f"--device {name}: {error}", "Use auto, cpu, cuda or cuda:N.") from None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Images a network call.",
        show_default="64",
        rich_help_panel="Where it runs",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="B",
        help="auto, torch, onnxruntime, ...: fmg list backends.",
        rich_help_panel="Where it runs",
        autocompletion=completion.components("backend"),
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="D",
        help="auto, cpu, cuda or cuda:N.",
        callback=_device_name,
        rich_help_panel="Where it runs",
        autocompletion=completion.one_of("auto", "cpu", "cuda"),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="T",
        help="fp32 or bf16.",
        rich_help_panel="Where it runs",
        autocompletion=completion.one_of("fp32", "bf16"),
    ),
]
LoadedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="T",
        help="fp32 or bf16, of a model or a run in torch.",
        show_default="fp32",
        rich_help_panel="Where it runs",
        autocompletion=completion.one_of("fp32", "bf16"),
    ),
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Run the int8 transformer of an artifact.", rich_help_panel="Where it runs")
]
Resolution = Annotated[
    int | None,
    typer.Option(
        "--resolution",
        min=8,
        max=16384,
        metavar="N",
        help="Side of an artifact's image.",
        show_default="its own",
        rich_help_panel="Where it runs",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        metavar="N",
        help="CPU threads.",
        show_default="all cores",
        rich_help_panel="Where it runs",
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        "--grid",
        metavar="G",
        help="Time grid by name, such as uniform.",
        show_default="the target's own",
        rich_help_panel="Sampling",
        autocompletion=completion.grids,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Use no network for weights, as HF_HUB_OFFLINE=1 does.",
        callback=_go_offline,
        is_eager=True,
        rich_help_panel="Where it runs",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the noise.", rich_help_panel="Sampling")]
Features = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        metavar="N",
        help="Feature extractor: adds diversity and, with --reference, Fréchet distance, precision and recall.",
        show_default=False,
        rich_help_panel="What is measured",
        autocompletion=completion.components("feature-extractor"),
    ),
]
OptionsByName = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.OPTION=VALUE",
        help="Option of a reward or a feature extractor.",
        show_default=False,
        rich_help_panel="What is measured",
    ),
]
Num = Annotated[
    int,
    typer.Option(
        "--num", min=1, max=1_000_000, metavar="N", help="Images for each number of steps.", rich_help_panel="Sampling"
    ),
]
_MAX_STEPS = 1000


def check_words(words: Sequence[str]) -> None:
    """Whether every word of the command line is text.

    Raises:
        UsageError: for bytes that are not UTF-8, which neither a prompt nor a recipe can hold.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(f"'{word}' is not UTF-8 text", "Type it in a terminal that uses UTF-8.") from None


def given_text(text: str | None, flag: str) -> str | None:
    """A text that is not empty, or None.

    Raises:
        UsageError: when it is empty, as a variable of the shell that is not set makes it.
    """
    if text is not None and not text.strip():
        raise UsageError(f"{flag} is empty", "Give a value, or leave it out.")
    return text


def parse_steps(text: str) -> tuple[int, ...]:
    """Numbers of network calls from a list such as `1,2,4`.

    Raises:
        UsageError: when an entry is not a whole number from 1 to 1000, or is given twice.
    """
    counts = []
    for part in text.split(","):
        word = part.strip()
        if not word.isascii() or not word.isdigit() or len(word) > 9 or not 1 <= int(word) <= _MAX_STEPS:
            raise UsageError(
                f"--steps {text}: '{word}' is not a whole number from 1 to {_MAX_STEPS}", "Write --steps 1,2,4."
            )
        counts.append(int(word))
    if len(set(counts)) < len(counts):
        raise UsageError(f"--steps {text} names a number twice", "Give each number of steps once.")
    return tuple(counts)


def check_grid(name: str | None) -> None:
    """Accepts the name of a time grid, and None for the target's own.

    Raises:
        UsageError: for an unknown name, before anything is loaded.
    """
    from fmg.registry.vocabulary import grid_names

    if name is not None and name not in grid_names():
        raise UsageError(f"--grid: there is no grid named '{name}'", suggestion(name, grid_names()))


def checked_prompts(prompts: list[str]) -> list[str]:
    """The prompts without surrounding blanks.

    Raises:
        UsageError: when one is empty.
    """
    stripped = [prompt.strip() for prompt in prompts]
    if any(map(is_blank, stripped)):
        raise UsageError("A prompt is empty", 'Give it in quotes: fmg generate "a red circle left".')
    return stripped


def checked_folder(text: str, flag: str) -> Path:
    """A folder that exists or can be made. (Typer's own paths turn an empty text into the working directory.)

    Raises:
        UsageError: when the text is empty, a file is in the way, or it cannot be written.
    """
    given_text(text, flag)
    folder = Path(text)
    if folder.is_file():
        raise UsageError(f"{flag} {folder}: '{folder}' is a file", "Name a folder.")
    check_place(folder, flag)
    return folder


def figure_format(path: Path, flag: str) -> None:
    """Whether a figure can be written as the ending of its name says.

    Raises:
        UsageError: it cannot.
    """
    from fmg.data.charts import FIGURE_FORMATS

    if path.suffix.lower().removeprefix(".") not in FIGURE_FORMATS:
        endings = ", ".join(f".{kind}" for kind in FIGURE_FORMATS)
        raise UsageError(f"{flag} {path} has no ending of a figure", f"Use one of {endings}.")


def new_place(text: str | None, flag: str) -> Path | None:
    """A file or folder that does not exist and can be made; None where none was given.

    Raises:
        UsageError: when the text is empty, there is something, or it cannot be written.
    """
    if given_text(text, flag) is None:
        return None
    assert text is not None
    path = Path(text)
    if path.exists():
        raise UsageError(f"{flag} {path} exists already", "Name another one; nothing is overwritten.")
    check_place(path, flag)
    return path
