"""What ``upperson export --trt`` builds beyond graphs, as far as this machine can."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upperson.cli.progress import Display


def require_engines(bundle: Path, capability: str | None) -> None:
    """Refuse what `build_engines` would refuse, as far as it can be told before any work.

    Args:
        bundle: Where the bundle will be.
        capability: See `build_engines`.

    Raises:
        BackendError: TensorRT is too old or does not load; TensorRT for RTX is not installed.
        InputError: A folder for engines holds something else, or cannot be written to.
        UsageError: TensorRT for RTX knows no such GPU.
    """
    if capability is not None:
        from upperson_export.rtx import rtx_target
        from upperson_export.rtx_folder import require_rtx_place

        rtx_target(capability)
        require_rtx_place(bundle)
    if _can_build():
        from upperson_rt.files import require_writable
        from upperson_rt.tensorrt.bindings import import_tensorrt
        from upperson_rt.tensorrt.cache import EngineCache

        import_tensorrt()
        require_writable(EngineCache().folder)


def build_engines(bundle: Path, capability: str | None, display: "Display") -> dict[str, str]:
    """Build the engines of a bundle's typed variants; return a line for each thing built.

    Args:
        bundle: A complete bundle.
        capability: Compute capability of a GPU to build TensorRT for RTX's engines for, which needs
            none here; None for no such engines.
        display: Told what goes on.

    Raises:
        BackendError: A compiler is missing, fails, or refuses a graph.
        IntegrityError: An engine differs from ONNX Runtime.
    """
    from upperson_export.variants import VARIANTS
    from upperson_rt.bundle import read_manifest

    variants = read_manifest(bundle).variants
    typed = [row.name for row in VARIANTS.values() if row.tensorrt and row.name in variants]
    if not typed:
        return {"next": "no variant for TensorRT kept its accuracy, so no engine was built"}
    lines = {} if capability is None else _rtx_engines(bundle, typed, capability, display)
    if _can_build():
        from upperson_rt.compile import compile_bundle

        for variant in typed:
            compiled = compile_bundle(bundle, variant, note=display.say, progress=display.step)
            for built in compiled.towers:
                lines[f"{built.tower}.{variant}"] = f"engine {built.path}"
    else:
        lines["next"] = (
            f"no GPU with TensorRT here; on the device run:  upperson-rt compile {bundle} "
            f"--variant {typed[-1]}"
        )
    return lines


def _can_build() -> bool:
    from upperson_rt.tensorrt.cuda import probe_cuda_driver

    return bool(probe_cuda_driver().devices) and find_spec("tensorrt") is not None


def _rtx_engines(
    bundle: Path, variants: Sequence[str], capability: str, display: "Display"
) -> dict[str, str]:
    from upperson_export.rtx_folder import rtx_folder, write_rtx_engines

    return {
        built["engine"]: (
            f"{rtx_folder(bundle) / built['engine']}: TensorRT for RTX {built['tensorrt_rtx']}, "
            f"compute capability {capability}, {built['fused_attentions']} fused attentions, "
            f"{built['int8_gemms']} int8 GEMMs"
        )
        for built in write_rtx_engines(
            bundle, variants, capability, note=display.say, progress=display.step
        )
    }
