"""Verifies that an artifact reproduces its run: files, facts, weights, precision, tensors, images, rewards.

Every check starts from the artifact and its manifest, can be repeated at any time, and is written into the manifest
with the hash of the weights it was made on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from os import PathLike
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import UsageError, python_call, reason, suggestion
from fmg.core.events import Notice, Observer, StageProgress, ignore
from fmg.core.prompt import tell_of_cuts
from fmg.core.protocols import Reward
from fmg.data.prompt_sets import load_prompts
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.scoring import CHUNK, EvalSet, prompt_clusters, score_images
from fmg.export.artifact import ArtifactSource
from fmg.export.calibration import IMAGES, other_calibration
from fmg.export.loaded_source import LoadedSource
from fmg.export.precision_report import fp32_products, precision_of
from fmg.export.source import find_source
from fmg.export.verify_graphs import GraphParity, first_divergence, parity, sample_inputs, widened
from fmg.export.verify_source import check_source
from fmg.inference import Generator, Target
from fmg.inference.artifact.backend import ArtifactBackend, PromptTokenizer, artifact_backend
from fmg.inference.artifact.layout import Artifact, open_artifact
from fmg.inference.artifact.manifest import PACKED, SAMPLER, TRANSFORMER, TRANSFORMER_INT8, Check, Precision
from fmg.inference.loading import AUTO, find, find_artifact, load, made_from
from fmg.inference.onnxruntime import NAME as ONNXRUNTIME
from fmg.inference.onnxruntime import PrecisionError
from fmg.inference.parity import Difference, ImageParity
from fmg.inference.self_check import VerifyReport, check_files, check_generation, described
from fmg.inference.target import TargetLike, load_model
from fmg.inference.tensorrt.precision_report import EnginePrecision
from fmg.inference.torch_backend import TorchBackend
from fmg.models.common.model import AdaptedModel
from fmg.models.flux.model import FluxModel
from fmg.progress import watching
from fmg.rewards.base import build_rewards, check_prompts

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
QUICK_IMAGES, FULL_IMAGES = 16, 512
IN_FP32 = (
    "computed in fp32 with the bf16 weights, because ONNX Runtime has no bf16 on a CPU;"
    " the rounding of bf16 arithmetic was not tested"
)
"""Note of the checks of a bf16 artifact that was widened to fp32 (`fmg.export.verify_graphs.widened`)."""
IN_SIMULATED_FP8 = "fp8 was simulated: rounded to E4M3 as in the graph, everything else in fp32 in place of bf16"
"""The same for an fp8 artifact."""

FUSED = "fused"
"""Suffix of the name of the fused sampler's check."""
_FEW_PROMPTS = 32
_HUGE = 1e30
REWARD_ALLOWED: Mapping[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.02, "fp8": 0.02, "int8": 0.02}
"""Half-width of the band that must contain the 95 % interval of the paired reward gap."""
LEAST_IMAGES = 500
"""With fewer images, the reward check proves nothing: if a rule scores both sides alike, the interval has no width."""


@runtime_checkable
class ReportsPrecision(Protocol):
    """A runtime that can report the precision of a graph, such as engines that keep the names of their layers."""

    def precision(self, graph: str) -> EnginePrecision | None:
        """The layers of a graph's engine by kind and type; None if they cannot be read."""


@python_call
def verify(
    artifact: str | PathLike[str] | Artifact,
    against: TargetLike = None,
    *,
    level: str = "quick",
    backend: str = AUTO,
    device: str = AUTO,
    num: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
    observer: Observer | None = None,
    progress: bool | None = None,
) -> VerifyReport:
    """Compares an artifact with the run or model that it was exported from, and writes the checks into its manifest.

    Args:
        artifact: what `export_artifact` returned, or its folder.
        against: the run or model; None takes what the manifest names.
        level: `quick` compares files, weights, precision, graphs and 16 images; `full` also the run's rewards on 512.
        backend: what runs the artifact.
        device: where both sides compute.
        num: number of images; None takes that of the level.
        seed: seed of inputs and noise.
        allow_code: whether the recipe of a run may name reward code; see `fmg eval`.
        observer: receives the progress.
        progress: whether progress is shown, as in `train`.

    Raises:
        UsageError: an unknown level, or the run or model no longer exists.
        CheckpointError: a file of either side is damaged.
    """
    if level not in LEVELS:
        raise UsageError(f"There is no verification level '{level}'", suggestion(level, LEVELS))
    with watching(observer, progress) as told:
        if isinstance(artifact, Artifact):
            opened = artifact
        else:
            opened = open_artifact(find_artifact(artifact, told), hashes=False)
        target = reference_of(opened, against, allow_code=allow_code, observer=told)
        return _verify(opened, target, level, backend, device, num, seed, told)


def _verify(
    artifact: Artifact,
    target: Target,
    level: str,
    backend: str,
    device: str,
    num: int | None,
    seed: int,
    observer: Observer,
) -> VerifyReport:
    comparison = _Comparison(artifact, target, level == "full", device, num, seed, observer)
    checks = [check_files(artifact)]
    comparison.tell_of_cuts()
    checks += [*comparison.source(), *comparison.precision()]
    try:
        with load(artifact, backend=backend, device=device) as candidate:
            detail = described(candidate)
            checks += comparison.run(candidate)
    except PrecisionError:
        with widened(artifact) as wide, load(wide, backend=ONNXRUNTIME, device="cpu") as candidate:
            precision = artifact.manifest.precision
            detail, how = (
                f"{described(candidate)}, {precision} weights",
                IN_SIMULATED_FP8 if precision == "fp8" else IN_FP32,
            )
            checks += [
                replace(check, note="; ".join(filter(None, (check.note, how)))) for check in comparison.run(candidate)
            ]
    if TRANSFORMER_INT8 in artifact.manifest.graphs:
        with load(artifact, backend=ONNXRUNTIME, device="cpu", int8=True) as candidate:
            checks += comparison.against(candidate, (TRANSFORMER_INT8,))
    try:
        artifact.with_checks(checks)
    except OSError as error:
        # read-only folders are verified as well
        observer(Notice("warning", f"The results could not be written into the manifest: {reason(error)}"))
    return VerifyReport(str(artifact.folder), target.label, level, detail, tuple(checks))


def reference_of(
    artifact: Artifact, against: TargetLike = None, *, allow_code: bool = False, observer: Observer = ignore
) -> Target:
    """The run or model that an artifact is compared with.

    Raises:
        UsageError: it does not exist, or is itself an artifact.
    """
    if isinstance(against, Target):
        return against
    if against is None:
        return made_from(artifact, allow_code=allow_code, advice="Name it: --against RUN.", observer=observer)
    found = find(against, allow_code=allow_code, observer=observer)
    if isinstance(found, Artifact):
        raise UsageError(f"'{against}' is an artifact", "Name the run or the model that the artifact was made from.")
    return found


def engine_precision(artifact: Artifact, candidate: Generator) -> Iterator[Check]:
    """Checks whether the backend computes in each graph's precision, if it can report that."""
    backend = candidate.backend
    runtime: object = backend.runtime if isinstance(backend, ArtifactBackend) else None
    if not isinstance(runtime, ReportsPrecision):
        return
    for graph in artifact.manifest.required:
        counted = runtime.precision(graph)
        if counted is None:
            continue
        problem = counted.problem(artifact.graph(graph).precision, fp32_products(artifact, graph))
        values = {f"layers_{name}": float(n) for name, n in counted.by_precision().items()}
        digest = artifact.manifest.weights_digest(graph)
        yield Check(f"precision/{backend.name}/{graph}", not problem, values, problem, digest)


class _Comparison:
    """All checks of one artifact against one target, which is loaded once."""

    def __init__(
        self,
        artifact: Artifact,
        target: Target,
        full: bool,
        device: str,
        num: int | None,
        seed: int,
        observer: Observer,
    ) -> None:
        recipe = target.recipe
        self._artifact = artifact
        self._target = target
        self._device = device
        self._seed = seed
        self._observer = observer
        self._rewards = build_rewards(recipe.rewards) if full else {}
        self._prompts = load_prompts(recipe.eval.prompts)
        self._num = num or (FULL_IMAGES if full else QUICK_IMAGES)
        self._set = EvalSet.make(self._prompts, self._num, seed)
        for label, reward in self._rewards.items():
            check_prompts(label, reward, self._set.prompts)

    @cached_property
    def _model(self) -> AdaptedModel[Any]:
        model = load_model(self._target, device=self._device, dtype="fp32")
        packs = self._artifact.manifest.schema == PACKED
        if not isinstance(model, AdaptedModel) or isinstance(model, FluxModel) != packs:
            raise UsageError(
                f"The artifact was not exported from the model of '{self._target.label}'",
                "Name the run or the model that the artifact was made from.",
            )
        return model

    def tell_of_cuts(self) -> None:
        """Warns about prompts that the model truncates, equally on both sides."""
        facts = list(self._artifact.manifest.tokenizers.values())[-1]
        tell_of_cuts(PromptTokenizer(self._artifact.path(facts.file), facts), self._set.prompts, self._observer)

    def source(self) -> Iterator[Check]:
        self._observer(StageProgress("weights", 0, 1))
        if self._artifact.manifest.schema == PACKED:
            source: ArtifactSource = find_source(self._target)
        else:
            source = LoadedSource(self._target, self._model)
        yield from check_source(self._artifact, source)
        if self._artifact.manifest.precision == "fp8":
            problem = other_calibration(self._artifact, self._model, self._target.recipe, self._observer)
            yield self._check(
                f"calibration/{TRANSFORMER}", TRANSFORMER, not problem, {"images": float(IMAGES)}, problem
            )
        self._observer(StageProgress("weights", 1, 1))

    def precision(self) -> Iterator[Check]:
        # the sampler has the nodes of transformer and decoder, whose precisions differ
        for graph in [name for name in self._artifact.manifest.graphs if name != SAMPLER]:
            counted = precision_of(self._artifact, graph)
            foreign = counted.foreign
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            note = f"requested {self._artifact.graph(graph).precision}; {foreign[0]}{more}" if foreign else ""
            yield self._check(f"precision/{graph}", graph, not foreign, counted.values(), note)

    def run(self, candidate: Generator) -> list[Check]:
        """All checks that run the graphs.

        Raises:
            PrecisionError: the backend cannot compute in the artifact's precision.
        """
        checks = [check_generation(self._artifact, candidate), *engine_precision(self._artifact, candidate)]
        return [*checks, *self.against(candidate, self._artifact.manifest.required)]

    def against(self, candidate: Generator, graphs: Sequence[str]) -> Iterator[Check]:
        """Tensors of these graphs, then whole images, then rewards."""
        assert isinstance(candidate.backend, ArtifactBackend)
        for number, graph in enumerate(graphs):
            found = parity(
                self._model, candidate.backend.runtime, self._artifact, graph, self._few_prompts, seed=self._seed
            )
            self._observer(StageProgress("graphs", number + 1, len(graphs)))
            yield self._tensors(candidate.backend.artifact, graph, found)
        transformer = TRANSFORMER if TRANSFORMER in graphs else TRANSFORMER_INT8
        yield from self._images(candidate, transformer)

    def _tensors(self, ran: Artifact, graph: str, found: GraphParity) -> Check:
        values = {
            "relative_l2": _number(found.relative_l2),
            "max_abs": _number(found.max_abs),
            "allowed": found.allowed,
            "shapes": float(found.shapes),
        }
        note = "" if found.passed else self._where(ran, graph, found)
        return self._check(f"tensors/{graph}", graph, found.passed, values, note)

    def _where(self, ran: Artifact, graph: str, found: GraphParity) -> str:
        """What went wrong, and the first module that differs in ONNX Runtime, whatever the backend."""
        said = "" if np.isfinite(found.relative_l2) else "the output has values that are not finite"
        if ran.graph(graph).precision not in ("fp32", "fp16"):
            return said
        inputs = next(iter(sample_inputs(self._artifact, graph, self._few_prompts, seed=self._seed)))
        first = first_divergence(self._model, ran, graph, inputs, allowed=found.allowed)
        where = str(first) if first else "every module agrees in ONNX Runtime, so the difference is in the backend"
        return f"{said}; {where}" if said else where

    def _images(self, candidate: Generator, transformer: str) -> Iterator[Check]:
        """Images and rewards at the artifact's own resolution, and a few images at each other one.

        The torch side takes grid and steps from the run, because those of the manifest are under test.
        """
        assert isinstance(candidate.backend, ArtifactBackend)
        sampling, rollout = self._artifact.manifest.sampling, self._target.recipe.rollout
        precision = self._artifact.graph(transformer).precision
        suffix = "" if transformer == TRANSFORMER else "/int8"
        own = sampling.resolution
        few = EvalSet.make(self._prompts, min(self._num, QUICK_IMAGES), self._seed)
        for resolution in (own, *(size for size in sampling.resolutions if size != own)):
            eval_set, rewards = (self._set, self._rewards) if resolution == own else (few, {})
            torch_side = TorchBackend(self._model, latent_shape=sampling.latent_shape(resolution))
            backend = artifact_backend(
                self._artifact, candidate.backend.runtime, resolution=resolution, transformer=transformer, fused=False
            )
            loop = Generator(backend, sampling.grid, sampling.steps, candidate.batch_size, tells=False)
            found = compare(
                Generator(torch_side, rollout.grid, rollout.steps, candidate.batch_size, tells=False),
                loop,
                eval_set,
                rewards,
                progress=partial(self._progress, "images and rewards" if rewards else "images"),
            )
            at = "" if resolution == own else f"/{resolution}"
            yield self._image_check(f"images{suffix}{at}", found.images, precision)
            for gap in found.gaps:
                if gap.part == "total":
                    yield self._reward(gap, f"reward/{gap.reward}{suffix}", REWARD_ALLOWED[precision])
            if resolution == own and transformer == TRANSFORMER and candidate.backend.fused_steps is not None:
                yield self._fused(candidate.backend, loop, few, precision)

    def _fused(self, backend: ArtifactBackend[Any], loop: Generator, eval_set: EvalSet, precision: Precision) -> Check:
        """The images of the sampler in one graph against those of the loop, which has been compared with torch."""
        fused = Generator(backend, loop.grid, loop.steps, loop.batch_size, tells=False)
        found = compare(loop, fused, eval_set, {}, progress=partial(self._progress, "images of the fused sampler"))
        own = backend.fused_steps
        other = "" if own == loop.steps else f"the graph makes {own} steps, but the manifest says {loop.steps}"
        return self._image_check(f"images/{FUSED}", found.images, precision, other)

    def _image_check(self, name: str, images: ImageParity, precision: Precision, problem: str = "") -> Check:
        values = {measure: _number(value) for measure, value in asdict(images).items()}
        problem = problem or images.problem(precision)
        return self._check(name, None, not problem, values, problem)

    def _reward(self, gap: RewardGap, name: str, allowed: float) -> Check:
        low, high = gap.ci95
        values = {
            "torch": gap.torch,
            "artifact": gap.artifact,
            "gap": gap.gap,
            "low": _number(low),
            "high": _number(high),
            "allowed": allowed,
            "images": float(gap.images),
        }
        return self._check(name, None, gap.passed(allowed), values, gap.problem(allowed))

    def _check(self, name: str, graph: str | None, passed: bool, values: Mapping[str, float], note: str) -> Check:
        manifest = self._artifact.manifest
        digest = manifest.sampling_digest() if graph is None else manifest.weights_digest(graph)
        return Check(name, passed, dict(values), note, digest)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._observer(StageProgress(stage, done, total))

    @property
    def _few_prompts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._set.prompts))[:_FEW_PROMPTS]


def _number(value: float) -> float:
    """A value that JSON can represent: NaN and infinities become very large."""
    return float(np.nan_to_num(value, nan=_HUGE, posinf=_HUGE, neginf=-_HUGE))


@dataclass(frozen=True)
class RewardGap:
    """Artifact minus torch on the same prompts and seeds, with its 95 % bootstrap interval over prompts."""

    reward: str
    part: str
    torch: float
    artifact: float
    gap: float
    ci95: tuple[float, float]
    images: int

    def passed(self, allowed: float) -> bool:
        """Whether the whole interval lies within `allowed` of zero; with too few images, it does not pass."""
        return not self.problem(allowed)

    def problem(self, allowed: float) -> str:
        """Why it does not pass; empty when it does."""
        low, high = self.ci95
        if not np.isfinite([self.torch, self.artifact]).all():
            return "a reward is not finite"
        if self.images < LEAST_IMAGES:
            return f"too few images to decide: {self.images} of {LEAST_IMAGES}"
        if -allowed <= low and high <= allowed:
            return ""
        inside = -allowed <= self.gap <= allowed
        return "the interval is too wide to decide: use more images" if inside else "the rewards differ"


@dataclass(frozen=True)
class ImageComparison:
    """Differences of the images of both sides, and the gap of every part of every reward."""

    images: ImageParity
    gaps: tuple[RewardGap, ...]


def compare(
    reference: Generator,
    candidate: Generator,
    eval_set: EvalSet,
    rewards: Mapping[str, Reward],
    *,
    progress: Callable[[int, int], None],
) -> ImageComparison:
    """Generates all images of `eval_set` on both sides, compares them and scores them.

    Args:
        reference: torch.
        candidate: the artifact.
        eval_set: prompts and seeds.
        rewards: rewards by label; without any, nothing is scored.
        progress: called with (done, total).
    """
    total = len(eval_set.prompts)
    difference = Difference()
    scores: dict[tuple[str, str], tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]] = {}
    for start in range(0, total, CHUNK):
        rows = slice(start, start + CHUNK)
        prompts, seeds = eval_set.prompts[rows], eval_set.seeds[rows]
        sides = [generator.generate(prompts, seeds, progress=False) for generator in (reference, candidate)]
        difference.add(sides[1].image_array, sides[0].image_array)
        if difference.not_finite:
            # no reward can score such images, and they fail anyway
            rewards, scores = {}, {}
        scored = [score_images(rewards, side.images, prompts) for side in sides]
        for key in scored[0]:
            ours = scores.setdefault(key, ([], []))
            for column, side in zip(ours, scored, strict=True):
                column.append(side[key])
        progress(min(start + CHUNK, total), total)
    clusters = prompt_clusters(eval_set.prompts)
    gaps = [_gap(key, np.concatenate(a), np.concatenate(b), clusters) for key, (a, b) in scores.items()]
    return ImageComparison(difference.result(), tuple(gaps))


def _gap(
    key: tuple[str, str], torch_: NDArray[np.float64], artifact: NDArray[np.float64], clusters: NDArray[np.int64]
) -> RewardGap:
    delta = artifact - torch_
    interval = bootstrap_mean(delta, clusters if np.ptp(clusters) > 0 else None)
    return RewardGap(*key, float(torch_.mean()), float(artifact.mean()), float(delta.mean()), interval, len(delta))
