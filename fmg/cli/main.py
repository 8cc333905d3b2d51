"""The `fmg` command: global options, the commands, and what happens to errors."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from signal import SIGINT
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from fmg.cli.bench import bench
from fmg.cli.components import check_component, init, list_components, schema, show
from fmg.cli.doctor import doctor
from fmg.cli.evaluate import evaluate
from fmg.cli.export import export
from fmg.cli.fetch import fetch
from fmg.cli.generate import generate
from fmg.cli.options import Command, check_words
from fmg.cli.output import print_error, print_warning, tolerate_narrow_encodings
from fmg.cli.pretrain import pretrain
from fmg.cli.push import push
from fmg.cli.reward_server import reward_server
from fmg.cli.runs import report, runs
from fmg.cli.score import score
from fmg.cli.serve import serve
from fmg.cli.train import train
from fmg.cli.verify import verify
from fmg.core.display import bounded
from fmg.core.errors import FmgError, FmgWarning, MissingDependencyError, out_of_memory, reason, system_refusal
from fmg.core.hub import OFFLINE
from fmg.core.runtime import beyond_runtime
from fmg.core.signals import exit_code, signal_name, signal_of
from fmg.version import __version__, install_line, is_runtime

# sysexits.h: EX_SOFTWARE, an error of the program itself
_BUG = 70
_LESS_MEMORY = (
    "Use smaller batches: --batch-size in eval, generate and bench; train.micro_batch, rollout.batch_size and"
    " eval.batch_size in `fmg train --set`, or in recipe.yaml of a run to resume. --dry-run shows what a run needs."
)
# The reader of stdout went away, as `head` does; Rich exits with the same code
_BROKEN_PIPE = 1


@dataclass
class Session:
    """The global options of one invocation."""

    debug: bool = False


class InterruptedByUserError(FmgError):
    """Ctrl-C or another signal outside the training loop, which saves and ends by itself."""

    def __init__(self, number: int) -> None:
        how = "Interrupted" if number == SIGINT else f"Ended by {signal_name(number)}"
        super().__init__(how, "Files that were already written are kept.")
        self.exit_code = exit_code(number)


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Runs the command; Ctrl-C becomes an error on one line, where Typer would end silently."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedByUserError(signal_of(error)) from None


app = typer.Typer(
    name="fmg", cls=_Commands, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fmg {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Reinforcement learning for few-step flow-map image generators.

    `fmg train` fine-tunes the embedded generator on this computer; `fmg eval` and `fmg generate` use the result.
    """
    ctx.ensure_object(Session).debug = debug
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


_TRAIN, _USE, _CHOOSE, _CARE = "Train and evaluate", "Generate and export", "Choose and extend", "Set up"
command = partial(app.command, cls=Command)

command("train", rich_help_panel=_TRAIN)(train)
command("eval", rich_help_panel=_TRAIN)(evaluate)
command("runs", rich_help_panel=_TRAIN)(runs)
command("report", rich_help_panel=_TRAIN)(report)
command("score", rich_help_panel=_TRAIN)(score)
command("generate", rich_help_panel=_USE)(generate)
command("export", rich_help_panel=_USE)(export)
command("verify", rich_help_panel=_USE)(verify)
command("serve", rich_help_panel=_USE)(serve)
command("bench", rich_help_panel=_USE)(bench)
command("push", rich_help_panel=_USE)(push)
command("list", rich_help_panel=_CHOOSE)(list_components)
command("show", rich_help_panel=_CHOOSE)(show)
command("init", rich_help_panel=_CHOOSE)(init)
command("schema", rich_help_panel=_CHOOSE)(schema)
command("check-component", rich_help_panel=_CHOOSE)(check_component)
app.add_typer(doctor, name="doctor", rich_help_panel=_CARE)
command("fetch", rich_help_panel=_CARE)(fetch)
command("reward-server", rich_help_panel=_CARE)(reward_server)
app.add_typer(pretrain, name="pretrain", rich_help_panel=_CARE)


def run() -> NoReturn:
    """The entry point of the `fmg` script."""
    _open_streams()
    if "--debug" not in sys.argv:
        # importing diffusers makes transformers recommend torchvision, which fmg does not use
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main(sys.argv[1:]))


def _open_streams() -> None:
    """Opens streams that the shell closed (`>&-`) on the null device, so that no file takes their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main(args: Sequence[str]) -> int:
    """Runs one command and returns its exit code; every expected failure is one line on stderr.

    Exit codes: 0 success; 1 a failure; 2 a wrong use, with nothing started; 70 an error in fmg itself;
    128 + n after signal n: 130 for Ctrl-C, 143 for SIGTERM.
    """
    tolerate_narrow_encodings()
    offline = os.environ.get(OFFLINE)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, set())
            return _main(args)
    finally:
        # --offline applies to one command, and a program may call several
        if offline is None:
            os.environ.pop(OFFLINE, None)
        else:
            os.environ[OFFLINE] = offline


@cache
def _commands() -> Any:
    """What Typer makes of `app`: it reads every signature, which takes longer than many commands do."""
    return typer.main.get_command(app)


def _main(args: Sequence[str]) -> int:
    session = Session()
    try:
        check_words(args)
        code = _commands().main(list(args), prog_name="fmg", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it exits, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except FmgError as error:
        return error.exit_code if error.reported else _failed(error.text, error.exit_code, session)
    except typer.TyperException as error:
        return _failed(bounded(_usage(error)), error.exit_code, session)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("fmg", "pydantic") and is_runtime():
            missing = beyond_runtime(f"`{shlex.join(['fmg', *args])}`")
        elif package in ("", "fmg"):
            return _bug(error, args, session)
        else:
            missing = MissingDependencyError(f"The package '{package}' is not installed", f"Run: {install_line()}")
        return _failed(missing.text, missing.exit_code, session)
    except Exception as error:
        if (said := out_of_memory(error)) is not None:
            return _failed(f"Memory ran out: {said}. {_LESS_MEMORY}", 1, session)
        if (reason := system_refusal(error)) is not None:
            name = getattr(error, "filename", None)
            where = "" if name is None else f" '{os.fsdecode(name)}'"
            what = bounded(f"The system refused the file or folder{where}: {reason}.")
            return _failed(f"{what} Check its name, its permissions and the free space.", 1, session)
        return _bug(error, args, session)


def _bug(error: Exception, args: Sequence[str], session: Session) -> int:
    again = shlex.join(["fmg", "--debug", *(arg for arg in args if arg != "--debug")])
    first = bounded(reason(error))
    what = f"Unexpected {type(error).__name__}: {first.rstrip('.')}."
    return _failed(what if session.debug else f"{what} See where: {bounded(again)}", _BUG, session)


def _show_warning(
    said: set[str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning on one line, and each of fmg's only once per command."""
    ours = issubclass(category, FmgWarning)
    text = bounded(str(message)) if ours else f"{filename}:{lineno}: {category.__name__}: {message}"
    if not ours or text not in said:
        print_warning(text)
    said.add(text)


def _failed(text: str, code: int, session: Session) -> int:
    if session.debug:
        import traceback

        traceback.print_exc()
    print_error(text)
    return code


def _usage(error: typer.TyperException) -> str:
    """Typer's message on one line, and where to read more."""
    message = error.format_message()
    end = "?" if message.rstrip().endswith("?") else "."
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fmg"
    return f"{' '.join(message.split()).rstrip('.?')}{end} See `{command} --help`."
