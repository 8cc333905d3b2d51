"""Generators: loading, conditioning, adapters and saving. Importing this package does not import torch."""

from __future__ import annotations

import logging


def _is_of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()


# importing diffusers makes transformers advise to install torchvision, which fmg has no use for
logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)
