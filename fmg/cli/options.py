"""Options that several commands share, and the checks that need only the text that was typed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fmg.cli import completion
from fmg.core.errors import UsageError
from fmg.core.files import check_place
from fmg.core.hub import OFFLINE
from fmg.core.prompt import is_blank

_MAX_STEPS = 1000


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options that `--help` lists under a title."""
    return partial(typer.Option, rich_help_panel=title)


measuring_option, sampling_option, hardware_option, file_option = map(
    panel, ("Measurement", "Sampling", "Hardware", "Files")
)


def _go_offline(asked: bool) -> bool:
    """Keeps huggingface_hub, transformers and diffusers off the network, in this process and in those it starts."""
    if asked:
        os.environ[OFFLINE] = "1"
    return asked


def _device_name(name: str) -> str:
    """Refuses a device name that exists on no machine, without importing torch, which knows the devices of this one."""
    from fmg.core.machine import device_name

    try:
        return device_name(name)
    except ValueError as error:
        raise UsageError(f"--device {name}: {error}", "Use auto, cpu, cuda or cuda:N.") from None


def _grid_name(name: str | None) -> str | None:
    """Refuses an unknown time grid, before anything is loaded; None is the target's own."""
    from fmg.flow.grids import check_name

    if name is not None:
        try:
            check_name(name)
        except UsageError as error:
            raise UsageError(f"--grid: {error.what[0].lower()}{error.what[1:]}", error.fix) from None
    return name


DTYPES = completion.one_of("fp32", "bf16")
LR_SCHEDULES = completion.one_of("constant", "linear", "cosine")
DEVICES = completion.one_of("auto", "cpu", "cuda")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BatchSize = Annotated[
    int | None, hardware_option("--batch-size", min=1, metavar="N", help="Images per forward pass.", show_default="64")
]
Backend = Annotated[
    str,
    hardware_option(
        "--backend",
        metavar="B",
        help="auto, torch, torch-compile, onnxruntime, ...; see `fmg list backends`.",
        autocompletion=completion.components("backend"),
    ),
]
Device = Annotated[
    str,
    hardware_option(
        "--device", metavar="D", help="auto, cpu, cuda or cuda:N.", callback=_device_name, autocompletion=DEVICES
    ),
]
Dtype = Annotated[str, hardware_option("--dtype", metavar="T", help="fp32 or bf16.", autocompletion=DTYPES)]
LoadedDtype = Annotated[
    str | None,
    hardware_option(
        "--dtype",
        metavar="T",
        help="fp32 or bf16, for a model or a run in torch.",
        show_default="fp32",
        autocompletion=DTYPES,
    ),
]
Int8 = Annotated[bool, hardware_option("--int8", help="Use the int8 transformer of an artifact.")]
Resolution = Annotated[
    int | None,
    hardware_option(
        "--resolution",
        min=8,
        max=16384,
        metavar="N",
        help="Image side in pixels, for an artifact.",
        show_default="the artifact's own",
    ),
]
Threads = Annotated[
    int | None,
    hardware_option("--threads", min=1, max=1024, metavar="N", help="CPU threads.", show_default="all cores"),
]
Grid = Annotated[
    str | None,
    sampling_option(
        "--grid",
        metavar="G",
        help="Time grid by name, such as uniform.",
        show_default="the target's",
        autocompletion=completion.grids,
        callback=_grid_name,
    ),
]
_adapter_option = panel("Adapters")
Adapters = Annotated[
    list[str] | None,
    _adapter_option(
        "--adapter",
        metavar="RUN[=WEIGHT]",
        help="LoRA of a run, times a weight; repeat to add up several. TARGET is then their model, and can be omitted.",
        show_default=False,
    ),
]
LoraScale = Annotated[
    float | None, _adapter_option("--lora-scale", metavar="S", help="Factor on the LoRA of a run.", show_default="1")
]
Offline = Annotated[
    bool,
    hardware_option(
        "--offline", help="Do not download weights; the same as HF_HUB_OFFLINE=1.", callback=_go_offline, is_eager=True
    ),
]
Seed = Annotated[int, sampling_option("--seed", min=0, metavar="N", help="Seed of the noise.")]
Features = Annotated[
    list[str] | None,
    measuring_option(
        "--features",
        metavar="N",
        help="Feature extractor; adds diversity and, with --reference, Fréchet distance, precision and recall.",
        show_default=False,
        autocompletion=completion.components("feature-extractor"),
    ),
]
OptionsByName = Annotated[
    list[str] | None,
    measuring_option(
        "--set",
        metavar="NAME.OPTION=VALUE",
        help="Option of a reward or a feature extractor; repeat for several.",
        show_default=False,
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Allow the recipe of a run to name reward code and reward servers.")
]


def reward_options(sets: Sequence[str]) -> dict[str, dict[str, object]]:
    """Options by reward from texts such as `ocr.threads=4`; values are YAML 1.2.

    Raises:
        UsageError: for any other form.
    """
    from fmg.recipe.layers import merge_all, set_layers

    if not sets:
        return {}
    chosen = merge_all(set_layers(sets)).plain()
    options: dict[str, dict[str, object]] = {}
    for name, values in chosen.items() if isinstance(chosen, Mapping) else ():
        if not isinstance(values, Mapping):
            raise UsageError(
                f"'--set {name}={values}' names no option", "Write NAME.OPTION=VALUE, such as --set ocr.threads=4."
            )
        options[name] = dict(values)
    return options


def check_words(words: Sequence[str]) -> None:
    """Whether every word of the command line is text.

    Raises:
        UsageError: for bytes that are not UTF-8, which neither a prompt nor a recipe can contain.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(f"'{word}' is not UTF-8 text", "Type it in a terminal that uses UTF-8.") from None


class Command(TyperCommand):
    """A command that refuses empty values, as an unset shell variable makes them; a `PROMPT` is left to the command."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            given = ctx.params.get(parameter.name)
            for value in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(value, str) and not value.strip() and parameter.metavar != "PROMPT":
                    flag = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
                    raise UsageError(f"{flag} is empty", "Give a value, or leave it out.")
        return super().invoke(ctx)


def parse_steps(text: str) -> tuple[int, ...]:
    """Numbers of sampling steps from a list such as `1,2,4`.

    Raises:
        UsageError: when an entry is not a whole number from 1 to 1000, or is given twice.
    """
    counts = tuple(whole_number("--steps", text, part, _MAX_STEPS, "1,2,4") for part in text.split(","))
    if len(set(counts)) < len(counts):
        raise UsageError(f"--steps {text} lists a number twice", "Give each number of steps once.")
    return counts


def whole_number(flag: str, text: str, part: str, most: int, example: str) -> int:
    """One number of a list of them.

    Raises:
        UsageError: when `part` of the text that `flag` was given is not a whole number from 1 to `most`.
    """
    word = part.strip()
    if not word.isascii() or not word.isdigit() or len(word) > 9 or not 1 <= int(word) <= most:
        raise UsageError(f"{flag} {text}: '{word}' is not a whole number from 1 to {most}", f"Write {flag} {example}.")
    return int(word)


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
    """A folder that exists or can be created.

    Raises:
        UsageError: a file is in the way, or the folder cannot be written.
    """
    folder = Path(text)
    if folder.is_file():
        raise UsageError(f"{flag} {folder}: '{folder}' is a file", "Name a folder.")
    check_place(folder, flag)
    return folder


def new_place(text: str | None, flag: str) -> Path | None:
    """A file or folder that does not exist and can be created; None if none was given.

    Raises:
        UsageError: something is there already, or the place cannot be written.
    """
    if text is None:
        return None
    path = Path(text)
    if path.exists():
        raise UsageError(f"{flag} {path} exists already", "Name another one; nothing is overwritten.")
    check_place(path, flag)
    return path


def new_figure(text: str, flag: str) -> Path:
    """The path of a new figure in an existing folder.

    Raises:
        UsageError: as `new_place`, or when the name does not end in a format that figures are written in.
    """
    from fmg.data.charts import FIGURE_FORMATS

    path = Path(text)
    if path.suffix.lower().removeprefix(".") not in FIGURE_FORMATS:
        endings = ", ".join(f".{kind}" for kind in FIGURE_FORMATS)
        raise UsageError(f"{flag} {path} does not end in a figure format", f"Use one of {endings}.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder '{path.parent}'", "Create it, or name another place.")
    new_place(text, flag)
    return path
