"""Reads the configurations of a repository with Triton's own protobuf definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2


def read_configs(repository: Path) -> dict[str, Any]:
    """`config.pbtxt` of every model as JSON, in the form that a server gives to Python models."""
    return {
        file.parent.name: json_format.MessageToDict(
            text_format.Parse(file.read_text("utf-8"), model_config_pb2.ModelConfig()),
            preserving_proto_field_name=True,
            # as the server does
            always_print_fields_with_no_presence=True,
        )
        for file in sorted(repository.glob("*/config.pbtxt"))
    }
