"""The driver, the GPU, and the bindings: what is there, what is missing, and what `doctor` says."""

import builtins
import ctypes
import re
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_doctor import diagnosis as doctor
from upperson_machine import nvidia
from upperson_machine.nvidia import SIGNATURES
from upperson_rt import errors
from upperson_rt.errors import BackendError
from upperson_tensorrt import bindings
from upperson_tensorrt import cuda as cuda_module
from upperson_tensorrt.bindings import import_tensorrt, install_hint, open_gpu
from upperson_tensorrt.compile import compile_bundle
from upperson_tensorrt.cuda import CONSTANTS, Cuda, Gpu

PIP = "pip install {}"

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


def test_every_function_that_is_called_has_a_prototype_and_the_other_way_round():
    source = "".join(Path(one.__file__).read_text() for one in (cuda_module, nvidia))
    counted = Counter(re.findall(r'(?:"|_library\.|cuda\.)(cu[A-Z]\w+|CU_\w+)', source))
    assert counted.keys() == SIGNATURES.keys() | CONSTANTS.keys()
    assert not [name for name, times in counted.items() if times == 1], "named, but not used"


@pytest.fixture
def two_gpus(monkeypatch):
    return FakeDriver(("Orin", 8, 7, 16), ("NVIDIA L4", 8, 9, 58)).install(monkeypatch)


@pytest.mark.parametrize("integrated", [False, True])
def test_bytes_go_to_the_device_and_back_from_any_thread(monkeypatch, integrated):
    """The driver refuses nearly everything in a thread without a current context."""
    driver = FakeDriver(integrated=integrated).install(monkeypatch)
    assert driver.cuStreamCreate(ctypes.byref(ctypes.c_void_p()), 1) == 201
    cuda = Cuda()
    assert cuda.gpu.integrated == integrated
    buffer, stream = cuda.staged_buffer(4), cuda.new_stream()
    assert buffer.mapped == integrated
    buffer.host[:] = [1, 2, 3, 4]
    cuda.upload(buffer, 3, stream)
    cuda.synchronize(stream)
    on_device = b"\x01\x02\x03\x04" if integrated else b"\x01\x02\x03\xee"
    assert ctypes.string_at(buffer.device_address, 4) == on_device
    ctypes.memmove(buffer.device_address, b"\x07\x08\x09", 3)
    cuda.download(buffer, 2, stream)
    assert buffer.host.tolist() == ([7, 8, 9, 4] if integrated else [1, 2, 3, 4])
    cuda.synchronize(stream)
    assert buffer.host.tolist() == ([7, 8, 9, 4] if integrated else [7, 8, 3, 4])
    graph = cuda.capture(stream, lambda: driver.enqueue(stream, lambda: None))
    cuda.launch(graph, stream)
    cuda.release([buffer], [stream], [graph])
    assert driver.current_gpu is None
    assert (driver.memory, driver.streams, driver.executables) == ({}, {}, {})

    function = "cuMemHostGetDevicePointer_v2" if integrated else "cuMemAlloc_v2"
    driver.fail[function] = 2
    with refused("cuda_failed", BackendError, function=function, status="CUDA_ERROR_OUT_OF_MEMORY"):
        cuda.staged_buffer(100)
    assert (driver.memory, driver.current_gpu) == ({}, None)


def test_a_graph_repeats_what_was_captured_and_a_failed_capture_leaves_the_stream_usable(two_gpus):
    cuda = Cuda()
    buffer, stream = cuda.staged_buffer(2), cuda.new_stream()

    def fail():
        cuda.upload(buffer, 1, stream)
        raise BackendError("not capturable")

    with pytest.raises(BackendError, match="not capturable"):
        cuda.capture(stream, fail)
    with refused("cuda_failed", BackendError):
        cuda.capture(stream, lambda: None)
    assert stream not in two_gpus.captures
    graph = cuda.capture(stream, lambda: cuda.upload(buffer, 2, stream))
    for value in (7, 9):
        buffer.host[:] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert ctypes.string_at(buffer.device_address, 2) == bytes([value, value])
    assert two_gpus.graphs == {}  # The executable graph is what is kept.


def test_a_device_by_its_name_is_current_where_it_is_used_and_only_there(two_gpus):
    first, second = open_gpu("cuda"), open_gpu("cuda:1")
    assert (first.gpu.name, first.gpu.driver) == ("Orin", "12.6")
    assert second.gpu == Gpu(1, "NVIDIA L4", "8.9", 58, "12.6", False)
    found = []

    def look():
        found.append(two_gpus.current_gpu)
        with second.current():
            found.append(two_gpus.current_gpu)
        found.append(two_gpus.current_gpu)

    with first.current(), ThreadPoolExecutor(1) as pool:
        look()
        pool.submit(look).result()
    assert found == [0, 1, 0, None, 1, None]
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
        (OSError("libcudart.so.12: no such file"), "tensorrt_not_loaded"),
        (None, "tensorrt_incomplete"),  # A folder of that name.
        ("8.6.1", "tensorrt_too_old"),
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
    assert PIP.format("tensorrt-cu12") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("cuda", "advised"), [(11040, 12), (12080, 12), (13000, 13)])
def test_the_package_that_is_advised_suits_the_driver(monkeypatch, tmp_path, cuda, advised):
    FakeDriver(version=cuda).install(monkeypatch)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert install_hint() == PIP.format(f"tensorrt-cu{advised}")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert install_hint().startswith(f"{PIP.format(f'tensorrt-cu{advised}')}; on a Jetson use Jet")
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081\n")
    monkeypatch.setattr(errors, "_TEGRA", release)
    assert install_hint().startswith("use JetPack's TensorRT (sudo apt install python3-libnvinfer")


@pytest.mark.parametrize(
    ("installed", "cuda", "problem"),
    [
        ((), 12060, None),  # JetPack's.
        ((12,), 12060, None),
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
    if problem is None:
        assert import_tensorrt().__version__ == VERSIONS[2]
    else:
        with refused(problem, BackendError):
            import_tensorrt()


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
        ("print('[11/26] [TRT] [W] x\\n[11/26] [TRT] [E] error: 35'); raise TypeError('nullptr')",
         "error: 35"),
        ("raise TypeError('factory function returned nullptr')",
         "TypeError: factory function returned nullptr"),
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


def test_doctor_has_a_fix_for_every_problem(driver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bindings, "start_problem", lambda: "error: 35")
        assert (row().status, row().exit_code) == ("fail", 5)
        assert row().detail == f"{VERSIONS[1]} does not start: error: 35"
        assert row().fix.endswith(f"install TensorRT again: {PIP.format('tensorrt-cu12')}")
    driver.fail["cuInit"] = 100
    assert row().status == "warn"
    assert "cannot run here: the NVIDIA driver does not start" in row().detail
    assert "--gpus all" in row().fix
    assert row("NVIDIA driver").status == "warn"
    monkeypatch.setattr(driver.trt, "__version__", "8.6.1")
    assert (row().status, row().exit_code) == ("fail", 5)
    assert "8.6.1 is too old" in row().detail
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "tensorrt" or None)
    assert "backend" not in {check.name for check in doctor.diagnose()}
