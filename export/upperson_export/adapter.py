"""Write an adapter file: a bundle less what a base bundle has, and what was trained instead of it.

Graphs are taken apart at their large weights. A weight is left out if the functions that will make
it again, those of `upperson_adapter.weights`, give its bytes.
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from upperson_adapter.apply import read_base
from upperson_adapter.package import (
    AdaptedTower,
    AdapterContent,
    AdapterManifest,
    BaseBundle,
    GraphPart,
    GraphSection,
    TensorPlace,
    pack_adapter,
    pack_tensors,
)
from upperson_adapter.weights import TRAINED, Weights, fold_trained, smooth, stored
from upperson_calibration.calibration_file import read_calibration
from upperson_export.fold import (
    TrainedModel,
    fold_image_tower,
    fold_text_tower,
    heads_of,
    trained_tensors,
)
from upperson_export.plain import PlainTower
from upperson_export.variants import EXACT
from upperson_machine.int8 import PAIR_LIMIT
from upperson_rt.bundle import CALIBRATION, read_manifest
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import all_names, sha256_of_file, write_atomically
from upperson_rt.manifest import Manifest
from upperson_rt.towers import TOWERS, Tower

_LEAST_BYTES = 512
"""Smaller weights stay in the graph."""

_MOST_LITERAL_BYTES = 1 << 20
"""Of a graph without its large weights; more says that one could not be made again."""


_FOLD: Mapping[Tower, Callable[[TrainedModel], PlainTower]] = {
    "image": fold_image_tower,
    "text": fold_text_tower,
}


class FrozenTower:
    """The float32 graph of a base's tower: its weights and where they lie."""

    def __init__(self, path: Path) -> None:
        initializers = ir.load(path).graph.initializers
        self.weights = {
            name: value.const_value.numpy()
            for name, value in initializers.items()
            if value.const_value is not None and value.dtype == ir.DataType.FLOAT
        }
        found = _find(path, {name: array.tobytes() for name, array in self.weights.items()})
        self.places = {
            name: TensorPlace(offset=offset, shape=self.weights[name].shape)
            for name, offset in found.items()
        }


@dataclass(frozen=True)
class AdapterBase:
    """A base bundle that adapters are exported for."""

    folder: Path
    manifest: Manifest
    towers: Mapping[Tower, FrozenTower]

    @classmethod
    def open(cls, folder: Path) -> "AdapterBase":
        """Read a bundle that was exported from a base without a run.

        Raises:
            InputError: Not a bundle.
            UsageError: It has an adapter already.
        """
        manifest = read_base(folder)
        graphs = manifest.variants[EXACT]
        return cls(
            folder,
            manifest,
            {tower: FrozenTower(folder / graphs.file(tower).file) for tower in TOWERS},
        )

    def identity(self) -> BaseBundle:
        """Return what adapter files say of it."""
        graphs = self.manifest.variants[EXACT]
        return BaseBundle(
            name=self.manifest.model.name,
            graphs={tower: graphs.file(tower) for tower in TOWERS},
        )

    def fold_onto(self, tower: Tower, plain: PlainTower, trained: Any) -> None:
        """Give a folded tower exactly the frozen weights that the base bundle has.

        Another machine may have folded them, and differ in the last digit of a sum.

        Raises:
            IntegrityError: The weights are of another base, or for pictures of another size.
        """
        frozen = dict(self.towers[tower].weights)
        frozen.pop("mask", None)  # It has columns for the prefix.
        own = plain.weights()
        folded = fold_trained(frozen, trained_tensors(trained), heads_of(trained))
        for name, value in own.items():
            if name in folded or name == "mask":
                continue
            if (given := frozen.get(name)) is None:
                raise IntegrityError(
                    f"the {tower} graph of {self.folder} has no '{name}', perhaps since two of its "
                    "weights are equal: it cannot be the base of adapters",
                    code="adapter_not_reproducible",
                    tower=tower,
                    tensor=name,
                )
            if given.shape != value.shape or not np.allclose(given, value, rtol=1e-4, atol=1e-6):
                raise IntegrityError(
                    f"the run was not trained over the base of {self.folder}: '{name}' of its "
                    f"{tower} tower differs; name the bundle of its base, exported for pictures "
                    "of the same size",
                    code="adapter_of_other_base",
                    tower=tower,
                    tensor=name,
                )
        plain.replace({n: v for n, v in (frozen | folded).items() if n in own})


@torch.no_grad()
def round_trained(model: TrainedModel, dtype: str) -> None:
    """Round a model's trained tensors to a type, float16 or float32, in which they are stored."""
    for tower in TOWERS:
        for name, value in getattr(model, tower).state_dict().items():
            if TRAINED.fullmatch(name) and value.is_floating_point():
                value.copy_(value.to(getattr(torch, dtype)))


def write_adapter(
    bundle: Path, base: AdapterBase, model: TrainedModel, dtype: str, output: Path
) -> None:
    """Write the adapter file of a bundle that was exported onto a base.

    The trained tensors are stored as ``dtype``, float16 or float32, without a change.

    Raises:
        InputError: A trained tensor does not fit into ``dtype``, or the file cannot be written.
        IntegrityError: The bundle cannot be made from the base again.
    """
    manifest = read_manifest(bundle)
    calibration = bundle / CALIBRATION
    smoothing = read_calibration(calibration).towers if calibration.exists() else {}
    graphs: dict[str, GraphSection] = {}
    literals: dict[str, bytes] = {}
    towers: dict[str, AdaptedTower] = {}
    trained: dict[str, npt.NDArray[Any]] = {}
    factors: dict[str, npt.NDArray[np.float32]] = {}
    for tower in TOWERS:
        part, frozen = getattr(model, tower), base.towers[tower]
        tensors, heads = trained_tensors(part), heads_of(part)
        trained |= {f"{tower}.{name}": _stored_as(dtype, name, v) for name, v in tensors.items()}
        sites = _FOLD[tower](model).sites()
        own_factors = {
            name: found.factors
            for name, found in (smoothing[tower].smoothing if smoothing else {}).items()
            if found.alpha is not None
        }
        factors |= {f"{tower}.{name}": value for name, value in own_factors.items()}
        plain = dict(frozen.weights) | fold_trained(frozen.weights, tensors, heads)
        states: list[Weights] = [plain]
        if own_factors:
            states.append(plain | smooth(plain, sites, own_factors))
        towers[tower] = AdaptedTower(
            heads=heads,
            frozen=frozen.places,
            sites=sites,
        )
        for name in dict.fromkeys(entry.file(tower).file for entry in manifest.variants.values()):
            graphs[name], literals[name] = _take_apart(bundle / name, tower, states)
    names = sorted(set(all_names(bundle)) - graphs.keys())
    copied = tuple(name for name in names if _same(bundle / name, base.folder / name))
    content = AdapterContent(
        manifest=AdapterManifest(
            base=base.identity(),
            towers=towers,
            graphs=graphs,
            copied=copied,
        ),
        trained=pack_tensors(trained),
        smoothing=pack_tensors(factors),
        graphs=literals,
        files={name: (bundle / name).read_bytes() for name in names if name not in copied},
    )
    write_atomically(output, pack_adapter(content))


def _stored_as(dtype: str, name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    stored_value: npt.NDArray[Any] = value.astype("int32" if value.dtype.kind == "i" else dtype)
    if not np.array_equal(stored_value, value):
        raise InputError(
            f"'{name}' does not fit into {dtype}: export the adapter in float32",
            code="trained_beyond_type",
            tensor=name,
        )
    return stored_value


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and sha256_of_file(one) == sha256_of_file(other)


# --- Graphs


def _take_apart(path: Path, tower: Tower, states: Sequence[Weights]) -> tuple[GraphSection, bytes]:
    """Return how a graph is put together from the weights of one of the states, and the rest."""
    stored_values = {
        name: value.const_value.tobytes()
        for name, value in ir.load(path).graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= _LEAST_BYTES
    }
    offsets = _find(path, stored_values)
    limits = (None, PAIR_LIMIT) if any(name.endswith(".int8") for name in offsets) else (None,)
    size_bytes = path.stat().st_size
    rest_bytes = size_bytes
    best: tuple[bool, int | None, dict[str, int]] = (False, None, {})
    for number, weights in enumerate(states):
        for limit in limits:
            made = {
                name: offset
                for name, offset in offsets.items()
                if _made_again(name, weights, limit) == stored_values[name]
            }
            rest = size_bytes - sum(len(stored_values[name]) for name in made)
            if rest < rest_bytes:
                rest_bytes, best = rest, (number > 0, limit, made)
    smoothed, pair_limit, made = best
    if rest_bytes > _MOST_LITERAL_BYTES:
        raise IntegrityError(
            f"{path.name} cannot be made from the base and the trained tensors: {rest_bytes} bytes "
            "are left; report the versions of torch, onnxscript and onnx",
            code="adapter_not_reproducible",
            file=path.name,
        )
    content = path.read_bytes()
    parts, literal, place = [], [], 0
    for name, offset in sorted(made.items(), key=lambda item: item[1]):
        literal.append(content[place:offset])
        parts.append(GraphPart(literal_bytes=offset - place, weight=name))
        place = offset + len(stored_values[name])
    literal.append(content[place:])
    parts.append(GraphPart(literal_bytes=size_bytes - place, weight=None))
    section = GraphSection(
        tower=tower, smoothed=smoothed, pair_limit=pair_limit, parts=tuple(parts)
    )
    return section, b"".join(literal)


def _made_again(name: str, weights: Weights, pair_limit: int | None) -> bytes | None:
    try:
        return stored(name, weights, pair_limit).tobytes()
    except InputError:  # No weight: a mask, for example.
        return None


def _find(path: Path, values: Mapping[str, bytes]) -> dict[str, int]:
    """Return where values lie in a file, without overlaps; values that are not found are left out.

    Files have their initializers in the order of the graph. An equal value that lies before is as
    good.
    """
    found: dict[str, int] = {}
    end = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, value in values.items():
            if value and (offset := content.find(value, end)) >= 0:
                found[name], end = offset, offset + len(value)
    return found
