"""The base of a model sharded over several processes: torch's FSDP2 on the frozen weights.

What is trained stays whole in every process. An adapter is a fraction of a percent of the model, it is fp32 even over a
base of a different dtype, and optimizers such as Muon need whole matrices (ADR 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fmg.core.errors import CompositionError


def shard_frozen(network: nn.Module) -> None:
    """Keeps only this process's part of every frozen parameter; a block is gathered while it computes.

    Units are the members of the network's module lists (its transformer blocks) and the rest of the network.

    Raises:
        CompositionError: nothing is frozen, so there is no base to shard.
    """
    parameters = list(network.parameters())
    trained = {p for p in parameters if p.requires_grad}
    if len(trained) == len(parameters):
        raise CompositionError(
            "FSDP2 shards the frozen base over the processes, but this run trains every weight",
            "Train an adapter, or use train.parallel=ddp.",
        )
    mesh = init_device_mesh(parameters[0].device.type, (dist.get_world_size(),))
    blocks = [block for child in network.children() for block in _members(child)]
    for unit in (*blocks, network):
        # the root, too, is resharded after a forward pass: a snapshot may replace its weights in the next one
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def _members(module: nn.Module) -> list[nn.Module]:
    """The members of a module list, or of the lists in a dictionary of them."""
    if isinstance(module, nn.ModuleDict):
        return [block for inner in module.values() for block in _members(inner)]
    return list(module) if isinstance(module, nn.ModuleList) else []


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Runs the body with the whole network in this process; nothing in the body communicates.

    Every process enters. In the body, parameters are plain tensors, except through `state_dict`, which shards them
    again. A network that was never sharded stays unchanged.
    """
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
