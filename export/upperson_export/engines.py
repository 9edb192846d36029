"""Engines of a finished bundle, as far as this machine can build them.

TensorRT engines need a GPU with TensorRT and go into the runtime's cache. Those of TensorRT for
RTX, NVIDIA's sibling for consumer cards, need no GPU and go beside the bundle, into a folder with a
record. They run on no Jetson. That compiler also shows what no linter can: whether it takes a
graph, and what it fuses.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from upperson_export.made_files import RecordedFolder
from upperson_export.variants import VARIANTS
from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.files import require_writable
from upperson_rt.towers import TOWERS
from upperson_tensorrt.bindings import import_tensorrt
from upperson_tensorrt.builder import (
    DEFAULT_WORKSPACE_MIB,
    BuildProgress,
    InputProfile,
    build_engine,
    tower_profile,
)
from upperson_tensorrt.cache import EngineCache
from upperson_tensorrt.compile import compile_bundle

_RTX_FOLDER = RecordedFolder("tensorrt-rtx", "engines.json")
_MAX_BATCH = 32
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[.*?\], TacticName: .*?Metadata: (?P<nodes>.*)"
)

Note = Callable[[str], None]
"""Called with each line of progress."""


def rtx_folder(bundle: Path) -> Path:
    """Return where engines of TensorRT for RTX go: ``bundle.rtx`` beside ``bundle``."""
    return Path(f"{bundle}.rtx")


def require_engines(bundle: Path, rtx_capability: str | None) -> None:
    """Refuse what `build_engines` would refuse, as far as that is known before any work."""
    if rtx_capability is not None:
        rtx_target(rtx_capability)
        _RTX_FOLDER.require_place(rtx_folder(bundle))
    if _can_build():
        import_tensorrt()
        require_writable(EngineCache().folder)


def build_engines(
    bundle: Path, rtx_capability: str | None, *, note: Note, progress: BuildProgress
) -> dict[str, str]:
    """Build the engines of a bundle's variants for TensorRT; return a line for each thing built.

    With the compute capability of a GPU, which need not be here, engines of TensorRT for RTX are
    built for it, too.

    Raises:
        BackendError: A compiler is missing, fails, or refuses a graph.
        IntegrityError: An engine differs from ONNX Runtime.
    """
    there = read_manifest(bundle).variants
    variants = [row.name for row in VARIANTS.values() if row.tensorrt and row.name in there]
    if not variants:
        return {"next": "no variant for TensorRT kept its accuracy, so no engine was built"}
    lines = {}
    if rtx_capability is not None:
        for built in write_rtx_engines(
            bundle, variants, rtx_capability, note=note, progress=progress
        ):
            lines[built["engine"]] = (
                f"{rtx_folder(bundle) / built['engine']}: TensorRT for RTX "
                f"{built['tensorrt_rtx']}, compute capability {rtx_capability}, "
                f"{built['fused_attentions']} fused attentions, {built['int8_gemms']} int8 GEMMs"
            )
    if _can_build():
        for variant in variants:
            for tower in compile_bundle(bundle, variant, note=note, progress=progress).towers:
                lines[f"{tower.tower}.{variant}"] = f"engine {tower.path}"
    else:
        lines["next"] = (
            f"no GPU with TensorRT here; on the device run:  upperson-rt compile {bundle} "
            f"--variant {variants[-1]}"
        )
    return lines


def write_rtx_engines(
    bundle: Path,
    variants: Sequence[str],
    compute_capability: str,
    *,
    note: Note,
    progress: BuildProgress,
) -> list[dict[str, Any]]:
    """Compile both towers of some variants; earlier engines are replaced by all of them or none.

    Each engine is described as in the folder's ``engines.json``.
    """
    manifest = read_manifest(bundle)
    engines = []
    with _RTX_FOLDER.create(rtx_folder(bundle)) as folder:
        for variant in variants:
            for tower in TOWERS:
                name = f"{tower}.{variant}.engine"
                note(f"compiling {name} with TensorRT for RTX; this can take minutes")
                graph = manifest.variants[variant].file(tower)
                profile = tower_profile(tower, manifest, _MAX_BATCH)
                engine = build_rtx_engine(
                    bundle / graph.file,
                    profile,
                    compute_capability,
                    lambda phase, *steps, name=name: progress(f"{name}: {phase}", *steps),
                )
                (folder / name).write_bytes(engine.content)
                engines.append(
                    {
                        "engine": name,
                        "onnx_sha256": graph.sha256,
                        "tensorrt_rtx": engine.version,
                        "compute_capability": compute_capability,
                        "profile": asdict(profile),
                        "fused_attentions": len(engine.fused_attentions()),
                        "int8_gemms": len(engine.int8_gemms()),
                    }
                )
        facts = {"fingerprint": manifest.fingerprint, "engines": engines}
        _RTX_FOLDER.write_record(folder, facts)
    return engines


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One kernel of an engine."""

    name: str
    kind: str
    """The compiler's word, such as ``gemm`` or ``kgen``."""
    types: frozenset[str]
    """Types of its inputs and constants, such as ``Int8`` and ``Half``."""
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RtxEngine:
    """A serialized engine and the compiler's description of it."""

    content: bytes
    version: str
    """TensorRT for RTX that made it; it runs with that version only."""
    layers: tuple[FusedLayer, ...]

    def fused_attentions(self) -> list[FusedLayer]:
        """Return the kernels that compute a whole softmax(q k^T) v."""
        return [layer for layer in self.layers if layer.name.startswith("_gemm_mha")]

    def int8_gemms(self) -> list[FusedLayer]:
        """Return the matrix products of int8 activations and int8 weights."""
        return [
            layer
            for layer in self.layers
            # Its scales are Float; with Half beside Int8, an operand was dequantized before.
            if layer.kind == "gemm" and "Int8" in layer.types and "Half" not in layer.types
        ]


def rtx_target(compute_capability: str) -> tuple[ModuleType, str]:
    """Return the bindings and the compiler's name of a GPU, which is cheap."""
    try:
        trt = import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise BackendError(
            f"TensorRT for RTX is not installed ({error}): run  pip install tensorrt-rtx-cu13 "
            "(x86-64 Linux)",
            code="extra_missing",
            package="tensorrt_rtx",
        ) from error
    names = {
        f"{name[2:-1]}.{name[-1]}": name for name in dir(trt.ComputeCapability) if name[:2] == "SM"
    }
    if compute_capability not in names:
        known = ", ".join(sorted(names, key=float))
        raise UsageError(
            f"TensorRT for RTX {trt.__version__} compiles for the compute capabilities {known}, "
            f"not for {compute_capability}: a Jetson or a data centre GPU builds its own engine "
            "with  upperson-rt compile",
            code="capability_unsupported",
            found=compute_capability,
        )
    return trt, names[compute_capability]


def build_rtx_engine(
    onnx_file: Path,
    profile: InputProfile,
    compute_capability: str = "8.6",
    progress: BuildProgress | None = None,
) -> RtxEngine:
    """Compile a tower, best a typed one, for a GPU that need not be there.

    Raises:
        BackendError: The package is missing, or the compiler refuses the graph or fails; the
            message names the node.
        IntegrityError: The graph is not a tower.
        UsageError: The compiler supports no such GPU.
    """
    trt, target = rtx_target(compute_capability)
    built = build_engine(
        trt,
        onnx_file,
        profile,
        workspace_bytes=DEFAULT_WORKSPACE_MIB << 20,
        targets=(target,),
        progress=progress,
    )
    return RtxEngine(built.plan, str(trt.__version__), tuple(parse_layers(built.layers)))


def parse_layers(text: str) -> Iterator[FusedLayer]:
    """Read the compiler's table of layers, one a line."""
    for line in text.splitlines():
        match = _LAYER.match(line.strip())
        if match is not None:
            tensors = match["inputs"] + match["constants"]
            yield FusedLayer(
                name=match["name"],
                kind=match["kind"],
                types=frozenset(re.findall(r"Datatype: (\w+)", tensors)),
                nodes=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match["nodes"])),
            )


def _can_build() -> bool:
    return bool(probe_cuda_driver().devices) and find_spec("tensorrt") is not None
