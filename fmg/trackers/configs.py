"""Options of the trackers. Imports no torch.

Servers are not options, because a recipe from elsewhere must not decide where metrics and images go. Each service reads
its own environment variables for them (docs/trackers.md).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fmg.registry.config import About, TrackerConfig


class TensorBoardConfig(TrackerConfig):
    """TensorBoard event files in the run folder. Values are stored in fp32."""

    about: ClassVar[About] = About(licence="tensorboard: Apache-2.0")
    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"


class ProjectConfig(TrackerConfig):
    """Options shared by all services but TensorBoard."""

    project: str = Field(
        default="fmg", min_length=1, description="project (MLflow: experiment) that the run belongs to"
    )
    run_name: str | None = Field(
        default=None, min_length=1, description="name that is shown; null: the name of the run folder"
    )


class WandbConfig(ProjectConfig):
    """Weights & Biases. Without a login the run is kept in the run folder, for `wandb sync`."""

    about: ClassVar[About] = About(licence="wandb: MIT")
    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    entity: str | None = Field(default=None, min_length=1, description="user or team; null: the default of the login")
    group: str | None = Field(default=None, min_length=1, description="group of runs that belong together")
    tags: tuple[str, ...] = Field(default=(), description="tags of the run")
    offline: bool | None = Field(default=None, description="whether to stay offline; null: only without a login")


class TrackioConfig(ProjectConfig):
    """Trackio, a local dashboard with the interface of Weights & Biases."""

    about: ClassVar[About] = About(licence="trackio: MIT")
    package: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"


class SwanLabConfig(ProjectConfig):
    """SwanLab. Without a login the run is kept in the run folder, for `swanlab sync`."""

    about: ClassVar[About] = About(licence="swanlab: Apache-2.0")
    package: ClassVar[str] = "swanlab"
    extra: ClassVar[str] = "swanlab"

    workspace: str | None = Field(
        default=None, min_length=1, description="user or organisation; null: that of the login"
    )
    tags: tuple[str, ...] = Field(default=(), description="tags of the run")
    offline: bool | None = Field(default=None, description="whether to stay offline; null: only without a login")


class MlflowConfig(ProjectConfig):
    """MLflow: the server that MLFLOW_TRACKING_URI names, or MLflow's own local store."""

    about: ClassVar[About] = About(licence="mlflow: Apache-2.0")
    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"
