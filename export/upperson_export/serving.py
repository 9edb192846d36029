"""Folders for inference servers, DeepStream and Triton, from one variant of a finished bundle."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from upperson_export.made_files import RecordedFolder, templates
from upperson_export.variants import VARIANTS
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.manifest import Manifest
from upperson_rt.towers import GRAPH_NAMES, SHORTEST_TEXT, TOWERS, Tower

Format = Literal["triton", "deepstream"]

RECORD = "serving.json"
"""The record: where the folder comes from, and its files."""

_TEMPLATES = templates(Path(__file__).parent / "templates" / "serving")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingFolder:
    """A folder that was written."""

    format: Format
    folder: Path
    variant: str
    fingerprint: str
    files: tuple[str, ...]
    """Relative POSIX paths, sorted, without the record itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """Input and output of a tower, without the batch; -1 is a dynamic axis."""

    input_name: str
    input_type: int
    """A value of ``onnx.TensorProto.DataType``."""
    input_dims: tuple[int, ...]
    output_name: str
    output_dims: tuple[int, ...]
    """The output is always float32."""


def require_serving_place(output: Path, kind: Format) -> None:
    """Refuse a folder that could not be written or replaced, before any work."""
    RecordedFolder(kind, RECORD).require_place(output)


def write_serving_record(folder: Path, output: Path, kind: Format, bundle: Bundle) -> ServingFolder:
    """Write the record of a filled folder, and return it."""
    manifest = bundle.manifest
    facts = {
        "model": manifest.model.name,
        "variant": bundle.variant,
        "precision": bundle.entry.precision,
        "fingerprint": manifest.fingerprint,
        "embed_dim": manifest.model.embed_dim,
    }
    return ServingFolder(
        format=kind,
        folder=output,
        variant=bundle.variant,
        fingerprint=manifest.fingerprint,
        files=RecordedFolder(kind, RECORD).write_record(folder, facts),
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    return _TEMPLATES.get_template(template).render(**values)


def open_variant(bundle: Path, variant: str | None, trust: Path | None = None) -> Bundle:
    """Open a bundle for serving; its hashes are checked."""
    if variant is None:
        variants = read_manifest(bundle, trust).variants
        wanted = [row.name for row in list(VARIANTS.values())[::-1] if row.servers]
        variant = next((name for name in wanted if name in variants), None)
        if variant is None:
            raise UsageError(
                f"bundle {bundle} has neither of the variants {' and '.join(wanted)}: name "
                f"one of its own with  --variant  ({', '.join(variants)})",
                code="no_variant_for_servers",
                path=bundle,
            )
    opened = Bundle.open(bundle, variant, trust=trust)
    opened.check_files()
    return opened


def signature(manifest: Manifest, tower: Tower) -> Signature:
    """Return a tower's input and output, from the manifest."""
    input_name, output_name = GRAPH_NAMES[tower]
    image = manifest.image
    return Signature(
        input_name=input_name,
        input_type=onnx.TensorProto.UINT8 if tower == "image" else onnx.TensorProto.INT32,
        input_dims=(image.height_px, image.width_px, 3) if tower == "image" else (-1,),
        output_name=output_name,
        output_dims=(manifest.model.embed_dim,),
    )


def load_tower(bundle: Bundle, tower: Tower) -> onnx.ModelProto:
    """Load a tower's graph."""
    path = bundle.path / bundle.entry.file(tower).file
    try:
        model = onnx.load(path)
    except Exception as error:  # Protobuf's DecodeError, which has no type stubs.
        raise IntegrityError(f"{path} is not an ONNX file: {error}; export it again") from error
    expected = signature(bundle.manifest, tower)
    wanted = [
        (expected.input_name, expected.input_type, (-1, *expected.input_dims)),
        (expected.output_name, onnx.TensorProto.FLOAT, (-1, *expected.output_dims)),
    ]
    found = [_described(value) for value in (*model.graph.input, *model.graph.output)]
    if found != wanted:
        raise IntegrityError(
            f"{path} has the inputs and outputs {_readable(found)}, but the manifest says "
            f"{_readable(wanted)}: export the bundle again",
            code="graph_not_as_manifest",
            path=path,
        )
    return model


def file_name(name: str) -> str:
    """Return a manifest's name as part of a file name: letters, digits and ``._-`` only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int, ...]]:
    tensor = value.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return value.name, tensor.elem_type, tuple(dims)


def _readable(values: list[tuple[str, int, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{name} {onnx.TensorProto.DataType.Name(kind)} {list(dims)}" for name, kind, dims in values
    )


# --- A secondary nvinfer for DeepStream: embeddings of the people that a detector has found
#
# Facts: https://docs.nvidia.com/deepstream/text/DS_plugin_gst-nvinfer (configuration keys, and ``y
# = net-scale-factor * (x - mean)`` with one factor for all channels, which is why normalisation
# stays inside the graph).

CONFIG = "config_infer_secondary_person.txt"

BATCH_SIZE = 16
"""Maximum number of people embedded at once, and of the engine's profile."""

MAX_SCALING = 16
"""Limit of a Jetson's scaler; beyond it nvinfer ends the pipeline."""

GIE_ID = 2
"""Number of this nvinfer in the pipeline; the detector has 1 in all of DeepStream's samples."""


def write_deepstream(
    bundle: Path, output: Path, variant: str | None = None, trust: Path | None = None
) -> ServingFolder:
    """Write what DeepStream's nvinfer needs to embed people as a secondary inference engine.

    ``output`` gets the image tower with a float32 planar input, the nvinfer configuration and a
    README: how to build the engine, and a probe that puts embeddings into a gallery. An earlier
    folder there is replaced if it is unchanged. The variant is fp16 by default, or fp32 if the
    bundle has no fp16; ``trust`` is a public key that must have signed the bundle.

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
        "names": {
            "config": CONFIG,
            "onnx": f"{stem}.planar.onnx",
            "engine": f"{stem}.b{BATCH_SIZE}.engine",
        },
        "dims": (channels, height_px, width_px),
        "image": expected,
        "batch_size": BATCH_SIZE,
        "gie_id": GIE_ID,
        "least": (-(-height_px // MAX_SCALING), -(-width_px // MAX_SCALING)),
    }
    with RecordedFolder("deepstream", RECORD).create(output) as folder:
        adapted = planar_float_input(load_tower(opened, "image"))
        onnx.save(adapted, folder / f"{stem}.planar.onnx")
        (folder / CONFIG).write_text(render("nvinfer.txt.j2", **values), "utf-8")
        (folder / "README.md").write_text(render("deepstream.md.j2", **values), "utf-8")
        return write_serving_record(folder, output, "deepstream", opened)


def planar_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the image tower as nvinfer feeds it: float32 [N, 3, H, W], 0 to 255.

    One Transpose is put before the graph; the rest stays, so equal pixels give equal embeddings.
    A Cast of the pixels to float32 is removed; one to another type stays, because typed graphs
    allow no mixed operands.

    Raises:
        IntegrityError: The input is another one.
    """
    adapted = ir.from_proto(model)
    graph = adapted.graph
    pixels = graph.inputs[0]
    if len(graph.inputs) != 1 or pixels.dtype != ir.DataType.UINT8 or len(pixels.shape or ()) != 4:
        raise IntegrityError(
            "expected an image tower with one input uint8 [N, H, W, 3]: export the bundle again",
            code="input_not_pixels",
        )
    assert pixels.shape is not None  # Its length was checked.
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


# --- A model repository for Triton Inference Server: two models, the tokenizer stays with clients
#
# Facts: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/ (model
# configuration, model repository, ragged batching).

MAX_BATCH_SIZE: dict[Tower, int] = {"image": 32, "text": 64}
"""Maximum number of pictures or sentences that the server runs at once."""

MAX_QUEUE_DELAY_US = 1000
"""How long the server waits for more requests to fill a batch, in microseconds."""

LENGTH_STEP = 16
"""Clients pad sentences to multiples of this many ids, since Triton only joins requests of equal
shape. Its ragged batching needs a graph with one-dimensional input, which ours is not."""

_TYPES: dict[int, str] = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
}


def write_triton(
    bundle: Path, output: Path, variant: str | None = None, trust: Path | None = None
) -> ServingFolder:
    """Write a model repository that runs the bundle's towers in Triton's ONNX Runtime backend.

    ``output`` gets ``<name>_image/`` and ``<name>_text/``, each with ``config.pbtxt`` and
    ``1/model.onnx``, and for clients ``tokenizer.json`` and a README with a working client. The
    arguments are those of `write_deepstream`.
    """
    opened = open_variant(bundle, variant, trust)
    manifest = opened.manifest
    names = {tower: f"{file_name(manifest.model.name)}_{tower}" for tower in TOWERS}
    with RecordedFolder("triton", RECORD).create(output) as folder:
        for tower in TOWERS:
            load_tower(opened, tower)  # To check it.
            version = folder / names[tower] / "1"
            version.mkdir(parents=True)
            graph = opened.path / opened.entry.file(tower).file
            shutil.copyfile(graph, version / "model.onnx")
            text = model_config(opened, tower, names[tower])
            (version.parent / "config.pbtxt").write_text(text, "utf-8")
        tokenizer = opened.path / manifest.text.tokenizer.file
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        readme = render(
            "triton.md.j2",
            bundle=opened,
            manifest=manifest,
            names=names,
            image=signature(manifest, "image"),
            text=signature(manifest, "text"),
            length_step=LENGTH_STEP,
            shortest_text=SHORTEST_TEXT,
        )
        (folder / "README.md").write_text(readme, "utf-8")
        return write_serving_record(folder, output, "triton", opened)


def model_config(bundle: Bundle, tower: Tower, name: str) -> str:
    """Return the text of a ``config.pbtxt``: an ``inference.ModelConfig`` as protobuf text.

    The parameters are for clients, which can compare the fingerprint with their gallery's.
    """
    expected = signature(bundle.manifest, tower)
    return render(
        "config.pbtxt.j2",
        name=name,
        tower=expected,
        input_type=_TYPES[expected.input_type],
        max_batch_size=MAX_BATCH_SIZE[tower],
        max_queue_delay_us=MAX_QUEUE_DELAY_US,
        parameters={
            "fingerprint": bundle.manifest.fingerprint,
            "variant": bundle.variant,
            "precision": bundle.entry.precision,
            "onnx_sha256": bundle.entry.file(tower).sha256,
        },
    )
