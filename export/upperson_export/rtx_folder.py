"""Engines of TensorRT for RTX for a whole bundle, in a folder with a record of what they are."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from upperson_export.recorded_folder import foreign_to_record, write_record
from upperson_export.rtx import build_rtx_engine
from upperson_rt.bundle import read_manifest
from upperson_rt.files import new_folder, require_place
from upperson_rt.tensorrt.builder import BuildProgress, tower_profile
from upperson_rt.towers import Tower

RECORD = "engines.json"
_KIND = "tensorrt-rtx"
_MAX_BATCH = 32


def rtx_folder(bundle: Path) -> Path:
    """Return where the engines of a bundle go: ``bundle.rtx`` beside ``bundle``."""
    return Path(f"{bundle}.rtx")


def require_rtx_place(bundle: Path) -> None:
    """Refuse what `write_rtx_engines` would refuse to replace, before any work."""
    require_place(rtx_folder(bundle), foreign_to_record(RECORD, _KIND))


def write_rtx_engines(
    bundle: Path,
    variants: Sequence[str],
    compute_capability: str,
    *,
    note: Callable[[str], None],
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
    towers: tuple[Tower, ...] = ("image", "text")
    engines = []
    with new_folder(rtx_folder(bundle), foreign_to_record(RECORD, _KIND)) as folder:
        for variant in variants:
            entry = manifest.variants[variant]
            for tower in towers:
                name = f"{tower}.{variant}.engine"
                note(f"compiling {name} with TensorRT for RTX; this can take minutes")
                graph = entry.file(tower)
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
        write_record(folder, RECORD, _KIND, facts)
    return engines


def _report(progress: BuildProgress, name: str, phase: str, step: int, steps: int) -> None:
    progress(f"{name}: {phase}", step, steps)
