"""Options of the optimizers. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fmg.registry.config import About, ComponentConfig

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(ComponentConfig):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.99), description="decay of the gradient's two moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")


class AdamW8bitConfig(AdamWConfig):
    """AdamW with 8-bit moments in blocks of 256 (Dettmers et al., arXiv 2110.02861), by bitsandbytes."""

    about: ClassVar[About] = About(
        licence="bitsandbytes: MIT", citation="Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization"
    )


class SgdConfig(ComponentConfig):
    """Stochastic gradient descent with momentum."""

    lr: float = Field(default=1e-2, gt=0, description="learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="decay of the velocity")
    nesterov: bool = Field(default=False, description="Nesterov's form; ignored without momentum")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty added to the gradient")


class MuonConfig(ComponentConfig):
    """Muon (Jordan et al., 2024) on matrices, AdamW on every other parameter."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate of both")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of Muon's velocity")
    nesterov: bool = Field(default=True, description="Nesterov's form of Muon's velocity")
    ns_steps: int = Field(default=5, ge=1, lt=100, description="Newton-Schulz iterations of the orthogonalisation")
    adjust_lr: Literal["original", "match_rms_adamw"] = Field(
        default="match_rms_adamw",
        description="scale of a matrix's step by its shape; match_rms_adamw suits AdamW rates",
    )
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay of both")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.99), description="AdamW's moments")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's eps")


class AdafactorConfig(ComponentConfig):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235)."""

    lr: float = Field(default=1e-3, gt=0, description="relative step size")
    beta2_decay: float = Field(default=-0.8, le=0, description="exponent of the second moment's decay over steps")
    clip_threshold: float = Field(default=1.0, ge=1, description="bound on the root mean square of a step")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
