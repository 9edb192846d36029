"""What ``upperson export --trt`` builds beyond graphs, as far as this machine can."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

Progress = Callable[[str, int, int], None]


def build_engines(
    bundle: Path, trt: bool, flavor: str, capability: str, progress: Progress
) -> dict[str, str]:
    """Build the engines of a bundle's typed variants; return a line for each thing built.

    Args:
        bundle: A complete bundle.
        trt: Whether engines were asked for; else nothing is built.
        flavor: ``standard``, or ``rtx``: TensorRT for RTX as well, which needs no GPU.
        capability: Compute capability that the latter is for.
        progress: Told what goes on.

    Raises:
        BackendError: A compiler is missing or fails.
        InputError: It refuses a graph.
        IntegrityError: An engine differs from ONNX Runtime.
        UsageError: TensorRT for RTX knows no such GPU.
    """
    from upperson_rt.backends.cuda_driver import probe_cuda_driver
    from upperson_rt.bundle import read_manifest

    if not trt:
        return {}
    variants = read_manifest(bundle).variants
    typed = [name for name in ("fp16", "int8-fp16") if name in variants]
    lines = _rtx_engines(bundle, typed, capability, progress) if flavor == "rtx" else {}
    if probe_cuda_driver().devices and find_spec("tensorrt") is not None:
        from upperson_rt.tensorrt.compile import compile_bundle

        for variant in typed:
            for built in compile_bundle(bundle, variant).towers:
                lines[f"{built.tower}.{variant}"] = f"engine {built.path}"
    else:
        lines["next"] = (
            f"no GPU with TensorRT here; on the device run:  upperson-rt compile {bundle} "
            f"--variant {typed[0] if typed else 'fp16'}"
        )
    return lines


def _rtx_engines(
    bundle: Path, variants: Sequence[str], capability: str, progress: Progress
) -> dict[str, str]:
    import onnx

    from upperson_export.rtx import build_rtx_engine
    from upperson_rt.atomic import write_atomically
    from upperson_rt.bundle import read_manifest
    from upperson_rt.canaries import Tower
    from upperson_rt.tensorrt.profiles import tower_profile

    manifest = read_manifest(bundle)
    towers: tuple[Tower, ...] = ("image", "text")
    lines = {}
    for variant in variants:
        entry = manifest.variants[variant]
        for tower in towers:
            progress(f"compiling {tower} {variant} for TensorRT for RTX", 0, 1)
            file = entry.image if tower == "image" else entry.text
            profile = tower_profile(tower, manifest, max_batch=32)
            engine = build_rtx_engine(onnx.load(bundle / file.file), profile, capability)
            target = bundle.with_name(f"{bundle.name}.rtx") / f"{tower}.{variant}.engine"
            write_atomically(target, engine.content)
            lines[target.name] = (
                f"{target}: TensorRT for RTX {engine.version}, compute capability {capability}, "
                f"{len(engine.fused_attentions())} fused attentions, "
                f"{len(engine.int8_gemms())} int8 GEMMs"
            )
    return lines
