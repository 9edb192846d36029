import json
import signal

import pytest

from tests.helpers.fake_tensorrt import install_fake_tensorrt
from tests.helpers.invoke import refusal
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


def test_compile_then_index_and_query_on_the_gpu(work, driver):
    result = run("compile", "bundle", "--variant", "fp32")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["tower", "batch"]
    assert lines[1].startswith("image")
    assert "1, 2, 7, 32" in lines[1]
    assert "3 to 12 tokens" in lines[2]
    assert lines[2].endswith(".engine")
    assert "--backend tensorrt --device cuda --variant fp32" in result.stderr

    gpu = ["--backend", "tensorrt", "--device", "cuda", "--variant", "fp32"]
    result = run("index", "crops", *gpu)
    assert result.exit_code == 0, result.stderr
    assert "backend: tensorrt 10.3.0.26 on cuda:0" in result.stderr
    found = run("query", "red coat", "-k", 1, "--json", *gpu)
    assert json.loads(found.stdout)["hits"][0]["source"] == str(work / "crops" / "red.png")


def test_json(work, driver, tmp_path):
    arguments = ("compile", "bundle", "--variant", "int8", "--max-batch", 4, "--json")
    result = run(*arguments, "--cache", tmp_path / "here")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["variant"], report["device"]) == ("int8", "cuda")
    assert report["target"]["tensorrt"] == "10.3.0.26"
    image, text = report["towers"]
    assert (image["tower"], image["reused"], text["tower"]) == ("image", False, "text")
    assert image["engine"].startswith(str(tmp_path / "here" / "engines"))
    assert [c["batch_size"] for c in image["comparisons"]] == [1, 2, 4]
    assert all(c["min_cosine"] >= image["min_cosine_allowed"] for c in image["comparisons"])
    again = json.loads(run(*arguments, "--cache", tmp_path / "here").stdout)
    assert all(tower["reused"] for tower in again["towers"])
    assert not (tmp_path / "cache").exists()


def test_a_terminal_shows_how_far_the_build_is(work, driver, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # What makes rich take a pipe for a terminal.
    result = run("compile", "--variant", "int8", "--json")
    assert result.exit_code == 0, result.stderr
    assert "text tower: Building engine" in result.stderr
    assert "3/3" in result.stderr
    assert json.loads(result.stdout)["variant"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["bundle"], 2),
        (["bundle", "--max-batch", "0"], 2),
        (["crops"], 3),
        (["--variant", "int8", "--device", "cpu"], 5),
        (["--variant", "int8", "--device", "cuda:1"], 5),
    ],
)
def test_errors_are_one_line_and_a_code(work, driver, tmp_path, arguments, exit_code):
    refusal(run("compile", *arguments, "--json"), exit_code)
    assert not (tmp_path / "cache").exists()


def test_a_wrong_engine_ends_with_6(work, driver, tmp_path):
    driver.trt.behaviour.wrong_batch = 7
    result = run("compile", "--variant", "int8", "--json")
    refusal(result, 6)
    assert "at batch 7 (images): row" in result.stderr
    assert list((tmp_path / "cache" / "engines").glob("*.engine*")) == []


def test_without_a_driver_it_ends_with_5(work, driver):
    driver.gpus = ()
    refusal(run("compile", "--variant", "int8", "--json"), 5)


def test_ctrl_c_ends_with_130_and_leaves_nothing(work, driver, tmp_path):
    driver.trt.behaviour.on_step = lambda step: signal.raise_signal(signal.SIGINT)
    result = run("compile", "--variant", "int8")
    assert result.exit_code == 130
    assert list((tmp_path / "cache" / "engines").glob("*.engine*")) == []
