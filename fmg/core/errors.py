"""The error family: every message is a sentence on what is wrong and a sentence on what to do."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import ParamSpec, TypeVar

from fmg.core.display import bounded, cut

# long enough for the names of everything that is known
_LONGEST_FIX = 2000

P = ParamSpec("P")
R = TypeVar("R")


class FmgError(Exception):
    """A failure that the user can act on. The command line prints it without a traceback.

    Both sentences name options as the command line does (`--batch-size`). An error that leaves a public Python function
    (`python_call`) names arguments instead when it is printed.

    Args:
        what: a sentence on what is wrong; the full stop is optional. Values in it are cut at 200 characters.
        fix: a sentence on what to do about it.
    """

    exit_code: int = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what = bounded(what)
        self.fix = bounded(fix, _LONGEST_FIX)
        self.reported = False
        """Whether another process of the run prints it."""
        self.in_python = False
        """Whether `str` names Python arguments instead of options of the command line."""

    @property
    def text(self) -> str:
        """Both sentences in the words of the command line."""
        return f"{_sentence(self.what)} {_sentence(self.fix)}"

    def __str__(self) -> str:
        return python_words(self.text) if self.in_python else self.text


class UsageError(FmgError):
    """A wrong flag, name, option or recipe: nothing has been started or written. Exit code 2."""

    exit_code = 2


class WrongTypeError(UsageError, TypeError):
    """An argument of a Python call whose type is wrong; also a `TypeError`, which a Python caller expects.

    Args:
        argument: its name.
        value: what was given.
        expected: the types that it takes, in words.
    """

    def __init__(self, argument: str, value: object, expected: str) -> None:
        super().__init__(f"The argument '{argument}' is of type {type(value).__name__}", f"Give {expected}.")


def whole_number(argument: str, value: object) -> int:
    """An integer argument of a Python call, of any library, as a Python integer.

    Raises:
        WrongTypeError: it is not an integer.
    """
    if not isinstance(value, Integral):
        raise WrongTypeError(argument, value, "an integer")
    return int(value)


class CompositionError(UsageError):
    """Components that do not fit together, refused before any weight is read. Exit code 2."""


class MissingDependencyError(UsageError):
    """An optional package that has to be installed, or a file that has to be fetched, first. Exit code 2."""


class CheckpointError(FmgError):
    """A weight file or run folder that is missing, damaged or of the wrong kind."""


class HubError(FmgError):
    """The model hub cannot be reached, or refuses."""


class StorageError(FmgError, OSError):
    """A file that could not be written: a full, read-only or vanished disk, or a folder without permission.

    It is also an `OSError`, which Python raises for its own files, whatever error the writing library raised.

    Args:
        what: as in `FmgError`.
        fix: as in `FmgError`.
        reason: as the system gives it, such as `No space left on device`.
    """

    def __init__(self, what: str, fix: str, reason: str) -> None:
        super().__init__(what, fix)
        self.errno, self.strerror = None, reason


class NotFiniteError(FmgError):
    """Images or outputs of a model with NaN or infinite values."""


class RewardError(FmgError):
    """A reward that failed or returned something that is not a finite number for every image."""


class RefusedImageError(RewardError):
    """An image of a size or shape that a reward does not score."""


class GateError(FmgError):
    """A safety check of a training run failed; the message lists the likely causes."""


class ProcessError(FmgError):
    """Another process of the run ended, or cannot be reached."""


def python_call(call: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: errors that leave it name Python arguments instead of command-line options."""

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except FmgError as error:
            error.in_python = True
            raise

    return called


# Quoted texts and shell commands stay as they are.
_KEPT = r"`[^`]*`|(?<!\w)'[^']*'(?!\w)|\b(?:fmg|pip) [a-z][^.;:,)]*"
_OPTION = re.compile(rf"(?P<kept>{_KEPT})|(?<![\w-])--(?P<name>[a-z][a-z0-9-]*)(?: (?P<value>[a-z][a-z0-9-]*|\d+))?")
_ARGUMENTS = {"reward": "rewards", "features": "extractors", "config": "recipe", "from": "target", "set": "options"}
_TAKE_A_WORD = {"backend", "device", "dtype", "extractors", "objective", "optimizer", "precision", "rewards"}
_SWITCHES = {"allow_code", "int8", "stop_on_hacking"}
_NO_VALUES = {"and", "for", "in", "is", "of", "or", "to", "with"}


def python_words(text: str) -> str:
    """`text` with every option of the command line (`--batch-size`, `--device cpu`) written as a Python argument."""
    return _OPTION.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    if match["kept"] is not None:
        return match["kept"]
    name, value = match["name"].replace("-", "_"), match["value"]
    name = _ARGUMENTS.get(name, name)
    rest = "" if value is None else f" {value}"
    if name in _SWITCHES:
        return f"{name}=True{rest}"
    if value is not None and value.isdigit():
        return f"{name}={value}"
    if name in _TAKE_A_WORD and value is not None and value not in _NO_VALUES:
        return f"{name}='{value}'"
    return f"'{name}'{rest}"


@contextmanager
def said_once(speaks: bool) -> Iterator[None]:
    """Marks an error that all processes of a run raise alike as already reported where `speaks` is false."""
    try:
        yield
    except FmgError as error:
        error.reported = not speaks
        raise


class FmgWarning(UserWarning):
    """Something that is likely a mistake but does not stop the work. The command line prints it as one line."""


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!", ":")) else text + "."


# Names of a list that an error prints: of runs there can be thousands
_LISTED = 40


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest known one, which may be a path that ends in it, and the list."""
    names = sorted(known)
    by_word = {path.rpartition("/")[2]: path for path in names} | {path: path for path in names}
    close = difflib.get_close_matches(name, by_word, n=1, cutoff=0.5)
    lead = f"Did you mean '{by_word[close[0]]}'? " if close else ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{lead}Known: {', '.join(names[:_LISTED]) if names else 'none'}{more}."


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the system's reason, the first problem that pydantic found, or the message.

    Of a message with several lines, the first is the most informative. All are taken if it only introduces the others,
    and for network errors, whose first line is a number.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # artifacts are sampled without pydantic, and then no error is one of its own
    pydantic = sys.modules.get("pydantic_core")
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        return f"{where}: {said}" if where else said
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return cut(" ".join(lines)) if isinstance(error, OSError) or lines[0].endswith(":") else lines[0]


def one_line(error: BaseException) -> str:
    """Type and message of an exception in one line, for failures of third-party code."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "Failed to allocate memory for requested buffer",
)


def out_of_memory(error: BaseException) -> str | None:
    """The message of an out-of-memory error, in one line; None for any other error.

    Recognised by the name of torch's class, and by the messages of drivers, cuBLAS, the CPU allocator and ONNX Runtime.
    """
    said = reason(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not named and not any(words in said for words in _MEMORY):
        return None
    # torch's message continues with advice on its settings, which seldom helps
    return ". ".join(said.split(". ")[:2]).rstrip(".")


# Rust's libraries (safetensors, tokenizers) quote the system's number, C and C++ ones its words
_SYSTEM_NUMBER = re.compile(r"\(os error (\d+)\)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Pillow's encoders and NumPy's `tofile` stop short without a reason
_CUT_SHORT = re.compile(r"encoder error -?\d+ when writing|\d+ requested and \d+ written")


def system_refusal(error: BaseException) -> str | None:
    """The system's reason for refusing a file, such as `No space left on device`; None for any other error.

    Recognised by an `OSError` with a number, and by the messages of libraries that raise their own errors, in the error
    or in its cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FmgError):
            return seen.strerror if isinstance(seen, StorageError) else None
        said = str(seen)
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.strerror or os.strerror(seen.errno)
        if (number := _SYSTEM_NUMBER.search(said)) is not None:
            return os.strerror(int(number[1]))
        for reason in map(os.strerror, _FULL):
            if reason in said:
                return reason
        if isinstance(seen, OSError) and _CUT_SHORT.search(said):
            return "the file could not be written completely"
        seen = seen.__cause__
    return None


@contextmanager
def writing(place: Path, *, called: str = "") -> Iterator[None]:
    """Turns the error that a library raises when the system refuses a file into one line.

    Args:
        place: the file or folder that is written.
        called: what it is called, before its name.

    Raises:
        StorageError: the system refused.
    """
    try:
        yield
    except (FmgError, ConnectionError, TimeoutError):
        # what is written may come from a network
        raise
    except Exception as error:
        if (reason := system_refusal(error)) is None:
            raise
        fix = "Free some space, check its permissions, or write to another place."
        raise StorageError(f"{called}'{place}' cannot be written: {reason}", fix, reason) from error
