"""``upperson-rt compile`` on a stand-in for TensorRT: engines, their reuse, and what is refused."""

import signal

import pytest

from tests.helpers.fake_tensorrt import install_fake_tensorrt
from tests.helpers.invoke import refusal, run_rt_json
from tests.helpers.invoke import run_rt as run


@pytest.fixture
def work(enter, bundle_and_crops, tmp_path, monkeypatch):
    """A working folder with ./bundle and ./crops, and a cache of its own."""
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path / "cache"))
    return enter(bundle_and_crops)


@pytest.fixture
def driver(monkeypatch):
    driver, driver.trt = install_fake_tensorrt(monkeypatch)
    return driver


def test_compile_then_index_and_query_on_the_gpu(work, driver, tmp_path):
    lines = run("compile", "bundle", "--variant", "fp32").stdout.splitlines()
    assert lines[0].split()[:2] == ["tower", "batch"]
    gpu = ["--backend", "tensorrt", "--device", "cuda", "--variant", "fp32"]
    assert run_rt_json("index", "crops", *gpu)["device"] == "cuda:0"
    (hit,) = run_rt_json("query", "red coat", "-k", 1, *gpu)["hits"]
    assert hit["source"] == str(work / "crops" / "red.png")


def test_engines_go_into_the_cache_and_are_used_again(work, driver, tmp_path, monkeypatch):
    place = ("--cache", tmp_path / "here")
    arguments = ("compile", "bundle", "--variant", "int8", "--max-batch", 4, *place)
    report = run_rt_json(*arguments)
    assert (report["variant"], report["device"]) == ("int8", "cuda")
    assert report["target"]["tensorrt"] == "10.3.0.26"
    image, text = report["towers"]
    assert (image["tower"], image["reused"], text["tower"]) == ("image", False, "text")
    assert image["engine"].startswith(str(tmp_path / "here" / "engines"))
    assert [c["batch_size"] for c in image["comparisons"]] == [1, 2, 4]
    assert all(c["min_cosine"] >= image["min_cosine_allowed"] for c in image["comparisons"])
    assert all(tower["reused"] for tower in run_rt_json(*arguments)["towers"])
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_built_leaves_nothing(work, driver, tmp_path):
    for exit_code, *arguments in (
        (2, "bundle"),
        (2, "bundle", "--max-batch", "0"),
        (3, "crops"),
        (5, "--variant", "int8", "--device", "cpu"),
        (5, "--variant", "int8", "--device", "cuda:1"),
    ):
        refusal(run("compile", *arguments, "--json"), exit_code)
        assert not (tmp_path / "cache").exists()
    int8 = ("compile", "--variant", "int8", "--json")
    driver.trt.behaviour.wrong_batch = 7
    assert "at batch 7 (images): row" in refusal(run(*int8), 6)["message"]
    driver.trt.behaviour.wrong_batch = None
    driver.trt.behaviour.on_step = lambda step: signal.raise_signal(signal.SIGINT)
    assert run(*int8).exit_code == 130
    assert list((tmp_path / "cache" / "engines").glob("*.engine*")) == []
    driver.gpus = ()
    refusal(run(*int8), 5)
