"""The limits of the image server, which the command and a repository for Triton share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from fmg.serving import batching


@dataclass(frozen=True)
class Limits(batching.Limits):
    """Limits on requests.

    Attributes:
        max_images: images per request.
        max_prompt: characters per prompt.
        max_steps: sampling steps (NFE) per image.
    """

    max_body: int = 1 << 20
    max_queued: int = 256
    max_batch: int = 16
    max_images: int = 10
    max_prompt: int = 4000
    max_steps: int = 50


DEFAULTS = Limits()
"""Default limits of a server."""
