"""A model repository for Triton Inference Server: two models, the tokenizer stays with clients.

Facts: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/ (model
configuration, model repository, ragged batching).
"""

import shutil
from pathlib import Path

import onnx

from upperson_export.serving.folder import (
    ServingFolder,
    file_name,
    load_tower,
    open_variant,
    render,
    serving_folder,
    signature,
    tower_file,
    write_serving_record,
)
from upperson_rt.bundle import Bundle
from upperson_rt.towers import SHORTEST_TEXT, TOWERS, Tower

MAX_BATCH_SIZE: dict[Tower, int] = {"image": 32, "text": 64}
"""Most pictures or sentences the server runs at once."""

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
    ``1/model.onnx``, and for clients ``tokenizer.json`` and a README with a working client.

    Args:
        bundle: Folder of the bundle.
        output: The model repository; an earlier one there is replaced if nobody changed it.
        variant: Which variant; by default fp16, or fp32 where the bundle has none.
        trust: Public key that must have signed the bundle; see `Bundle.open`.

    Raises:
        InputError: Not a bundle, or ``output`` holds something else.
        UsageError: No such variant.
        IntegrityError: The bundle is damaged or not signed by the key that is trusted, or its
            graphs are not what its manifest says.
    """
    opened = open_variant(bundle, variant, trust)
    manifest = opened.manifest
    names = {tower: f"{file_name(manifest.model.name)}_{tower}" for tower in TOWERS}
    with serving_folder(output, "triton") as folder:
        for tower in TOWERS:
            load_tower(opened, tower)  # Only to check it.
            version = folder / names[tower] / "1"
            version.mkdir(parents=True)
            shutil.copyfile(tower_file(opened, tower), version / "model.onnx")
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
