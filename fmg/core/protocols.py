"""The abstractions that components implement. Structural: anything with these members works, no base class needed.

Times are `(b,)` float tensors in [0, 1]; noise is at 1, data at 0. Imports no torch: backends run where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from fmg.core.profiling import StageClock
from fmg.core.specs import MapSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

    from fmg.core.types import Batch, Conditioning, ImageFeatures, Loss, Prompt, RewardOutput, ScoredRollout

Anchors = Literal["endpoint", "any"]


@runtime_checkable
class ProbabilityPath(Protocol):
    """An affine Gaussian probability path `x_t = alpha_t x_0 + sigma_t eps` (docs/math.md, eq. 1)."""

    @property
    def name(self) -> str:
        """`linear` or `trig`."""

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Signal coefficient, falling from 1 at t = 0 to 0 at t = 1."""

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Noise coefficient, rising from 0 at t = 0 to 1 at t = 1."""

    def kernel(self, a: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Scale and std of `q(x_s | x_a)` for `0 <= a <= s <= 1` (eq. 2)."""

    def anchor(self, noise_share: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time `a <= s` whose noise-to-signal ratio is `noise_share` times that at `s` (eq. 3)."""


@runtime_checkable
class FlowMap(Protocol):
    """A learned or exact map `X_{t->s}` of the probability-flow ODE.

    `anchors` is `any` for two-time maps and `endpoint` for maps that can only jump to `s = 0`; those raise
    `CompositionError` for another `s`, and for `velocity`.
    """

    @property
    def anchors(self) -> Anchors:
        """Which target times `jump` accepts."""

    @property
    def path(self) -> ProbabilityPath:
        """The probability path whose marginals the map transports."""

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->s}(x_t)`."""

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """The diagonal `v(x_t, t)` of a two-time map: the velocity of the probability-flow ODE."""


@runtime_checkable
class MeanFlow(FlowMap, Protocol):
    """A two-time map, whose network predicts average velocities."""

    def average_velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`u(x_t, t, s)`, the average velocity between `s` and `t`; on the diagonal `v(x_t, t)`."""


class Density(Protocol):
    """A distribution over the next state, independent over coordinates; see `fmg.flow.Gaussian`."""

    @property
    def mean(self) -> Float[Tensor, "b *shape"]:
        """Mean, fp32."""

    @property
    def std(self) -> Float[Tensor, " b"]:
        """Standard deviation of every coordinate, fp32, without parameters in it."""

    def push(self, noise: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
        """`mean + std * noise`."""

    def log_prob(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
        """Log-density averaged over all but the batch dimension, fp32."""


class Stochasticizer(Protocol):
    """Turns a deterministic flow map into a policy: a Gaussian over `x_s` given `x_t`."""

    @property
    def path_preserving(self) -> bool:
        """True when `x_t ~ p_t` implies `x_s ~ p_s` for an exact map."""

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Density:
        """The transition density for `0 < s < t <= 1`."""


class Reward(Protocol):
    """Scores images against prompts. A mixture of rewards is a reward.

    One whose config says that it is `differentiable` also gives `total` a gradient with respect to images that record
    one. Its weights never have gradients.
    """

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]; non-finite scores are a `RewardError`, never a zero."""


class FeatureExtractor(Protocol):
    """Turns images into features for metrics of sets: diversity, Fréchet distance, precision and recall."""

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        """Features of images in [0, 1], fp32 on the CPU; those of an image do not depend on its batch."""


class Policies(Protocol):
    """The flow maps an objective compares: the trained one, a frozen copy of it, and the base."""

    @property
    def current(self) -> FlowMap:
        """With gradients, adapter on."""

    @property
    def old(self) -> FlowMap:
        """The policy that generated the rollout, without gradients."""

    @property
    def reference(self) -> FlowMap:
        """The base: adapter off, without gradients."""


Needs = Literal["transitions", "samples", "gradients"]
"""What an objective learns from: densities of transitions, scored samples, or gradients of rewards."""

DecodeFunction = Callable[["Float[Tensor, 'b *shape']"], "Float[Tensor, 'b 3 h w']"]
"""Images in [0, 1] of latents, with gradients."""
ScoreFunction = Callable[["Float[Tensor, 'b 3 h w']", Sequence[str]], "Float[Tensor, ' b']"]
"""The weighted sum of the trained rewards of images for prompts, with gradients."""


class Objective(Protocol):
    """Turns scored rollouts into a loss."""

    @property
    def needs(self) -> Needs:
        """`transitions` demands a stochasticizer with a density; `samples` also takes deterministic rollouts.
        `gradients` demands differentiable rewards and a `StateRollout`; such an objective is a `GradientObjective`."""

    @property
    def clip_range(self) -> float | None:
        """Half-width of the ratio clip, which sets the tolerance of the replay gate; None without a ratio."""

    def bind(self, stochasticizer: Stochasticizer) -> Objective:
        """The same objective, replaying transitions of this stochasticizer."""

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """Everything that is computed once per rollout. `seed` keys the noise of the objective."""

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """The mean loss over the rows of `batch`."""


@runtime_checkable
class GradientObjective(Protocol):
    """An objective that `needs` gradients: it differentiates rewards of images that it decodes itself."""

    def with_images(self, decode: DecodeFunction, score: ScoreFunction) -> Objective:
        """The same objective with a decoder and the rewards."""

    def starts(
        self, groups: Int[Tensor, " n"], members: Int[Tensor, " n"], steps: int, *, seed: int, iteration: int
    ) -> Int[Tensor, " n"] | None:
        """The interval of a grid of `steps` at whose start the rollout keeps the state of each sample; None keeps none.

        `groups`, `members`, `seed` and `iteration` identify a sample, as in `fmg.rl.sample_rollout`.
        """


class OptimizerFactory(Protocol):
    """Builds a torch optimizer over named parameters."""

    def __call__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer; parameters without gradients are the caller's mistake."""


class PromptSet(Protocol):
    """A named, ordered set of prompts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt: ...

    def __iter__(self) -> Iterator[Prompt]: ...


class Model(Protocol):
    """A loaded generator: flow map, text encoders and decoder, with one adapter that can be trained and saved."""

    @property
    def spec(self) -> MapSpec:
        """What kind of map it is and its sampling conventions."""

    @property
    def flow_map(self) -> FlowMap:
        """The map with the adapter as it is set now."""

    @property
    def policies(self) -> Policies:
        """Views of the same weights; `snapshot()` moves `old` to the current weights."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent as `jump` takes it."""

    @property
    def device(self) -> torch.device:
        """Device of the flow map."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings, on `device`."""

    def decode(self, latents: Float[Tensor, "b *shape"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1], fp32."""

    def attach_adapter(self, rank: int, alpha: float, targets: Sequence[str], dropout: float, seed: int) -> int:
        """Adds a trainable LoRA (gaussian init from `seed`); returns the number of adapted modules."""

    def unfreeze(self, what: Literal["duration", "full"], *, old: bool = True, reference: bool = True) -> int:
        """Trains weights of the base, in fp32: the second-time embedder beside a LoRA, or all of them without one;
        returns the number of tensors. With `full`, `policies.old` and `policies.reference` exist only on request, since
        each is a copy of the network."""

    def fix_rows(self, rows: int | None) -> None:
        """Pads smaller batches to `rows`, so that kernels see one shape; None: no padding."""

    def trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Named parameters that the optimizer may change."""

    def snapshot(self) -> None:
        """Freezes a copy of the trainable weights as `policies.old`, if one is kept."""

    def save_adapter(self, folder: Path) -> None:
        """Writes the trained weights and verifies them: a LoRA as `pytorch_lora_weights.safetensors` (diffusers layout)
        and the PEFT folder `peft/`, with what is trained beside it; a whole network as the folder `transformer/`."""

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote; unknown or missing keys are a `CheckpointError`."""


@runtime_checkable
class Shardable(Protocol):
    """A model whose frozen weights can be sharded over the processes of a run."""

    def shard(self) -> None:
        """Keeps only this process's part of them; called once by every process, before the first forward pass."""

    def gathered(self) -> AbstractContextManager[None]:
        """Gathers all weights in this process for the body. All processes must enter; the body does not communicate."""


@runtime_checkable
class Rerouted(Protocol):
    """A model whose network can be replaced by its compiled form or an exported graph."""

    @property
    def network(self) -> torch.nn.Module:
        """The network module that is trained."""

    def flow_map_through(self, network: Callable[..., Any], /) -> FlowMap:
        """The current map with another network, which has the call signature of the module."""


class ModelSource(Protocol):
    """The product of the model registry: a description that can be loaded."""

    @property
    def spec(self) -> MapSpec:
        """Available without reading any weight."""

    def check(self) -> None:
        """Raises what `load` would raise for missing files, without reading a weight."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Reads the weights straight to `device` in `dtype`."""


NoiseSource = Callable[[int], "NDArray[np.float32]"]
"""Standard normal noise (b, c, h, w) of a step: 0 for where an image begins, k + 1 for interval k of the grid."""

Subject = Literal["model", "artifact"]


@dataclass(frozen=True)
class Drawn:
    """Images (b, 3, height, width) in [0, 1] and the latents (b, c, h, w) they were decoded from, both fp32."""

    images: NDArray[np.float32]
    latents: NDArray[np.float32]


class Backend(Protocol):
    """Text encoders, few-step sampler and decoder of one model on one runtime.

    A context manager: leaving it frees the runtime. The stages of `encode` and `draw` have the names of
    `fmg.core.profiling`.
    """

    @property
    def name(self) -> str:
        """Registered name, such as `torch`."""

    @property
    def detail(self) -> str:
        """Readable details: execution provider, engine, threads."""

    @property
    def device(self) -> str:
        """The device: `cpu`, `cuda:0`."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """The conditioning that `draw` takes. Recent prompts are cached."""

    def draw(self, cond: Any, noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """One image for each prompt of `cond`, along strictly decreasing `times` from 1 to 0."""

    def uncached(self) -> AbstractContextManager[None]:
        """Runs the body with the prompt cache off, so that `encode` can be timed."""

    def release_text(self) -> None:
        """Frees the memory of the text encoders; they are loaded again when a new prompt comes."""

    def clock(self) -> StageClock[Any]:
        """A clock that reads this runtime's time, on a GPU from events in its queue."""

    def reset_peak_memory(self) -> None:
        """Begins a new measurement of `peak_memory`."""

    def peak_memory(self) -> int:
        """Maximum bytes held at once since the last reset: of the device, or of the process on a CPU."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BackendSource(Protocol):
    """The product of the backend registry: a backend that can be opened.

    `subject` is a `fmg.inference.target.Target` where `opens` says `model`, and a `fmg.inference.artifact.Artifact`
    where it says `artifact`.
    """

    @property
    def opens(self) -> Subject:
        """What it generates from."""

    @property
    def preference(self) -> int:
        """`auto` takes the suitable backend with the highest."""

    def check(self) -> None:
        """Whether the packages it needs are installed.

        Raises:
            MissingDependencyError: a package is missing; says how to install it.
        """

    def suits(self, subject: Any, device: str) -> bool:
        """Whether `auto` may take it: packages, device and, for engines, a matching engine exist. Never raises."""

    def open(self, subject: Any, device: str) -> Backend:
        """Loads the weights.

        Args:
            subject: the model, run or artifact to generate from.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            FmgError: a package, a device or a file is missing or unusable.
        """


@dataclass(frozen=True)
class TrackedRun:
    """The facts about a run that a tracker gets when it is opened.

    Attributes:
        path: the run folder.
        folder: folder for the tracker's files, which the tracker creates; unchanged when the run is resumed.
        id: unique id of the run, eight hexadecimal digits; unchanged when the run is resumed.
        name: displayed name of the run.
        process: the process that trains.
        recipe: all values of the run's recipe, nested.
        iterations: iteration of every line of `metrics.jsonl` from which the run resumes; empty for a new run.
        logged: lines that the tracker logged before the run was interrupted; the file may have been cut below them.
        warn: tells the user of a problem that the tracker recovers from.
    """

    path: Path
    folder: Path
    id: str
    name: str
    process: int
    recipe: Mapping[str, Any]
    iterations: Sequence[int]
    logged: int
    warn: Callable[[str], None]


class Tracker(Protocol):
    """Shows the metrics of a run. It runs in its own process, which may wait for a server.

    Any exception means that the call did not work: the tracker is opened again, or gets the same line again, later.
    """

    def open(self, run: TrackedRun) -> tuple[int, str]:
        """Creates the run in the tracker, or continues it, and stores its recipe.

        Returns:
            The index of the line of `metrics.jsonl` that it needs first, and where users can view it: an address or
            a command.
        """

    def log(self, index: int, line: Mapping[str, float], grid: Path | None) -> None:
        """Logs one line of `metrics.jsonl`: the metrics of an iteration or of an evaluation.

        Args:
            index: index of the line, from 0.
            line: its values; NaN where a value was not finite.
            grid: the sample grid of an evaluation, a PNG file.
        """

    def close(self, ended: bool) -> None:
        """Delivers what is pending. The run may be resumed.

        Args:
            ended: whether the run finished or was interrupted cleanly; false if it failed or was killed.
        """
