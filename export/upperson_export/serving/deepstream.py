"""A secondary nvinfer for DeepStream: embeddings of the people that a detector has found.

Facts: https://docs.nvidia.com/deepstream/text/DS_plugin_gst-nvinfer (configuration keys, and
``y = net-scale-factor * (x - mean)`` with one factor for all channels, which is why
normalisation stays inside the graph).
"""

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from upperson_export.serving.folder import (
    ServingFolder,
    file_name,
    load_tower,
    open_variant,
    render,
    serving_folder,
    signature,
    write_serving_record,
)
from upperson_rt.errors import IntegrityError

CONFIG = "config_infer_secondary_person.txt"

BATCH_SIZE = 16
"""Most people embedded at once; the engine's profile ends there, too."""

MOST_SCALING = 16
"""A Jetson's scaler enlarges no more than that; asked for more, nvinfer ends the pipeline."""

GIE_ID = 2
"""Number of this nvinfer in the pipeline; the detector has 1 in all of DeepStream's samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Names:
    """Names of files that mention each other."""

    config: str
    onnx: str
    engine: str


def write_deepstream(
    bundle: Path, output: Path, variant: str | None = None, trust: Path | None = None
) -> ServingFolder:
    """Write what DeepStream's nvinfer needs to embed people as a secondary inference engine.

    ``output`` gets the image tower with a float32 planar input, the nvinfer configuration and a
    README: how to build the engine, and a probe that puts embeddings into a gallery.

    Args:
        bundle: Folder of the bundle.
        output: Folder to write; an earlier one there is replaced if nobody changed it.
        variant: Which variant; by default fp16, or fp32 where the bundle has none.
        trust: Public key that must have signed the bundle; see `Bundle.open`.

    Raises:
        InputError: Not a bundle, or ``output`` holds something else.
        UsageError: No such variant.
        IntegrityError: The bundle is damaged or not signed by the key that is trusted, or its
            graph is not what its manifest says.
    """
    opened = open_variant(bundle, variant, trust)
    expected = signature(opened.manifest, "image")
    height_px, width_px, channels = expected.input_dims
    stem = f"image.{file_name(opened.variant)}"
    values = {
        "bundle": opened,
        "manifest": opened.manifest,
        "names": _Names(
            config=CONFIG, onnx=f"{stem}.planar.onnx", engine=f"{stem}.b{BATCH_SIZE}.engine"
        ),
        "dims": (channels, height_px, width_px),
        "image": expected,
        "batch_size": BATCH_SIZE,
        "gie_id": GIE_ID,
        "least": (-(-height_px // MOST_SCALING), -(-width_px // MOST_SCALING)),
    }
    with serving_folder(output, "deepstream") as folder:
        adapted = planar_float_input(load_tower(opened, "image"))
        onnx.save(adapted, folder / f"{stem}.planar.onnx")
        (folder / CONFIG).write_text(render("nvinfer.txt.j2", **values), "utf-8")
        (folder / "README.md").write_text(render("deepstream.md.j2", **values), "utf-8")
        return write_serving_record(folder, output, "deepstream", opened)


def planar_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the image tower as nvinfer feeds it: float32 [N, 3, H, W] of values 0 to 255.

    One Transpose is put before the graph; everything behind it stays, so equal pixels give equal
    embeddings. A Cast to float32 that read the pixels would do nothing any more and goes; one to
    another type stays, because typed graphs allow no mixed operands.

    Args:
        model: An image tower with the one input uint8 [N, H, W, 3]; it is not changed.

    Raises:
        IntegrityError: The input is another one.
    """
    adapted = ir.from_proto(model)
    graph = adapted.graph
    pixels = graph.inputs[0]
    if len(graph.inputs) != 1 or pixels.dtype != ir.DataType.UINT8 or len(pixels.shape or ()) != 4:
        raise IntegrityError(
            "expected an image tower with one input uint8 [N, H, W, 3]: export the bundle again"
        )
    assert pixels.shape is not None  # Its length was asked for.
    readers = list(pixels.uses())
    transpose = ir.node("Transpose", [pixels], {"perm": [0, 2, 3, 1]}, name="planar/Transpose")
    interleaved = transpose.outputs[0]
    interleaved.name = _unused(graph, "pixels_nhwc")
    interleaved.dtype, interleaved.shape = ir.DataType.FLOAT, pixels.shape
    batch, height, width, channels = pixels.shape
    pixels.dtype, pixels.shape = ir.DataType.FLOAT, ir.Shape([batch, channels, height, width])
    for node, index in readers:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.outputs[0].replace_all_uses_with(interleaved)
            graph.remove(node, safe=True)
        else:
            node.replace_input_with(index, interleaved)
    graph.insert_before(graph[0], transpose)
    proto = ir.to_proto(adapted)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _unused(graph: ir.Graph, name: str) -> str:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    while any(value.name == name for value in values):
        name += "_"
    return name
