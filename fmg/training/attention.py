"""Which attention kernels a training may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def finite_attention() -> Iterator[None]:
    """For its length `scaled_dot_product_attention` does without cuDNN's kernel, whose gradients may be NaN.

    Since torch 2.11 cuDNN's is the first choice for bf16 on Hopper (docs/adr/0018-attention-kernels.md). It holds for
    rollouts as well as updates: a ratio compares both, and checkpointed blocks are computed again outside their call.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
