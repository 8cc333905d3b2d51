"""The Python model of a repository for NVIDIA Triton: prompts in, images out, with every graph a model of the server.

`fmg export --triton` copies this module, and what it imports of fmg, into the repository, so a server samples with the
same code as `fmg generate`. It needs numpy and tokenizers, and `triton_python_backend_utils` of the server, which is
imported when the server loads the model.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.display import counted
from fmg.core.errors import FmgError, UsageError, reason
from fmg.core.json_io import parse_object
from fmg.core.pixels import to_uint8
from fmg.core.profiling import StageClock, wall_clock
from fmg.inference.artifact.backend import ArtifactBackend, artifact_backend
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import BATCH, MANIFEST, SAMPLER, TensorSpec
from fmg.inference.artifact.manifest_io import from_json
from fmg.inference.generator import Generator, image_seeds

PROMPT, SEED, STEPS, SIZE, IMAGE = "prompt", "seed", "steps", "size", "image"
"""Inputs of a request, of which only the prompt is required, and its output."""

GRAPH, ROWS = "graph.", "rows."
"""Prefixes of parameters in `config.pbtxt`, before the name of a graph: the name of its model on the server, and the
most rows that the model takes, if the Python model takes more."""
TRANSFORMER, WHOLE_SHAPES, MAX_STEPS, MAX_PROMPT = "transformer", "whole_shapes", "max_steps", "max_prompt"
"""Further parameters in `config.pbtxt`: which graph is the transformer, the graphs whose model has `max_batch_size: 0`,
and the limits on steps and on the characters of a prompt."""

_INTERNAL = "See the log of the server."


def served_axes(spec: TensorSpec) -> tuple[int | str, ...]:
    """The axes of one row of a tensor, as the model of a graph takes it when the server forms the batches.

    The server adds the batch axis, and it has no rows without axes: a number per row becomes (1). What all rows share,
    such as the positions of image tokens, is repeated for each.
    """
    axes = spec.shape[1:] if has_batch(spec) else spec.shape
    return axes or (1,)


def has_batch(spec: TensorSpec) -> bool:
    """Whether a tensor of a graph has a batch axis."""
    return spec.shape[:1] == (BATCH,)


class TritonRuntime:
    """The graphs of an artifact as models of the server. Implements `fmg.inference.artifact.backend.GraphRuntime`.

    Args:
        utils: the module `triton_python_backend_utils`.
        artifact: whose graphs they are.
        models: name of the model by graph.
        version: their version.
        rows: most rows per call by graph; none is no limit.
        whole_shapes: graphs whose model takes whole tensors, with `max_batch_size: 0`.
    """

    name = "triton"
    detail = "models of the server"
    device = "server"

    def __init__(
        self,
        utils: Any,
        artifact: Artifact,
        models: Mapping[str, str],
        version: int,
        rows: Mapping[str, int],
        whole_shapes: Iterable[str],
    ) -> None:
        self._utils = utils
        self._artifact = artifact
        self._models = models
        self._version = version
        self._rows = rows
        self._whole_shapes = frozenset(whole_shapes)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The single output of a graph.

        Raises:
            FmgError: the server has no such model, or the model failed.
        """
        (output,) = self.outputs(graph, inputs).values()
        return output

    def outputs(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of a graph by name; errors as `run`."""
        batched = [spec.name for spec in self._artifact.graph(graph).inputs if has_batch(spec)]
        count = len(inputs[batched[0]])
        most = self._rows.get(graph, count)
        parts = []
        for start in range(0, count, most):
            rows = slice(start, start + most)
            parts.append(self._call(graph, {name: x[rows] if name in batched else x for name, x in inputs.items()}))
        return parts[0] if len(parts) == 1 else {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}

    def _call(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        utils, described, model = self._utils, self._artifact.graph(graph), self._models[graph]
        by_row = graph not in self._whole_shapes
        entering = _by_row(described.inputs, inputs) if by_row else inputs
        response = utils.InferenceRequest(
            model_name=model,
            model_version=self._version,
            requested_output_names=[spec.name for spec in described.outputs],
            inputs=[utils.Tensor(name, np.ascontiguousarray(array)) for name, array in entering.items()],
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise FmgError(f"The model '{model}' failed: {response.error().message()}", _INTERNAL)
        found = {}
        for spec in described.outputs:
            # a copy, because the server frees the memory of a response
            array = np.array(utils.get_output_tensor_by_name(response, spec.name).as_numpy())
            found[spec.name] = array.reshape(array.shape[: len(spec.shape)]) if by_row else array
        return found

    def free(self, graphs: Iterable[str]) -> None:
        """Does nothing: the server decides what stays loaded."""

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def get(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def clock(self) -> StageClock[Any]:
        return wall_clock()

    def reset_peak_memory(self) -> None:
        """Does nothing: the server counts the memory of its models."""

    def peak_memory(self) -> int:
        return 0

    def close(self) -> None:
        """Does nothing: there is nothing to free."""


def _by_row(specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs of a graph row by row, in the form of `served_axes`."""
    count = next(len(inputs[spec.name]) for spec in specs if has_batch(spec))
    rows = {}
    for spec in specs:
        array = inputs[spec.name]
        if not has_batch(spec):
            array = np.broadcast_to(array, (count, *array.shape))
        rows[spec.name] = array[:, None] if array.ndim == 1 else array
    return rows


@dataclass(frozen=True)
class _Row:
    """One image to generate."""

    prompt: str
    seed: int
    steps: int
    size: int


@dataclass
class _Job:
    """One request: its rows, their images once they are generated, and the first error."""

    rows: Sequence[_Row] = ()
    images: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    error: FmgError | None = None


class TritonPythonModel:
    """The interface of Triton's Python backend: `initialize` once per instance, `execute` for every batch."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Reads the manifest and the tokenizers.

        Raises:
            TritonModelException: of the server; a file of the model is missing or was changed.
        """
        import triton_python_backend_utils as utils

        self._utils = utils
        try:
            self._open(args)
        except FmgError as error:
            raise utils.TritonModelException(error.text) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request: its images, or its own error.

        Rows of all requests are generated together if they have equal steps and sizes.
        """
        jobs = [self._read(request) for request in requests]
        alike: dict[tuple[int, int], list[tuple[_Job, int]]] = defaultdict(list)
        for job in jobs:
            for place, row in enumerate(job.rows):
                alike[row.steps, row.size].append((job, place))
        for (steps, size), places in alike.items():
            self._generate(places, steps, self._at(size))
        return [self._response(job) for job in jobs]

    def _open(self, args: Mapping[str, str]) -> None:
        config: Any = parse_object(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        file = folder / MANIFEST
        artifact = Artifact(folder, from_json(file.read_bytes(), file))
        artifact.check_hashes([facts.file for facts in artifact.manifest.tokenizers.values()], afresh=True)
        models = {key.removeprefix(GRAPH): name for key, name in given.items() if key.startswith(GRAPH)}
        rows = {key.removeprefix(ROWS): int(most) for key, most in given.items() if key.startswith(ROWS)}
        whole = given.get(WHOLE_SHAPES, "").split(",")
        runtime = TritonRuntime(self._utils, artifact, models, int(args["model_version"]), rows, whole)
        self._sampling = artifact.manifest.sampling
        self._backend: ArtifactBackend[Any] = artifact_backend(
            artifact, runtime, transformer=given[TRANSFORMER], fused=SAMPLER in models
        )
        self._batch = int(config["max_batch_size"])
        self._max_steps, self._max_prompt = int(given[MAX_STEPS]), int(given[MAX_PROMPT])
        self._generators: dict[int, Generator] = {}
        self._at(self._sampling.resolution)

    def _at(self, size: int) -> Generator:
        """The sampler of images of a size.

        Raises:
            UsageError: the artifact has no such size.
        """
        if size not in self._generators:
            self._generators[size] = Generator(
                self._backend.at(size), self._sampling.grid, self._sampling.steps, self._batch, tells=False
            )
        return self._generators[size]

    def _read(self, request: Any) -> _Job:
        try:
            return _Job(self._rows(request))
        except UsageError as error:
            return _Job(error=error)

    def _rows(self, request: Any) -> list[_Row]:
        """What a request asks for.

        Raises:
            UsageError: a value that this model does not take.
        """
        prompts = [_text(value) for value in self._values(request, PROMPT)]
        if any(len(prompt) > self._max_prompt for prompt in prompts):
            raise UsageError(f"A prompt has more than {self._max_prompt} characters", "Shorten it.")
        seeds = image_seeds(self._values(request, SEED) or 0, prompts)
        steps = self._values(request, STEPS) or [self._sampling.steps] * len(prompts)
        sizes = self._values(request, SIZE) or [self._sampling.resolution] * len(prompts)
        if len(set(sizes)) > 1:
            raise UsageError("The images of one request have different sizes", "Send one request for each size.")
        for count in set(steps):
            if count > self._max_steps:
                raise UsageError(f"{count} steps are more than this model takes", f"Ask for up to {self._max_steps}.")
            self._at(sizes[0]).times(count)
        return [_Row(*row) for row in zip(prompts, seeds, steps, sizes, strict=True)]

    def _values(self, request: Any, name: str) -> list[Any]:
        """The values of an input by row; none if it was left out."""
        tensor = self._utils.get_input_tensor_by_name(request, name)
        return [] if tensor is None else tensor.as_numpy().reshape(-1).tolist()

    def _generate(self, places: Sequence[tuple[_Job, int]], steps: int, generator: Generator) -> None:
        rows = [job.rows[place] for job, place in places]
        prompts = [row.prompt for row in rows]
        try:
            if cut := self._backend.cut_prompts(prompts):
                self._utils.Logger.log_warn(cut)
            made = generator.generate(prompts, [row.seed for row in rows], steps=steps, progress=_silent)
        except Exception as error:
            # no error may reach requests of other batches
            self._utils.Logger.log_error("".join(traceback.format_exception(error)))
            failure = error if isinstance(error, FmgError) else FmgError(f"Sampling failed: {reason(error)}", _INTERNAL)
            for job, _ in places:
                job.error = job.error or failure
            return
        finite = [bool(np.isfinite(image).all()) for image in made.image_array]
        for (job, place), image, usable in zip(places, made.image_array, finite, strict=True):
            if usable:
                job.images[place] = to_uint8(image)
            else:
                what = f"The image of seed {job.rows[place].seed} has values that are not finite"
                job.error = job.error or FmgError(what, "Use another precision or other weights.")

    def _response(self, job: _Job) -> Any:
        utils = self._utils
        if job.error is not None:
            asked = isinstance(job.error, UsageError)
            code = utils.TritonError.INVALID_ARG if asked else utils.TritonError.INTERNAL
            return utils.InferenceResponse(error=utils.TritonError(str(job.error), code))
        images = np.stack([job.images[place] for place in range(len(job.rows))])
        return utils.InferenceResponse(output_tensors=[utils.Tensor(IMAGE, images)])


def _text(value: Any) -> str:
    """A prompt from its bytes.

    Raises:
        UsageError: they are not UTF-8.
    """
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise UsageError(f"A prompt of {counted(len(value), 'byte')} is not UTF-8", "Encode it as UTF-8.") from None


def _silent(done: int, total: int) -> None:
    """Shows no progress."""
