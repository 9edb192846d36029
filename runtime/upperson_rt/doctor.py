"""Self-diagnosis: what is installed, what runs, and whether bundle and gallery are sound."""

import platform
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from upperson_rt.backends.cuda_driver import probe_cuda_driver
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, UppersonError
from upperson_rt.gallery import Gallery

__all__ = ["Check", "diagnose"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    """What was found."""
    fix: str = ""
    """What to do about it; empty where the detail already says so."""
    exit_code: int = 0
    """For the command line; not 0 exactly for ``fail``."""


def diagnose(
    bundle: Path | None = None,
    gallery: str | Path | None = None,
    variant: str | None = None,
    backend: str = "auto",
    device: str = "cpu",
) -> list[Check]:
    """Check the installation, and a bundle and a gallery where given.

    Args:
        bundle: Folder of a bundle: hashes, then canaries on the backend that really runs.
        gallery: Location of a gallery: opens, counts, and belongs to the bundle.
        variant: Of the bundle; None for its default.
        backend: See `open_backend`.
        device: See `open_backend`.
    """
    checks = [_python(), *_packages(), *_backends(), _driver()]
    fingerprint = None
    if bundle is not None:
        bundle_checks, fingerprint = _bundle(bundle, variant, backend, device)
        checks += bundle_checks
    if gallery is not None:
        checks.append(_gallery(gallery, fingerprint))
    return checks


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok", detail)


def _packages() -> list[Check]:
    checks = []
    for package in ("numpy", "pillow", "tokenizers"):
        version = _version(package)
        checks.append(
            Check(package, "ok", version)
            if version
            else _fail(package, "not installed", f"pip install {package}")
        )
    whole, slim = _version("upperson"), _version("upperson-rt")
    if whole and slim:
        checks.append(
            Check(
                "upperson",
                "warn",
                f"both upperson {whole} and upperson-rt {slim} are installed; they own the same "
                "files, and removing one damages the other",
                "pip uninstall upperson upperson-rt, then install one of them",
            )
        )
    else:
        found = f"upperson {whole}" if whole else f"upperson-rt {slim}" if slim else "from source"
        checks.append(Check("upperson", "ok", found))
    return checks


def _backends() -> list[Check]:
    gpu_build, cpu_build = _version("onnxruntime-gpu"), _version("onnxruntime")
    openvino = _version("openvino")
    optional = "not installed (optional)"
    checks = []
    if find_spec("onnxruntime") is None:
        checks.append(Check("onnxruntime", "ok", optional))
    elif gpu_build and cpu_build:
        checks.append(
            Check(
                "onnxruntime",
                "warn",
                f"both onnxruntime {cpu_build} and onnxruntime-gpu {gpu_build} are installed; they "
                "overwrite each other",
                "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
            )
        )
    else:
        checks.append(_onnxruntime(gpu_build or cpu_build or "unknown version"))
    checks.append(Check("openvino", "ok", openvino or optional))
    checks.append(
        Check("tensorrt", "ok", optional) if find_spec("tensorrt") is None else _tensorrt()
    )
    if not any(find_spec(name) for name in ("onnxruntime", "openvino", "tensorrt")):
        checks.append(
            _fail("backend", "none is installed", "pip install 'upperson-rt[cpu]' or [gpu]")
        )
    return checks


def _onnxruntime(version: str) -> Check:
    try:
        import onnxruntime
    except ImportError as error:
        return _fail("onnxruntime", f"{version} does not import: {error}", "install it again")
    providers = [name.removesuffix("ExecutionProvider") for name in _providers(onnxruntime)]
    return Check("onnxruntime", "ok", f"{version} with {', '.join(providers)}")


def _tensorrt() -> Check:
    """Check TensorRT and its engines. Importing it is safe without a driver, using it is not."""
    from upperson_rt.tensorrt.bindings import import_tensorrt
    from upperson_rt.tensorrt.cache import EngineCache

    try:
        version = import_tensorrt().__version__
    except BackendError as error:
        return _fail_from_error("tensorrt", error)
    driver = probe_cuda_driver()
    if not driver.devices:
        reason = driver.problem or "the driver finds no GPU"
        return Check(
            "tensorrt",
            "warn",
            f"{version}, which cannot run here: {reason}",
            "install the driver, or run the container with --gpus all",
        )
    cache = EngineCache()
    records, problems = cache.records()
    usable = [record for record in records if record.target.tensorrt == version]
    variants = ", ".join(sorted({record.variant for record in usable})) or "none"
    found = f"{version}, engines in {cache.folder}: {len(usable)} for this version ({variants})"
    if len(records) > len(usable):
        found += f", {len(records) - len(usable)} for another"
    if problems:
        return Check("tensorrt", "warn", f"{found}; {'; '.join(problems)}", "compile again")
    advice = "" if usable else "upperson-rt compile BUNDLE  builds them"
    return Check("tensorrt", "ok", found, advice)


def _providers(onnxruntime: object) -> list[str]:
    names: list[str] = onnxruntime.get_available_providers()  # type: ignore[attr-defined]
    return names


def _driver() -> Check:
    driver = probe_cuda_driver()
    if driver.version is not None:
        gpus = ", ".join(driver.devices) or "no GPU"
        return Check("NVIDIA driver", "ok", f"CUDA {driver.version}, {gpus}")
    wanted = _version("onnxruntime-gpu") or find_spec("tensorrt")
    problem = driver.problem or "unknown"
    if wanted:
        return Check(
            "NVIDIA driver",
            "warn",
            f"{problem}, but a GPU package is installed",
            "install the driver, or run the container with --gpus all",
        )
    return Check("NVIDIA driver", "ok", f"{problem}; only GPUs need it")


def _bundle(
    path: Path, variant: str | None, backend: str, device: str
) -> tuple[list[Check], str | None]:
    """Return the checks of a bundle, and its fingerprint if it opens."""
    try:
        bundle = Bundle.open(path, variant, backend, device)
    except UppersonError as error:
        return [_fail_from_error("bundle", error)], None
    model = bundle.manifest.model
    checks = [
        Check(
            "bundle",
            "ok",
            f"{path}: {model.name}, {model.base}, {model.embed_dim} dimensions, variants "
            f"{', '.join(bundle.manifest.variants)} (using {bundle.variant}, its hashes match)",
        )
    ]
    try:
        canaries = bundle.check_canaries()
        running = bundle.backend("image")
    except UppersonError as error:
        return [*checks, _fail_from_error("canaries", error)], bundle.manifest.fingerprint
    worst = min(canary.min_cosine for canary in canaries)
    checks.append(
        Check(
            "canaries",
            "ok",
            f"lowest cosine {worst:.6f} (needs {bundle.entry.canary_min_cosine}) with "
            f"{running.name} {running.version} on {running.device}",
        )
    )
    return checks, bundle.manifest.fingerprint


def _gallery(path: str | Path, fingerprint: str | None) -> Check:
    try:
        with Gallery.open(path, fingerprint) as gallery:
            items = gallery.count()
    except UppersonError as error:
        return _fail_from_error("gallery", error)
    belongs = "" if fingerprint is None else ", made with this bundle's model"
    return Check("gallery", "ok", f"{path}: {items} pictures{belongs}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _fail(name: str, detail: str, fix: str) -> Check:
    return Check(name, "fail", detail, fix, BackendError.exit_code)


def _fail_from_error(name: str, error: UppersonError) -> Check:
    return Check(name, "fail", " ".join(str(error).split()), exit_code=error.exit_code)
