"""The towers of a bundle, run in a process of its own by one library, for `benchmarks.kernels`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from upperson_rt.backends import open_backend
from upperson_rt.backends.onnxruntime import session_options
from upperson_rt.bundle import Bundle
from upperson_rt.encoder import Encoder
from upperson_rt.towers import Backend, Tower


def embed(runner: str, asked: str, output: str) -> None:
    """Write the embeddings of both towers into an npz file.

    Args:
        runner: A backend, ``plain``, or ``last bits``: plain with vectors that differ in these.
        asked: JSON with the bundle, and pictures and sentences under the towers' names.
        output: The file.
    """
    wanted = json.loads(Path(asked).read_text())
    opened = Bundle.open(wanted["bundle"], "int8", threads=1)
    manifest, variant = opened.manifest, opened.variant

    def backend(tower: Tower) -> Backend:
        path = Path(wanted["bundle"], manifest.variants[variant].file(tower).file)
        if runner in ("plain", "last bits"):
            return _Plain(path, changed=runner == "last bits")
        return open_backend(path, runner, "cpu", 1)

    encoder = Encoder(manifest, variant, opened.tokenizer, backend)
    images, texts = encoder.encode_images(wanted["image"]), encoder.encode_texts(wanted["text"])
    np.savez(output, image=images, text=texts)


class _Plain:
    """ONNX Runtime without any of its optimisations: each node by itself, products in float32."""

    name, device, version, max_batch = "plain", "cpu", ort.__version__, None

    def __init__(self, path: Path, *, changed: bool) -> None:
        model = ir.load(path)
        if changed:
            _change_last_bits(model)
        options = session_options(ort, 1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _change_last_bits(model: ir.Model) -> None:
    """Change biases and norms by half a last bit, more or less; scales of int8 stay."""
    rng = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        users = {use.node.op_type for use in value.uses()}
        if tensor is None or users & {"QuantizeLinear", "DequantizeLinear"}:
            continue
        if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1:
            changed = tensor.numpy() * (1 + 2.0**-24 * rng.standard_normal(tensor.shape.numpy()))
            value.const_value = ir.tensor(changed.astype(np.float32), name=value.name)
