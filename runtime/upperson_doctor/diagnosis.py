"""Self-diagnosis: what is installed, what runs, and whether bundle and gallery are sound."""

import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from upperson_autotune.autotuner import MeasuredChoice
from upperson_doctor.cards import check_cards
from upperson_doctor.installed import installed_checks
from upperson_doctor.scores import check_scores
from upperson_log.chain import verify_log
from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.backends import auto_order, open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.checks import Check, fail_from_error, failed, ok, warning
from upperson_rt.errors import IntegrityError, UppersonError, install_command
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.gallery import Gallery
from upperson_rt.machine import version_of
from upperson_rt.printable import count_of
from upperson_rt.towers import TOWERS, Tower
from upperson_signature.signature import named_key

_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")

_PROBE = (
    b'\x08\x08:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f'
    b"\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""The smallest ONNX file: y = -x for one float, opset 17."""


def diagnose(
    bundle: Path | None = None,
    gallery: str | Path | None = None,
    variant: str | None = None,
    backend: str = "auto",
    device: str = "cpu",
    trust: Path | None = None,
    query_log: Path | None = None,
) -> list[Check]:
    """Check the installation, and a bundle, a gallery and a query log where given.

    Of a bundle hashes and golden samples are checked, and that it distinguishes test cards, of a
    gallery that it opens and belongs to the bundle, of both that scores are calibrated with
    pictures like these, of a query log that its lines are as they were written. Arguments as
    `Bundle.open`.
    """
    checks = [*installed_checks(), *_detector(), *_backends(), _driver(), *_device(backend, device)]
    opened = None
    if bundle is not None:
        bundle_checks, opened = _bundle(bundle, variant, backend, device, trust)
        checks += bundle_checks
    if gallery is not None:
        fingerprint = None if opened is None else opened.manifest.fingerprint
        checks.append(_gallery(gallery, fingerprint))
    if opened is not None:
        is_sound = gallery is not None and checks[-1].status != "fail"
        checks.append(check_scores(opened, gallery if is_sound else None))
    if query_log is not None:
        checks.append(_query_log(query_log))
    return checks


def _query_log(path: Path) -> Check:
    try:
        report = verify_log(path)
        if report.problems:
            raise IntegrityError(report.problems[0], code=report.code)
    except UppersonError as error:
        return fail_from_error("query log", error)
    return ok("query log", f"{count_of(report.lines, 'line')} as they were written")


def _detector() -> list[Check]:
    """Report which detector ``--detector auto`` takes."""
    is_there = "auto" in extension_names("detectors") and find_spec("cv2") is not None
    return load_extension("detectors", "auto").checks() if is_there else []


def _backends() -> list[Check]:
    checks: list[Check] = []
    for name in extension_names("backends"):
        checks += load_extension("backends", name).checks()
    if not any(find_spec(name) for name in ("onnxruntime", "openvino", "tensorrt")):
        advice = f"{install_command('cpu')}; for an NVIDIA GPU  {install_command('gpu')}"
        checks.append(failed("backend", "none is installed", advice))
    return checks


def _device(backend: str, device: str) -> list[Check]:
    """Run the smallest graph where bundles would run, and say where that was."""
    name = backend
    if backend == "auto":
        installed = (name for name in auto_order(device.lower()) if find_spec(name))
        name = next(installed, "")
    if not name or not _runs_any_graph(name):
        return []  # None is installed, or its own row is all that can be checked.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.onnx")
        path.write_bytes(_PROBE)
        try:
            running = open_backend(path, name, device)
            outputs = running.run({"x": np.array([2], np.float32)})
        except UppersonError as error:
            return [fail_from_error("device", error)]
    if outputs["y"].tolist() != [-2]:
        where = f"{running.name} {running.version} on {running.device}"
        wrong = f"{where} computes -2 as {outputs['y']}"
        return [failed("device", wrong, "install the library or the driver again")]
    facts = {"backend": running.name, "version": running.version, "device": running.device}
    how = "the first one installed" if backend == "auto" else "as asked for"
    detail = f"{running.name} {running.version} computes on {running.device} ({how})"
    return [ok("device", detail, **facts)]


def _runs_any_graph(backend: str) -> bool:
    if backend not in extension_names("backends"):
        return True
    return bool(getattr(load_extension("backends", backend), "runs_any_graph", False))


def _driver() -> Check:
    driver = probe_cuda_driver()
    facts = {"cuda": driver.version, "gpus": list(driver.devices), "version": kernel_driver()}
    if driver.version is not None:
        gpus = ", ".join(driver.devices) or "no GPU"
        release = f", driver {facts['version']}" if facts["version"] else ""
        return ok("NVIDIA driver", f"CUDA {driver.version}, {gpus}{release}", **facts)
    wanted = version_of("onnxruntime-gpu") or find_spec("tensorrt")
    problem = driver.problem or "unknown"
    if wanted:
        detail = f"{problem}, but a GPU package is installed"
        fix = "install the driver, or run the container with --gpus all"
        return warning("NVIDIA driver", detail, fix, **facts)
    return ok("NVIDIA driver", f"{problem}; only GPUs need it", **facts)


def kernel_driver() -> str | None:
    """Return the release of the driver, such as 550.54.14, where the kernel module names it."""
    if not _KERNEL_DRIVER.is_file():
        return None
    text = _KERNEL_DRIVER.read_text("utf-8", "replace")
    found = re.search(r"Kernel Module.*?\b(\d+(?:\.\d+)+)\b", text)  # Not the 86 of x86_64.
    return found and found[1]


def _bundle(
    path: Path, variant: str | None, backend: str, device: str, trust: Path | None
) -> tuple[list[Check], Bundle | None]:
    try:
        bundle = Bundle.open(path, variant, backend, device, trust=trust)
        bundle.check_files()
        signature = _signature(path, trust is not None)
    except UppersonError as error:
        return [fail_from_error("bundle", error)], None
    model = bundle.manifest.model
    row = ok(
        "bundle",
        f"{path}: {model.name}, {model.base}, {model.embed_dim} dimensions, variants "
        f"{', '.join(bundle.manifest.variants)} (using {bundle.variant}, its hashes match)",
        model=model.name,
        variant=bundle.variant,
        variants=list(bundle.manifest.variants),
        fingerprint=bundle.manifest.fingerprint,
    )
    checks = [row, signature]
    try:
        golden = bundle.check_golden_samples()
    except UppersonError as error:
        return [*checks, fail_from_error("golden samples", error)], bundle
    worst = min(check.min_cosine for check in golden)
    towers = {tower: bundle.backend(tower) for tower in TOWERS}
    places = dict.fromkeys(f"{one.name} {one.version} on {one.device}" for one in towers.values())
    running = towers["image"]
    needed = min(bundle.entry.min_golden_cosine(found) for found in towers.values())
    row = ok(
        "golden samples",
        f"lowest cosine {worst:.6f} (needs {needed:g}) with {' and '.join(places)}",
        min_cosine=worst,
        backend=running.name,
        version=running.version,
        device=running.device,
    )
    rows = [*checks, row, check_cards(bundle.encoder())]
    rows += (_tower(bundle, tower) for tower in TOWERS)
    return rows, bundle


def _signature(path: Path, verified: bool) -> Check:
    """Say which key has signed a bundle; that it did is known if it was verified."""
    key = named_key(path)
    if key is None:
        found = "the bundle is not signed: hashes show damage, not who made it"
    elif verified:
        found = f"by the trusted key sha256:{key}, of all files as they are"
    else:
        found = f"says it is by the key sha256:{key}, unchecked:  --trust PUBKEY  checks it"
    return ok("signature", found, key=key, verified=verified)


def _tower(bundle: Bundle, tower: Tower) -> Check:
    running, choice = bundle.backend(tower), bundle.choice(tower)
    detail = f"{running.name} {running.version} on {running.device} ({choice.why})"
    facts: dict[str, Any] = {"backend": running.name, "why": choice.why}
    fix = ""
    if isinstance(choice, MeasuredChoice):
        found = choice.measurement
        facts |= {
            "milliseconds": found.milliseconds,
            "pictures": found.pictures,
            "left_out": found.left_out,
            "file": None if choice.file is None else str(choice.file),
        }
        detail += "".join(f"; {name}: {problem}" for name, problem in found.left_out.items())
        if choice.problem:
            fix = f"{choice.problem}: name a folder to keep measurements in  $UPPERSON_CACHE"
    sound = not fix and not facts.get("left_out")
    return Check(f"{tower} tower", "ok" if sound else "warn", detail, fix, facts=facts)


def _gallery(location: str | Path, fingerprint: str | None) -> Check:
    try:
        with Gallery.open(location, fingerprint) as gallery:
            gallery.check()
            info = gallery.info()
    except UppersonError as error:
        return fail_from_error("gallery", error)
    belongs = "" if fingerprint is None else ", made with this bundle's model"
    index = "" if info.index is None else f", index {info.index.kind}"
    return ok(
        "gallery",
        f"{info.location}: {count_of(info.items, 'picture')}{belongs}{index}; its rows were not "
        "read:  upperson-rt gallery verify  does that",
        items=info.items,
        index=None if info.index is None else info.index.kind,
        fingerprint=info.fingerprint,
        size_bytes=info.size_bytes,
    )
