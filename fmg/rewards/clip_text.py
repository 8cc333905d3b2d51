"""Text as OpenCLIP cleans it before its tokenizer, which the tokenizer of transformers does not do."""

from __future__ import annotations

import html
from importlib.util import find_spec

from fmg.core.errors import MissingDependencyError
from fmg.version import install_line


def require_ftfy(reward: str) -> None:
    """Checks that `ftfy` is installed, without importing it.

    Raises:
        MissingDependencyError: when it is not.
    """
    if find_spec("ftfy") is None:
        raise MissingDependencyError(
            f"The reward '{reward}' needs the package ftfy, which repairs text the way its authors did",
            f"Install it with `{install_line('rewards')}`.",
        )


def clean(text: str) -> str:
    """`ftfy.fix_text`, HTML entities resolved twice, runs of white space to one space, lower case.

    The cleaning of OpenAI's CLIP tokenizer, which OpenCLIP and HPSv2 use. Needs the package `ftfy`.
    """
    import ftfy

    repaired: str = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(repaired)).split()).lower()
