"""What building and running share: the logger, the plan's format, and the types of tensors."""

import base64
import json
import os
from dataclasses import dataclass
from enum import IntEnum

import onnx

from ._enums import DataType

VERSION = os.environ.get("FAKE_TENSORRT_VERSION", "11.4.0.106")

DTYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT64: DataType.INT64,
    onnx.TensorProto.INT32: DataType.INT32,
    onnx.TensorProto.BOOL: DataType.BOOL,
}


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self):
        pass


class Logger(ILogger):
    def __init__(self, min_severity=Severity.WARNING):
        self.min_severity = min_severity

    def log(self, severity, msg):
        pass


@dataclass(frozen=True)
class Plan:
    """What a serialised engine of this stand-in holds."""

    version: str
    profiles: list[dict[str, list[list[int]]]]
    flags: list[str]
    verbosity: str
    model: bytes

    def pack(self) -> bytes:
        content = {**vars(self), "magic": "fake plan", "model": base64.b64encode(self.model).decode()}
        return json.dumps(content).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Plan":
        content = json.loads(data)
        if content.pop("magic") != "fake plan":
            raise ValueError("magic tag does not match")
        return cls(**{**content, "model": base64.b64decode(content["model"])})


def dims(value):
    """Sizes of a value of a graph, -1 for a dynamic axis."""
    return tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)
