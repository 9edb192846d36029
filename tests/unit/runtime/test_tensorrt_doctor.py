import pytest

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt import doctor
from upperson_rt.compile import compile_bundle
from upperson_rt.doctor import diagnose
from upperson_rt.tensorrt import bindings


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver, driver.trt = install_fake_tensorrt(monkeypatch, VERSIONS[1])
    find_spec = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "tensorrt" or find_spec(name))
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bindings, "start_problem", lambda: None)
    return driver


def row(name="tensorrt", **arguments):
    (found,) = (check for check in diagnose(**arguments) if check.name == name)
    return found


def test_not_installed():
    if doctor.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    assert (row().status, row().detail) == ("ok", "not installed (optional)")


def test_without_engines_it_says_how_to_make_them(driver, tmp_path):
    found = row()
    assert found.status == "ok"
    assert found.detail == (
        f"{VERSIONS[1]}, engines in {tmp_path}/cache/engines: 0 for this version (none)"
    )
    assert "upperson-rt compile BUNDLE" in found.fix


def test_engines_are_counted_and_checked(driver, tmp_path, monkeypatch):
    bundle = make_toy_bundle(tmp_path / "bundle")
    compile_bundle(bundle, "fp32", max_batch=2)
    assert "2 for this version (fp32)" in row().detail
    assert row().fix == ""
    canaries = row("canaries", bundle=bundle, variant="fp32", backend="tensorrt", device="cuda")
    assert f"with tensorrt {VERSIONS[1]} on cuda:0" in canaries.detail
    absent = row("canaries", bundle=bundle, variant="int8", backend="tensorrt", device="cuda")
    assert (absent.status, absent.exit_code) == ("fail", 5)
    assert "engines there: fp32 of toy" in absent.detail

    (json_path,) = (tmp_path / "cache" / "engines").glob("text-*.json")
    json_path.write_text("junk")
    assert row().status == "warn"
    assert "1 for this version (fp32)" in row().detail
    assert "is not valid JSON" in row().detail
    monkeypatch.setattr(driver.trt, "__version__", "10.17.0")
    assert "0 for this version (none), 1 for another" in row().detail


def test_a_tensorrt_that_does_not_start(driver, monkeypatch):
    problem = "CUDA initialization failure with error: 35"
    monkeypatch.setattr(bindings, "start_problem", lambda: problem)
    found = row()
    assert (found.status, found.exit_code) == ("fail", 5)
    assert found.detail == f"{VERSIONS[1]} does not start: {problem}"
    assert found.fix == (
        "update the driver, or install TensorRT again: pip install tensorrt-cu12 "
        "--extra-index-url https://pypi.nvidia.com"
    )


def test_problems_come_with_their_fix(driver, monkeypatch):
    driver.fail["cuInit"] = 100
    assert row().status == "warn"
    assert "cannot run here: the NVIDIA driver does not start" in row().detail
    assert "--gpus all" in row().fix
    assert row("NVIDIA driver").status == "warn"

    monkeypatch.setattr(driver.trt, "__version__", "8.6.1")
    assert (row().status, row().exit_code) == ("fail", 5)
    assert "8.6.1 is too old" in row().detail


def test_a_gpu_without_other_backends_is_enough(driver, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "tensorrt" or None)
    assert "backend" not in {check.name for check in diagnose()}
