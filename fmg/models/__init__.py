"""Generators: loading, conditioning, adapters and saving. Importing this package does not import torch."""

from __future__ import annotations

import logging


def _is_of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


# importing diffusers makes transformers recommend torchvision, which fmg does not use
logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)
