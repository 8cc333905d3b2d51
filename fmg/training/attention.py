"""Which attention kernels a training may use."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def finite_attention() -> AbstractContextManager[None]:
    """For its length `scaled_dot_product_attention` uses every kernel of torch but cuDNN's, whose gradients may be NaN.

    Since torch 2.11 cuDNN's is the first choice for bf16 on Hopper (docs/adr/0018-attention-kernels.md). It holds for
    rollouts as well as updates: a ratio compares both, and checkpointed blocks are computed again outside their call.
    """
    context: AbstractContextManager[None] = sdpa_kernel(_KERNELS)
    return context
