import pytest

from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt import doctor
from upperson_rt.backends.cuda_driver import CudaDriver
from upperson_rt.doctor import diagnose
from upperson_rt.gallery import Gallery
from upperson_rt.manifest import parse_manifest


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
    assert "variants fp32, int8 (using int8, its hashes match)" in found["bundle"].detail
    assert "lowest cosine 1.0000" in found["canaries"].detail
    assert "onnxruntime" in found["canaries"].detail
    assert "0 pictures, made with this bundle's model" in found["gallery"].detail
    assert "CPU" in found["onnxruntime"].detail


def test_failures_are_rows_not_exceptions(bundle, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=3)
    replace_in_bundle(bundle, "image.int8.onnx", (other / "image.int8.onnx").read_bytes())
    found = by_name(diagnose(bundle, tmp_path / "nowhere"))
    assert found["bundle"].status == "ok"
    assert (found["canaries"].status, found["canaries"].exit_code) == ("fail", 6)
    assert "image tower" in found["canaries"].detail
    assert (found["gallery"].status, found["gallery"].exit_code) == ("fail", 3)

    (bundle / "canaries.npz").unlink()
    found = by_name(diagnose(bundle))
    assert (found["bundle"].status, found["bundle"].exit_code) == ("fail", 6)
    assert "canaries" not in found


def test_a_gallery_of_another_model_fails(bundle, tmp_path):
    Gallery.open(tmp_path / "g", "sha256:other", 16, create=True).close()
    assert by_name(diagnose(bundle, tmp_path / "g"))["gallery"].exit_code == 6
    assert by_name(diagnose(None, tmp_path / "g"))["gallery"].status == "ok"


def with_packages(monkeypatch, **versions):
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_version", installed.get)
    spec = {"onnxruntime-gpu": "onnxruntime"}
    modules = {spec.get(name, name) for name in installed}
    monkeypatch.setattr(doctor, "find_spec", lambda name: name if name in modules else None)


def test_clashing_distributions_are_warned_about(monkeypatch):
    with_packages(
        monkeypatch, upperson="1", upperson_rt="1", onnxruntime="1", onnxruntime_gpu="1", numpy="2"
    )
    found = by_name(diagnose())
    assert found["upperson"].status == "warn"
    assert "pip uninstall upperson upperson-rt" in found["upperson"].fix
    assert found["onnxruntime"].status == "warn"
    assert (found["pillow"].status, found["pillow"].exit_code) == ("fail", 5)


def test_no_backend_fails(monkeypatch):
    with_packages(monkeypatch, upperson="1")
    found = by_name(diagnose())
    assert (found["backend"].status, found["backend"].exit_code) == ("fail", 5)


@pytest.mark.parametrize(
    ("driver", "gpu_package", "status", "detail"),
    [
        (CudaDriver("12.6", ("Orin",)), True, "ok", "CUDA 12.6, Orin"),
        (CudaDriver(None, problem="no driver"), True, "warn", "no driver, but a GPU package"),
        (CudaDriver(None, problem="no driver"), False, "ok", "no driver; only GPUs need it"),
    ],
)
def test_the_driver(monkeypatch, driver, gpu_package, status, detail):
    with_packages(monkeypatch, **({"tensorrt": "10.3"} if gpu_package else {}))
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: driver)
    found = by_name(diagnose())["NVIDIA driver"]
    assert (found.status, found.detail[: len(detail)]) == (status, detail)
