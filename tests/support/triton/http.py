"""The HTTP side of the stand-in: `POST /v2/models/NAME/infer` of the KServe protocol, with binary tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor

from tests.support.triton import triton_python_backend_utils as utils

LENGTH = "Inference-Header-Content-Length"
KINDS = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32}


@contextmanager
def listening(model: Any, name: str) -> Iterator[str]:
    """Serves a Python model; gives host and port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != f"/v2/models/{name}/infer":
                self._answer(404, {"error": f"Request for unknown model: '{self.path.split('/')[3]}' is not found"})
                return
            (response,) = model.execute([request_of(body, int(self.headers[LENGTH]))])
            if response.has_error():
                self._answer(400, {"error": response.error().message()})
                return
            (tensor,) = response.output_tensors()
            data = tensor.as_numpy().tobytes()
            output = {"name": tensor.name(), "datatype": "UINT8", "shape": list(tensor.as_numpy().shape)}
            output["parameters"] = {"binary_data_size": len(data)}
            self._answer(200, {"model_name": name, "model_version": "1", "outputs": [output]}, data)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, status: int, header: dict[str, object], data: bytes = b"") -> None:
            text = json.dumps(header).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) + len(data)))
            if data:
                self.send_header(LENGTH, str(len(text)))
            self.end_headers()
            self.wfile.write(text + data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def request_of(body: bytes, header: int) -> utils.InferenceRequest:
    tensors, at = [], header
    for given in json.loads(body[:header])["inputs"]:
        size = given["parameters"]["binary_data_size"]
        data, at = body[at : at + size], at + size
        texts = given["datatype"] == "BYTES"
        array = deserialize_bytes_tensor(data) if texts else np.frombuffer(data, KINDS[given["datatype"]])
        tensors.append(utils.Tensor(given["name"], array.reshape(given["shape"])))
    return utils.InferenceRequest(tensors)
