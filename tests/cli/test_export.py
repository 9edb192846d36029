"""``upperson export``: what ships, what is refused, and that nothing half-done stays."""

import gc
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.command_line import run_program
from tests.helpers.fake_tensorrt import install_fake_tensorrt
from tests.helpers.invoke import run, run_json, run_refused, run_rt, snapshot
from tests.helpers.openai_archive import save_openai_archive
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bases import toy_base, write_base
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import FOLD, TOWERS, toy_graph
from tests.helpers.vit_b16 import int8_gemms
from upperson.cli import exportable
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.run import TrainedEncoder
from upperson_export import candidates, engines, graphs
from upperson_export.bundle import ExportOptions, unowned_in_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError
from upperson_rt.signature import verify_folder
from upperson_synthetic import SyntheticSpec, write_dataset

METRICS = ["R@1", "R@5", "R@10", "mAP", "mINP"]


@pytest.fixture(scope="module", autouse=True)
def towers_are_traced_once(toy_graphs, tmp_path_factory):
    """Write towers of a structure that was traced before with their weights: a trace takes seconds.

    That this gives the same file is a test of its own (`tests/parity/test_export.py`).
    """

    def structure(tower):
        return str(tower), *((name, x.shape) for name, x in tower.state_dict().items())

    traced = {structure(FOLD[kind](toy_model())): toy_graph(kind) for kind in TOWERS}

    def export(tower, kind, path, *, example):
        gc.collect()  # What an export before it left: graphs are cyclic, and hold their weights.
        if structure(tower) in traced:
            graph = graphs.write_with_weights(traced[structure(tower)], tower, path)
            assert graph is not None
            return graph
        graph = graphs.export_onnx(tower, kind, path, example=example)
        kept = tmp_path_factory.mktemp("traced") / f"{kind}.onnx"
        traced[structure(tower)] = replace(graph, file=shutil.copy(path, kept))
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "export_onnx", export)
        yield


@pytest.fixture
def copied_run(toy_run, work):
    return shutil.copytree(toy_run, work / "run")


@pytest.fixture(scope="module")
def ungated(towers_are_traced_once, toy_run, tmp_path_factory):
    """A bundle of the toy's run that was not measured, and its report; nobody changes it."""
    bundle = tmp_path_factory.mktemp("ungated") / "bundle"
    report = run_json("export", toy_run, "--output", bundle, "--no-gate", "--calib-size", 12)
    return bundle, report


@pytest.fixture
def worked(monkeypatch):
    """The runs that were loaded, which every export begins with."""
    loaded = []
    monkeypatch.setattr("upperson.cli.exportable.load_run", loaded.append)
    return loaded


@pytest.mark.timeout(180, func_only=True)
def test_int8_that_fails_the_gate_is_measured_and_left_out(copied_run, work):
    report = run_json(
        "export", copied_run, "--output", "bundle", "--calib-size", 16, "--max-r1-drop", -101
    )
    assert report["variants"]["int8"]["shipped"] is False
    assert list(report["variants"]["int8"]["metrics"]) == METRICS
    bundle = Bundle.open(work / "bundle")
    assert bundle.variant == "fp32"
    assert list(bundle.manifest.variants) == ["fp32"]
    assert not list((work / "bundle").glob("*int8*"))
    assert bundle.check_golden_samples()
    for page in ("report.html", "README.md"):
        text = (work / "bundle" / page).read_text("utf-8")
        assert "int8 is not in the bundle" in text
        assert f"onnxruntime {onnxruntime.__version__}" in text
    assert "<h2>Linears left in float" not in (work / "bundle/report.html").read_text("utf-8")
    types = {(row["backend"], *row["float_types"].values()) for row in report["ladder"]}
    assert ("onnxruntime", "f32") in types
    again = ["export", copied_run, "--output", "second", "--calib-size", 16]
    again += ["--calibration", "bundle/calibration.json", "--precision", "int8"]
    error = run_refused(*again, "--max-r1-drop", -101, code="accuracy_not_kept", exit_code=4)
    assert error["fields"]["variant"] == "int8"
    assert not (work / "second").exists()


@pytest.mark.timeout(120, func_only=True)
def test_an_onnx_file_that_differs_from_torch_is_not_bundled(copied_run, work, monkeypatch):
    real = candidates.export_onnx

    def broken(tower, kind, path, *, example):
        real(tower, kind, path, example=example)
        model = onnx.load(path)
        (weights,) = (item for item in model.graph.initializer if item.name == "projection.weight")
        values = numpy_helper.to_array(weights).copy()
        values[0] += np.float32(0.01)
        weights.CopyFrom(numpy_helper.from_array(values, weights.name))
        onnx.save(model, path)

    monkeypatch.setattr(candidates, "export_onnx", broken)
    few = ["--output", "bundle", "--calib-size", 8]
    run_refused("export", copied_run, *few, code="export_differs", exit_code=6)
    assert {path.name for path in work.iterdir()} == {"run"}


@pytest.mark.timeout(120, func_only=True)
def test_one_calibration_sample_is_enough_and_the_bundle_is_signed(copied_run, work):
    write_keys(work, "key", ec.generate_private_key(ec.SECP256R1()))
    report = run_json(
        "export", copied_run, "--output", "bundle", "--calib-size", 1, "--max-r1-drop", -101,
        "--sign", "key.pem",
    )  # fmt: skip
    assert verify_folder(work / "bundle", work / "key.pub")
    assert not unowned_in_bundle(work / "bundle")  # The next export may replace it.
    assert "mixed-1/2" in {row["rung"] for row in report["ladder"]}
    # One picture has no order, so cosines alone rank the Linears.
    damage = calibration_of(work / "bundle")["towers"]["image"]["damage"]
    assert {layer["order_loss"] for layer in damage} == {0}
    cosines = [layer["cosine_loss"] for layer in damage]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > cosines[-1]
    assert Bundle.open(work / "bundle").check_golden_samples()


@pytest.mark.parametrize("mine", ["thesis.txt", "notes/todo.txt", "bundle.json"])
def test_a_folder_with_other_files_is_not_taken_for_a_bundle(
    demo_folder, copied_run, work, worked, mine
):
    shutil.copytree(demo_folder / "bundle", work / "bundle")
    (work / "bundle" / mine).parent.mkdir(exist_ok=True)
    (work / "bundle" / mine).write_text('{"tool": "mine"}')
    before = snapshot(work)
    error = run_refused("export", copied_run, "--output", "bundle")
    assert error["exit_code"] == 3
    assert mine.partition("/")[0] in error["message"]
    assert snapshot(work) == before
    assert worked == []


@pytest.mark.timeout(240, func_only=True)
def test_typed_variants_serving_files_and_reuse_of_a_calibration(copied_run, work):
    arguments = ["export", copied_run, "--calib-size", 16, "--max-r1-drop", 5]
    report = run_json(*arguments, "--output", "bundle", "--trt", "--triton", "models")
    assert list(report["variants"]) == ["fp32", "int8", "fp16", "int8-fp16"]
    assert "upperson-rt compile bundle --variant int8-fp16" in report["engines"]["next"]
    assert (work / "models").is_dir()
    for variant, row in report["variants"].items():
        assert row["shipped"]
        assert Bundle.open(work / "bundle", variant).check_golden_samples()
        assert row["size_bytes"] < report["variants"]["fp32"]["size_bytes"] or variant == "fp32"
    html = (work / "bundle/report.html").read_text("utf-8")
    assert "Every candidate that was measured" in html
    # fp16 needs the largest values alone; they are kept, too.
    assert Bundle.open(work / "bundle", "fp16").entry.calibration["images"] == 16
    assert calibration_of(work / "bundle")["towers"]["text"]["forms"]["plain"]["largest_anywhere"]


@pytest.mark.timeout(240, func_only=True)
def test_a_calibration_that_is_reused_decides_everything(copied_run, people, work, ungated):
    bundle, first = ungated
    file = Path(shutil.copy(bundle / "calibration.json", work))
    assert first["calibration"]["reused_file_sha256"] is None
    (work / "others").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:4]:
        shutil.copy(image, work / "others")
    others = ["--calib-data", "others", "--calib-size", 4, "--no-gate", "--calibration", file]
    second = run_json("export", copied_run, "--output", "again", *others)
    # The graphs are the same to the last bit, though they saw none of these pictures.
    for name in ("calibration.json", "image.int8.onnx", "text.int8.onnx"):
        assert (work / "again" / name).read_bytes() == (bundle / name).read_bytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert second["calibration"] == first["calibration"] | {"reused_file_sha256": digest}
    entry = Bundle.open(work / "again", "int8").entry
    assert entry.calibration["reused_file_sha256"] == digest
    assert entry.calibration["image_source"] == "synthetic renderer"
    assert f"taken over from a calibration file, sha256 {digest[:16]}" in (
        work / "again/report.html"
    ).read_text("utf-8")
    third = ["export", copied_run, "--output", "third", *others]
    error = run_refused(*third, "--estimator", "entropy", code="estimator_differs", exit_code=2)
    assert error["fields"] == {"expected": "percentile-99.999", "found": "entropy"}
    digits = json.loads(file.read_text("utf-8"))["towers"]["image"]["graph_sha256"]
    text = file.read_text("utf-8")
    file.write_text(text.replace(digits, "0" * 64), "utf-8")
    run_refused(*third, code="calibration_of_other_model", exit_code=6)
    file.write_text(text.replace('"alpha"', '"beta"'), "utf-8")
    error = run_refused(*third)
    assert error["exit_code"] == 3
    assert "calibration.json" in error["message"]
    assert not (work / "third").exists()


def test_a_run_and_a_base_get_a_split_and_samples(copied_run, people, work, monkeypatch):
    given = []
    monkeypatch.setattr(exportable, "export_bundle", lambda *arguments: given.append(arguments))
    (work / "crops").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:3]:
        shutil.copy(image, work / "crops")
    data = exportable.ExportData(calib_size=8, calib_data=work / "crops")
    exportable.export_run(copied_run, work / "bundle", ExportOptions(), data, lambda *_: None)
    _, _, _, samples, split, *_ = given.pop()
    assert (samples.image_source, len(samples.images)) == ("folder crops", 3)
    assert (samples.text_source, len(samples.input_ids)) == (f"{people.name}, train", 8)
    assert split.name == f"{people.name}, test"

    data = exportable.ExportData(root=people, calib_size=4)
    exportable.export_base(
        "upperson-small", None, (None, None), work / "bundle", ExportOptions(), data,
        lambda *_: None,
    )  # fmt: skip
    model, identity, _, samples, split, *_ = given.pop()
    assert split.has_identities
    assert split.name == f"{people.name}, test"
    assert samples.image_source == f"{people.name}, train"
    assert (model.image_size, identity.adapter_sha256) == ((192, 64), "none")


def test_without_the_gate_rendered_people_calibrate_and_the_bundle_says_so(ungated):
    bundle, report = ungated
    assert report["split"] is None
    assert report["calibration"]["image_source"] == "synthetic renderer"
    assert report["calibration"]["text_source"] == "synthetic renderer"
    assert (report["calibration"]["images"], report["calibration"]["texts"]) == (12, 12)
    assert report["variants"]["int8"]["rungs"] == {"image": "smoothed", "text": "smoothed"}
    entry = Bundle.open(bundle, "int8").entry
    assert entry.calibration["gate"] == "off"
    assert entry.metrics is None


@pytest.mark.timeout(240, func_only=True)
def test_on_a_gpu_engines_are_built_compared_and_talked_about(copied_run, work, monkeypatch):
    install_fake_tensorrt(monkeypatch)
    monkeypatch.setenv("UPPERSON_CACHE", str(work / "cache"))
    result = run(
        "export", copied_run, "--output", "bundle", "--no-gate", "--calib-size", 8, "--trt",
        "--no-int8",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    built = sorted((work / "cache/engines").glob("*.engine"))
    assert [path.name.partition("-")[0] for path in built] == ["image", "text"]
    assert all(f"engine {path}\n" in result.stdout for path in built)
    assert "building the engine of the image tower (fp16); this can take minutes" in result.stderr
    assert "comparing the engine of the text tower with ONNX Runtime" in result.stderr
    assert "on the device run" not in result.stdout


@pytest.mark.timeout(240, func_only=True)
def test_rtx_engines_and_deepstream_files_come_with_a_bundle(copied_run, work, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for x86-64 only")
    result = run(
        "export", copied_run, "--output", "bundle", "--no-gate", "--calib-size", 16, "--trt",
        "--trt-flavor", "rtx", "--rtx-capability", "8.9", "--deepstream", "nvinfer",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    names = [
        "image.fp16.engine", "image.int8-fp16.engine", "text.fp16.engine", "text.int8-fp16.engine",
    ]  # fmt: skip
    before = snapshot(work / "bundle.rtx")
    assert sorted(before) == ["engines.json", *names]
    assert all(len(before[name]) > 100_000 for name in names)
    record = json.loads(before["engines.json"])
    assert sorted(record["files"]) == names
    assert {engine["compute_capability"] for engine in record["engines"]} == {"8.9"}
    manifest = Bundle.open(work / "bundle", "fp16").manifest
    assert record["fingerprint"] == manifest.fingerprint
    assert record["engines"][0]["onnx_sha256"] == manifest.variants["fp16"].image.sha256
    assert "compiling image.fp16.engine with TensorRT for RTX" in result.stderr
    printed = one_line(result.stdout)
    assert "compute capability 8.9, 2 fused attentions, 0 int8 GEMMs" in printed
    assert f"compute capability 8.9, 2 fused attentions, {int8_gemms(2)} int8 GEMMs" in printed
    written = {path.name for path in (work / "nvinfer").rglob("*") if path.is_file()}
    assert any(name.endswith(".txt") for name in written)
    assert Bundle.open(work / "bundle").check_golden_samples()

    def stop_at_the_second(name):
        if "text.int8" in name:
            raise KeyboardInterrupt

    def write(note):
        engines.write_rtx_engines(
            work / "bundle", ["int8-fp16"], "7.5", note=note, progress=lambda *_: None
        )

    with pytest.raises(KeyboardInterrupt):
        write(stop_at_the_second)
    assert snapshot(work / "bundle.rtx") == before
    assert {path.name for path in work.iterdir()} == {"run", "bundle", "bundle.rtx", "nvinfer"}
    write(lambda _: None)
    after = snapshot(work / "bundle.rtx")
    assert sorted(after) == ["engines.json", *names[1::2]]
    assert all(after[name] != before[name] for name in after)
    (work / "bundle.rtx/image.int8-fp16.engine").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"image\.int8-fp16\.engine"):
        write(lambda _: None)


@pytest.mark.parametrize("name", ["adapter_mlp.up.weight", "prefix.key_tokens"])
def test_weights_that_are_not_finite_are_named(copied_run, work, name):
    path = copied_run / "adapter.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if name in key)
    tensors[key].flat[0] = np.nan
    save_file(tensors, path, metadata)
    error = run_refused("export", copied_run, "--output", "bundle", "--no-gate", "--calib-size", 8)
    assert error["exit_code"] == 3
    assert key.partition(".")[2] in error["message"]
    assert {path.name for path in work.iterdir()} == {"run"}


@pytest.mark.parametrize("base", ["[1]", "null", "7", '"small"', "{", "{}"])
def test_an_adapter_that_names_no_base_is_refused(copied_run, work, base):
    path = copied_run / "adapter.safetensors"
    save_file(load_file(path), path, {"base": base})
    error = run_refused("export", copied_run, "--output", "bundle", "--no-gate")
    assert error["exit_code"] == (6 if base == "{}" else 3)
    assert "adapter.safetensors" in error["message"] or base == "{}"
    assert {path.name for path in work.iterdir()} == {"run"}


# fmt: off
BAD_OPTIONS = {
    ("option_ignored", 2): [
        "--no-gate --root empty", "--no-gate --max-r1-drop 0.5", "--no-gate --precision int8",
        "--no-int8 --precision int8", "--no-int8 --estimator mse", "--no-int8 --calibration c",
        "--trt-flavor rtx", "--trt --rtx-capability 8.9", "--min-overlap 80",
    ],
    ("option_unknown", 2): ["--estimator guess", "--precision int4", "--trt-flavor other"],
    ("option_not_finite", 2): ["--max-r1-drop nan"],
    ("option_needs_base", 2): ["--pretrained x", "--height 9", "--width 9", "--dataset csv"],
    ("run_and_base", 2): ["--base upperson-small"],
    ("folders_nested", 2): [
        "--triton bundle/models", "--triton a --deepstream ./a",
        "--trt --trt-flavor rtx --triton bundle.rtx",
    ],
    (None, 3): [
        "--calib-data nowhere", "--calib-data empty", "--calibration empty", "--output file/bundle",
        "--output file", "--output .", "--triton mine", "--deepstream mine", "--sign file",
        "--sign none.pem",
    ],
}
# fmt: on


@pytest.mark.parametrize(
    ("options", "code", "exit_code"),
    [(options, *error) for error, rows in BAD_OPTIONS.items() for options in rows],
)
def test_bad_options_are_refused_before_any_work(
    copied_run, work, worked, options, code, exit_code
):
    options = options.split()
    for folder in ("empty", "mine"):
        (work / folder).mkdir()
    (work / "mine/config.txt").write_text("mine")
    (work / "file").write_text("mine")
    before = snapshot(work)
    error = run_refused("export", copied_run, *options, code=code, exit_code=exit_code)
    if code is None:  # The error names the file or folder.
        assert options[-1] == "." or options[-1].partition("/")[0] in error["message"]
    else:
        assert error["fields"].get("option", options[-2]) == options[-2]
    assert worked == []
    assert snapshot(work) == before
    assert {path.name for path in work.iterdir()} == {"run", "empty", "mine", "file"}


@pytest.mark.timeout(240, func_only=True)
def test_a_base_is_exported_without_a_run_or_captions_and_answers(people, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # It compiles for longer than all else.
    crops = work / "crops"
    crops.mkdir()
    for image in sorted(people.rglob("*.jpg"))[:40]:
        shutil.copy(image, crops)
    config, _ = write_base(work / "base", "clip")
    save_openai_archive(toy_base("clip").state_dict(), work / "base/openai.pt")
    result = run(
        "export", "--base", config, "--pretrained", work / "base/openai.pt", "--height", 96,
        "--width", 32, "--calib-data", crops, "--calib-size", 8, "--output", "bundle",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = one_line(result.stdout)
    assert "no captions, so no accuracy: 500 sentences of the exporter ranked 20 pictures" in told
    report = json.loads((work / "bundle/report.json").read_text("utf-8"))
    assert report["split"] == {"name": "folder crops", "images": 20, "captions": 500}
    assert (report["max_r1_drop"], report["min_overlap"]) == (None, 90.0)
    for measured in report["ladder"]:  # The files themselves were run.
        assert measured["metrics"] is None
        assert 50 < measured["top10_overlap"] <= 100
        if set(measured["rung"].split(" + ")) != {"fp32"}:
            assert measured["accepted"] == (measured["top10_overlap"] >= 90)
    assert report["calibration"]["image_source"] == "folder crops"
    bundle = Bundle.open(work / "bundle")
    assert bundle.manifest.model.adapter_sha256 == "none"
    assert bundle.manifest.model.name == "toy-clip"
    assert (bundle.manifest.image.height_px, bundle.manifest.image.width_px) == (96, 32)
    assert bundle.entry.metrics is None
    assert bundle.entry.calibration["gate"] == "rankings"
    assert not unowned_in_bundle(work / "bundle")
    # The same as the base in torch.
    base = load_base(str(config), str(work / "base/openai.pt"))
    images = sorted(crops.iterdir())[:3]
    plain = TrainedEncoder(UPPerson(base.clip, PLAIN_CLIP, (96, 32), base.statistics).eval())
    exact = Bundle.open(work / "bundle", "fp32").encoder()
    assert np.abs(exact.encode_images(images) - plain.encode_images(images, 3)).max() < 1e-5
    texts = ["woman in red coat", "a boy"]
    assert np.abs(exact.encode_texts(texts) - plain.encode_texts(texts, 2)).max() < 1e-5
    assert run_rt("index", "-b", "bundle", "-g", "gallery", crops).exit_code == 0
    answer = run_rt("query", "-b", "bundle", "-g", "gallery", "woman in red coat", "-k", "3")
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout.count(".jpg") == 3


OWN = ["--base", "upperson-small"]


@pytest.mark.parametrize(
    ("options", "code", "exit_code"),
    [
        ([], "run_missing", 2),
        ([*OWN, "--max-r1-drop", "1"], "option_ignored", 2),
        ([*OWN, "--dataset", "csv"], "option_ignored", 2),
        ([*OWN, "--no-gate", "--min-overlap", "80"], "option_ignored", 2),
        ([*OWN, "--height", "100"], None, 2),  # It does not divide into patches.
        (["--base", "ViT-B-61", "--pretrained", "openai"], None, 2),
        (["--base", "ViT-B-16"], None, 2),  # Without weights.
        (["--base", "ViT-B-16", "--pretrained", "gone.pt"], None, 3),
        ([*OWN, "--calib-data", "few"], "too_few_to_rank", 3),
        ([*OWN, "--calib-data", "none"], None, 3),
        ([*OWN, "--root", "few"], None, 3),
    ],
)
def test_a_base_that_cannot_be_exported_is_refused(people, work, options, code, exit_code):
    (work / "few").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:39]:
        shutil.copy(image, work / "few")
    run_refused("export", *options, code=code, exit_code=exit_code)
    assert {path.name for path in work.iterdir()} == {"few"}


def test_a_data_set_without_pictures_or_with_one_person_measures_nothing(copied_run, work):
    (work / "empty").mkdir()
    run_refused("export", copied_run, "--root", "empty", exit_code=3)
    spec = SyntheticSpec(look="street", train_ids=1, val_ids=0, test_ids=1, views=2)
    write_dataset(work / "alone", spec)
    run_refused("export", copied_run, "--root", "alone", code="split_of_one_person", exit_code=3)
    assert {path.name for path in work.iterdir()} == {"run", "empty", "alone"}


def test_a_missing_package_is_reported_before_any_work(copied_run, work):
    done = run_program("upperson", "export", copied_run, cwd=work, without=["jinja2"])
    assert done.returncode == 5, done.stderr
    assert "pip install 'upperson[export]'" in done.stderr
    assert {path.name for path in work.iterdir()} == {"run"}


def test_rtx_is_checked_before_any_work(copied_run, work, worked, monkeypatch):
    rtx = ["export", copied_run, "--trt", "--trt-flavor", "rtx"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        run_refused(*rtx, code="extra_missing", exit_code=5)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for x86-64 only")
    run_refused(*rtx, "--rtx-capability", "8.7", code="capability_unsupported", exit_code=2)
    (work / "bundle.rtx").mkdir()
    (work / "bundle.rtx/image.fp16.engine").write_text("took an hour")
    run_refused(*rtx, exit_code=3)
    assert (work / "bundle.rtx/image.fp16.engine").read_text() == "took an hour"
    assert worked == []


def test_a_gpu_that_cannot_build_is_reported_before_any_work(copied_run, work, worked, monkeypatch):
    _, trt = install_fake_tensorrt(monkeypatch)
    (work / "file").write_text("mine")
    monkeypatch.setenv("UPPERSON_CACHE", str(work / "file"))
    run_refused("export", copied_run, "--trt", exit_code=3)
    monkeypatch.setattr(trt, "__version__", "8.6.1")
    run_refused("export", copied_run, "--trt", exit_code=5)
    assert worked == []


@pytest.mark.parametrize(
    ("variants", "next_step"),
    [
        (["fp32", "fp16", "int8-fp16"], "upperson-rt compile bundle --variant int8-fp16"),
        (["fp32", "int8", "fp16"], "upperson-rt compile bundle --variant fp16"),
        (["fp32", "int8"], "no variant for TensorRT kept its accuracy"),
    ],
)
def test_the_next_step_names_a_variant_that_is_there(work, monkeypatch, variants, next_step):
    manifest = SimpleNamespace(variants=dict.fromkeys(variants))
    monkeypatch.setattr(engines, "read_manifest", lambda _: manifest)
    built = engines.build_engines(Path("bundle"), None, note=print, progress=print)
    assert next_step in built["next"]


def calibration_of(bundle):
    return json.loads((bundle / "calibration.json").read_text("utf-8"))


def one_line(text):
    """Undo the frames and line breaks of usage errors."""
    return " ".join(text.replace("│", " ").split())
