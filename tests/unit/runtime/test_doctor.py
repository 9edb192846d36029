import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import upperson_onnxruntime
from tests.helpers.toy_bundle import calibrate_toy_bundle, make_toy_bundle, replace_in_bundle
from upperson_doctor import diagnosis as doctor
from upperson_doctor import installed as packages
from upperson_doctor.diagnosis import diagnose
from upperson_doctor.jetson import jetson_release
from upperson_log.query_log import QueryLog
from upperson_machine.nvidia import CudaDriver
from upperson_openvino.backend import OpenVinoBackend
from upperson_rt import errors
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, install_command
from upperson_rt.gallery import Gallery, Item
from upperson_rt.manifest import parse_manifest
from upperson_rt.phrases.evidence import Evidence
from upperson_rt.score_calibration import Reference, write_score_calibration
from upperson_rt.search import features
from upperson_rt.search.features import sample_features


def by_name(checks):
    return {check.name: check for check in checks}


def ends(check):
    return check.status, check.exit_code


def test_a_healthy_installation(folder, tmp_path):
    calibrate_toy_bundle(folder)
    manifest = parse_manifest((folder / "bundle.json").read_text())
    Gallery.open(tmp_path / "g", manifest.fingerprint, 16, create=True).close()
    found = by_name(diagnose(folder, tmp_path / "g"))
    assert found.pop("test cards").status == "warn"  # The toy knows colours, and no stripes.
    assert {check.status for check in found.values()} == {"ok"}
    for tower in ("image", "text"):
        facts = found[f"{tower} tower"].facts
        assert facts["backend"] in found[f"{tower} tower"].detail
        assert facts["why"].startswith("auto: ")
    assert found["device"].facts["device"] == "cpu"
    assert found["onnxruntime"].facts["providers"][-1] == "CPU"
    assert found["sqlite"].facts == {"version": sqlite3.sqlite_version}
    assert found["gallery"].facts["items"] == 0
    assert found["golden samples"].facts["min_cosine"] > 0.9999
    assert found["bundle"].facts["variants"] == ["fp32", "int8"]


def test_the_score_calibration_and_the_cameras_that_are_unlike_it(folder, tmp_path, monkeypatch):
    def found(gallery=None):
        return by_name(diagnose(folder, gallery))["score calibration"]

    none = found()
    assert (none.status, none.facts["source"]) == ("warn", None)
    assert "upperson-rt calibrate" in none.fix
    calibration = calibrate_toy_bundle(folder)
    assert found().status == "ok"
    monkeypatch.setattr("upperson_rt.search.shift.LEAST", 5)
    unit = np.eye(16, dtype=np.float32)
    with Gallery.open(tmp_path / "g", calibration.fingerprint, 16, create=True) as gallery:
        for row, camera in enumerate(("gate", "hall")):
            items = [Item(key=f"{camera}{n}", camera=camera) for n in range(12)]
            gallery.add(items, np.repeat(unit[row : row + 1], 12, axis=0))
    like = found(tmp_path / "g")
    assert (like.status, like.facts["source"], like.facts["version"]) == ("ok", "bundle", 1)
    assert [group["pictures"] for group in like.facts["groups"]] == [12, 12]
    axes = (tuple(unit[1].tolist()),)  # Along which the pictures of the hall lie.
    site = replace(
        calibration,
        version=2,
        reference=Reference(mean=(0.0,) * 16, axes=axes, threshold=0.5),
    )
    write_score_calibration(tmp_path / "g" / "scores.json", site)
    unlike = found(tmp_path / "g")
    assert (unlike.status, unlike.facts["source"], unlike.facts["version"]) == (
        "warn",
        "gallery",
        2,
    )
    assert "hall" in unlike.detail
    assert "gate" not in unlike.detail.replace(str(tmp_path), "")
    write_score_calibration(
        tmp_path / "g" / "scores.json", replace(site, version=3, fingerprint="sha256:other")
    )
    assert ends(found(tmp_path / "g")) == ("fail", 3)


def test_a_calibration_of_other_rules_is_stale(folder, monkeypatch):
    def found():
        return by_name(diagnose(folder))["score calibration"].status

    made = calibrate_toy_bundle(folder)
    evidence = Evidence(Bundle.open(folder).encoder().encode_texts)
    sample = sample_features(evidence, made.background)
    calibrate_toy_bundle(folder, fitted_on={"sample": sample})
    assert found() == "ok"
    with monkeypatch.context() as other:
        other.setattr(features, "_TEMPERATURE", 0.03)
        assert found() == "warn"
    for damaged in (sample[1:], ["1", *sample[1:]], {}):
        calibrate_toy_bundle(folder, fitted_on={"sample": damaged})
        assert found() == "warn"


def test_what_was_measured_is_shown_and_made_if_need_be(toy_bundle, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    first, again = (by_name(diagnose(toy_bundle)) for _ in range(2))
    for tower in ("image", "text"):
        row = first[f"{tower} tower"]
        assert row == again[f"{tower} tower"]
        assert set(row.facts["milliseconds"]) == {"onnxruntime", "openvino"}
        assert Path(row.facts["file"]).parent == tmp_path / "cache" / "backends"
    named = by_name(diagnose(toy_bundle, backend="openvino"))
    assert named["text tower"].facts == {"backend": "openvino", "why": "as asked for"}
    assert named["device"].facts["backend"] == "openvino"
    assert "cpu" in named["openvino"].facts["devices"]


def test_a_measurement_that_is_not_kept_and_a_backend_left_out_are_warnings(
    toy_bundle, tmp_path, monkeypatch
):
    pytest.importorskip("openvino")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "file"))

    def broken(*_):
        raise BackendError("OpenVINO cannot load it")

    monkeypatch.setattr(OpenVinoBackend, "_load", broken)
    row = by_name(diagnose(toy_bundle))["image tower"]
    assert (row.status, row.facts["file"], row.facts["backend"]) == ("warn", None, "onnxruntime")
    assert "$UPPERSON_CACHE" in row.fix
    assert row.facts["left_out"] == {"openvino": "OpenVINO cannot load it"}


def test_failures_are_rows_not_exceptions(folder, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=3)
    replace_in_bundle(folder, "image.int8.onnx", (other / "image.int8.onnx").read_bytes())
    Gallery.open(tmp_path / "g", "sha256:other", 16, create=True).close()
    found = by_name(diagnose(folder, tmp_path / "g"))
    rows = [found[name] for name in ("bundle", "golden samples", "gallery")]
    assert [ends(row) for row in rows] == [("ok", 0), ("fail", 6), ("fail", 6)]
    assert ends(by_name(diagnose(gallery=tmp_path / "nowhere"))["gallery"]) == ("fail", 3)
    assert ends(by_name(diagnose(gallery=tmp_path / "g"))["gallery"]) == ("ok", 0)
    (folder / "canaries.npz").unlink()
    found = by_name(diagnose(folder))
    assert ends(found["bundle"]) == ("fail", 6)
    assert "golden samples" not in found


def test_a_gallery_in_milvus(toy_bundle, tmp_path):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    manifest = parse_manifest((toy_bundle / "bundle.json").read_text())
    location = f"milvus://{tmp_path}/people.db/people"
    Gallery.open(location, manifest.fingerprint, 16, create=True).close()
    found = doctor._gallery(location, manifest.fingerprint)
    assert (found.status, found.facts["items"]) == ("ok", 0)
    assert found.detail.startswith(location)
    found = doctor._gallery("milvus://127.0.0.1:9/people?timeout=0.2", manifest.fingerprint)
    assert ends(found) == ("fail", 5)
    assert "no Milvus server answers at http://127.0.0.1:9" in found.detail


def with_packages(monkeypatch, **versions):
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    spec = {"onnxruntime-gpu": "onnxruntime", "faiss-cpu": "faiss"}
    modules = {spec.get(name, name) for name in installed}
    for module in (doctor, packages, upperson_onnxruntime):
        monkeypatch.setattr(module, "version_of", installed.get)
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in modules else None)


def test_what_is_missing_or_installed_twice(monkeypatch):
    with_packages(
        monkeypatch, upperson="1", upperson_rt="2", onnxruntime="1", onnxruntime_gpu="1", numpy="2"
    )
    found = by_name(diagnose())
    assert (found["upperson"].status, found["onnxruntime"].status) == ("warn", "warn")
    assert found["upperson"].facts == {"version": "1", "runtime": "2"}
    assert ends(found["pillow"]) == ("fail", 5)
    with_packages(monkeypatch, upperson="1")
    found = by_name(diagnose())
    assert ends(found["backend"]) == ("fail", 5)
    for name, extra in (
        ("opencv", "camera"),
        ("av", "camera"),
        ("pymilvus", "milvus"),
        ("prometheus-client", "metrics"),
        ("fastapi", "serve"),
    ):
        assert (found[name].status, found[name].facts.get("version")) == ("ok", None)
        assert f"pip install 'upperson[{extra}]'" in found[name].detail
    assert (found["faiss"].status, found["faiss"].fix) == ("warn", "pip install faiss-cpu")
    with_packages(monkeypatch, opencv_python="4.14", opencv_python_headless="4.13", pymilvus="3")
    monkeypatch.setattr(packages, "import_module", lambda name: None)
    monkeypatch.setattr(packages.sqlite3, "sqlite_version_info", (3, 22, 0))
    found = by_name(packages.installed_checks())
    assert (found["opencv"].status, found["sqlite"].status) == ("warn", "fail")
    assert "overwrite each other" in found["opencv"].detail
    assert found["pymilvus"].detail == "3"


@pytest.mark.parametrize(
    ("versions", "status", "version"),
    [
        ({"upperson": "1", "upperson_rt": "1"}, "ok", "1"),
        ({"upperson_rt": "2"}, "ok", "2"),
        ({"upperson": "1"}, "warn", "1"),
        ({}, "ok", None),
    ],
)
def test_both_distributions_are_of_one_release(monkeypatch, versions, status, version):
    with_packages(monkeypatch, **versions)
    found = by_name(packages.installed_checks())["upperson"]
    assert (found.status, found.facts["version"]) == (status, version)


def test_a_device_that_is_not_there_or_computes_wrongly_fails(monkeypatch):
    assert doctor._device("onnxruntime", "cuda:3")[0].exit_code == 5
    assert doctor._device("tensorflow", "cpu")[0].exit_code == 2
    answer = {"y": np.zeros(1, np.float32)}
    broken = SimpleNamespace(name="x", version="1", device="cpu", run=lambda inputs: answer)
    monkeypatch.setattr(doctor, "open_backend", lambda path, backend, device: broken)
    (found,) = doctor._device("auto", "cpu")
    assert ends(found) == ("fail", 5)
    assert "computes -2 as [0.]" in found.detail


def test_packages_that_do_not_import_say_why(monkeypatch):
    with_packages(monkeypatch, numpy="2", opencv_python="4.14", faiss_cpu="1.15", onnxruntime="1")
    real = packages.import_module

    def broken(name):
        if name in ("cv2", "faiss", "numpy"):
            raise ImportError("libGL.so.1: cannot open shared\nobject file")
        return real(name)

    monkeypatch.setattr(packages, "import_module", broken)
    found = by_name(packages.installed_checks())
    assert ends(found["numpy"]) == ends(found["faiss"]) == ("fail", 5)
    assert found["opencv"].status == "warn"
    assert "libGL.so.1: cannot open shared object file" in found["opencv"].detail
    assert "upperson[camera]" in found["opencv"].fix


def on_a_jetson(monkeypatch, tmp_path, revision="4.3", venv="true"):
    path = tmp_path / "nv_tegra_release"
    path.write_text(f"# R36 (release), REVISION: {revision}, GCID: 37537400, BOARD: generic\n")
    monkeypatch.setattr(errors, "_TEGRA", path)
    (tmp_path / "pyvenv.cfg").write_text(f"home = /\ninclude-system-site-packages = {venv}\n")
    monkeypatch.setattr("sys.prefix", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC", "550.54.14"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (b", "540.4.0"),
        ("NVIDIA UNIX Open Kernel Module for x86_64", None),
    ],
)
def test_the_kernel_driver_is_named(monkeypatch, tmp_path, line, release):
    kernel = tmp_path / "version"
    kernel.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(doctor, "_KERNEL_DRIVER", kernel)
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: CudaDriver("12.4", ("L4",)))
    found = doctor._driver()
    assert found.detail == "CUDA 12.4, L4" + (f", driver {release}" if release else "")
    assert found.facts == {"cuda": "12.4", "gpus": ["L4"], "version": release}


@pytest.mark.parametrize(
    ("installed", "jetson", "advice"),
    [
        ({"numpy": "1.26.4"}, {}, ""),
        ({"numpy": "2.2.6"}, {}, "pip install 'numpy<2'"),
        ({"numpy": "1.26.4", "opencv_python_headless": "4.12"}, {},
         "pip uninstall opencv-python-headless"),
        ({"numpy": "1.26.4"}, {"revision": "3.0"}, "install JetPack 6.1 or later"),
        ({"numpy": "1.26.4"}, {"venv": "false"}, "python3 -m venv --system-site-packages"),
    ],
)  # fmt: skip
def test_what_to_change_on_a_jetson(monkeypatch, tmp_path, installed, jetson, advice):
    on_a_jetson(monkeypatch, tmp_path, **jetson)
    with_packages(monkeypatch, **installed)
    found = by_name(packages.installed_checks())
    release = jetson.get("revision", "4.3")
    assert found["python"].facts["jetson"] == f"R36 (release), REVISION: {release}"
    assert jetson_release() == (36, int(release[0]), int(release[2]))
    status = ("warn", "docs/how-to/jetson.md") if advice else ("ok", "")
    assert (found["jetson"].status, found["jetson"].fix) == status
    assert advice in found["jetson"].detail
    assert len(found["jetson"].facts["advice"]) == bool(advice)


def test_hints_for_machines_without_wheels(monkeypatch, tmp_path):
    assert install_command("gpu").endswith("[gpu]'")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "[cpu]', then use JetPack's TensorRT" in install_command("gpu")
    assert install_command("camera").endswith("[camera]'")
    on_a_jetson(monkeypatch, tmp_path)
    assert install_command("camera").startswith("sudo apt install nvidia-opencv")


@pytest.mark.parametrize(
    ("requires", "driver", "status"),
    [
        (["nvidia-cuda-runtime~=13.0; extra == 'cuda'"], "12.6", "warn"),
        (["nvidia-cuda-runtime~=13.0; extra == 'cuda'"], "13.0", "ok"),
        (["nvidia-cuda-runtime-cu12~=12.0; extra == 'cuda'"], "12.2", "ok"),
        (["numpy"], "11.4", "ok"),
        (["nvidia-cuda-runtime~=13.0; extra == 'cuda'"], None, "ok"),
    ],
)
def test_an_onnxruntime_for_another_cuda(monkeypatch, requires, driver, status):
    with_packages(monkeypatch, onnxruntime_gpu="1.31.1")
    monkeypatch.setattr(upperson_onnxruntime.metadata, "requires", lambda name: requires)
    found = CudaDriver(driver, problem="no driver")
    monkeypatch.setattr(upperson_onnxruntime, "probe_cuda_driver", lambda: found)
    found = by_name(doctor._backends())["onnxruntime"]
    assert found.status == status
    if status == "warn":
        assert found.detail == "1.31.1 is for CUDA 13, but the driver only goes up to CUDA 12.6"
        assert "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'" in found.fix


@pytest.mark.parametrize(
    ("driver", "gpu_package", "status"),
    [
        (CudaDriver("12.6", ("Orin",)), True, "ok"),
        (CudaDriver(None, problem="no driver"), True, "warn"),
        (CudaDriver(None, problem="no driver"), False, "ok"),
    ],
)
def test_the_driver(monkeypatch, driver, gpu_package, status):
    with_packages(monkeypatch, **({"tensorrt": "10.3"} if gpu_package else {}))
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: driver)
    found = doctor._driver()
    assert (found.status, found.facts["cuda"]) == (status, driver.version)
    assert (driver.problem or driver.devices[0]) in found.detail


def test_a_query_log_is_verified(tmp_path):
    path = tmp_path / "log"
    with QueryLog(path) as log:
        log.write("red", [], k=1)
    assert by_name(diagnose(query_log=path))["query log"].status == "ok"
    for missing, code in ((path, 6), (tmp_path / "log.head", 3)):
        missing.unlink()
        assert doctor._query_log(path).exit_code == code
    os.mkfifo(path)
    assert doctor._query_log(path).exit_code == 3
