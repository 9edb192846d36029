"""Engines of a finished bundle, as far as this machine can build them.

TensorRT's are built where a GPU with TensorRT is, into the runtime's cache. Those of TensorRT for
RTX need no GPU and go beside the bundle, into a folder with a record of what they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upperson_export.recorded_folder import RecordedFolder
from upperson_export.rtx import build_rtx_engine, rtx_target
from upperson_export.variants import VARIANTS
from upperson_rt.bundle import read_manifest
from upperson_rt.compile import compile_bundle
from upperson_rt.files import require_writable
from upperson_rt.tensorrt.bindings import import_tensorrt
from upperson_rt.tensorrt.builder import BuildProgress, tower_profile
from upperson_rt.tensorrt.cache import EngineCache
from upperson_rt.tensorrt.cuda import probe_cuda_driver
from upperson_rt.towers import TOWERS

_RTX_FOLDER = RecordedFolder("tensorrt-rtx", "engines.json")
_MAX_BATCH = 32

Note = Callable[[str], None]
"""Told what is going on, a line at a time."""


def rtx_folder(bundle: Path) -> Path:
    """Return where engines of TensorRT for RTX go: ``bundle.rtx`` beside ``bundle``."""
    return Path(f"{bundle}.rtx")


def require_engines(bundle: Path, rtx_capability: str | None) -> None:
    """Refuse what `build_engines` would refuse, as far as it can be told before any work.

    Args:
        bundle: Where the bundle will be.
        rtx_capability: See `build_engines`.

    Raises:
        BackendError: TensorRT is too old or does not load; TensorRT for RTX is not installed.
        InputError: A folder for engines holds something else, or cannot be written to.
        UsageError: TensorRT for RTX knows no such GPU.
    """
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

    Args:
        bundle: A complete bundle.
        rtx_capability: Compute capability of a GPU to build engines of TensorRT for RTX for, which
            needs none here; None for no such engines.
        note: Told what is going on, a line at a time.
        progress: Told about each step of a build.

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

    Returns:
        A description of each engine, as ``engines.json`` in the folder has it.

    Raises:
        BackendError, IntegrityError, UsageError: As `build_rtx_engine`.
        InputError: The folder holds something else, or cannot be written to.
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
                    partial(_report, progress, name),
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


def _report(progress: BuildProgress, name: str, phase: str, step: int, steps: int) -> None:
    progress(f"{name}: {phase}", step, steps)


def _can_build() -> bool:
    return bool(probe_cuda_driver().devices) and find_spec("tensorrt") is not None
