import os
import re
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import upperson_onnxruntime
from tests.helpers.toy_bundle import calibrate_toy_bundle, make_toy_bundle, replace_in_bundle
from upperson_doctor import diagnosis as doctor
from upperson_doctor import installed as packages
from upperson_doctor.cards import _COLOURS, check_cards
from upperson_doctor.diagnosis import diagnose
from upperson_doctor.jetson import jetson_release
from upperson_doctor.scores import check_scores
from upperson_log.query_log import QueryLog
from upperson_machine.nvidia import CudaDriver
from upperson_openvino.backend import OpenVinoBackend
from upperson_phrases.evidence import Evidence
from upperson_rt import errors
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.manifest import parse_manifest
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
    facts = {name: check.facts for name, check in found.items()}
    for tower in ("image tower", "text tower"):
        assert facts[tower]["backend"] in found[tower].detail
        assert facts[tower]["why"].startswith("auto: ")
    assert facts["device"]["device"] == "cpu"
    assert facts["onnxruntime"]["providers"][-1] == "CPU"
    assert facts["sqlite"] == {"version": sqlite3.sqlite_version}
    assert facts["gallery"]["items"] == 0
    assert facts["golden samples"]["min_cosine"] > 0.9999
    assert facts["bundle"]["variants"] == ["fp32", "int8"]


def test_the_score_calibration_and_the_cameras_that_are_unlike_it(folder, tmp_path, monkeypatch):
    def found(gallery=None):
        return check_scores(Bundle.open(folder), gallery)

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
    reference = Reference(mean=(0.0,) * 16, axes=axes, threshold=0.5)
    site = replace(calibration, version=2, reference=reference)
    write_score_calibration(tmp_path / "g" / "scores.json", site)
    unlike = found(tmp_path / "g")
    facts = unlike.facts["source"], unlike.facts["version"]
    assert (unlike.status, *facts) == ("warn", "gallery", 2)
    shown = unlike.detail.replace(str(tmp_path), "")
    assert ("hall" in shown, "gate" in shown) == (True, False)
    other = replace(site, fingerprint="sha256:other")
    write_score_calibration(tmp_path / "g" / "scores.json", other)
    assert ends(found(tmp_path / "g")) == ("fail", 3)


def test_a_calibration_of_other_rules_is_stale(folder, monkeypatch):
    def found():
        return check_scores(Bundle.open(folder), None).status

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
    assert (found["opencv"].status, found["opencv"].facts.get("version")) == ("ok", None)
    assert "pip install 'upperson[camera]'" in found["opencv"].detail
    assert (found["faiss"].status, found["faiss"].fix) == ("warn", "pip install faiss-cpu")
    with_packages(monkeypatch, opencv_python="4.14", opencv_python_headless="4.13", pymilvus="3")
    monkeypatch.setattr(packages, "import_module", lambda name: None)
    monkeypatch.setattr(packages.sqlite3, "sqlite_version_info", (3, 22, 0))
    found = by_name(packages.installed_checks())
    assert (found["opencv"].status, found["sqlite"].status) == ("warn", "fail")
    assert "overwrite each other" in found["opencv"].detail
    assert found["pymilvus"].detail == "3"


def test_a_device_that_is_not_there_or_computes_wrongly_fails(monkeypatch):
    assert doctor._device("onnxruntime", "cuda:3")[0].exit_code == 5
    assert doctor._device("tensorflow", "cpu")[0].exit_code == 2
    answer = {"y": np.zeros(1, np.float32)}
    broken = SimpleNamespace(name="x", version="1", device="cpu", run=lambda inputs: answer)
    monkeypatch.setattr(doctor, "open_backend", lambda path, backend, device: broken)
    (found,) = doctor._device("auto", "cpu")
    assert ends(found) == ("fail", 5)
    assert "computes -2 as [0.]" in found.detail


def test_the_driver_is_named_and_missed_where_a_package_needs_it(monkeypatch, tmp_path):
    kernel = tmp_path / "version"
    line = "NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (b"
    kernel.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(doctor, "_KERNEL_DRIVER", kernel)
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: CudaDriver("12.4", ("L4",)))
    facts = {"cuda": "12.4", "gpus": ["L4"], "version": "540.4.0"}
    assert (doctor._driver().status, doctor._driver().facts) == ("ok", facts)
    monkeypatch.setattr(doctor, "probe_cuda_driver", lambda: CudaDriver(None, problem="none"))
    for installed, status in (({}, "ok"), ({"tensorrt": "10.3"}, "warn")):
        with_packages(monkeypatch, **installed)
        assert doctor._driver().status == status


@pytest.mark.parametrize(
    ("installed", "sees_system", "advice"),
    [
        ({"numpy": "1.26.4"}, "true", ""),
        ({"numpy": "2.2.6"}, "true", "pip install 'numpy<2'"),
        ({"numpy": "1.26.4"}, "false", "python3 -m venv --system-site-packages"),
    ],
)
def test_what_to_change_on_a_jetson(monkeypatch, tmp_path, installed, sees_system, advice):
    path = tmp_path / "nv_tegra_release"
    path.write_text("# R36 (release), REVISION: 4.3, GCID: 37537400, BOARD: generic\n")
    monkeypatch.setattr(errors, "_TEGRA", path)
    config = f"home = /\ninclude-system-site-packages = {sees_system}\n"
    (tmp_path / "pyvenv.cfg").write_text(config)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with_packages(monkeypatch, **installed)
    found = by_name(packages.installed_checks())
    assert found["python"].facts["jetson"] == "R36 (release), REVISION: 4.3"
    assert jetson_release() == (36, 4, 3)
    status = ("warn", "docs/how-to/jetson.md") if advice else ("ok", "")
    assert (found["jetson"].status, found["jetson"].fix) == status
    assert advice in found["jetson"].detail
    assert len(found["jetson"].facts["advice"]) == bool(advice)


@pytest.mark.parametrize(("driver", "status"), [("12.6", "warn"), ("13.0", "ok"), (None, "ok")])
def test_an_onnxruntime_for_another_cuda(monkeypatch, driver, status):
    with_packages(monkeypatch, onnxruntime_gpu="1.31.1")
    requires = ["nvidia-cuda-runtime~=13.0; extra == 'cuda'"]
    monkeypatch.setattr(upperson_onnxruntime.metadata, "requires", lambda name: requires)
    found = CudaDriver(driver, problem="no driver")
    monkeypatch.setattr(upperson_onnxruntime, "probe_cuda_driver", lambda: found)
    assert by_name(doctor._backends())["onnxruntime"].status == status


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


# --- Test cards: a model that works passes them, random weights do not


class Knowing:
    """Embeds coats and sentences by colour, and by stripes if it knows them."""

    def __init__(self, knows_stripes):
        self._knows_stripes = knows_stripes

    def encode_texts(self, sentences):
        rows = []
        for sentence in sentences:
            (name,) = [name for name in _COLOURS if re.search(rf"\b{name}\b", sentence)]
            kind = 1.0 if "striped" in sentence else -1.0 if "plain" in sentence else 0.0
            rows.append(self._row(np.array(_COLOURS[name]), kind))
        return np.array(rows, np.float32)

    def encode_images(self, pictures):
        coats = [picture[96:190, 60] for picture in pictures]
        colours = [np.median(coat, axis=0) for coat in coats]
        stripes = [1.0 if coat.std(axis=0).max() > 20 else -1.0 for coat in coats]
        return np.array([self._row(*pair) for pair in zip(colours, stripes, strict=True)])

    def _row(self, colour, striped):
        return np.array([*(colour / 255 - 0.5), striped * self._knows_stripes], np.float32)


def test_a_model_that_knows_colours_and_stripes_passes_and_one_without_stripes_is_warned_of():
    check = check_cards(Knowing(1.0))
    assert (*ends(check), check.facts["stripes_right"]) == ("ok", 0, 4)
    assert check.facts["p_value"] < 0.001
    check = check_cards(Knowing(0.0))
    assert (check.status, check.facts["stripes_right"]) == ("warn", 0)


def test_random_weights_fail():
    """p is uniform for them: 1 in 1,000 is expected not to fail."""
    for seed in range(20):
        rng = np.random.default_rng(seed)

        def embed(given, rng=rng):
            return rng.normal(size=(len(given), 64)).astype(np.float32)

        random = SimpleNamespace(encode_texts=embed, encode_images=embed)
        assert ends(check_cards(random)) == ("fail", 3)
