"""The driver, the GPU, and the bindings: what is there, what is missing, and what `doctor` says."""

import builtins
import ctypes
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import metadata

import pytest

from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_doctor import diagnosis as doctor
from upperson_machine.nvidia import SIGNATURES
from upperson_rt.errors import BackendError
from upperson_tensorrt import bindings
from upperson_tensorrt.bindings import import_tensorrt, open_gpu
from upperson_tensorrt.compile import compile_bundle
from upperson_tensorrt.cuda import CONSTANTS, Gpu

NUMBERS = ("int", "CUdevice", "CUdevice_attribute", "CUresult", "CUstreamCaptureMode")
HANDLES = ("void*", "CUcontext", "CUgraph", "CUgraphExec", "CUstream")
C_TYPES = dict.fromkeys(NUMBERS, ctypes.c_int) | dict.fromkeys(HANDLES, ctypes.c_void_p)
C_TYPES |= {"CUdeviceptr": ctypes.c_uint64, "char*": ctypes.c_char_p, "size_t": ctypes.c_size_t}
C_TYPES |= {"unsigned int": ctypes.c_uint, "unsigned long long": ctypes.c_ulonglong}


def c_type(text):
    return C_TYPES.get(text) or ctypes.POINTER(c_type(text.removesuffix("*")))


def c_argument(text):
    """The type of ``const char **pStr``."""
    plain = text.replace("const", "").replace("*", "").split()
    return c_type(" ".join(plain[:-1]) + "*" * text.count("*"))


@pytest.mark.parametrize("package", ["nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"])
def test_the_binding_is_that_of_nvidias_own_header(package):
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: extra 'dev', on Linux and x86-64")
    (path,) = (file for file in files if file.name == "cuda.h")
    header = path.locate().read_text()
    for name, types_ in SIGNATURES.items():
        # A macro gives the API's name to the latest version: `#define cuMemAlloc cuMemAlloc_v2`.
        macro = re.search(rf"#define (\w+) +(?:__CUDA_API_PTSZ\()?{name}\b", header)
        plain = macro[1] if macro else name
        prototype = re.search(rf"^CUresult CUDAAPI {plain}\(([^)]*)\);", header, re.MULTILINE)
        assert tuple(map(c_argument, prototype[1].split(","))) == types_, name
        versions = re.search(rf"#define {plain} +(?:__CUDA_API_PTSZ\()?(\w+)", header)
        assert versions is None or versions[1] == name, "an older version of the function is bound"
    values = {name: re.search(rf"\b{name}(?: *=|) +(\w+)", header)[1] for name in CONSTANTS}
    assert {name: int(value, 0) for name, value in values.items()} == CONSTANTS


@pytest.fixture
def two_gpus(monkeypatch):
    return FakeDriver(("Orin", 8, 7, 16), ("NVIDIA L4", 8, 9, 58)).install(monkeypatch)


def test_a_device_by_its_name_is_current_where_it_is_used_and_only_there(two_gpus):
    first, second = open_gpu("cuda"), open_gpu("cuda:1")
    assert (first.gpu.name, first.gpu.driver) == ("Orin", "12.6")
    assert second.gpu == Gpu(1, "NVIDIA L4", "8.9", 58, "12.6", False)

    def look():
        before = two_gpus.current_gpu
        with second.current():
            inside = two_gpus.current_gpu
        return before, inside, two_gpus.current_gpu

    with first.current(), ThreadPoolExecutor(1) as pool:
        assert (look(), pool.submit(look).result()) == ((0, 1, 0), (None, 1, None))
    with refused("device_missing", BackendError, device="cuda:2"):
        open_gpu("cuda:2")
    for device in ("cpu", "cuda:", "cuda:x", "gpu"):
        with refused("device_unknown", BackendError, device=device):
            open_gpu(device)


@pytest.mark.parametrize("problem", ["cuInit gave 100", "cuGraphInstantiateWithFlags", "libcuda"])
def test_a_driver_that_does_not_work_is_found_before_tensorrt_is_touched(
    two_gpus, monkeypatch, problem
):
    def absent(name):
        raise OSError(name)

    if problem == "libcuda":
        monkeypatch.setattr(ctypes, "CDLL", absent)
    two_gpus.fail["cuInit"] = 100
    two_gpus._functions.pop(problem, None)
    with refused("no_driver", BackendError):
        open_gpu("cuda")


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (ModuleNotFoundError(name="tensorrt"), "tensorrt_missing"),
        (ModuleNotFoundError("no tensorrt_libs", name="tensorrt_libs"), "tensorrt_incomplete"),
        (ImportError("libnvinfer.so.10: cannot open\nshared"), "tensorrt_not_loaded"),
        (None, "tensorrt_incomplete"),  # A folder of that name.
        ("10.2.0.19", "tensorrt_too_old"),
        *((version, "") for version in VERSIONS),
    ],
)
def test_bindings_that_are_no_good_are_explained(monkeypatch, found, code):
    module, real_import = types.ModuleType("tensorrt"), builtins.__import__
    if found is not None:
        module.__version__ = found
    monkeypatch.setitem(sys.modules, "tensorrt", module)

    def fail(name, *arguments, **options):
        if name == "tensorrt" and isinstance(found, Exception):
            raise found
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    if not code:
        assert import_tensorrt().__version__ == found
        return
    with refused(code, BackendError) as raised:
        import_tensorrt()
    assert "pip install tensorrt-cu12" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("installed", "cuda", "problem"),
    [
        ((13,), 13020, None),
        ((13,), 12060, "tensorrt_too_new"),
        ((12, 13), 13000, "tensorrt_twice"),
    ],
)
def test_a_tensorrt_for_another_cuda(monkeypatch, installed, cuda, problem):
    install_fake_tensorrt(monkeypatch, VERSIONS[2], version=cuda)
    packages, real = [f"tensorrt-cu{n}-bindings" for n in installed], metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: VERSIONS[2] if name in packages else real(name)
    )
    with nullcontext() if problem is None else refused(problem, BackendError):
        assert import_tensorrt().__version__ == VERSIONS[2]


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
        ("print('[TRT] [E] no such engine'); import os; os.kill(os.getpid(), 11)",
         "it ended its process with SIGSEGV (no such engine)"),
        ("import time; time.sleep(60)", "it does not start within 1 seconds"),
    ],
)  # fmt: skip
def test_tensorrt_is_started_in_a_process_of_its_own(monkeypatch, tmp_path, start, problem):
    (tmp_path / "tensorrt.py").write_text(f"{STARTS}    {start}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if start.startswith("import time"):
        monkeypatch.setattr(bindings, "_START_SECONDS", 1)
    assert bindings.start_problem() == problem


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver, driver.trt = install_fake_tensorrt(monkeypatch, VERSIONS[1])
    find_spec = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "tensorrt" or find_spec(name))
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bindings, "start_problem", lambda: None)
    return driver


def row(name="tensorrt", **arguments):
    (found,) = (check for check in doctor.diagnose(**arguments) if check.name == name)
    return found


def test_doctor_counts_and_checks_engines(driver, tmp_path, monkeypatch):
    assert row().status == "ok"
    assert row().detail.endswith(f"{tmp_path}/cache/engines: 0 for this version (none)")
    assert "upperson-rt compile BUNDLE" in row().fix
    bundle = make_toy_bundle(tmp_path / "bundle")
    compile_bundle(bundle, "fp32", max_batch=2)
    assert "2 for this version (fp32)" in row().detail
    assert row().fix == ""
    golden = row("golden samples", bundle=bundle, variant="fp32", backend="tensorrt", device="cuda")
    assert f"with tensorrt {VERSIONS[1]} on cuda:0" in golden.detail
    absent = row("golden samples", bundle=bundle, variant="int8", backend="tensorrt", device="cuda")
    assert (absent.status, absent.exit_code) == ("fail", 5)

    (json_path,) = (tmp_path / "cache" / "engines").glob("text-*.json")
    json_path.write_text("junk")
    assert row().status == "warn"
    assert "1 for this version (fp32)" in row().detail
    assert "is not valid JSON" in row().detail
    monkeypatch.setattr(driver.trt, "__version__", "10.17.0")
    assert "0 for this version (none), 1 for another" in row().detail
