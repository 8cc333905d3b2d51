"""The types an engine computes in, as TensorRT's inspector reports them, whatever its build flags."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fmg.inference.artifact.manifest import Precision
from fmg.inference.tensorrt.engine import Engine

PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "gemm", "conv")
"""Name prefixes of layers that do most of the work, in networks and in inspected engines."""

_TYPES: Mapping[str, str] = {"fp32": "FLOAT", "bf16": "BF16", "fp16": "HALF"}
_NAMES: Mapping[str, str] = {**_TYPES, "fp8": "FP8", "int8": "INT8"}
# The inspector writes `Row major linear FP16` or `Half`, depending on version and kind of layer
_WORDS = (
    ("BF16", r"bf16|bfloat16"),
    ("FP8", r"fp8|e4m3|e5m2"),
    ("HALF", r"fp16|half"),
    ("FLOAT", r"fp32|float"),
    ("INT8", r"int8"),
    ("INT32", r"int32"),
    ("INT64", r"int64"),
    ("BOOL", r"bool"),
)
# Share of the products of a half-precision graph that may be fp32: the embedders of times
_FP32_SHARE = 0.1


@dataclass(frozen=True)
class EnginePrecision:
    """Layers by kind and by the type of their result, in TensorRT's names."""

    layers: Mapping[str, Mapping[str, int]]

    @property
    def types(self) -> Mapping[str, int]:
        """Layers by type, of all kinds together."""
        total: Counter[str] = Counter()
        for counts in self.layers.values():
            total.update(counts)
        return dict(sorted(total.items()))

    @property
    def products(self) -> Mapping[str, int]:
        """Matrix products and convolutions by type."""
        total: Counter[str] = Counter()
        for kind, counts in self.layers.items():
            if kind.lower().startswith(tuple(word.lower() for word in PRODUCTS)):
                total.update(counts)
        return dict(sorted(total.items()))

    def by_precision(self) -> Mapping[str, int]:
        """Products by the manifest's names (`fp32`, `bf16`, ...); all layers where no product can be recognised."""
        counts = self.products or self.types
        return {name: counts[kind] for name, kind in _NAMES.items() if kind in counts}

    def problem(self, precision: Precision, fp32: int = 0) -> str:
        """How the engine differs from the requested precision, in one clause; empty if it does not.

        Args:
            precision: of the graph.
            fp32: products that the graph itself computes in fp32, such as those of attention without a softmax.

        An engine of an fp32 graph has no narrower type in it. An engine of a bf16 or fp16 graph has products of that
        type, few in fp32 (embedders of times), and none of a third type. Where the inspector names no products,
        because kernels are fused beyond recognition, some layer must have that type. An engine of an fp8 graph is one
        of a bf16 graph in which some layers give fp8: what quantises the inputs of its products, or is fused with it.
        """
        if precision not in (*_TYPES, "fp8"):
            return f"engines have no precision '{precision}'"
        narrow, types = precision == "fp8", self.types
        wanted = _TYPES["bf16" if narrow else precision]
        if narrow and not types.get("FP8"):
            return "no layer computes in FP8, which was requested"
        foreign = sorted(types.keys() & ({"BF16", "HALF", "FP8", "INT8"} - {wanted} - ({"FP8"} if narrow else set())))
        if foreign:
            return f"{types[foreign[0]]} layers compute in {foreign[0]} where {wanted} was requested"
        products = self.products
        if not (products or types).get(wanted):
            return f"no layer computes in {wanted}, which was requested"
        wide = 0 if wanted == "FLOAT" else products.get("FLOAT", 0)
        total = products.get(wanted, 0) + wide
        if wide > max(fp32, _FP32_SHARE * total):
            return f"{wide} of {total} products compute in FLOAT where {wanted} was requested"
        return ""


def inspect(trt: ModuleType, engine: Engine) -> EnginePrecision | None:
    """The inspector's report of a loaded engine; None for an engine that was built without detailed verbosity."""
    api: Any = trt
    inspector = engine.raw.create_engine_inspector()
    text = inspector.get_engine_information(api.LayerInformationFormat.JSON)
    counts: dict[str, Counter[str]] = {}
    for layer in json.loads(text).get("Layers", []):
        # without detailed verbosity a layer is only a name
        if not isinstance(layer, dict):
            continue
        for output in layer.get("Outputs", [])[:1]:
            dtype = _type(str(output.get("Format/Datatype", output.get("Datatype", ""))))
            counts.setdefault(str(layer.get("LayerType", "unknown")), Counter())[dtype] += 1
    found = {kind: dict(sorted(types.items())) for kind, types in sorted(counts.items())}
    return EnginePrecision(found) if found else None


def _type(text: str) -> str:
    return next((name for name, pattern in _WORDS if re.search(pattern, text, re.IGNORECASE)), text or "unknown")
