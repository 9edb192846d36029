"""Exports of towers that were traced before: a trace takes seconds."""

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
from filelock import FileLock
from torch import Tensor

from upperson.model.base import weights_sha256
from upperson_calibration.graph import TowerGraph
from upperson_export.graphs import described_linears, export_onnx, write_with_weights
from upperson_export.plain import PlainTower
from upperson_rt.towers import Tower

Export = Callable[..., TowerGraph]
"""What does as `export_onnx`."""


def as_in(bundle: Path) -> Export:
    """Return an export of towers that differ from a bundle's in weights alone.

    That exchanging them gives the file that a trace gives is a test of its own
    (`tests/parity/test_export.py`).
    """
    return partial(_as_in, bundle)


def once_in(folder: Path) -> Export:
    """Return an export that traces a tower once, into a folder that processes share."""
    folder.mkdir(exist_ok=True)
    return partial(_once_in, folder)


def _as_in(
    bundle: Path, tower: PlainTower, kind: Tower, path: Path, *, example: Tensor
) -> TowerGraph:
    found = write_with_weights(_described(bundle / f"{kind}.fp32.onnx", tower, kind), tower, path)
    assert found is not None, "the exporter renamed or merged a weight"
    return found


def _once_in(
    folder: Path, tower: PlainTower, kind: Tower, path: Path, *, example: Tensor
) -> TowerGraph:
    digest = hashlib.sha256(f"{tower} {weights_sha256(tower)}".encode()).hexdigest()
    kept = folder / f"{digest}.onnx"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            export_onnx(tower, kind, path, example=example)
            shutil.move(path, kept)
    shutil.copyfile(kept, path)
    return _described(path, tower, kind)


def _described(file: Path, tower: PlainTower, kind: Tower) -> TowerGraph:
    return TowerGraph(kind, file, described_linears(ir.load(file), tower), tower.padding_counts)
