"""Rules of prompt sets, feature extractors and models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fmg.conformance.component_under_test import ComponentUnderTest
from fmg.conformance.rewards import COUNT, SIDES, pictures
from fmg.conformance.rules import NotApplicable, Rule, Violation, require
from fmg.core.errors import CompositionError
from fmg.core.prompt import is_blank
from fmg.core.protocols import FeatureExtractor, Model, ModelSource, PromptSet
from fmg.core.types import ImageFeatures
from fmg.registry.config import ModelConfig


@dataclass(frozen=True)
class PromptsCase:
    """A prompt set."""

    component: ComponentUnderTest

    @cached_property
    def prompts(self) -> PromptSet:
        built: PromptSet = self.component.build()
        return built


def _prompts(case: PromptsCase) -> None:
    texts = [prompt.text for prompt in case.prompts]
    require(
        len(texts) > 0 and len(texts) == len(case.prompts),
        "The length of the set differs from the number of prompts it yields.",
    )
    require(not any(map(is_blank, texts)), "A prompt is empty.")
    twice = next((text for text in texts if texts.count(text) > 1), None) if len(texts) < 5000 else None
    require(twice is None, f"'{twice}' occurs twice: the images of both would form one group.")
    indexed = [case.prompts[i].text for i in range(len(texts))]
    require(indexed == texts, "Indexing and iterating give different prompts.")


def _prompts_again(case: PromptsCase) -> None:
    again: PromptSet = case.component.build()
    same = [p.text for p in again] == [p.text for p in case.prompts]
    require(same, "Built again, the set has different prompts, so a resumed run would differ.")


PROMPT_RULES: tuple[Rule[PromptsCase], ...] = (
    Rule("prompts in a fixed order", _prompts),
    Rule("deterministic", _prompts_again),
)


@dataclass(frozen=True)
class FeaturesCase:
    """A feature extractor."""

    component: ComponentUnderTest

    @cached_property
    def extractor(self) -> FeatureExtractor:
        built: FeatureExtractor = self.component.build()
        return built

    @cached_property
    def features(self) -> ImageFeatures:
        return self.extractor(pictures(SIDES[0]))


def _features(case: FeaturesCase) -> None:
    for name, values in (("vectors", case.features.vectors), ("maps", case.features.maps)):
        fine = (
            values.ndim == 2 and len(values) == COUNT and values.dtype == torch.float32 and values.device.type == "cpu"
        )
        require(fine, f"The {name} must be fp32 (b, d) on the CPU; they are {values.dtype} {tuple(values.shape)}.")
        require(bool(values.isfinite().all()), f"The {name} are not finite.")
        require(not values.requires_grad, f"The {name} carry gradients.")


def _features_alone(case: FeaturesCase) -> None:
    singles = [case.extractor(pictures(SIDES[0])[i : i + 1]) for i in range(COUNT)]
    pairs = {
        "vectors": (case.features.vectors, torch.cat([one.vectors for one in singles])),
        "maps": (case.features.maps, torch.cat([one.maps for one in singles])),
    }
    for name, (whole, alone) in pairs.items():
        require(torch.allclose(whole, alone, atol=1e-3, rtol=1e-3), f"The {name} of an image depend on its batch.")


FEATURE_RULES: tuple[Rule[FeaturesCase], ...] = (
    Rule("features of every image", _features),
    Rule("independent of the batch", _features_alone),
)


@dataclass(frozen=True)
class ModelCase:
    """A model; its weights are only read if it runs on a CPU."""

    component: ComponentUnderTest

    @cached_property
    def source(self) -> ModelSource:
        built: ModelSource = self.component.build()
        return built

    @cached_property
    def model(self) -> Model:
        if self.source.spec.gpu_memory_gb > 0:
            raise NotApplicable(f"The model needs a GPU of {self.source.spec.gpu_memory_gb:g} GB.")
        self.source.check()
        return self.source.load(torch.device("cpu"), torch.float32)

    def inputs(self) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3, *self.model.latent_shape, generator=torch.Generator().manual_seed(0))
        return noise, torch.ones(3)


def _spec(case: ModelCase) -> None:
    config = case.component.config
    assert isinstance(config, ModelConfig)
    require(config.spec() == case.source.spec, "The config's spec() differs from the spec of the model that it builds.")


def _images(case: ModelCase) -> None:
    model = case.model
    require(model.flow_map.anchors == model.spec.anchors, "The map accepts different times than its spec declares.")
    require(model.flow_map.path.name == model.spec.path, "The map uses a different path than its spec declares.")
    noise, ones = case.inputs()
    with torch.no_grad():
        clean = model.flow_map.jump(noise, ones, torch.zeros(3), model.encode(["a", "b", "c"]))
        images = model.decode(clean)
    require(clean.shape == noise.shape, "A jump changes the shape of the latents.")
    inside = (
        images.dtype == torch.float32 and images.shape[:2] == (3, 3) and bool(((images >= 0) & (images <= 1)).all())
    )
    require(inside, "decode() does not give fp32 images (b, 3, h, w) in [0, 1].")


def _times(case: ModelCase) -> None:
    model = case.model
    noise, ones = case.inputs()
    cond = model.encode(["a", "b", "c"])
    with torch.no_grad():
        if model.spec.anchors == "any":
            same = torch.allclose(model.flow_map.jump(noise, ones, ones, cond).float(), noise, atol=1e-4)
            require(same, "A jump from t to t is not the identity.")
            return
        try:
            model.flow_map.jump(noise, ones, torch.full((3,), 0.5), cond)
        except CompositionError:
            return
    raise Violation("A single-time map accepts an interior time: raise a CompositionError.")


def _adapter(case: ModelCase) -> None:
    model = case.model
    noise, ones = case.inputs()
    cond = model.encode(["a", "b", "c"])
    with torch.no_grad():
        before = model.flow_map.jump(noise, ones, torch.zeros(3), cond)
        count = model.attach_adapter(4, 8.0, ["attention"], 0.0, 0)
        after = model.flow_map.jump(noise, ones, torch.zeros(3), cond)
    require(count > 0, "The adapter fits no module.")
    require(torch.allclose(before, after, atol=1e-5), "A fresh adapter changes the map.")
    trained = [name for name, p in model.trainable() if p.requires_grad]
    require(bool(trained), "Nothing is trainable with an adapter attached.")


MODEL_RULES: tuple[Rule[ModelCase], ...] = (
    Rule("spec as declared", _spec),
    Rule("noise to images", _images),
    Rule("times as declared", _times),
    Rule("a fresh adapter is neutral", _adapter),
)
