"""Writes a model repository for NVIDIA Triton Inference Server from an artifact, all or nothing. Imports no torch.

OUT/
  NAME/            Python backend: prompts in, images out (`fmg.inference.triton`)
    config.pbtxt
    1/model.py  1/fmg/…  1/manifest.json  1/tokenizer/…
  NAME_GRAPH/      one for each graph
    config.pbtxt
    1/model.onnx  1/GRAPH.safetensors      or 1/model.plan
  SHA256SUMS
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import fmg
from fmg.core.cache import content_hash
from fmg.core.display import counted
from fmg.core.errors import MissingDependencyError, UsageError, python_call
from fmg.core.events import Notice, Observer, ignore
from fmg.core.files import SUMS, atomic_folder, check_space, digest, sums_text
from fmg.inference.artifact.layout import Artifact, open_artifact
from fmg.inference.artifact.manifest import (
    BATCH,
    MANIFEST,
    SAMPLER,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    AxisRange,
    Graph,
    TensorSpec,
)
from fmg.inference.service.limits import DEFAULTS
from fmg.inference.target import without_folders
from fmg.inference.tensorrt.flavours import TENSORRT
from fmg.inference.tensorrt.records import EngineRecord, built_here, check_plan, needs_refit, read_records
from fmg.inference.triton import (
    GRAPH,
    IMAGE,
    MAX_PROMPT,
    MAX_STEPS,
    PROMPT,
    ROWS,
    SEED,
    SIZE,
    STEPS,
    WHOLE_SHAPES,
    has_batch,
    served_axes,
)
from fmg.inference.triton import TRANSFORMER as TRANSFORMER_PARAMETER
from fmg.version import __version__, install_line

Device = Literal["auto", "cpu", "gpu"]
CONFIG = "config.pbtxt"
PYTHON_MODEL = "fmg.inference.triton"
"""The module of the model that takes prompts."""

_WIDTH = 120
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
# the others need a GPU on ONNX Runtime
_ON_A_CPU = ("fp32", "fp16", "int8")
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_NAME = 100
_ENTRY = f'''"""Written by fmg export --triton."""

import sys
from pathlib import Path

# in front of any fmg that is installed on the server: this one was exported with the model
sys.path.insert(0, str(Path(__file__).resolve().parent))

from {PYTHON_MODEL} import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class TritonOptions:
    """How an artifact is served.

    Attributes:
        name: name of the model that takes prompts, in front of the names of the others; None: that of the model.
        device: where the graphs run; `auto`: on a GPU if the server has one.
        version: number of the version folder.
        int8: use the transformer with 8-bit weights.
        fused: use the fused sampler instead of transformer and decoder.
    """

    name: str | None = None
    device: Device = "auto"
    version: int = 1
    int8: bool = False
    fused: bool = False


@dataclass(frozen=True)
class TritonRepository:
    """A written repository.

    Attributes:
        folder: what a server gets as `--model-repository`.
        model: the model that takes prompts.
        backends: backend of every model by name.
        max_batch: most images per request and per batch.
    """

    folder: Path
    model: str
    backends: Mapping[str, str]
    max_batch: int


@python_call
def export_triton(
    artifact: str | PathLike[str],
    out: str | PathLike[str],
    options: TritonOptions | None = None,
    *,
    observer: Observer = ignore,
) -> TritonRepository:
    """Writes a model repository for Triton.

    Args:
        artifact: what `fmg export` made. Its TensorRT engines are taken if they were built on this computer.
        out: the folder to create.
        options: names, device and version.
        observer: told which engines are left out.

    Raises:
        UsageError: `out` exists or is in the artifact, an option does not fit the artifact, or the disk is too small.
        CheckpointError: the artifact is damaged.
        MissingDependencyError: the ONNX packages are not installed.
    """
    folder, chosen = Path(out), options or TritonOptions()
    if folder.exists():
        raise UsageError(f"{folder} exists already", "Write to another folder, or move that one away.")
    opened = open_artifact(Path(artifact))
    check_request(folder, opened.folder, chosen)
    repository = _Repository(opened, chosen, _engines(opened, chosen, observer))
    check_space(folder, repository.size())
    with atomic_folder(folder) as partial:
        repository.write(partial)
    return TritonRepository(folder, repository.name, repository.backends(), repository.max_batch)


def check_request(out: Path, artifact: Path, options: TritonOptions, precisions: Collection[str] = ()) -> None:
    """Checks what needs no artifact, so that none is exported in vain.

    Args:
        out: the folder to create.
        artifact: the folder of the artifact.
        options: as `export_triton`.
        precisions: of the graphs that ONNX Runtime will compute.

    Raises:
        UsageError: the options do not go together, or `out` is in the artifact.
    """
    if options.name is not None:
        _checked_name(options.name)
    if options.version < 1:
        raise UsageError(f"Version {options.version} is not a version of a model", "Give 1 or more (--triton-version).")
    if options.fused and options.int8:
        raise UsageError("The fused sampler has no 8-bit weights", "Leave out --int8 or --fused.")
    if out.resolve().is_relative_to(artifact.resolve()):
        raise UsageError(
            f"{out} is in the artifact {artifact}, which must not contain other files", "Write to another folder."
        )
    _check_devices(precisions, options)


@dataclass(frozen=True)
class _Served:
    """A graph as a model of the server.

    Attributes:
        key: name of the graph.
        model: name of the model.
        graph: its inputs and outputs.
        max_batch: most rows per call.
        plan: its engine, or None for ONNX Runtime.
    """

    key: str
    model: str
    graph: Graph
    max_batch: int
    plan: EngineRecord | None

    @property
    def backend(self) -> str:
        return "onnxruntime" if self.plan is None else "tensorrt"

    @property
    def whole_shapes(self) -> bool:
        """Whether the server cannot form its batches: an engine takes positions that all rows share."""
        return self.plan is not None and not all(map(has_batch, self.graph.inputs))


class _Repository:
    def __init__(self, artifact: Artifact, options: TritonOptions, engines: Mapping[str, EngineRecord]) -> None:
        manifest = artifact.manifest
        self._artifact = artifact
        self._options = options
        self.name = _checked_name(options.name or manifest.model.name)
        _check_graphs(artifact, options)
        self._transformer = TRANSFORMER_INT8 if options.int8 else TRANSFORMER
        sampler = SAMPLER if options.fused else self._transformer
        keys = [sampler if key == TRANSFORMER else key for key in manifest.required]
        if options.fused:
            keys.remove(VAE_DECODER)
        self._served = [self._serve(key, engines.get(key)) for key in keys]
        _check_devices([served.graph.precision for served in self._served if served.plan is None], options)
        self._sums: dict[str, str] = {}
        # of models whose batches the server forms; for others, the Python model splits larger batches into several
        # calls
        (self.max_batch,) = (served.max_batch for served in self._served if served.key == sampler)

    def _serve(self, key: str, plan: EngineRecord | None) -> _Served:
        manifest = self._artifact.manifest
        graph = manifest.graphs[key]
        most = manifest.axes[BATCH].maximum if plan is None else _rows_of(graph, plan)[1]
        return _Served(key, f"{self.name}_{key}", graph, most, plan)

    def backends(self) -> dict[str, str]:
        """Backend of every model by name."""
        return {self.name: "python", **{served.model: served.backend for served in self._served}}

    def size(self) -> int:
        """Bytes of the files that are copied from the artifact."""
        manifest = self._artifact.manifest
        plans = sum(served.plan.size for served in self._served if served.plan is not None)
        graphs = [served.key for served in self._served if served.plan is None]
        return plans + sum(manifest.files[name].size for key in graphs for name in manifest.weight_files(key))

    def write(self, folder: Path) -> None:
        """Fills the repository."""
        for served in self._served:
            self._write_graph(folder, served)
        self._write_sampler(folder)
        (folder / SUMS).write_text(sums_text(self._sums), encoding="utf-8")

    def _write_graph(self, folder: Path, served: _Served) -> None:
        version = f"{served.model}/{self._options.version}"
        if served.plan is not None:
            self._copy(folder, check_plan(self._artifact.engines, served.plan), f"{version}/model.plan")
        else:
            for name in self._artifact.manifest.weight_files(served.key):
                self._copy(folder, self._artifact.path(name), f"{version}/{name}")
            file, target = self._artifact.onnx(served.key), f"{version}/model.onnx"
            if all(map(has_batch, served.graph.inputs)):
                self._copy(folder, file, target)
            else:
                _write_batched(file, folder / target, served.graph.inputs)
                self._sums[target] = digest(folder / target)
        self._write_text(folder, f"{served.model}/{CONFIG}", pbtxt(self._graph_config(served)))

    def _write_sampler(self, folder: Path) -> None:
        """The model that takes prompts: its code, and what it needs of the artifact."""
        version = f"{self.name}/{self._options.version}"
        self._write_text(folder, f"{version}/model.py", _ENTRY)
        for module in python_modules(PYTHON_MODEL):
            source = _source(module)
            self._write_text(
                folder, f"{version}/{source.relative_to(_ROOT.parent).as_posix()}", source.read_text("utf-8")
            )
        for name in (MANIFEST, *(facts.file for facts in self._artifact.manifest.tokenizers.values())):
            self._copy(folder, self._artifact.path(name), f"{version}/{name}")
        self._write_text(folder, f"{self.name}/{CONFIG}", pbtxt(self._sampler_config()))

    def _copy(self, folder: Path, source: Path, name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # no hard link, which readers of external data may refuse
        shutil.copyfile(source, target)
        self._sums[name] = content_hash(source)

    def _write_text(self, folder: Path, name: str, text: str) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        self._sums[name] = digest(file)

    def _graph_config(self, served: _Served) -> dict[str, object]:
        manifest, graph = self._artifact.manifest, served.graph
        whole = served.whole_shapes
        group: dict[str, object] = {"kind": Word(_kind(served, self._options.device)), "count": 1}
        traced = {"fmg.graph.sha256": manifest.files[graph.file].sha256}
        weights = manifest.weight_files(served.key)
        traced["fmg.weights.sha256"] = ",".join(manifest.files[name].sha256 for name in weights)
        if served.plan is not None:
            made = served.plan.ingredients
            group["profile"] = [str(index) for index in range(len(made.profiles))]
            traced |= {"fmg.engine.sha256": served.plan.sha256, "fmg.engine.version": made.version}
            traced["fmg.engine.gpu"] = made.gpu
        return {
            "name": served.model,
            "backend": served.backend,
            "max_batch_size": 0 if whole else served.max_batch,
            "version_policy": _LATEST,
            "input": [_tensor(spec, manifest.axes, whole) for spec in graph.inputs],
            "output": [_tensor(spec, manifest.axes, whole) for spec in graph.outputs],
            **({} if whole else {"dynamic_batching": {}}),
            "instance_group": [group],
            "model_warmup": [
                self._warm_up(served, rows) for rows in dict.fromkeys((1, served.max_batch)) if rows == 1 or not whole
            ],
            "parameters": self._parameters(traced),
        }

    def _warm_up(self, served: _Served, rows: int) -> dict[str, object]:
        """A sample of zeros at the default size, with which the server runs a model before the first request."""
        axes = self._artifact.manifest.axes
        inputs = []
        for spec in served.graph.inputs:
            shape = spec.shape if served.whole_shapes else served_axes(spec)
            # where the server cannot form batches, the batch is an axis like the others
            sizes = [rows if axis == BATCH else axis if isinstance(axis, int) else axes[axis].optimum for axis in shape]
            value = {"data_type": Word(_TYPES[spec.dtype]), "dims": sizes, "zero_data": True}
            inputs.append({"key": spec.name, "value": value})
        return {"name": counted(rows, "row"), "batch_size": rows, "inputs": inputs}

    def _sampler_config(self) -> dict[str, object]:
        sampling = self._artifact.manifest.sampling
        fused = self._options.fused
        several = len(sampling.resolutions) > 1 and not fused
        side = -1 if several else sampling.resolution
        settings = {GRAPH + served.key: served.model for served in self._served}
        limits = {MAX_STEPS: str(DEFAULTS.max_steps), MAX_PROMPT: str(DEFAULTS.max_prompt)}
        settings |= {TRANSFORMER_PARAMETER: self._transformer, **limits}
        settings |= {
            ROWS + served.key: str(served.max_batch) for served in self._served if served.max_batch < self.max_batch
        }
        if whole := [served.key for served in self._served if served.whole_shapes]:
            settings[WHOLE_SHAPES] = ",".join(whole)
        return {
            "name": self.name,
            "backend": "python",
            "max_batch_size": self.max_batch,
            "version_policy": _LATEST,
            "input": [
                {"name": PROMPT, "data_type": Word("TYPE_STRING"), "dims": [1]},
                _optional(SEED, "TYPE_INT64"),
                *([] if fused else [_optional(STEPS, "TYPE_INT32")]),
                *([_optional(SIZE, "TYPE_INT32")] if several else []),
            ],
            "output": [{"name": IMAGE, "data_type": Word("TYPE_UINT8"), "dims": [side, side, 3]}],
            "dynamic_batching": {
                "max_queue_delay_microseconds": round(DEFAULTS.gather * 1_000_000),
                "default_queue_policy": {"max_queue_size": DEFAULTS.max_queued},
            },
            "instance_group": [{"kind": Word("KIND_CPU"), "count": 1}],
            "parameters": self._parameters(settings),
        }

    def _parameters(self, settings: Mapping[str, str]) -> list[dict[str, object]]:
        """Settings of a model, and where it comes from: a client reads both with the model's configuration."""
        manifest = self._artifact.manifest
        origin = {
            "fmg.version": __version__,
            "fmg.artifact.sha256": manifest.sampling_digest(),
            "fmg.model": manifest.model.name,
            "fmg.precision": manifest.precision,
        }
        if manifest.adapter is not None:
            # every client of the server can read it
            shared = without_folders(manifest.adapter)
            origin |= {"fmg.adapter.sha256": shared.digest, "fmg.adapter.run": shared.run}
        return [{"key": key, "value": {"string_value": text}} for key, text in {**settings, **origin}.items()]


_LATEST: Mapping[str, object] = {"latest": {"num_versions": 1}}


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise UsageError(
            f"'{name}' cannot be the name of a Triton model",
            f"Use up to {_MAX_NAME} letters, digits, dots, hyphens and underscores (--triton-name).",
        )
    return name


def _check_graphs(artifact: Artifact, options: TritonOptions) -> None:
    manifest = artifact.manifest
    if options.fused and SAMPLER not in manifest.graphs:
        raise UsageError(
            f"The artifact {artifact.folder} has no fused sampler", "Export with --fused, or leave out --fused."
        )
    if options.int8 and TRANSFORMER_INT8 not in manifest.graphs:
        raise UsageError(
            f"The artifact {artifact.folder} has no int8 transformer", "Export with --int8, or leave out --int8."
        )


def _check_devices(precisions: Collection[str], options: TritonOptions) -> None:
    """Checks where the graphs without an engine are to run, by their precisions."""
    if options.int8 and options.device == "gpu":
        raise UsageError("8-bit weights are for a CPU", "Leave out --int8, or use --triton-device cpu.")
    if "fp8" in precisions:
        raise UsageError(
            "fp8 runs only in TensorRT engines, and the artifact has none for its transformer",
            "Build one on the GPU of the server (fmg export ARTIFACT --trt --flavour tensorrt).",
        )
    gpu_only = [precision for precision in precisions if precision not in _ON_A_CPU]
    if options.device == "cpu" and gpu_only:
        raise UsageError(
            f"ONNX Runtime cannot compute {gpu_only[0]} on a CPU",
            "Export with --precision fp32, or use --triton-device gpu.",
        )


def _kind(served: _Served, device: str) -> str:
    """Where the instances of a graph run."""
    if served.plan is not None or served.graph.precision not in _ON_A_CPU:
        return "KIND_GPU"
    return "KIND_CPU" if served.graph.precision == "int8" else _KINDS[device]


def _engines(artifact: Artifact, options: TritonOptions, observer: Observer) -> dict[str, EngineRecord]:
    """The engine of each graph that Triton's TensorRT backend can take, that with the largest batches."""
    if options.device == "cpu" or options.int8:
        return {}
    graphs = artifact.manifest.graphs
    found: dict[str, EngineRecord] = {}
    for record in read_records(artifact.folder):
        if why := _unusable(artifact, record):
            observer(Notice("info", f"The engine {record.plan} is left out: {why}"))
            continue
        graph, other = graphs[record.graph], found.get(record.graph)
        if other is None or _rows_of(graph, other) < _rows_of(graph, record):
            found[record.graph] = record
    return found


def _unusable(artifact: Artifact, record: EngineRecord) -> str:
    """Why an engine is not served; empty if it is."""
    made, files = record.ingredients, artifact.manifest.files
    graph = artifact.manifest.graphs.get(record.graph)
    if made.flavour != TENSORRT.name:
        return f"Triton runs engines of TensorRT, not of {made.flavour}"
    if graph is None or made.onnx != files[graph.file].sha256 or needs_refit(artifact, record):
        return "it was built from another graph or other weights"
    if not built_here(record.sha256):
        return "it was not built on this computer"
    least, _ = _rows_of(graph, record)
    return f"it takes {least} rows or more" if least > 1 else ""


def _rows_of(graph: Graph, record: EngineRecord) -> tuple[int, int]:
    """The rows that every profile of an engine takes: the largest minimum and the smallest maximum."""
    name = next(spec.name for spec in graph.inputs if has_batch(spec))
    ranges = [profile.shapes[name] for profile in record.ingredients.profiles]
    return max(shape.minimum[0] for shape in ranges), min(shape.maximum[0] for shape in ranges)


def _write_batched(file: Path, out: Path, specs: Sequence[TensorSpec]) -> None:
    """Writes a graph that takes inputs shared by all rows once per row, and uses those of the first row.

    Triton forms batches of a graph only if all of its inputs have a batch axis; those of positions have none. The
    weights stay where they are, and the names of everything else too.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError(
            f"Batches of {file.name} need the package 'onnx'", f"Install it: {install_line('onnx')}."
        ) from None
    from onnx import TensorProto, helper

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    first = "fmg.first_row"
    graph.initializer.append(helper.make_tensor(first, TensorProto.INT64, [], [0]))
    for spec in specs:
        if has_batch(spec):
            continue
        shared = f"{spec.name}.shared"
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == spec.name:
                    node.input[place] = shared
        (value,) = (value for value in graph.input if value.name == spec.name)
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(spec.name, kind, (BATCH, *spec.shape)))
        graph.node.insert(0, helper.make_node("Gather", [spec.name, first], [shared], name=shared, axis=0))
    out.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(out))


def _tensor(spec: TensorSpec, axes: Mapping[str, AxisRange], whole: bool) -> dict[str, object]:
    """An input or output in `config.pbtxt`; an axis that the artifact fixes has a number there too."""
    shape = spec.shape if whole else served_axes(spec)
    sizes = [axis if isinstance(axis, int) else _fixed(axes[axis]) for axis in shape]
    stated: dict[str, object] = {"name": spec.name, "data_type": Word(_TYPES[spec.dtype]), "dims": sizes}
    if not whole and spec.shape == (BATCH,):
        stated["reshape"] = {"shape": []}
    return stated


def _fixed(axis: AxisRange) -> int:
    return axis.maximum if axis.minimum == axis.maximum else -1


def _optional(name: str, kind: str) -> dict[str, object]:
    return {"name": name, "data_type": Word(kind), "dims": [1], "optional": True}


class Word(str):
    """A value of an enumeration, which protobuf's text format writes without quotes."""


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: a mapping is a message, and a list repeats its field."""
    return "".join(_pbtxt_fields(message, indent))


def _pbtxt_fields(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(entry, Mapping) for entry in value):
            yield f"{indent}{name}: [{', '.join(map(_pbtxt_value, value))}]\n"
            continue
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, Mapping):
                yield f"{indent}{name}: {_pbtxt_value(entry)}\n"
                continue
            inner = pbtxt(entry, indent + "  ")
            lines = inner.split("\n")[:-1]
            short = " ".join([f"{indent}{name} {{", *(line.strip() for line in lines), "}"])
            yield f"{short}\n" if len(short) <= _WIDTH else f"{indent}{name} {{\n{inner}{indent}}}\n"


def _pbtxt_value(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


_ROOT = Path(fmg.__file__).parent


def python_modules(module: str) -> list[str]:
    """A module of fmg and everything of fmg that it imports at the top level, directly or not, with their packages."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += _imports(ast.parse(_source(name).read_text("utf-8")))
    return sorted(found)


def _imports(tree: ast.Module) -> Iterator[str]:
    # those inside functions and under `if TYPE_CHECKING` are not run when a module is imported
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == fmg.__name__)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == fmg.__name__:
            yield node.module
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in inner if _source(name).is_file())


def _source(module: str) -> Path:
    """The file of a module of fmg; a file that is not there for a name that is no module."""
    place = _ROOT.parent.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
