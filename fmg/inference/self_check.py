"""Checks of an artifact on its own: its files, and that it generates images. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import Check
from fmg.inference.generator import Generator
from fmg.inference.loading import AUTO, load

SCHEMA = 1
# names of checks, as stored in manifests
FILES, DRAWING = "files", "drawing"
# short, so that no model truncates them
_PROMPTS = ("red", "blue", "red")
_SEEDS = (0, 1, 0)
# One level of an 8-bit image: equal rows of a batch are not always equal bit for bit
_SAME = 1 / 255


@dataclass(frozen=True)
class VerifyReport:
    """The result of the checks.

    Attributes:
        artifact: its folder.
        against: the run or model it was compared with; empty for none.
        level: `alone`, `quick` or `full`.
        backend: what ran the graphs, and how.
        checks: in the order in which they were made.
    """

    artifact: str
    against: str
    level: str
    backend: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values (docs/schemas/verify.schema.json)."""
        return {"schema": SCHEMA, "passed": self.passed, **asdict(self)}


def verify_alone(artifact: Artifact, *, backend: str = AUTO, device: str = AUTO) -> VerifyReport:
    """Checks the hashes of all files, and that images can be generated again; needs neither torch nor the run.

    Raises:
        CheckpointError: a file is not the exported one or not in the manifest, or a graph cannot be loaded.
    """
    files = check_files(artifact)
    with load(artifact, backend=backend, device=device) as generator:
        checks = (files, check_generation(artifact, generator))
        return VerifyReport(str(artifact.folder), "", "alone", described(generator), checks)


def described(generator: Generator) -> str:
    """A readable description of what a generator runs on."""
    return f"{generator.backend.name} ({generator.backend.detail})"


def check_files(artifact: Artifact) -> Check:
    """Reads every file again and compares its hash; refuses other files, and graphs that point to others.

    Raises:
        CheckpointError: naming the first that is missing, is a link, has different content, or does not belong here.
    """
    artifact.check_hashes(afresh=True)
    artifact.check_listed()
    for graph in artifact.manifest.graphs:
        artifact.onnx(graph)
    size = sum(entry.size for entry in artifact.manifest.files.values())
    values = {"files": float(len(artifact.manifest.files)), "bytes": float(size)}
    return Check(FILES, True, values, "", artifact.manifest.sampling_digest())


def check_generation(artifact: Artifact, generator: Generator) -> Check:
    """Generates three images, two of them from one prompt and seed."""
    images = generator.generate(_PROMPTS, _SEEDS, progress=False).image_array.astype(np.float64)
    finite = bool(np.isfinite(images).all())
    repeat, other = (float(np.abs(images[0] - images[i]).max()) if finite else 1.0 for i in (2, 1))
    problems = {
        "an image has values that are not finite": not finite,
        "values are outside [0, 1]": finite and not (images.min() >= 0 and images.max() <= 1),
        "the same prompt and seed gave two different images": finite and repeat > _SAME,
        "two prompts gave the same image": other <= _SAME,
    }
    found = [problem for problem, there in problems.items() if there]
    return Check(DRAWING, not found, {"repeat": repeat}, "; ".join(found), artifact.manifest.sampling_digest())
