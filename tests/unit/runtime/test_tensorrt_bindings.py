import builtins
import sys
import types

import pytest

from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from upperson_rt.errors import BackendError
from upperson_rt.tensorrt.bindings import import_tensorrt, open_gpu


def without_tensorrt(monkeypatch, error):
    real_import = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "tensorrt":
            raise error
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError(name="tensorrt"), "TensorRT is not installed: on a Jetson"),
        (ModuleNotFoundError("no tensorrt_libs", name="tensorrt_libs"), "incomplete"),
        (ImportError("libnvinfer.so.10: cannot open\nshared"), "so.10: cannot open shared"),
        (OSError("libcudart.so.12: no such file"), r"does not load \(libcudart"),
    ],
)
def test_bindings_that_do_not_load_are_explained(monkeypatch, error, message):
    without_tensorrt(monkeypatch, error)
    with pytest.raises(BackendError, match=message) as raised:
        import_tensorrt()
    assert "python3-libnvinfer" in str(raised.value)
    assert "--system-site-packages" in str(raised.value)
    assert "pypi.nvidia.com" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_that_work(monkeypatch, version):
    install_fake_tensorrt(monkeypatch, version)
    assert import_tensorrt().__version__ == version


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.2.0.19"])
def test_versions_that_are_too_old(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
    with pytest.raises(BackendError, match=rf"TensorRT {version} is too old, 10\.3 or later"):
        import_tensorrt()


def test_a_folder_of_that_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(BackendError, match="is not TensorRT's"):
        import_tensorrt()


def test_the_driver_is_asked_first(monkeypatch):
    driver = FakeDriver().install(monkeypatch)
    driver.fail["cuInit"] = 100
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU, but .*cuInit gave 100"):
        open_gpu("cuda")


def test_devices(monkeypatch):
    FakeDriver(("Orin", 8, 7, 16), ("NVIDIA L4", 8, 9, 58)).install(monkeypatch)
    assert open_gpu("cuda").gpu.name == "Orin"
    assert open_gpu("cuda:1").gpu.name == "NVIDIA L4"
    with pytest.raises(BackendError, match="'cuda:2' is not there; GPUs found: cuda:0 Orin, cu"):
        open_gpu("cuda:2")
    for device in ("cpu", "cuda:", "cuda:x", "gpu"):
        with pytest.raises(BackendError, match=f"no device '{device}': say  --device cuda"):
            open_gpu(device)
