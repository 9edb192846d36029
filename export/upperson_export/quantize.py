"""INT8 by explicit Q/DQ on the block Linears, in the form TensorRT and OpenVINO run fastest.

Symmetric int8 with zero point 0; weights per output channel, activations per tensor. Only qkv, out,
fc1 and fc2 are quantized: adapters and patch projection read a stream with outliers of a magnitude
that ruins an int8 range, and the final projection decides the ranking.
"""

import logging
import re
import tempfile
import warnings
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(attention\.(qkv|q|kv|out)|mlp\.(fc1|fc2))\.weight")


def block_linears(model: onnx.ModelProto) -> list[str]:
    """Return the names of the MatMul nodes that INT8 covers, in graph order."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and _BLOCK_LINEAR.fullmatch(node.input[1])
    ]


def quantize_int8(source: Path, target: Path, reader: CalibrationDataReader) -> None:
    """Write an int8 Q/DQ version of a float32 tower.

    Args:
        source: The float32 ONNX file.
        target: Where to write.
        reader: Feeds calibration batches; activation ranges are the extremes seen.
    """
    names = block_linears(onnx.load(source, load_external_data=False))
    # Its temporary files go beside the target, where the result has to fit anyway.
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.getLogger().addFilter(_not_about_preprocessing)
        try:
            quantized = Path(folder, target.name)
            quantize_static(
                source,
                quantized,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                },
            )
        finally:
            logging.getLogger().removeFilter(_not_about_preprocessing)
        quantized.replace(target)


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    """Drop the advice to run ONNX Runtime's own graph preparation, which renames nodes."""
    return "pre-processing" not in record.getMessage()
