"""A server that speaks Triton's protocol and runs a model repository in ONNX Runtime.

It is not Triton: it takes `tritonclient`'s own definition of the protocol and of config.pbtxt, so
that a client and a configuration can be tried out without a server. Import it only where
`tritonclient` is installed.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype


def read_config(path: Path) -> Any:
    """Parse a config.pbtxt by the real definition; an unknown field or enum is an error."""
    return text_format.Parse(path.read_text("utf-8"), model_config_pb2.ModelConfig())


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, repository: Path) -> None:
        self.requests: list[tuple[str, tuple[int, ...]]] = []
        self.configs, self.sessions = {}, {}
        for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
            self.configs[folder.name] = read_config(folder / "config.pbtxt")
            self.sessions[folder.name] = onnxruntime.InferenceSession(
                folder / "1" / "model.onnx", providers=["CPUExecutionProvider"]
            )

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Check a request against the configuration as Triton documents it, then run it."""
        config = self.configs[request.model_name]
        (tensor,), (declared,) = request.inputs, config.input
        shape = tuple(tensor.shape)
        kind = model_config_pb2.DataType.Name(declared.data_type)
        fits = (
            (tensor.name, f"TYPE_{tensor.datatype}") == (declared.name, kind)
            and 1 <= shape[0] <= config.max_batch_size
            and len(shape) == 1 + len(declared.dims)
            and all(want in (-1, got) for want, got in zip(declared.dims, shape[1:], strict=True))
        )
        if not fits:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{tensor} does not fit {declared}")
        self.requests.append((request.model_name, shape))
        dtype = triton_to_np_dtype(tensor.datatype)
        array = np.frombuffer(request.raw_input_contents[0], dtype).reshape(shape)
        names = [output.name for output in request.outputs]
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, value in zip(
            names, self.sessions[request.model_name].run(names, {tensor.name: array}), strict=True
        ):
            response.outputs.add(name=name, datatype="FP32", shape=value.shape)
            response.raw_output_contents.append(value.tobytes())
        return response


@contextmanager
def serve(repository: Path) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Serve a repository; gives the address, and the list of requests as they come."""
    servicer = _Servicer(repository)
    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer.requests
    finally:
        server.stop(None).wait()
