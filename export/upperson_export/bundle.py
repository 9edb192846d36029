"""Write a bundle: fold, export, quantize, measure, decide, and only then put it in place."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from upperson_calibration.reader import BatchReader
from upperson_calibration.samples import CalibrationSet
from upperson_export.accuracy import RetrievalSplit, measure, r1_drop, report_row
from upperson_export.fold import TrainedModel, fold_image_tower, fold_text_tower
from upperson_export.onnx import export_onnx
from upperson_export.parity import require_parity
from upperson_export.quantize import quantize_int8
from upperson_export.report import model_card, report_html
from upperson_rt import __version__
from upperson_rt.atomic import new_folder
from upperson_rt.backends import open_backend
from upperson_rt.bundle import MANIFEST_FILE, Bundle, read_manifest, sha256_of_file
from upperson_rt.canaries import Tower
from upperson_rt.encoder import GRAPH_NAMES, run_tower
from upperson_rt.errors import UppersonError
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

TOWERS: tuple[Tower, ...] = ("image", "text")

_FILES = {
    MANIFEST_FILE, "tokenizer.json", "canaries.npz", "report.json", "report.html", "README.md"
}  # fmt: skip

CANARIES = 8
CANARY_MIN_COSINE = {"fp32": 0.9999, "int8": 0.99}
"""Golden embeddings come from this machine; int8 kernels differ a little between processors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export and what accuracy to insist on."""

    int8: bool = True
    """Also write an int8 variant."""

    max_r1_drop: float = 0.5
    """Most points of R@1 that int8 may lose against fp32; a worse one is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Where the model's weights come from."""

    name: str
    base: str
    base_sha256: str
    adapter_sha256: str
    embed_dim: int


def export_bundle(
    model: TrainedModel,
    identity: ModelIdentity,
    tokenizer_json: str,
    calibration: CalibrationSet,
    split: RetrievalSplit,
    output: Path,
    options: ExportOptions,
    progress: Report,
) -> dict[str, Any]:
    """Export a model into a bundle and return its report.

    The bundle appears at ``output`` complete or not at all.

    Args:
        model: A trained dual encoder in evaluation mode.
        identity: Recorded in the manifest; decides the fingerprint.
        tokenizer_json: Content of ``tokenizer.json``.
        calibration: Sets int8 ranges; its first samples become the canaries.
        split: Every variant's accuracy is measured on it, through the runtime.
        output: Folder to write; an older bundle there is replaced.
        options: What to export.
        progress: Told what goes on.

    Raises:
        InputError: NaN weights, or ``output`` holds something that is not a bundle.
        IntegrityError: ONNX and torch disagree, or a written file does not work in the runtime.
    """
    with new_folder(output, is_earlier=_is_bundle) as folder:
        precisions = ["fp32", "int8"] if options.int8 else ["fp32"]
        _write_towers(model, calibration, folder, precisions, progress)
        (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        _write_canaries(calibration, folder, precisions)
        manifest = _manifest(identity, model, calibration, folder, precisions)
        _write_manifest(folder, manifest)

        rows: dict[str, dict[str, Any]] = {}
        measured = {}
        for precision in precisions:
            encoder = Bundle.open(folder, precision).encoder()
            measured[precision] = measure(
                encoder,
                split,
                partial(progress, f"measuring {precision}"),
            )
            drop = None if precision == "fp32" else r1_drop(measured["fp32"], measured[precision])
            rows[precision] = report_row(measured[precision], drop)
            rows[precision]["size_bytes"] = _size(manifest.variants[precision])
        kept = [
            name
            for name in precisions
            if not rows[name]["r1_drop"] or rows[name]["r1_drop"]["points"] <= options.max_r1_drop
        ]
        report = {
            "model": identity.name,
            "split": {
                "name": split.name,
                "images": len(split.image_files),
                "captions": len(split.captions),
            },
            "max_r1_drop": options.max_r1_drop,
            "variants": {name: rows[name] | {"shipped": name in kept} for name in precisions},
            "calibration": calibration.describe() if options.int8 else None,
        }
        for name in set(precisions) - set(kept):
            for tower in TOWERS:
                (folder / _onnx_name(tower, name)).unlink()
        _write_texts(folder, manifest, report, kept)
    return report


def _is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle and holds no file that is not of one."""
    try:
        read_manifest(folder)
    except UppersonError:
        return False
    return all(path.suffix == ".onnx" or path.name in _FILES for path in folder.iterdir())


def _write_towers(
    model: TrainedModel,
    calibration: CalibrationSet,
    folder: Path,
    precisions: Sequence[str],
    progress: Report,
) -> None:
    inputs: dict[Tower, npt.NDArray[Any]] = {
        "image": calibration.images,
        "text": calibration.input_ids,
    }
    plain: dict[Tower, nn.Module] = {
        "image": fold_image_tower(model),
        "text": fold_text_tower(model),
    }
    for step, tower in enumerate(TOWERS):
        progress(f"exporting the {tower} tower", step, len(TOWERS))
        path = folder / _onnx_name(tower, "fp32")
        # A batch of one would be taken for a constant.
        example = torch.from_numpy(np.concatenate([inputs[tower][:2]] * 2))
        export_onnx(plain[tower], tower, path, example=example)
        require_parity(plain[tower], path, tower, inputs[tower][:17])
    for tower in TOWERS if "int8" in precisions else ():
        reader = BatchReader(
            GRAPH_NAMES[tower][0],
            inputs[tower],
            progress=partial(progress, f"calibrating the {tower} tower"),
        )
        quantize_int8(
            folder / _onnx_name(tower, "fp32"), folder / _onnx_name(tower, "int8"), reader
        )


def _write_canaries(calibration: CalibrationSet, folder: Path, precisions: Sequence[str]) -> None:
    count = min(CANARIES, len(calibration.images), len(calibration.input_ids))
    inputs: dict[Tower, npt.NDArray[Any]] = {
        "image": calibration.images[:count],
        "text": calibration.input_ids[:count],
    }
    arrays = {"images": inputs["image"], "input_ids": inputs["text"]}
    for precision in precisions:
        for tower in TOWERS:
            backend = open_backend(folder / _onnx_name(tower, precision), "onnxruntime")
            arrays[f"{tower}_embeds.{precision}"] = run_tower(backend, tower, inputs[tower])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    (folder / "canaries.npz").write_bytes(buffer.getvalue())


def _manifest(
    identity: ModelIdentity,
    model: TrainedModel,
    calibration: CalibrationSet,
    folder: Path,
    precisions: Sequence[str],
) -> Manifest:
    height_px, width_px = model.image_size
    section = ModelSection(
        name=identity.name,
        base=identity.base,
        base_sha256=identity.base_sha256,
        adapter_sha256=identity.adapter_sha256,
        embed_dim=identity.embed_dim,
    )
    image = ImageSection(height_px=height_px, width_px=width_px)
    text = TextSection(
        context_length=model.text.context_length, tokenizer=_entry(folder, "tokenizer.json")
    )
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        generator=f"upperson {__version__}",
        model=section,
        image=image,
        text=text,
        variants={
            precision: VariantEntry(
                precision=precision,
                image=_entry(folder, _onnx_name("image", precision)),
                text=_entry(folder, _onnx_name("text", precision)),
                canary_min_cosine=CANARY_MIN_COSINE[precision],
                calibration=calibration.describe() if precision == "int8" else None,
            )
            for precision in precisions
        },
        default_variant="fp32",
        canaries=_entry(folder, "canaries.npz"),
        fingerprint=space_fingerprint(section, image, text),
    )


def _write_texts(
    folder: Path, manifest: Manifest, report: dict[str, Any], kept: Sequence[str]
) -> None:
    """Write report, model card and the final manifest, which is what makes it a bundle."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, "utf-8")
    (folder / "report.html").write_text(report_html(report, manifest), "utf-8")
    (folder / "README.md").write_text(model_card(report, manifest), "utf-8")
    final = replace(
        manifest,
        variants={
            name: replace(manifest.variants[name], metrics=report["variants"][name]["metrics"])
            for name in kept
        },
        default_variant=kept[-1],
        report=_entry(folder, "report.json"),
    )
    _write_manifest(folder, final)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")


def _onnx_name(tower: Tower, precision: str) -> str:
    return f"{tower}.{precision}.onnx"


def _entry(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(file=name, sha256=sha256_of_file(path), size_bytes=path.stat().st_size)


def _size(entry: VariantEntry) -> int:
    return entry.image.size_bytes + entry.text.size_bytes
