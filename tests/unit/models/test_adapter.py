from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.protocols import FlowMap
from fmg.models.flux.model import FluxModel

CPU = torch.device("cpu")


def _jump(model: FluxModel, flow_map: FlowMap | None = None) -> Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([1.0, 0.7]), torch.tensor([0.5, 0.1])
    return (flow_map or model.flow_map).jump(x, t, s, model.encode(["a red circle", "a blue square"]))


def _attach(model: FluxModel, rank: int = 2, dropout: float = 0.0, seed: int = 0) -> int:
    return model.attach_adapter(rank, 4.0, ["attention"], dropout, seed)


def _train(model: FluxModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for _, p in model.trainable()], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        _jump(model).square().mean().backward()
        optimizer.step()


def test_the_attention_preset_adapts_every_attention_projection(model: FluxModel) -> None:
    # 2 double-stream blocks with 8 projections, 2 single-stream blocks with 3
    assert _attach(model) == 2 * 8 + 2 * 3
    names = {name.rsplit(".", 2)[0].split(".", 2)[2] for name, _ in model.trainable()}
    assert {"attn.to_q", "attn.to_out.0", "attn.add_v_proj", "attn.to_add_out"} <= names


def test_names_and_presets_can_be_mixed(model: FluxModel) -> None:
    adapted = model.attach_adapter(2, 4.0, ["attention-mlp", "x_embedder", "to_q"], 0.0, seed=0)
    # besides the attention: 4 linear layers in each double-stream block, 1 in each single-stream block, the embedder
    assert adapted == 22 + 2 * 4 + 2 * 1 + 1


def test_a_fresh_adapter_leaves_the_map_as_it_is(model: FluxModel) -> None:
    with torch.no_grad():
        before = _jump(model)
        _attach(model)
        assert torch.equal(_jump(model), before)


def test_initial_values_come_from_the_seed_alone(two_time_folder: Path) -> None:
    def values(seed: int, global_seed: int) -> Tensor:
        model = FluxModel.from_folder(two_time_folder, CPU, torch.float32, name="tiny")
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        _attach(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for _, p in model.trainable()])

    assert torch.equal(values(0, 1), values(0, 2))
    assert not torch.equal(values(0, 1), values(1, 1))


def test_a_is_gaussian_with_std_one_over_rank(model: FluxModel) -> None:
    _attach(model, rank=16)
    drawn = torch.cat([p.detach().flatten() for name, p in model.trainable() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.03)


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "dropout", "expected"),
    [
        (2, 4.0, ["to_qq"], 0.0, "targets to_qq match no linear module.*attn.to_q"),
        (2, 4.0, ["attention", "to_qq"], 0.0, "targets to_qq match no"),
        (2, 4.0, [], 0.0, r"targets \(none\) match no"),
        (0, 4.0, ["attention"], 0.0, "rank >= 1"),
        (2, 0.0, ["attention"], 0.0, "alpha > 0"),
        (2, 4.0, ["attention"], 1.0, "dropout < 1"),
    ],
)
def test_an_impossible_adapter_is_refused_and_nothing_attached(
    model: FluxModel, rank: int, alpha: float, targets: list[str], dropout: float, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        model.attach_adapter(rank, alpha, targets, dropout, seed=0)
    assert list(model.trainable()) == []


def test_a_second_adapter_is_refused(model: FluxModel) -> None:
    _attach(model)
    with pytest.raises(UsageError, match="already has an adapter"):
        _attach(model)


def test_training_moves_the_adapter_and_nothing_else(model: FluxModel) -> None:
    with torch.no_grad():
        base, digest = _jump(model), model.base_digest()
    _attach(model)
    _train(model)
    with torch.no_grad():
        assert not torch.equal(_jump(model), base)
        with model.adapter_enabled(False):
            assert torch.equal(_jump(model), base)
            with model.adapter_enabled(True):
                assert not torch.equal(_jump(model), base)
            assert torch.equal(_jump(model), base)
        assert torch.equal(_jump(model, model.policies.reference), base)
    assert model.base_digest() == digest


def test_the_digest_sees_a_single_changed_weight(model: FluxModel) -> None:
    digest = model.base_digest()
    with torch.no_grad():
        model.components.transformer.proj_out.bias[0].add_(1e-6)
    assert model.base_digest() != digest


def test_old_is_the_last_snapshot(model: FluxModel) -> None:
    _attach(model)
    with torch.no_grad():
        base = _jump(model)
    _train(model)
    assert torch.equal(_jump(model, model.policies.old), base)
    model.snapshot()
    with torch.no_grad():
        trained = _jump(model)
    assert torch.equal(_jump(model, model.policies.old), trained)
    _train(model, steps=1)
    assert torch.equal(_jump(model, model.policies.old), trained)
    assert not torch.equal(_jump(model), trained)


def test_old_and_reference_never_record_gradients(model: FluxModel) -> None:
    _attach(model)
    assert _jump(model).requires_grad
    assert not _jump(model, model.policies.old).requires_grad
    assert not _jump(model, model.policies.reference).requires_grad
    assert all(parameter.requires_grad for _, parameter in model.trainable())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_other_policies_between_forward_and_backward_change_no_gradient(
    model: FluxModel, dropout: float, checkpointing: bool
) -> None:
    if checkpointing:
        model.components.transformer.enable_gradient_checkpointing()
    _attach(model, dropout=dropout)
    _train(model)

    def gradients(interleave: bool) -> list[Tensor]:
        for _, parameter in model.trainable():
            parameter.grad = None
        torch.manual_seed(0)
        out = _jump(model)
        if interleave:
            for flow_map in (model.policies.old, model.policies.reference):
                _jump(model, flow_map)
            with torch.no_grad():
                _jump(model)
        out.square().mean().backward()
        return [parameter.grad.clone() for _, parameter in model.trainable() if parameter.grad is not None]

    plain, interleaved = gradients(False), gradients(True)
    assert len(plain) == len(list(model.trainable()))
    assert all(torch.equal(a, b) for a, b in zip(plain, interleaved, strict=True))


def test_dropout_acts_only_where_gradients_are_recorded(model: FluxModel) -> None:
    _attach(model, dropout=0.5)
    _train(model)
    assert not torch.equal(_jump(model).detach(), _jump(model).detach())
    with torch.no_grad():
        assert torch.equal(_jump(model), _jump(model))
    model.snapshot()
    assert torch.equal(_jump(model, model.policies.old), _jump(model, model.policies.old))
