"""Options of the rewards. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from fmg.registry.config import ComponentConfig


class JpegConfig(ComponentConfig):
    """Size of an image as a JPEG file."""

    judges: ClassVar[bool] = False

    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality")


class PythonRewardConfig(ComponentConfig):
    """A function of one's own: `fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`."""

    needs_consent: ClassVar[Mapping[str, str]] = {"target": "runs Python code"}

    target: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$",
        description="module:function, looked up in the working directory and the installed packages",
    )


class FunctionRewardConfig(ComponentConfig):
    """A function that a Python call was given: `fmg.train(..., rewards=[my_function])`. A recipe records its name."""

    function: str = Field(pattern=r"^\w+$", max_length=100, description="name of the function")
