"""Every number of the pretraining in one place. `SHAPES` and `TEXT` are the settings of the shipped weights."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AutoencoderSettings:
    """Stage 1. `latent_noise` is added to unit-variance latents before decoding."""

    width: int = 24
    latent_channels: int = 4
    pool: int = 12_000
    steps: int = 2200
    batch: int = 64
    lr: float = 3e-3
    latent_noise: float = 0.12
    regulariser: float = 0.1


@dataclass(frozen=True)
class TextSettings:
    """Sizes of the text side; lengths are numbers of tokens of a padded prompt."""

    clip_length: int = 16
    t5_length: int = 16
    t5_layers: int = 1
    pooled_dim: int = 64
    token_dim: int = 64


@dataclass(frozen=True)
class TransformerSettings:
    """Sizes of the FLUX transformer; see `FlowMapFluxTransformer2DModel`."""

    num_layers: int = 1
    num_single_layers: int = 4
    attention_head_dim: int = 32
    num_attention_heads: int = 4
    axes_dims_rope: tuple[int, int, int] = (8, 12, 12)
    time_scale: float = 1000.0


@dataclass(frozen=True)
class FlowSettings:
    """Stage 2.

    Training stops after `steps` of a cosine schedule that would end at `schedule_steps`; the average of the weights
    takes the place of the schedule's low-rate end. `muon_fp32` chooses `Fp32Muon`, here and in `DistillSettings`.
    """

    pool: int = 60_000
    steps: int = 1300
    schedule_steps: int = 2600
    batch: int = 128
    lr: float = 1.5e-3
    muon_lr: float = 0.02
    muon_fp32: bool = False
    ema: float = 0.998


@dataclass(frozen=True)
class TrajectorySettings:
    """Stage 3: `count` trajectories of `4 * subdivisions` midpoint steps each."""

    count: int = 8192
    batch: int = 256
    subdivisions: int = 3


@dataclass(frozen=True)
class DistillSettings:
    """Stages 4 and 5. `huber` is the pseudo-Huber constant, in units of the velocity's root mean square error.

    `from_scratch` trains the whole network from random weights, which an exact teacher requires.
    """

    steps: int = 800
    batch: int = 128
    lr: float = 1e-3
    muon_lr: float = 0.01
    muon_fp32: bool = False
    ema: float = 0.997
    huber: float = 0.1
    from_scratch: bool = False


@dataclass(frozen=True)
class PretrainSettings:
    """All stages. Without a flow the teacher is the exact one; without `single_time` no such model is made."""

    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    text: TextSettings = field(default_factory=TextSettings)
    transformer: TransformerSettings = field(default_factory=TransformerSettings)
    flow: FlowSettings | None = field(default_factory=FlowSettings)
    trajectories: TrajectorySettings = field(default_factory=TrajectorySettings)
    two_time: DistillSettings = field(default_factory=DistillSettings)
    single_time: DistillSettings | None = field(default_factory=lambda: DistillSettings(steps=600))
    evaluation_images: int = 2000


SHAPES = PretrainSettings()
"""The settings of `meanflow-shapes` and `scm-shapes`."""

TEXT = PretrainSettings(
    autoencoder=AutoencoderSettings(pool=5184, steps=700, batch=32),
    text=TextSettings(clip_length=22, t5_length=8),
    transformer=TransformerSettings(num_single_layers=2, num_attention_heads=2),
    flow=None,
    two_time=DistillSettings(steps=1500, batch=96, lr=1.5e-3, muon_lr=0.02, muon_fp32=True, from_scratch=True),
    single_time=None,
)
"""What made `meanflow-text`."""
