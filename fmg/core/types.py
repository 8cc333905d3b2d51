"""The values that travel through a run: prompts -> Conditioning -> Rollout -> ScoredRollout -> Batch -> Loss.

Every type is frozen and has no optional field, so a stage that needs rewards cannot be called before they exist.
`n` is the number of samples of a rollout, `b` a batch, `*shape` the shape of one latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fmg.core.prompt import Prompt as Prompt


class SharedRows(Mapping[str, Tensor]):
    """Tensors whose rows may be shared: a lookup gathers the rows that an index names.

    A rollout has a row for every sample and transition, but only as many different rows as prompts; T5 states for each
    row would take gigabytes. So rows are gathered where they are read, one micro-batch at a time.
    """

    def __init__(self, stored: Mapping[str, Tensor], index: Int[Tensor, " b"]) -> None:
        self._stored = stored
        self._index = index.cpu()

    def __getitem__(self, name: str) -> Tensor:
        rows = self._stored[name]
        return rows[self._index.to(rows.device)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def rows(self) -> int:
        """Number of rows that a lookup gives."""
        return len(self._index)

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The tensors that the index points into."""
        return self._stored

    def select(self, rows: Int[Tensor, " k"]) -> SharedRows:
        """The given rows, without gathering any."""
        return SharedRows(self._stored, self._index[rows.cpu()])

    def to(self, device: torch.device) -> SharedRows:
        """The same rows with the stored tensors on another device."""
        return SharedRows({name: x.to(device) for name, x in self._stored.items()}, self._index)


@dataclass(frozen=True)
class Conditioning:
    """What a flow map is conditioned on: the prompts and the tensors that encode them.

    `tensors` maps a name that the model defines (FLUX: `tokens` (b, l, d), `pooled` (b, p)) to a tensor whose
    leading dimension is `len(prompts)`. A model without conditioning uses an empty mapping. What `select` returns
    shares the tensors it was selected from and gathers its rows when they are looked up.
    """

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, rows in self._row_counts().items():
            if rows != len(self.prompts):
                raise ValueError(f"conditioning '{name}' has {rows} rows for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The tensors that are kept in memory, whose rows may be shared; nothing is gathered."""
        return self.tensors.stored if isinstance(self.tensors, SharedRows) else self.tensors

    def select(self, rows: Int[Tensor, " k"]) -> Conditioning:
        """The given rows, in the given order (repeats allowed); costs only an index, whatever the tensors' size."""
        shared = self.tensors.select(rows) if isinstance(self.tensors, SharedRows) else SharedRows(self.tensors, rows)
        return Conditioning(tuple(self.prompts[i] for i in rows.tolist()), shared)

    def to(self, device: torch.device) -> Conditioning:
        """The same values on another device."""
        if isinstance(self.tensors, SharedRows):
            return Conditioning(self.prompts, self.tensors.to(device))
        return Conditioning(self.prompts, {name: x.to(device) for name, x in self.tensors.items()})

    def _row_counts(self) -> dict[str, int]:
        if isinstance(self.tensors, SharedRows):
            return dict.fromkeys(self.tensors, self.tensors.rows)
        return {name: x.shape[0] for name, x in self.tensors.items()}


@dataclass(frozen=True)
class Transition:
    """One stochastic step `t -> s` of every sample: state before, state after, and the density it was sampled from.

    `mean` and `log_prob` belong to the policy that generated the rollout; `log_prob` is averaged over latent
    coordinates (theory: Flow-Map GRPO, arXiv 2607.00535, objective).
    """

    index: int
    t: Float[Tensor, " n"]
    s: Float[Tensor, " n"]
    x_t: Float[Tensor, "n *shape"]
    x_s: Float[Tensor, "n *shape"]
    mean: Float[Tensor, "n *shape"]
    std: Float[Tensor, " n"]
    log_prob: Float[Tensor, " n"]


@dataclass(frozen=True)
class SampleRollout:
    """Final latents `x0` only. `groups[i]` is the index of the prompt group that sample `i` belongs to."""

    cond: Conditioning
    groups: Int[Tensor, " n"]
    x0: Float[Tensor, "n *shape"]
    grid: tuple[float, ...]


@dataclass(frozen=True)
class StateRollout(SampleRollout):
    """Final latents, and one state of each sample on the way to them, at the start of a grid interval.

    Attributes:
        start: index of that interval.
        x_t: the states.
    """

    start: Int[Tensor, " n"]
    x_t: Float[Tensor, "n *shape"]


@dataclass(frozen=True)
class TransitionRollout(SampleRollout):
    """Final latents and the stochastic transitions that led to them, in the order they were taken."""

    transitions: tuple[Transition, ...]


@dataclass(frozen=True)
class BranchRollout(SampleRollout):
    """One star for each of `g` groups: a state, the density of one transition from it, and `m` siblings from it.

    `x0` are the completions of the siblings. Samples are group-major, `n = g m`: sample `i` completes sibling `i % m`
    of group `i // m`. Only the transition has a density; completions carry none (docs/math.md, eq. 30).

    Attributes:
        step: index of the grid interval at which each group branches.
        t, s: its times.
        x_t: the state that the siblings share.
        mean, std: the density `N(mean, std^2 I)` of the policy that generated the rollout.
        x_s: the siblings.
        log_prob: their log-densities, averaged over latent coordinates.
    """

    step: Int[Tensor, " g"]
    t: Float[Tensor, " g"]
    s: Float[Tensor, " g"]
    x_t: Float[Tensor, "g *shape"]
    mean: Float[Tensor, "g *shape"]
    std: Float[Tensor, " g"]
    x_s: Float[Tensor, "g m *shape"]
    log_prob: Float[Tensor, "g m"]


Rollout = SampleRollout | StateRollout | TransitionRollout | BranchRollout


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch of images: `total` is what a run maximises, `parts` are reported beside it."""

    total: Float[Tensor, " b"]
    parts: Mapping[str, Float[Tensor, " b"]]


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a batch of images.

    Attributes:
        vectors: one embedding per image, which distances between sets of images compare.
        maps: activations over the image, scaled so that the squared Euclidean distance of two rows is the
            perceptual distance of the two images.
    """

    vectors: Float[Tensor, "b d"]
    maps: Float[Tensor, "b m"]


@dataclass(frozen=True)
class PartialRewardOutput(RewardOutput):
    """Scores of a batch in which some images could not be scored: `scored` is False there, and the total NaN.

    Only a reward that may leave images without a score returns it (`on_failure: drop-group`). A consumer that does not
    know this type gets the NaN, which is an error everywhere; one that does leaves out the whole prompt group.
    """

    scored: Bool[Tensor, " b"]


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the reward of every sample. `advantages` are already grouped, normalised and clamped."""

    rollout: Rollout
    rewards: RewardOutput
    advantages: Float[Tensor, " n"]


@dataclass(frozen=True)
class Batch:
    """Rows that an objective can turn into a loss; any subset of rows is a Batch again.

    `rows` maps names that the objective documents to tensors with one leading row dimension; `cond` has one row
    each as well. The loss over a whole Batch is the mean over its rows, so micro-batch losses combine by row count.
    """

    rows: Mapping[str, Tensor]
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.cond)

    def select(self, index: Int[Tensor, " k"]) -> Batch:
        """The given rows, in the given order."""
        return Batch({name: x[index.to(x.device)] for name, x in self.rows.items()}, self.cond.select(index))

    def with_rows(self, **rows: Tensor) -> Batch:
        """The same batch with some columns replaced or added."""
        return replace(self, rows={**self.rows, **rows})

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(torch.arange(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Loss:
    """A differentiable scalar and the detached scalars worth logging (row means, except keys ending in `_max`)."""

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]


def cat_transitions(parts: Sequence[Transition]) -> Transition:
    """The same step of several chunks of samples, one after the other."""
    if len({p.index for p in parts}) != 1:
        raise ValueError("transitions of different steps cannot be concatenated")
    tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Transition) if f.name != "index"}
    return Transition(index=parts[0].index, **tensors)
