"""Exports of towers that were traced before: a trace takes seconds."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from filelock import FileLock
from torch import Tensor

from upperson_calibration.graph import TowerGraph
from upperson_export.graphs import described_linears, export_onnx, write_with_weights
from upperson_export.plain import PlainTower
from upperson_rt.towers import Tower

Export = Callable[..., TowerGraph]
"""What does as `export_onnx`."""


_CONSTANTS = (bool, int, float, str, tuple)


def as_in(bundle: Path) -> Export:
    """Return an export of towers that differ from a bundle's in weights alone."""

    def export(tower: PlainTower, kind: Tower, path: Path, *, example: Tensor) -> TowerGraph:
        known = _described(bundle / f"{kind}.fp32.onnx", tower, kind)
        found = write_with_weights(known, tower, path)
        assert found is not None, "the exporter renamed or merged a weight"
        return found

    return export


def once_in(folder: Path) -> Export:
    """Return an export that traces each shape of a tower once into a folder of all processes."""
    folder.mkdir(parents=True, exist_ok=True)

    def export(tower: PlainTower, kind: Tower, path: Path, *, example: Tensor) -> TowerGraph:
        facts = [(name, value.shape) for name, value in tower.state_dict().items()]
        for module in tower.modules():
            facts += [one for one in vars(module).items() if isinstance(one[1], _CONSTANTS)]
        kept = folder / hashlib.sha256(f"{kind} {tower} {facts}".encode()).hexdigest()
        file = kept / f"{kind}.fp32.onnx"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                made = Path(f"{kept}.new")
                made.mkdir(exist_ok=True)
                graph = export_onnx(tower, kind, made / file.name, example=example)
                made.rename(kept)
                shutil.copyfile(file, path)  # Last: who waits for it may kill this process.
                return replace(graph, file=path)
        found = write_with_weights(_described(file, tower, kind), tower, path)
        return export_onnx(tower, kind, path, example=example) if found is None else found

    return export


def _described(file: Path, tower: PlainTower, kind: Tower) -> TowerGraph:
    return TowerGraph(kind, file, described_linears(ir.load(file), tower), tower.padding_counts)
