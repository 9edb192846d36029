"""``upperson export``: what ships, what is refused, and that nothing half-done stays behind."""

import gc
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.fake_tensorrt import install_fake_tensorrt
from tests.helpers.invoke import run, run_json, run_rt, snapshot
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
from upperson_export import engines
from upperson_export.bundle import ExportOptions, foreign_to_bundle
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
    from upperson_export import forms, graphs

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
        patch.setattr(forms, "export_onnx", export)
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
    assert bundle.check_canaries()
    for page in ("report.html", "README.md"):
        text = (work / "bundle" / page).read_text("utf-8")
        assert "int8 is not in the bundle: no tower keeps its accuracy in int8." in text
        assert "slightly optimistic" in text
        assert f"onnxruntime {onnxruntime.__version__}" in text
    assert "<h2>Linears left in float" not in (work / "bundle/report.html").read_text("utf-8")
    types = {(row["backend"], *row["float_types"].values()) for row in report["ladder"]}
    assert types >= {("onnxruntime", "f32")}
    result = run(
        "export", copied_run, "--output", "second", "--calib-size", 16, "--max-r1-drop", -101,
        "--precision", "int8", "--calibration", "bundle/calibration.json",
    )  # fmt: skip
    assert result.exit_code == 4, result.stderr
    assert "no safer form is left" in result.stderr
    assert not (work / "second").exists()


@pytest.mark.timeout(120, func_only=True)
def test_an_onnx_file_that_differs_from_torch_is_not_bundled(copied_run, work, monkeypatch):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    from upperson_export import forms

    real = forms.export_onnx

    def broken(tower, kind, path, *, example):
        real(tower, kind, path, example=example)
        model = onnx.load(path)
        (weights,) = (item for item in model.graph.initializer if item.name == "projection.weight")
        values = numpy_helper.to_array(weights).copy()
        values[0] += np.float32(0.01)
        weights.CopyFrom(numpy_helper.from_array(values, weights.name))
        onnx.save(model, path)

    monkeypatch.setattr(forms, "export_onnx", broken)
    result = run("export", copied_run, "--output", "bundle", "--calib-size", 8)
    assert result.exit_code == 6
    assert "differs from torch" in result.stderr
    assert {path.name for path in work.iterdir()} == {"run"}


@pytest.mark.timeout(120, func_only=True)
def test_one_calibration_sample_is_enough_and_the_bundle_is_signed(copied_run, work):
    write_keys(work, "key", ec.generate_private_key(ec.SECP256R1()))
    report = run_json(
        "export", copied_run, "--output", "bundle", "--calib-size", 1, "--max-r1-drop", -101,
        "--sign", "key.pem",
    )  # fmt: skip
    assert verify_folder(work / "bundle", work / "key.pub")
    assert not foreign_to_bundle(work / "bundle")  # The next export may replace it.
    assert "mixed-1/2" in {row["rung"] for row in report["ladder"]}
    # One picture has no order, so cosines alone rank the Linears.
    damage = calibration_of(work / "bundle")["towers"]["image"]["damage"]
    assert {layer["order_loss"] for layer in damage} == {0}
    cosines = [layer["cosine_loss"] for layer in damage]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > cosines[-1]
    assert Bundle.open(work / "bundle").check_canaries()


def test_a_key_that_cannot_sign_is_told_before_any_work(copied_run, work, worked):
    (work / "key.pem").write_text("no key")
    for name, message in (("key.pem", "is not a private key in PEM"), ("none.pem", "cannot read")):
        result = run("export", copied_run, "--output", "bundle", "--sign", name)
        assert result.exit_code == 3
        assert message in result.stderr
    assert not worked
    assert not (work / "bundle").exists()


@pytest.mark.parametrize("mine", ["thesis.txt", "mine.onnx", "notes/todo.txt", "bundle.json"])
def test_a_folder_with_other_files_is_not_taken_for_a_bundle(
    demo_folder, copied_run, work, worked, mine
):
    shutil.copytree(demo_folder / "bundle", work / "bundle")
    (work / "bundle" / mine).parent.mkdir(exist_ok=True)
    (work / "bundle" / mine).write_text('{"tool": "mine"}')
    before = snapshot(work)
    result = run("export", copied_run, "--output", "bundle")
    assert result.exit_code == 3
    assert "is not an earlier result, or was changed or holds other files" in result.stderr
    named = "README.md, bundle.json, " if mine == "bundle.json" else f"({mine.partition('/')[0]})"
    assert named in result.stderr
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
        assert Bundle.open(work / "bundle", variant).check_canaries()
        assert row["size_bytes"] < report["variants"]["fp32"]["size_bytes"] or variant == "fp32"
    html = (work / "bundle/report.html").read_text("utf-8")
    assert "Every form that was measured" in html
    # Only the largest values count for fp16, and they are kept, too.
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
    result = run("export", copied_run, "--output", "third", *others, "--estimator", "entropy")
    assert result.exit_code == 2
    assert "ranges are percentile-99.999" in one_line(result.stderr)
    file.write_text(file.read_text("utf-8").replace('"alpha"', '"beta"'), "utf-8")
    result = run("export", copied_run, "--output", "third", *others)
    assert result.exit_code == 3
    assert "calibration.json" in result.stderr
    assert not (work / "third").exists()


def test_pictures_of_a_folder_come_with_captions_from_elsewhere(
    copied_run, people, work, monkeypatch
):
    given = []
    monkeypatch.setattr(exportable, "export_bundle", lambda *arguments: given.append(arguments))
    (work / "crops").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:3]:
        shutil.copy(image, work / "crops")
    exportable.export_run(
        copied_run, work / "bundle", ExportOptions(), calib_size=8, calib_data=work / "crops",
        progress=lambda *_: None,
    )  # fmt: skip
    ((_, _, _, samples, split, *_),) = given
    assert (samples.image_source, len(samples.images)) == ("folder crops", 3)
    assert (samples.text_source, len(samples.input_ids)) == (f"{people.name}, train", 8)
    assert split.name == f"{people.name}, test"


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
    assert "Accuracy was not measured" in (bundle / "README.md").read_text("utf-8")


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
    told = one_line(result.stdout)
    assert "compute capability 8.9, 2 fused attentions, 0 int8 GEMMs" in told
    assert f"compute capability 8.9, 2 fused attentions, {int8_gemms(2)} int8 GEMMs" in told
    written = {path.name for path in (work / "nvinfer").rglob("*") if path.is_file()}
    assert any(name.endswith(".txt") for name in written)
    assert Bundle.open(work / "bundle").check_canaries()

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
    with pytest.raises(InputError, match=r"holds other files as well \(image\.int8-fp16\.engine\)"):
        write(lambda _: None)


@pytest.mark.parametrize("name", ["adapter_mlp.up.weight", "lora.key.up", "prefix.key_tokens"])
def test_weights_that_are_not_finite_are_named(copied_run, work, name):
    path = copied_run / "adapter.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if name in key)
    tensors[key].flat[0] = np.nan
    save_file(tensors, path, metadata)
    result = run("export", copied_run, "--output", "bundle", "--no-gate", "--calib-size", 8)
    assert result.exit_code == 3
    assert key.partition(".")[2] in result.stderr
    assert {path.name for path in work.iterdir()} == {"run"}


@pytest.mark.parametrize("base", ["[1]", "null", "7", '"small"', "{", "{}"])
def test_an_adapter_that_names_no_base_is_refused(copied_run, work, base):
    path = copied_run / "adapter.safetensors"
    save_file(load_file(path), path, {"base": base})
    result = run("export", copied_run, "--output", "bundle", "--no-gate")
    assert result.exit_code == (6 if base == "{}" else 3), result.stderr
    assert "adapter.safetensors" in result.stderr or base == "{}"
    assert {path.name for path in work.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--calib-data", "nowhere"], 3, "no such file or folder: nowhere"),
        (["--calib-data", "empty"], 3, "no images in folder empty"),
        (["--calibration", "empty"], 3, "empty"),
        (["--calib-size", "0"], 2, "calib-size"),
        (["--estimator", "guess"], 2, "--estimator must be one of min-max"),
        (["--precision", "int4"], 2, "--precision must be auto or int8"),
        (["--max-r1-drop", "nan"], 2, "--max-r1-drop must be a number"),
        (["--trt-flavor", "other"], 2, "--trt-flavor must be standard or rtx"),
        (["--no-gate", "--root", "empty"], 2, "--root has no effect with --no-gate"),
        (["--no-gate", "--max-r1-drop", "0.5"], 2, "--max-r1-drop has no effect with --no-gate"),
        (["--no-gate", "--precision", "int8"], 2, "--precision has no effect with --no-gate"),
        (["--no-int8", "--precision", "int8"], 2, "--precision has no effect with --no-int8"),
        (["--no-int8", "--estimator", "mse"], 2, "--estimator has no effect with --no-int8"),
        (["--no-int8", "--calibration", "c"], 2, "--calibration has no effect on fp32 alone"),
        (["--trt-flavor", "rtx"], 2, "--trt-flavor has no effect without --trt"),
        (
            ["--trt", "--rtx-capability", "8.9"],
            2,
            "--rtx-capability has no effect without --trt --trt-flavor rtx",
        ),
        (["--triton", "bundle/models"], 2, "lie in each other: name folders beside each other"),
        (["--triton", "a", "--deepstream", "./a"], 2, "are the same folder"),
        (["--trt", "--trt-flavor", "rtx", "--triton", "bundle.rtx"], 2, "the engines' folder"),
        (["--output", "file/bundle"], 3, "file is not a folder"),
        (["--output", "file"], 3, "file is a file, expected a folder"),
        (["--output", "."], 3, "is the working folder"),
        (["--triton", "mine"], 3, "mine exists and is not an earlier result"),
        (["--deepstream", "mine"], 3, "mine exists and is not an earlier result"),
    ],
)
def test_bad_options_are_one_line_and_a_code_before_any_work(
    copied_run, work, worked, options, code, message
):
    (work / "empty").mkdir()
    (work / "mine").mkdir()
    (work / "mine/config.txt").write_text("mine")
    (work / "file").write_text("mine")
    before = snapshot(work)
    result = run("export", copied_run, *options)
    assert result.exit_code == code, result.stderr
    assert message in one_line(result.stderr)
    assert result.stdout == ""
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
    assert not foreign_to_bundle(work / "bundle")
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


def test_a_base_is_measured_by_accuracy_where_there_are_captions(people, work, monkeypatch):
    given = []
    monkeypatch.setattr(exportable, "export_bundle", lambda *arguments: given.append(arguments))
    exportable.export_base(
        "upperson-small", None, (None, None), work / "bundle", ExportOptions(), root=people,
        calib_size=4, progress=lambda *_: None,
    )  # fmt: skip
    ((model, identity, _, samples, split, *_),) = given
    assert split.has_identities
    assert split.name == f"{people.name}, test"
    assert samples.image_source == f"{people.name}, train"
    assert (model.image_size, identity.adapter_sha256) == ((192, 64), "none")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "RUN is missing: pass the run folder"),
        (["run", "--base", "upperson-small"], 2, "exclude each other"),
        (["run", "--pretrained", "openai"], 2, "--pretrained goes with --base"),
        (["run", "--height", "384"], 2, "--height goes with --base"),
        (["run", "--width", "128"], 2, "--width goes with --base"),
        (["run", "--dataset", "csv"], 2, "--dataset goes with --base"),
        (["run", "--min-overlap", "80"], 2, "has no effect where there are captions"),
        (["--base", "upperson-small", "--max-r1-drop", "1"], 2, "without captions: pass --root"),
        (["--base", "upperson-small", "--dataset", "csv"], 2, "no effect without --root"),
        (["--base", "upperson-small", "--no-gate", "--min-overlap", "80"], 2, "no effect with"),
        (["--base", "upperson-small", "--height", "100"], 2, "does not divide into patches"),
        (["--base", "ViT-B-61", "--pretrained", "openai"], 2, "is unknown: expected"),
        (["--base", "ViT-B-16"], 2, "needs weights, found none: pass --pretrained"),
        (["--base", "ViT-B-16", "--pretrained", "gone.pt"], 3, "found no such file"),
        (["--base", "upperson-small", "--calib-data", "few"], 3, "rankings need 40 pictures"),
        (["--base", "upperson-small", "--calib-data", "none"], 3, "no such file or folder"),
        (["--base", "upperson-small", "--root", "few"], 3, "annotations.jsonl"),
    ],
)
def test_a_base_that_cannot_be_exported_is_one_line(people, work, options, code, message):
    (work / "few").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:39]:
        shutil.copy(image, work / "few")
    result = run("export", *options)
    assert result.exit_code == code, result.stderr
    assert message in one_line(result.stderr)
    assert {path.name for path in work.iterdir()} == {"few"}


def test_a_data_set_without_pictures_is_told(copied_run, work):
    (work / "empty").mkdir()
    result = run("export", copied_run, "--root", "empty")
    assert result.exit_code == 3
    assert "empty" in one_line(result.stderr)
    assert {path.name for path in work.iterdir()} == {"run", "empty"}


def test_a_split_that_shows_one_person_measures_nothing(copied_run, work):
    spec = SyntheticSpec(look="street", train_ids=1, val_ids=0, test_ids=1, views=2)
    write_dataset(work / "alone", spec)
    result = run("export", copied_run, "--root", "alone")
    assert result.exit_code == 3
    assert "alone shows one person in its test split" in one_line(result.stderr)
    assert {path.name for path in work.iterdir()} == {"run", "alone"}


@pytest.mark.parametrize("package", ["onnxscript", "jinja2", "matplotlib"])
def test_a_missing_package_is_told_before_any_work(copied_run, work, worked, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run("export", copied_run)
    assert result.exit_code == 5
    assert f"needs the package '{package}'" in result.stderr
    assert "pip install 'upperson[export]'" in result.stderr
    assert worked == []


def test_rtx_without_its_compiler_is_told_before_any_work(copied_run, work, worked, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    result = run("export", copied_run, "--trt", "--trt-flavor", "rtx")
    assert result.exit_code == 5
    assert "TensorRT for RTX is not installed" in result.stderr
    assert worked == []


def test_what_rtx_cannot_do_is_told_before_any_work(copied_run, work, worked):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for x86-64 only")
    rtx = ["export", copied_run, "--trt", "--trt-flavor", "rtx"]
    result = run(*rtx, "--rtx-capability", "8.7")
    assert result.exit_code == 2
    assert "not for 8.7: a Jetson or a data centre GPU builds its own" in one_line(result.stderr)
    (work / "bundle.rtx").mkdir()
    (work / "bundle.rtx/image.fp16.engine").write_text("took an hour")
    result = run(*rtx)
    assert result.exit_code == 3
    assert "bundle.rtx exists and is not an earlier result" in one_line(result.stderr)
    assert (work / "bundle.rtx/image.fp16.engine").read_text() == "took an hour"
    assert worked == []


def test_a_gpu_that_cannot_build_is_told_before_any_work(copied_run, work, worked, monkeypatch):
    _, trt = install_fake_tensorrt(monkeypatch)
    (work / "file").write_text("mine")
    monkeypatch.setenv("UPPERSON_CACHE", str(work / "file"))
    result = run("export", copied_run, "--trt")
    assert result.exit_code == 3
    assert "file is not a folder" in one_line(result.stderr)
    monkeypatch.setattr(trt, "__version__", "8.6.1")
    result = run("export", copied_run, "--trt")
    assert result.exit_code == 5
    assert "TensorRT 8.6.1 is too old" in result.stderr
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
