"""A stand-in for `triton_python_backend_utils`, on a server that runs its models with ONNX Runtime in this process.

It is as strict as the server: it checks requests against `config.pbtxt`, and configurations against the graphs as
Triton's ONNX Runtime backend does. Needs only numpy and onnxruntime, so it also runs where fmg is not installed.
"""

from __future__ import annotations

import importlib
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime

TRITONSERVER_MEMORY_CPU = 0
TYPES = {"TYPE_FP32": "float32", "TYPE_INT64": "int64", "TYPE_INT32": "int32", "TYPE_UINT8": "uint8"}
ONNX_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}


class TritonModelException(Exception):  # noqa: N818 - the name of the real one
    pass


class TritonError:
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        assert isinstance(message, str)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class PreferredMemory:
    def __init__(self, kind: int, device: int = 0) -> None:
        self.kind = kind


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class InferenceRequest:
    """A request of a Python model to another model, or, with `inputs` alone, of a client."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        model_version: int = -1,
        preferred_memory: PreferredMemory | None = None,
    ) -> None:
        self.tensors = {tensor.name(): tensor for tensor in inputs}
        self.model, self.version, self.outputs = model_name, model_version, requested_output_names
        self.on_the_cpu = preferred_memory is not None and preferred_memory.kind == TRITONSERVER_MEMORY_CPU

    def exec(self) -> InferenceResponse:
        return Server.running.answer(self)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_warn(cls, line: str) -> None:
        cls.lines.append(line)

    log_error = log_warn


class RefusedError(Exception):
    pass


class Server:
    """A repository that is served.

    Args:
        repository: the folder.
        configs: `config.pbtxt` of every model as JSON, in the form that Python models get.
        graphs: graphs to run in place of engines, by the names of the models.
    """

    running: Server

    def __init__(self, repository: Path, configs: Mapping[str, Any], graphs: Mapping[str, Path] = {}) -> None:
        self.configs = configs
        self.calls: list[tuple[str, int]] = []
        self._repository = repository
        self._sessions = {}
        for name, config in configs.items():
            assert config["name"] == name
            assert [entry.name for entry in (repository / name).iterdir() if entry.is_dir()] == ["1"]
            if config["backend"] != "python":
                file = graphs.get(name, repository / name / "1" / "model.onnx")
                self._sessions[name] = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                self._check_model(name)
        Server.running = self

    def load(self, name: str) -> Any:
        """A Python model, imported as the server does."""
        folder = self._repository / name
        sys.path += [str(folder / "1"), str(folder), str(Path(__file__).parent)]
        return self.started(importlib.import_module("1.model").TritonPythonModel(), name)

    def started(self, model: Any, name: str) -> Any:
        model.initialize(
            {
                "model_config": json.dumps(self.configs[name]),
                "model_repository": str(self._repository / name),
                "model_version": "1",
                "model_name": name,
            }
        )
        return model

    def warm_up(self) -> int:
        """Runs the samples of all models; how many there were."""
        count = 0
        for name, config in self.configs.items():
            for sample in config["model_warmup"]:
                tensors = []
                for key, value in sample["inputs"].items():
                    sizes = [int(size) for size in value["dims"]]
                    batched = config["max_batch_size"] > 0
                    shape = [sample["batch_size"], *sizes] if batched else sizes
                    assert value["zero_data"]
                    assert -1 not in shape
                    tensors.append(Tensor(key, np.zeros(shape, TYPES[value["data_type"]])))
                names = [output["name"] for output in config["output"]]
                answer = self.answer(InferenceRequest(tensors, name, names, 1, PreferredMemory(0)))
                assert not answer.has_error(), answer.error().message()
                count += 1
        return count

    def answer(self, request: InferenceRequest) -> InferenceResponse:
        try:
            assert request.on_the_cpu, "the output would stay on the GPU, where numpy cannot read it"
            return InferenceResponse(self._run(request))
        except (RefusedError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument) as error:
            return InferenceResponse(error=TritonError(f"{error}"))

    def _run(self, request: InferenceRequest) -> list[Tensor]:
        if request.model not in self._sessions or request.version not in (1, -1):
            raise RefusedError(f"there is no model {request.model} {request.version}")
        config = self.configs[request.model]
        most = config["max_batch_size"]
        given = {name: tensor.as_numpy() for name, tensor in request.tensors.items()}
        rows = {len(array) for array in given.values()} if most else {0}
        if len(rows) > 1 or max(rows) > most:
            raise RefusedError(f"batches of {sorted(rows)} rows for a model of {most}")
        if given.keys() != {spec["name"] for spec in config["input"]}:
            raise RefusedError(f"inputs {sorted(given)}")
        self.calls.append((request.model, *rows))
        inputs = {spec["name"]: fitted(spec, given[spec["name"]], most, "reshape") for spec in config["input"]}
        session = self._sessions[request.model]
        names = [output.name for output in session.get_outputs()]
        made = dict(zip(names, session.run(None, inputs), strict=True))
        outputs = []
        for spec in config["output"]:
            array = made[spec["name"]]
            if most and not wanted(spec, "reshape") and "reshape" in spec:
                array = array[:, None]
            fitted(spec, array, most, "dims")
            if spec["name"] in request.outputs:
                tensor = Tensor(spec["name"], array)
                # the server frees the memory of a response that nobody holds
                weakref.finalize(tensor, array.fill, 0)
                outputs.append(tensor)
        return outputs

    def _check_model(self, name: str) -> None:
        """As the backend checks a configuration when it loads the graph."""
        config, session = self.configs[name], self._sessions[name]
        batched = config["max_batch_size"] > 0
        for stated, real in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
            assert {spec["name"] for spec in stated} == {tensor.name for tensor in real}
            for tensor in real:
                (spec,) = (spec for spec in stated if spec["name"] == tensor.name)
                assert ONNX_TYPES[spec["data_type"]] == tensor.type
                axes = [axis if isinstance(axis, int) else -1 for axis in tensor.shape]
                assert not batched or axes[0] == -1, f"{name} {tensor.name} has no batch axis"
                full = [*([-1] if batched else []), *wanted(spec, "reshape")]
                assert len(full) == len(axes), (name, tensor.name, full, axes)
                assert all(axis in (-1, size) for axis, size in zip(axes, full, strict=True)), (tensor.name, full, axes)


def wanted(spec: Mapping[str, Any], which: str) -> list[int]:
    """The sizes of a tensor: those that a client sends, or those that the backend gets."""
    if which == "reshape" and "reshape" in spec:
        return [int(size) for size in spec["reshape"]["shape"]]
    return [int(size) for size in spec["dims"]]


def fitted(spec: Mapping[str, Any], array: np.ndarray, most: int, which: str) -> np.ndarray:
    """A tensor that fits its configuration, in the other form."""
    sizes = wanted(spec, "dims")
    shape = array.shape[1:] if most else array.shape
    fits = len(sizes) == len(shape) and all(a in (-1, b) for a, b in zip(sizes, shape, strict=True))
    if not fits or str(array.dtype) != TYPES[spec["data_type"]]:
        raise RefusedError(f"{spec['name']} is {array.dtype} {array.shape} instead of {spec['data_type']} {sizes}")
    if which == "reshape" and "reshape" in spec:
        return array.reshape([*array.shape[:1], *wanted(spec, "reshape")])
    return array


def asked(rows: Sequence[Mapping[str, Any]]) -> InferenceRequest:
    """A client's request for some images: of each the prompt, and optionally seed, steps and size."""
    kinds = {"prompt": np.object_, "seed": np.int64, "steps": np.int32, "size": np.int32}
    tensors = []
    for name, kind in kinds.items():
        if name in rows[0]:
            values = [row[name].encode() if isinstance(row[name], str) else row[name] for row in rows]
            tensors.append(Tensor(name, np.array(values, kind)[:, None]))
    return InferenceRequest(tensors)
