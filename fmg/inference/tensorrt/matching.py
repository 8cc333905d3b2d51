"""Which of an artifact's engines can draw it on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmg.core.errors import UsageError
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    GRAPHS,
    HEIGHT,
    IMAGE,
    TEXT,
    TEXT_ENCODER_2,
    WIDTH,
    TensorSpec,
)
from fmg.inference.tensorrt.flavours import Flavour, Gpu
from fmg.inference.tensorrt.record import EngineRecord, Profile, read_records


@dataclass(frozen=True)
class Machine:
    """What engines have to fit: the flavour, its version, and the GPU."""

    flavour: Flavour
    version: str
    gpu: Gpu | None


def fitting_engines(artifact: Artifact, machine: Machine, resolution: int | None = None) -> Mapping[str, EngineRecord]:
    """An engine for every graph. One built from the weights that the artifact has now goes before a refittable one.

    Args:
        artifact: the artifact.
        machine: where the engines shall run.
        resolution: side of the image in pixels; None takes the artifact's own.

    Raises:
        UsageError: some graph has no engine that fits, and why.
        CheckpointError: a record is damaged.
    """
    records = read_records(artifact.folder)
    return {graph: _fitting(artifact, graph, records, machine, resolution) for graph in GRAPHS}


def needs_refit(artifact: Artifact, record: EngineRecord) -> bool:
    """Whether an engine holds other weights than the artifact does."""
    return record.ingredients.weights != artifact.manifest.weights_digest(record.graph)


def _fitting(
    artifact: Artifact, graph: str, records: list[EngineRecord], machine: Machine, resolution: int | None
) -> EngineRecord:
    of_flavour = [r for r in records if r.graph == graph and r.ingredients.flavour == machine.flavour.name]
    reasons = {record.plan: _misfit(artifact, record, machine, resolution) for record in of_flavour}
    fitting = [record for record in of_flavour if not reasons[record.plan]]
    if fitting:
        return min(fitting, key=lambda record: needs_refit(artifact, record))
    why = "; ".join(f"{plan} {reason}" for plan, reason in reasons.items())
    raise UsageError(
        f"The artifact {artifact.folder} has no {machine.flavour.backend} engine of '{graph}' that fits here"
        f"{f': {why}' if why else ''}",
        f"Build one: fmg export --trt --flavour {machine.flavour.name}, or use --backend onnxruntime.",
    )


def _misfit(artifact: Artifact, record: EngineRecord, machine: Machine, resolution: int | None) -> str:
    manifest = artifact.manifest
    entry = manifest.graphs[record.graph]
    made = record.ingredients
    if made.onnx != manifest.files[entry.file].sha256:
        return "was built from another graph"
    if needs_refit(artifact, record) and not made.options.get("refittable"):
        return "was built from other weights"
    if reason := record.fits(machine.flavour, machine.version, machine.gpu):
        return f"was {reason}" if reason.startswith("built") else f"cannot run: {reason}"
    side = resolution or manifest.sampling.resolution
    _, height, width = manifest.sampling.latent_shape(side)
    fixed = {
        IMAGE: manifest.sampling.image_tokens(side),
        HEIGHT: height,
        WIDTH: width,
        TEXT: manifest.tokenizers[TEXT_ENCODER_2].length,
    }
    covered = any(_covers(profile, entry.inputs, fixed) for profile in made.profiles)
    return "" if covered else f"has no profile for {side} px"


def _covers(profile: Profile, inputs: tuple[TensorSpec, ...], fixed: Mapping[str, int]) -> bool:
    """Whether a profile has an engine's inputs with these sizes of named axes; rows are left open."""
    for spec in inputs:
        if spec.name not in profile.shapes:
            return False
        allowed = profile.shapes[spec.name]
        # an axis that is neither fixed nor named here is the batch, which runtimes cut to what fits
        shape = tuple(
            axis if isinstance(axis, int) else fixed.get(axis, low)
            for axis, low in zip(spec.shape, allowed.minimum, strict=True)
        )
        if not allowed.admits(shape):
            return False
    return True
