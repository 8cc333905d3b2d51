"""The conformance kit: fmg's own components conform, and each planted violation is reported by its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fmg.conformance import assert_conforms, check_component
from fmg.core.errors import CompositionError, UsageError
from fmg.core.protocols import FlowMap, Policies, Stochasticizer
from fmg.core.specs import Requirements
from fmg.core.types import Batch, BranchRollout, Conditioning, Loss, RewardOutput, ScoredRollout
from fmg.flow import Gaussian, expand
from fmg.recipe import Recipe
from fmg.registry import objectives, rewards, stochasticizers
from fmg.registry.config import About, ComponentConfig, StochasticizerConfig
from fmg.registry.registry import Registry
from fmg.rl.configs import GrpoConfig
from fmg.rl.grpo import Grpo
from tests.support.cli import fmg

SHIPPED = [
    *(("stochasticizer", name) for name in ("asfmc", "asfmc-endpoint", "asfmc-euler", "flow-sde", "dance-sde", "cps")),
    *(
        ("reward", name)
        for name in ("shapes", "shapes-clip", "shapes-quality", "text-fidelity", "jpeg-compressibility")
    ),
    *(("objective", name) for name in ("grpo", "grpo-guard", "rwfm", "reinforce", "diffusion-nft", "awm")),
    *(("objective", name) for name in ("meanflow-nft", "mean-flow-advantage", "reward-gradient")),
    *(("optimizer", name) for name in ("adamw", "muon", "adafactor", "sgd")),
    ("prompt-set", "shapes-heldout"),
    ("feature-extractor", "pixels"),
    ("model", "scm-shapes"),
]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_what_is_shipped_conforms(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # test_lazy_import checks all configs in one process instead of one process each
    from fmg.conformance import rules

    kept = tuple(rule for rule in rules.COMMON_RULES if rule.name != "config imports no torch")
    monkeypatch.setattr("fmg.conformance.check.COMMON_RULES", kept)
    assert_conforms(kind, name)


@pytest.fixture
def registry_state() -> Iterator[None]:
    """Removes what a test registers."""
    registries: tuple[Registry[object], ...] = (rewards, stochasticizers, objectives)  # type: ignore[assignment]
    before = [(dict(r._rows), dict(r._configs), dict(r._factories)) for r in registries]
    yield
    for registry, (rows, configs, factories) in zip(registries, before, strict=True):
        registry._rows, registry._configs, registry._factories = rows, configs, factories


def broken_rules(kind: str, name: str) -> dict[str, str]:
    return {finding.rule: finding.text for finding in check_component(kind, name).violations}


class PlainConfig(ComponentConfig):
    """Options of the planted rewards."""

    about: ClassVar[About] = About(licence="MIT")


Score = Callable[[Tensor], Tensor]


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def against_neighbours(images: Tensor) -> Tensor:
    values = brightness(images)
    return values - values.mean()


def slightly_against_neighbours(images: Tensor) -> Tensor:
    return 1e-3 * against_neighbours(images)


def slightly_noisy(images: Tensor) -> Tensor:
    return 1e-3 * torch.rand(len(images))


def noisy(images: Tensor) -> Tensor:
    return brightness(images) + torch.rand(len(images))


def sorted_scores(images: Tensor) -> Tensor:
    return brightness(images).sort().values


def darkening(images: Tensor) -> Tensor:
    return brightness(images.mul_(0.5))


def hiding(images: Tensor) -> Tensor:
    return brightness(images).nan_to_num(0.0)


def one_number(images: Tensor) -> Tensor:
    return brightness(images).mean()


def logarithm(images: Tensor) -> Tensor:
    return brightness(images).log()


@pytest.mark.usefixtures("registry_state")
@pytest.mark.parametrize(
    ("score", "rule", "says"),
    [
        (against_neighbours, "independent of the batch", "one by one"),
        (slightly_against_neighbours, "independent of the batch", "one by one"),
        (slightly_noisy, "deterministic", "scores the same images again"),
        (noisy, "deterministic", "scores the same images again"),
        (sorted_scores, "follows the order of images", "a different order"),
        (darkening, "leaves its inputs alone", "modifies the images"),
        (hiding, "hides no broken image", "finite score"),
        (one_number, "one finite score per image", "shaped ()"),
        (logarithm, "scores black and white", "black image"),
    ],
)
def test_a_planted_violation_of_a_reward_is_named(score: Score, rule: str, says: str) -> None:
    @rewards.register("planted", PlainConfig, "A planted violation")
    class Planted:
        def __init__(self, config: PlainConfig) -> None:
            pass

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
            return RewardOutput(score(images), {})

    found = broken_rules("reward", "planted")
    assert says in found[rule]
    with pytest.raises(AssertionError, match=rule):
        assert_conforms("reward", "planted")


@pytest.mark.usefixtures("registry_state")
@pytest.mark.parametrize(
    "pairs_wrongly", [lambda prompts: sorted(prompts), lambda prompts: [prompts[0]] * len(prompts)]
)
def test_a_reward_that_pairs_pictures_with_other_prompts_is_named(pairs_wrongly: Callable[..., list[str]]) -> None:
    @rewards.register("mismatched", PlainConfig, "A planted violation")
    class Mismatched:
        def __init__(self, config: PlainConfig) -> None:
            pass

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
            lengths = torch.tensor([float(len(prompt)) for prompt in pairs_wrongly(list(prompts))])
            return RewardOutput(brightness(images) * lengths, {})

    found = broken_rules("reward", "mismatched")
    assert "a different order, each with its prompt" in found["follows the order of images"]


@pytest.mark.usefixtures("registry_state")
def test_a_large_offset_hides_no_violation_and_a_picky_reward_is_asked_what_it_takes() -> None:
    @rewards.register("picky", PlainConfig, "A planted violation")
    class Picky:
        def __init__(self, config: PlainConfig) -> None:
            pass

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
            assert set(prompts) <= {"a red circle", "a blue square"}
            return RewardOutput(100 + 0.01 * against_neighbours(images), {})

        def check_prompts(self, prompts: Sequence[str]) -> None:
            if set(prompts) - {"a red circle", "a blue square"}:
                raise UsageError("Unknown", "Ask for shapes.")

    assert broken_rules("reward", "picky").keys() == {"independent of the batch"}


@pytest.mark.usefixtures("registry_state")
def test_a_careless_config_is_named() -> None:
    class Careless(ComponentConfig):
        model_config = ConfigDict(extra="ignore", frozen=False)
        strength: float = 1.0

    @rewards.register("careless", Careless)
    class Reward:
        def __init__(self, config: Careless) -> None:
            pass

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
            return RewardOutput(brightness(images), {})

    found = broken_rules("reward", "careless")
    assert found.keys() == {"summary", "licence", "options are described", "options are strict"}
    assert "strength" in found["options are described"]


class KernelConfig(StochasticizerConfig):
    """Options of the planted stochasticizers."""

    about: ClassVar[About] = About(licence="MIT")
    fault: str = Field("", description="what is wrong with it")

    def requires(self) -> Requirements:
        return Requirements(anchors="any", path="any", calls=1, min_target_time=0.0)


class Kernel:
    """`asfmc` with the anchor s / 2, and faults."""

    path_preserving = True

    def __init__(self, config: KernelConfig) -> None:
        self._fault = config.fault
        self._drawn = torch.Generator().manual_seed(0)

    def transition(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        if self._fault == "one time":
            s = s[:1].expand_as(s)
        anchor = s / 2
        scale, std = flow_map.path.kernel(anchor, s)
        x_a = flow_map.jump(x_t, t, anchor, cond)
        if self._fault == "second call":
            flow_map.jump(x_t, t, anchor, cond)
        if self._fault == "narrow":
            std = 0.5 * std
        if self._fault == "learned std":
            std = std * (1 + 0.01 * x_a.float().flatten(1).mean(1) ** 2)
        if self._fault == "noise":
            x_a = x_a + 0.01 * torch.randn(x_a.shape, generator=self._drawn)
        if self._fault == "batch":
            x_a = x_a - 0.1 * x_a.mean(0)
        return Gaussian(expand(scale, x_a) * x_a, std)


@pytest.mark.usefixtures("registry_state")
@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("second call", "network evaluations as declared"),
        ("narrow", "marginals as declared"),
        ("learned std", "parameters in the mean alone"),
        ("noise", "replay gives ratio 1"),
        ("batch", "rows are independent"),
        ("one time", "rows of one call may have different times"),
    ],
)
def test_a_planted_violation_of_a_stochasticizer_is_named(fault: str, rule: str) -> None:
    stochasticizers.register("planted", KernelConfig)(Kernel)
    found = {f.rule for f in check_component("stochasticizer", "planted", {"fault": fault}).violations}
    # a single-time map refuses interior times by itself
    assert "refuses what it does not fit" not in found
    assert rule in found


@pytest.mark.usefixtures("registry_state")
def test_a_kernel_that_uses_a_map_it_does_not_fit_is_named() -> None:
    class Endpoint:
        path_preserving = False

        def __init__(self, config: KernelConfig) -> None:
            pass

        def transition(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
            return Gaussian(flow_map.jump(x_t, t, torch.zeros_like(s), cond), s)

    stochasticizers.register("planted", KernelConfig, "Declares more than it needs")(Endpoint)
    assert "single-time map" in broken_rules("stochasticizer", "planted")["refuses what it does not fit"]


class StarConfig(GrpoConfig):
    """Options of the planted objectives."""

    about: ClassVar[About] = About(licence="MIT")
    fault: str = Field("", description="what is wrong with it")


class Stars(Grpo):
    """`grpo`, and faults on branched rollouts alone."""

    config: StarConfig

    def bind(self, stochasticizer: Stochasticizer) -> Stars:
        return Stars(self.config, stochasticizer)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        branched, fault = isinstance(scored.rollout, BranchRollout), self.config.fault
        if branched and fault == "chains alone":
            raise ValueError("no transitions")
        if branched and fault == "no baseline":
            scored = replace(scored, advantages=scored.advantages + 1)
        batch = super().prepare(scored, policies, seed)
        if branched and fault == "random":
            return batch.with_rows(weight=torch.rand(len(batch)))
        return batch.select(torch.arange(2 * len(batch)) // 2) if branched and fault == "two rows" else batch

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        loss = super().loss(policies, batch)
        summed = self.config.fault == "sum" and batch.rows["advantage"].ndim == 2
        # advantages of groups add up to nothing, so that the sum needs something to show
        return replace(loss, total=loss.total + (1 + loss.total) * (len(batch) - 1)) if summed else loss


@pytest.mark.usefixtures("registry_state")
@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        ("", set()),
        ("two rows", {"one row per group"}),
        ("sum", {"micro-batches add up"}),
        ("random", {"noise is keyed"}),
        ("no baseline", {"equal rewards teach nothing"}),
        (
            "chains alone",
            {
                "one row per group",
                "a finite loss with a gradient",
                "micro-batches add up",
                "noise is keyed",
                "equal rewards teach nothing",
            },
        ),
    ],
)
def test_a_planted_violation_on_branched_rollouts_is_named(fault: str, rules: set[str]) -> None:
    objectives.register("planted", StarConfig)(Stars)
    found = {f.rule for f in check_component("objective", "planted", {"fault": fault}).violations}
    assert found == {f"branched: {rule}" for rule in rules}


def test_an_objective_without_branches_is_not_checked_on_them_and_is_refused_with_them() -> None:
    findings = check_component("objective", "rwfm").findings
    assert {f.outcome for f in findings if f.rule.startswith("branched: ")} == {"not checked"}
    with pytest.raises(CompositionError, match="'rwfm' does not support branched rollouts"):
        Recipe.default(objective="rwfm", **{"rollout.kind": "branch"})


@pytest.mark.parametrize(
    ("target", "name", "says"),
    [
        ("warmth", None, "neither a kind with a name nor module:attribute"),
        ("no.such.module:Thing", None, "cannot be imported"),
        ("fmg.flow:Gaussian", None, "is not registered"),
        ("backend", "torch", "There are no rules for a backend"),
    ],
)
def test_what_cannot_be_examined(target: str, name: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_component(target, name)


def test_a_function_is_examined_as_a_reward(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_functions.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = fmg("check-component", "my_functions:red")
    assert done.code == 0, done.stdout + done.stderr
    assert "No rule is broken." in done.stdout
