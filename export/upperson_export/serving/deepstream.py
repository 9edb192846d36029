"""A secondary nvinfer for DeepStream: embeddings of the people that a detector has found.

Facts: https://docs.nvidia.com/deepstream/text/DS_plugin_gst-nvinfer (configuration keys, and
``y = net-scale-factor * (x - mean)`` with one factor for all channels, which is why
normalisation stays inside the graph).
"""

from dataclasses import dataclass
from pathlib import Path

import onnx

from upperson_export.serving.folder import (
    ServingFolder,
    render,
    serving_folder,
    write_serving_record,
)
from upperson_export.serving.nvinfer_graph import planar_float_input
from upperson_export.serving.source import file_name, load_tower, open_variant, signature

CONFIG = "config_infer_secondary_person.txt"

BATCH_SIZE = 16
"""Most people embedded at once; the engine's profile ends there, too."""

GIE_ID = 2
"""Number of this nvinfer in the pipeline; the detector has 1 in all of DeepStream's samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Names:
    """Names of files that mention each other."""

    config: str
    onnx: str
    engine: str


def write_deepstream(bundle: Path, output: Path, variant: str | None = None) -> ServingFolder:
    """Write what DeepStream's nvinfer needs to embed people as a secondary inference engine.

    ``output`` gets the image tower with a float32 planar input, the nvinfer configuration and a
    README: how to build the engine, and a probe that puts embeddings into a gallery.

    Args:
        bundle: Folder of the bundle.
        output: Folder to write; an earlier one there is replaced if nobody changed it.
        variant: Which variant; by default fp16, or fp32 where the bundle has none.

    Raises:
        InputError: Not a bundle, or ``output`` holds something else.
        UsageError: No such variant.
        IntegrityError: The bundle is damaged, or its graph is not what its manifest says.
    """
    opened = open_variant(bundle, variant)
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
    }
    with serving_folder(output, "deepstream") as folder:
        adapted = planar_float_input(load_tower(opened, "image"))
        onnx.save(adapted, folder / f"{stem}.planar.onnx")
        (folder / CONFIG).write_text(render("nvinfer.txt.j2", **values), "utf-8")
        (folder / "README.md").write_text(render("deepstream.md.j2", **values), "utf-8")
        return write_serving_record(folder, output, "deepstream", opened)
