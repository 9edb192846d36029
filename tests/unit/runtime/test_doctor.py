import sqlite3
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_doctor import diagnosis as doctor
from upperson_doctor import installed as packages
from upperson_doctor.diagnosis import diagnose
from upperson_openvino.backend import OpenVinoBackend
from upperson_rt import nvidia
from upperson_rt.errors import BackendError, install_command
from upperson_rt.gallery import Gallery
from upperson_rt.manifest import parse_manifest
from upperson_rt.nvidia import CudaDriver
from upperson_rt.query_log import QueryLog


@pytest.fixture
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_healthy_installation(bundle, tmp_path):
    manifest = parse_manifest((bundle / "bundle.json").read_text())
    Gallery.open(tmp_path / "g", manifest.fingerprint, 16, create=True).close()
    checks = diagnose(bundle, tmp_path / "g")
    assert {check.status for check in checks} == {"ok"}
    found = by_name(checks)
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


def test_what_was_measured_is_shown_and_made_if_need_be(bundle, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    first, again = (by_name(diagnose(bundle)) for _ in range(2))
    for tower in ("image", "text"):
        row = first[f"{tower} tower"]
        assert row == again[f"{tower} tower"]
        assert set(row.facts["milliseconds"]) == {"onnxruntime", "openvino"}
        assert Path(row.facts["file"]).parent == tmp_path / "cache" / "backends"
    named = by_name(diagnose(bundle, backend="openvino"))
    assert named["text tower"].facts == {"backend": "openvino", "why": "as asked for"}
    assert named["device"].facts["backend"] == "openvino"
    assert "cpu" in named["openvino"].facts["devices"]


def test_a_measurement_that_cannot_be_kept_and_a_backend_left_out_are_warnings(
    bundle, tmp_path, monkeypatch
):
    pytest.importorskip("openvino")
    (tmp_path / "file").touch()
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "file"))
    row = by_name(diagnose(bundle))["image tower"]
    assert (row.status, row.facts["file"]) == ("warn", None)
    assert "$UPPERSON_CACHE" in row.fix

    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))

    def broken(*_):
        raise BackendError("OpenVINO cannot load it")

    monkeypatch.setattr(OpenVinoBackend, "_load", broken)
    row = by_name(diagnose(bundle))["image tower"]
    assert (row.status, row.facts["backend"]) == ("warn", "onnxruntime")
    assert row.facts["left_out"] == {"openvino": "OpenVINO cannot load it"}


def test_failures_are_rows_not_exceptions(bundle, tmp_path):
    def ends(name, *arguments):
        row = by_name(diagnose(*arguments))[name]
        return row.status, row.exit_code

    other = make_toy_bundle(tmp_path / "other", seed=3)
    replace_in_bundle(bundle, "image.int8.onnx", (other / "image.int8.onnx").read_bytes())
    Gallery.open(tmp_path / "g", "sha256:other", 16, create=True).close()
    assert ends("bundle", bundle) == ("ok", 0)
    assert ends("golden samples", bundle) == ("fail", 6)
    assert ends("gallery", bundle, tmp_path / "nowhere") == ("fail", 3)
    assert ends("gallery", bundle, tmp_path / "g") == ("fail", 6)
    assert ends("gallery", None, tmp_path / "g") == ("ok", 0)
    *kept, last = (other / "text.int8.onnx").read_bytes()
    (other / "text.int8.onnx").write_bytes(bytes([*kept, last ^ 1]))
    (bundle / "canaries.npz").unlink()
    for broken in (other, bundle):
        assert ends("bundle", broken) == ("fail", 6)
        assert "golden samples" not in by_name(diagnose(broken))


def test_a_gallery_in_milvus(bundle, tmp_path):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    manifest = parse_manifest((bundle / "bundle.json").read_text())
    location = f"milvus://{tmp_path}/people.db/people"
    Gallery.open(location, manifest.fingerprint, 16, create=True).close()
    found = by_name(diagnose(bundle, location))["gallery"]
    assert (found.status, found.facts["items"]) == ("ok", 0)
    assert found.detail.startswith(location)
    found = by_name(diagnose(bundle, "milvus://127.0.0.1:9/people?timeout=0.5"))["gallery"]
    assert (found.status, found.exit_code) == ("fail", 5)
    assert "no Milvus server answers at http://127.0.0.1:9" in found.detail


def with_packages(monkeypatch, **versions):
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    spec = {"onnxruntime-gpu": "onnxruntime", "faiss-cpu": "faiss"}
    modules = {spec.get(name, name) for name in installed}
    for module in (doctor, packages):
        monkeypatch.setattr(module, "version_of", installed.get)
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in modules else None)


def test_what_is_missing_or_installed_twice(monkeypatch):
    with_packages(
        monkeypatch, upperson="1", upperson_rt="1", onnxruntime="1", onnxruntime_gpu="1", numpy="2"
    )
    found = by_name(diagnose())
    assert (found["upperson"].status, found["onnxruntime"].status) == ("warn", "warn")
    assert "pip uninstall upperson upperson-rt" in found["upperson"].fix
    assert (found["pillow"].status, found["pillow"].exit_code) == ("fail", 5)
    with_packages(monkeypatch, upperson="1")
    found = by_name(diagnose())
    assert (found["backend"].status, found["backend"].exit_code) == ("fail", 5)
    monkeypatch.setattr(packages.sqlite3, "sqlite_version_info", (3, 22, 0))
    assert by_name(packages.installed_checks())["sqlite"].status == "fail"


def test_a_device_that_is_not_there_or_computes_wrongly_fails(monkeypatch):
    for arguments, code in (
        ({"device": "cuda:3", "backend": "onnxruntime"}, 5),
        ({"backend": "tensorflow"}, 2),
    ):
        found = by_name(diagnose(**arguments))["device"]
        assert (found.status, found.exit_code) == ("fail", code)
    broken = SimpleNamespace(
        name="onnxruntime",
        version="1",
        device="cpu",
        run=lambda inputs: {"y": np.zeros(1, np.float32)},
    )
    monkeypatch.setattr(doctor, "open_backend", lambda path, backend, device: broken)
    found = by_name(diagnose())["device"]
    assert (found.status, found.exit_code) == ("fail", 5)
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
    assert (found["numpy"].status, found["numpy"].exit_code) == ("fail", 5)
    assert found["faiss"].status == "fail"
    assert found["opencv"].status == "warn"
    assert "libGL.so.1: cannot open shared object file" in found["opencv"].detail
    assert "upperson[camera]" in found["opencv"].fix


def test_optional_packages_say_how_to_get_them(monkeypatch):
    with_packages(monkeypatch, upperson="1")
    found = by_name(packages.installed_checks())
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
    found = by_name(packages.installed_checks())
    assert found["opencv"].status == "warn"
    assert "overwrite each other" in found["opencv"].detail
    assert found["pymilvus"].detail == "3"


def on_a_jetson(monkeypatch, tmp_path, revision="4.0", release=36):
    path = tmp_path / "nv_tegra_release"
    path.write_text(
        f"# R{release} (release), REVISION: {revision}, GCID: 37537400, BOARD: generic\n"
    )
    monkeypatch.setattr(nvidia, "_TEGRA", path)


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC", "550.54.14"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.178.04  Release Build", "580.178.04"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (b", "540.4.0"),
        ("NVIDIA UNIX Open Kernel Module for x86_64", None),
    ],
)
def test_the_kernel_driver_is_named(monkeypatch, tmp_path, line, release):
    kernel = tmp_path / "version"
    kernel.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(doctor, "_KERNEL_DRIVER", kernel)
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: CudaDriver("12.4", ("L4",)))
    found = by_name(diagnose())["NVIDIA driver"]
    assert found.detail == "CUDA 12.4, L4" + (f", driver {release}" if release else "")
    assert found.facts == {"cuda": "12.4", "gpus": ["L4"], "version": release}


def test_a_jetson_that_is_set_up_well(monkeypatch, tmp_path):
    on_a_jetson(monkeypatch, tmp_path, "4.3")
    with_packages(monkeypatch, numpy="1.26.4")
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    found = by_name(packages.installed_checks())
    assert found["python"].facts["jetson"] == "R36 (release), REVISION: 4.3"
    assert (found["jetson"].status, found["jetson"].fix) == ("ok", "")
    assert nvidia.jetson_release() == (36, 4, 3)


@pytest.mark.parametrize(
    ("installed", "revision", "venv", "advice"),
    [
        ({"numpy": "2.2.6"}, "4.3", "true", "pip install 'numpy<2'"),
        ({"numpy": "1.26.4", "opencv-python-headless": "4.12"}, "4.3", "true",
         "pip uninstall opencv-python-headless"),
        ({"numpy": "1.26.4"}, "3.0", "true", "install JetPack 6.1 or later"),
        ({"numpy": "1.26.4"}, "4.3", "false", "python3 -m venv --system-site-packages"),
    ],
)  # fmt: skip
def test_a_jetson_is_told_what_to_change(monkeypatch, tmp_path, installed, revision, venv, advice):
    on_a_jetson(monkeypatch, tmp_path, revision)
    with_packages(monkeypatch, **{name.replace("-", "_"): v for name, v in installed.items()})
    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {venv}\n")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    found = by_name(packages.installed_checks())["jetson"]
    assert (found.status, found.fix) == ("warn", "docs/jetson.md")
    assert advice in found.detail
    assert len(found.facts["advice"]) == 1


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
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(
        doctor, "probe_cuda_driver", lambda: CudaDriver(driver, problem="no driver")
    )
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
    found = by_name(diagnose())["NVIDIA driver"]
    assert (found.status, found.facts["cuda"]) == (status, driver.version)
    assert (driver.problem or driver.devices[0]) in found.detail


def test_a_query_log_is_verified(tmp_path):
    with QueryLog(tmp_path / "log") as log:
        log.write("red", [], k=1)
    assert by_name(diagnose(query_log=tmp_path / "log"))["query log"].status == "ok"
    (tmp_path / "log").unlink()
    assert by_name(diagnose(query_log=tmp_path / "log"))["query log"].exit_code == 6
    (tmp_path / "log.head").unlink()
    assert by_name(diagnose(query_log=tmp_path / "log"))["query log"].exit_code == 3
