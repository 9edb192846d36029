"""From a bundle to engines for the GPU of this machine, each compared before it is kept."""

import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

import upperson_rt
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.towers import TOWERS, Tower, run_tower
from upperson_tensorrt.bindings import import_tensorrt, open_gpu
from upperson_tensorrt.builder import (
    DEFAULT_WORKSPACE_MIB,
    BuildProgress,
    InputProfile,
    build_engine,
    compare_engine,
    tower_profile,
)
from upperson_tensorrt.cache import EngineCache, EngineRecord, Target
from upperson_tensorrt.cuda import Cuda
from upperson_tensorrt.session import EngineSession


@dataclass(frozen=True)
class CompiledTower:
    """One engine."""

    tower: Tower
    path: Path
    record: EngineRecord
    reused: bool
    """It was there already, from an earlier build with the same settings."""


@dataclass(frozen=True)
class CompiledBundle:
    """The engines of a variant."""

    variant: str
    target: Target
    folder: Path
    towers: tuple[CompiledTower, CompiledTower]
    """Image, then text."""


def compile_bundle(
    bundle: Path,
    variant: str = "fp16",
    device: str = "cuda",
    *,
    trust: Path | None = None,
    max_batch: int = 32,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    cache: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: BuildProgress = lambda work, step, steps: None,
) -> CompiledBundle:
    """Build the engines of a variant, compare them with ONNX Runtime, and write them to the cache.

    Engines that are there already, whole and made with the same settings, are kept. Nothing is
    written for a tower whose engine does not compute what ONNX Runtime computes. One process builds
    at a time.

    Args:
        bundle: Folder of the bundle.
        variant: Its precision; the graph decides the precision of every operation.
        device: ``cuda`` or ``cuda:N``.
        trust: Public key that must have signed the bundle; see `Bundle.open`.
        max_batch: Largest batch that runs in one go.
        workspace_mib: Largest scratch memory of one layer.
        cache: Folder of engines; see `cache_folder`, the default.
        note: Called with each line of progress.
        progress: Called for each step of a build.

    Raises:
        UsageError: There is no such variant, or a number is below 1.
        InputError: Not a bundle, or the cache cannot be written to.
        BackendError: No driver or GPU, TensorRT or ONNX Runtime missing, or the build fails.
        IntegrityError: The bundle is damaged, or an engine does not compute what ONNX Runtime
            computes; nothing is written for that tower.
        KeyboardInterrupt: Ctrl-C; the build was cancelled.
    """
    if workspace_mib < 1:
        message = f"workspace_mib must be at least 1, got {workspace_mib}"
        raise UsageError(message, code="out_of_range", what="workspace_mib")
    manifest = read_manifest(bundle, trust)
    if variant not in manifest.variants:
        raise UsageError(
            f"bundle {bundle} has no variant '{variant}', only {', '.join(manifest.variants)}: "
            "choose one of them with --variant, or export the bundle again with  --trt  for "
            "those that suit TensorRT best, fp16 and int8-fp16",
            code="variant_unknown",
            variant=variant,
        )
    profiles = {tower: tower_profile(tower, manifest, max_batch) for tower in TOWERS}
    cuda = open_gpu(device)
    trt = import_tensorrt()
    # The reference: it checks hashes, golden samples and that ONNX Runtime is there before the
    # minutes of a build.
    opened = Bundle.open(bundle, variant, "onnxruntime", "cpu", trust=trust)
    opened.check_files()
    store, target = EngineCache(cache), Target.here(trt, cuda)
    note(f"{target}; engines go to {store.folder}")
    with store.lock(lambda: note("another process is compiling, waiting for it")):
        towers = tuple(
            _compile_tower(
                tower, opened, trt, cuda, target, profile, workspace_mib, store, note, progress
            )
            for tower, profile in profiles.items()
        )
    return CompiledBundle(variant, target, store.folder, (towers[0], towers[1]))


def _compile_tower(
    tower: Tower,
    opened: Bundle,
    trt: ModuleType,
    cuda: Cuda,
    target: Target,
    profile: InputProfile,
    workspace_mib: int,
    store: EngineCache,
    note: Callable[[str], None],
    progress: BuildProgress,
) -> CompiledTower:
    entry = opened.entry.file(tower)
    wanted = (target, entry.sha256, profile, workspace_mib)
    for record in store.records()[0]:
        if wanted == (record.target, record.onnx_sha256, record.profile, record.workspace_mib):
            try:
                store.load(record)
            except IntegrityError as error:
                note(f"building the engine of the {tower} tower again: {error}")
                break
            note(f"the engine of the {tower} tower is there already")
            return CompiledTower(tower, store.folder / record.name, record, reused=True)

    reference = opened.backend(tower)
    note(f"building the engine of the {tower} tower ({opened.variant}); this can take minutes")
    timings = store.load_timing_cache(target)
    with cuda.current():
        built = build_engine(
            trt,
            opened.path / entry.file,
            profile,
            workspace_bytes=workspace_mib << 20,
            timing_cache=timings,
            progress=lambda phase, step, steps: progress(f"{tower} tower: {phase}", step, steps),
        )
    if timings and not built.timing_cache_used:
        note("the timings of earlier builds could not be used; kernels were measured anew")
    session = EngineSession(trt, cuda, built.plan)
    note(f"comparing the engine of the {tower} tower with ONNX Runtime")
    comparisons = compare_engine(
        tower,
        lambda rows: session.run(rows).astype(np.float32, copy=False),
        # Row by row: a batch of the largest engine may be too much memory for a small board.
        lambda rows: np.concatenate([run_tower(reference, tower, row[None]) for row in rows]),
        opened.golden,
        profile,
        opened.entry.canary_min_cosine,
        f"variant {opened.variant} with TensorRT {trt.__version__}",
    )
    record = EngineRecord(
        target=target,
        onnx_sha256=entry.sha256,
        profile=profile,
        workspace_mib=workspace_mib,
        variant=opened.variant,
        model=opened.manifest.model.name,
        sha256=hashlib.sha256(built.plan).hexdigest(),
        size_bytes=len(built.plan),
        built=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        build_seconds=round(built.seconds, 3),
        versions={
            "upperson_rt": upperson_rt.__version__,
            "driver": cuda.gpu.driver,
            "onnxruntime": reference.version,
        },
        min_cosine=opened.entry.canary_min_cosine,
        comparisons=tuple(comparisons),
    )
    path = store.save(record, built.plan)
    # Only now: the timings of a build that computes wrongly would lead to the same one again.
    if built.timing_cache is not None:
        store.save_timing_cache(target, built.timing_cache)
    return CompiledTower(tower, path, record, reused=False)
