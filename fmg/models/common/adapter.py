"""A LoRA on the transformer: attaching it, switching it off, freezing copies of it.

The names of adapter tensors are those of the files: `<module>.lora_A.weight` and `<module>.lora_B.weight`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.core.errors import UsageError
from fmg.core.specs import LORA_PRESETS, expand_targets, is_target

ADAPTER = "default"
_ROWS_BYTES = 64 * 2**20


def is_adapter(name: str) -> bool:
    """Whether a parameter name belongs to a LoRA."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name that a base weight has without an adapter around it."""
    return name.replace(".base_layer.", ".")


def adapter_name(name: str, adapter: str = ADAPTER) -> str:
    """The name that a parameter of a LoRA has in files."""
    return name.replace(f".{adapter}.", ".")


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network without its adapter, by their names in files."""
    return {base_name(name): parameter for name, parameter in network.named_parameters() if not is_adapter(name)}


def base_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network without its adapter: parameters and buffers by their names in files.

    Avoids `state_dict`, which would shard a gathered FSDP2 network again.
    """
    stored = dict(network.named_parameters())
    for prefix, module in network.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        stored |= {".".join(filter(None, (prefix, name))): x for name, x in module._buffers.items() if name in kept}
    return {base_name(name): x.detach() for name, x in stored.items() if not is_adapter(name)}


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA parameters by their names in files, in module order."""
    return {adapter_name(name): p for name, p in transformer.named_parameters() if is_adapter(name)}


def adapter_shapes(
    transformer: nn.Module, targets: Sequence[str], rank: int, unused: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a LoRA on `targets`, attached or not."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in matching_modules(transformer, targets, unused).items():
        shapes[f"{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


def matching_modules(
    transformer: nn.Module, targets: Sequence[str], unused: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Linear modules whose name equals one of `targets` (presets allowed) or ends with a dot and one of them.

    Modules under `unused` are left out: no sample passes through them.

    Raises:
        UsageError: a target that is not from a preset matches nothing, or no target matches anything.
    """
    linears = {n: linear for n, linear in _linear_modules(transformer).items() if not is_under(n, unused)}
    suffixes = expand_targets(targets)
    found = {name: linear for name, linear in linears.items() if is_target(name, suffixes)}
    # a preset lists what any model of a family may have; a typed name has to exist
    typed = [target for target in targets if target not in LORA_PRESETS]
    unmatched = [target for target in typed if not any(is_target(name, (target,)) for name in linears)]
    if unmatched or not found:
        raise UsageError(
            f"The LoRA targets {', '.join(unmatched or targets) or '(none)'} match no linear module of the model",
            f"Use a preset ({', '.join(LORA_PRESETS)}) or the end of a module name: {', '.join(_endings(linears))}.",
        )
    return found


def is_under(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or tensor is one of `modules`, or part of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def attach(
    transformer: Any,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float,
    seed: int,
    unused: Sequence[str] = (),
) -> dict[str, nn.Linear]:
    """Adds a LoRA with fp32 parameters, gaussian A and zero B (the map does not change); returns the adapted modules.

    A ~ N(0, 1/rank^2), sampled from `seed` on the CPU without touching the global generator. Modules under `unused` are
    not adapted.

    Raises:
        UsageError: rank, alpha or dropout out of range, there is already an adapter, or targets match nothing.
    """
    if tuner_layers(transformer):
        raise UsageError("The model already has an adapter", "Load the model again to attach another one.")
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UsageError(
            f"A LoRA with rank {rank}, alpha {alpha} and dropout {dropout} is invalid",
            "Use rank >= 1, alpha > 0 and 0 <= dropout < 1.",
        )
    found = matching_modules(transformer, targets, unused)
    _add(transformer, ADAPTER, rank, alpha, found, targets, dropout, seed)
    for module in dropout_modules(transformer):
        module.train()
    return found


def hold(
    transformer: Any, name: str, rank: int, alpha: float, targets: Sequence[str], unused: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Adds another LoRA; returns its parameters by their names in files.

    Raises:
        UsageError: targets match nothing.
    """
    _add(transformer, name, rank, alpha, matching_modules(transformer, targets, unused), targets, dropout=0.0, seed=0)
    return {
        adapter_name(full, name): parameter.requires_grad_(False)
        for full, parameter in transformer.named_parameters()
        if is_adapter(full) and f".{name}." in full
    }


def select(layers: Sequence[Any], name: str | None) -> None:
    """Makes one LoRA the active one, or none. A layer that it does not adapt computes as the base does.

    As in `adapter_switched`, the flags that PEFT's forward reads are set directly.
    """
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def _add(
    transformer: Any,
    name: str,
    rank: int,
    alpha: float,
    found: Mapping[str, nn.Linear],
    targets: Sequence[str],
    dropout: float,
    seed: int,
) -> None:
    # this imports all of transformers, which composing a run or averaging weights does not need
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_peft_targets(transformer, expand_targets(targets), found),
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # several adapters are what `hold` is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # torch.manual_seed would also seed the generators of every accelerator
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=name)
    for full, parameter in transformer.named_parameters():
        if is_adapter(full) and f".{name}." in full:
            # PEFT follows the base's dtype; bf16 would round away updates of the size that RL makes
            parameter.data = parameter.data.float()


def _peft_targets(transformer: nn.Module, suffixes: Sequence[str], found: Mapping[str, nn.Linear]) -> list[str]:
    """The suffixes that select only `found`, and the whole names where a suffix would select other modules too.

    PEFT refuses such modules: `attn.to_out` is a matrix in FLUX.2's single-stream blocks and a list in its others.
    """
    chosen: dict[str, None] = {}
    for suffix in suffixes:
        selected = [name for name, _ in transformer.named_modules() if is_target(name, (suffix,))]
        linear = [name for name in selected if name in found]
        chosen |= dict.fromkeys([suffix] if linear and linear == selected else linear)
    return list(chosen)


def tuner_layers(transformer: nn.Module) -> list[Any]:
    """The PEFT layers that wrap adapted modules."""
    return list(named_tuner_layers(transformer).values())


def named_tuner_layers(transformer: nn.Module) -> dict[str, Any]:
    """The PEFT layers by the names of the modules that they wrap."""
    if not hasattr(transformer, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def merged_tensors(transformer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the network with its adapter merged, in `dtype`, on the network's device.

    Tensors that the adapter does not change and that have that dtype already are the network's own, not copies.
    """
    tensors = base_tensors(transformer)
    merged = {}
    for name, layer in named_tuner_layers(transformer).items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        merged[f"{name}.weight"] = add_low_rank(tensors[f"{name}.weight"], a, b, layer.scaling[ADAPTER], dtype)
    return {name: x.to(dtype) for name, x in tensors.items()} | merged


def add_low_rank(
    base: Float[Tensor, "outputs inputs"],
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "outputs rank"],
    scale: float,
    dtype: torch.dtype,
    working: torch.dtype = torch.float32,
) -> Float[Tensor, "outputs inputs"]:
    """W + scale B A in `dtype`, added in `working` and rounded once.

    Rows are merged a few at a time, so that no second matrix in `working` is in memory.
    """
    a, b = a.to(working), b.to(working)
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    rows = max(1, _ROWS_BYTES // (working.itemsize * base.shape[1]))
    for start in range(0, base.shape[0], rows):
        part = slice(start, start + rows)
        merged[part] = torch.addmm(base[part].to(working), b[part], a, alpha=scale).to(dtype)
    return merged


def dropout_modules(transformer: nn.Module) -> list[nn.Module]:
    """The dropout of the LoRA; the networks themselves have no active dropout."""
    dropouts = (layer.lora_dropout.values() for layer in tuner_layers(transformer))
    return [module for modules in dropouts for module in modules if isinstance(module, nn.Dropout)]


@contextmanager
def adapter_switched(layers: Sequence[Any], enabled: bool) -> Iterator[None]:
    """Runs the body with the adapter on or off, then restores what was set.

    PEFT's `enable_adapters` also rewrites `requires_grad`, which FSDP2 and a pending backward must not see change, so
    the flag that its forward reads is set directly.
    """
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = not enabled
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@contextmanager
def dropout_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Runs the body without LoRA dropout.

    Dropout is on by default and switched off around calls, not the other way round, because gradient checkpointing
    repeats a forward during the backward pass and must find the mode of the first.
    """
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def _linear_modules(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {
        name.removesuffix(".base_layer"): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter(f"{name}.")
    }


def _endings(names: Iterable[str]) -> list[str]:
    """Names without their block: `transformer_blocks.0.attn.to_out.0` -> `attn.to_out.0`."""
    endings = set()
    for name in names:
        parts = name.split(".")
        endings.add(".".join(parts[2:] if len(parts) > 2 and parts[1].isdigit() else parts))
    return sorted(endings)
