import builtins
import sys
import types
from importlib import metadata

import pytest

from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from upperson_rt import jetson
from upperson_rt.errors import BackendError
from upperson_rt.tensorrt import bindings
from upperson_rt.tensorrt.bindings import import_tensorrt, install_hint, open_gpu


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
        (ModuleNotFoundError(name="tensorrt"), "TensorRT is not installed: pip install"),
        (ModuleNotFoundError("no tensorrt_libs", name="tensorrt_libs"), "incomplete"),
        (ImportError("libnvinfer.so.10: cannot open\nshared"), "so.10: cannot open shared"),
        (OSError("libcudart.so.12: no such file"), r"does not load \(libcudart"),
    ],
)
def test_bindings_that_do_not_load_are_explained(monkeypatch, error, message):
    without_tensorrt(monkeypatch, error)
    with pytest.raises(BackendError, match=message) as raised:
        import_tensorrt()
    assert "pip install tensorrt-cu12 --extra-index-url https://pypi.nvidia.com" in str(
        raised.value
    )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cuda", "package"),
    [(11040, "tensorrt-cu12"), (12080, "tensorrt-cu12"), (13000, "tensorrt-cu13")],
)
def test_the_package_that_is_advised_suits_the_driver(monkeypatch, cuda, package):
    FakeDriver(version=cuda).install(monkeypatch)
    assert install_hint() == f"pip install {package} --extra-index-url https://pypi.nvidia.com"


def test_the_advice_for_machines_with_arm_processors(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "; on a Jetson use JetPack's TensorRT" in install_hint()
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081\n")
    monkeypatch.setattr(jetson, "_TEGRA", release)
    assert install_hint() == (
        "use JetPack's TensorRT (sudo apt install python3-libnvinfer) in a virtual environment "
        "made with --system-site-packages, see docs/jetson.md"
    )


@pytest.mark.parametrize(
    ("installed", "cuda", "problem"),
    [
        ((), 12060, None),  # JetPack's.
        ((12,), 12060, None),
        ((12,), 13000, None),
        ((13,), 13020, None),
        ((13,), 12060, r"is for CUDA 13, but the driver only goes up to CUDA 12\.6: update the dr"),
        ((13,), 11040, r"is for CUDA 13.*CUDA 11\.4.*pip install tensorrt-cu12"),
        ((12, 13), 13000, "for CUDA 12 and for CUDA 13, one over the other: pip uninstall both"),
    ],
)
def test_a_tensorrt_for_another_cuda(monkeypatch, installed, cuda, problem):
    install_fake_tensorrt(monkeypatch, VERSIONS[2], version=cuda)
    real = metadata.version

    def version(name):
        if name in [f"tensorrt-cu{n}-bindings" for n in installed]:
            return VERSIONS[2]
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    if problem is None:
        assert import_tensorrt().__version__ == VERSIONS[2]
    else:
        with pytest.raises(BackendError, match=problem) as raised:
            import_tensorrt()
        assert "\n" not in str(raised.value)


STARTS = """
__version__ = "10.3.0"
class Logger:
    WARNING = 2
    def __init__(self, level): pass
def Runtime(logger):
"""


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        ("return 1", None),
        ("import os; os.abort()", "it ended its process with SIGABRT"),
        ("print('[TRT] [E] no such engine'); import os; os.kill(os.getpid(), 11)",
         "it ended its process with SIGSEGV (no such engine)"),
        ("print('[11/26] [TRT] [W] x\\n[11/26] [TRT] [E] error: 35'); raise TypeError('nullptr')",
         "error: 35"),
        ("raise TypeError('factory function returned nullptr')",
         "TypeError: factory function returned nullptr"),
        ("import time; time.sleep(60)", "it does not start within 2 seconds"),
    ],
)  # fmt: skip
def test_tensorrt_is_started_in_a_process_of_its_own(monkeypatch, tmp_path, start, problem):
    (tmp_path / "tensorrt.py").write_text(f"{STARTS}    {start}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if start.startswith("import time"):
        monkeypatch.setattr(bindings, "_START_SECONDS", 2)
    assert bindings.start_problem() == problem


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
