"""``upperson export``: what ships, what is refused, and that nothing half-done stays."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.fake_tensorrt import install_fake_tensorrt
from tests.helpers.invoke import run, run_failing, run_json, run_rt_json, snapshot
from tests.helpers.openai_archive import save_openai_archive
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bases import toy_base, write_base
from tests.helpers.traces import once_in
from upperson.cli import exportable
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.run import TrainedEncoder
from upperson_export import candidates, engines
from upperson_export.bundle import ExportOptions
from upperson_export.precision_search import SplitEmbeds
from upperson_rt.bundle import Bundle, unowned_in_bundle
from upperson_rt.errors import InputError
from upperson_signature.signature import verify_folder
from upperson_synthetic import SyntheticSpec, write_dataset

FEW = ("--no-gate", "--calib-size", 8)


@pytest.fixture(scope="module", autouse=True)
def towers_of_one_shape_are_traced_once(shared_folder):
    """Write others with their weights: `tests/parity/test_export.py` proves that it is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "export_onnx", once_in(shared_folder / "traces"))
        yield


@pytest.fixture
def copied_run(toy_run, work):
    return shutil.copytree(toy_run, work / "run")


@pytest.fixture
def worked(monkeypatch):
    """The runs that were loaded, which every export begins with."""
    loaded = []
    monkeypatch.setattr("upperson.cli.exportable.load_run", loaded.append)
    return loaded


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def calibration_of(bundle):
    return json.loads((bundle / "calibration.json").read_text("utf-8"))


@pytest.mark.timeout(180)
def test_int8_that_fails_the_gate_is_measured_and_left_out_of_a_signed_bundle(copied_run, work):
    write_keys(work, "key", ec.generate_private_key(ec.SECP256R1()))
    failing = ("export", copied_run, "--max-r1-drop", -101, "--calib-size", 1)  # One is enough.
    report = run_json(*failing, "--output", "bundle", "--sign", "key.pem")
    assert report["variants"]["int8"]["shipped"] is False
    assert list(report["variants"]["int8"]["metrics"]) == ["R@1", "R@5", "R@10", "mAP", "mINP"]
    assert "mixed-1/2" in {row["rung"] for row in report["ladder"]}
    types = {(row["backend"], *row["float_types"].values()) for row in report["ladder"]}
    assert ("onnxruntime", "f32") in types

    bundle = Bundle.open(work / "bundle")
    assert (bundle.variant, list(bundle.manifest.variants)) == ("fp32", ["fp32"])
    assert bundle.check_golden_samples()
    assert not list((work / "bundle").glob("*int8*"))
    for page in ("report.html", "README.md"):
        assert "int8 is not in the bundle" in (work / "bundle" / page).read_text("utf-8")
    assert verify_folder(work / "bundle", work / "key.pub")
    assert not unowned_in_bundle(work / "bundle")  # The next export may replace it.
    again = ("--output", "second", "--calibration", "bundle/calibration.json")
    error = run_failing(4, "accuracy_not_kept", *failing, *again, "--precision", "int8")
    assert error["fields"]["variant"] == "int8"
    assert not (work / "second").exists()


def test_a_variant_that_loses_short_queries_alone_ends_the_export(copied_run, work, monkeypatch):
    """Embeddings are made up: of captions the same in fp32 and int8, of short queries not."""

    def made_up(folder, towers, split, progress):
        images = np.eye(split.image_pids.max() + 1, dtype=np.float32)[split.image_pids]
        captions = np.eye(images.shape[1], dtype=np.float32)[split.caption_pids]
        queries = range(len(split.short.texts))
        short = np.stack([images[split.short.satisfied_G == query].mean(0) for query in queries])

        def embed(tower, variant, candidate, backend):
            found = short if candidate == "fp32" else np.roll(short, 1, axis=0)
            text = np.concatenate([captions, found / np.linalg.norm(found, axis=1)[:, None]])
            return SplitEmbeds(images if tower == "image" else text, "f32")

        return embed

    monkeypatch.setattr("upperson_export.bundle.CandidateEmbeddings", made_up)
    export = ("export", copied_run, "--calib-size", 8)
    error = run_failing(4, "accuracy_not_kept", *export, "--precision", "int8")
    fields = error["fields"]
    assert (fields["tower"], fields["measure"], fields["limit"]) == ("text", "short R@1", 0.5)
    assert names_in(work) == {"run"}


@pytest.mark.timeout(120)
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
    run_failing(6, "export_differs", "export", copied_run, "--calib-size", 8)
    assert names_in(work) == {"run"}


def test_a_folder_with_other_files_is_not_taken_for_a_bundle(demo_folder, copied_run, work, worked):
    for mine in ("thesis.txt", "notes/todo.txt", "bundle.json"):
        bundle = shutil.copytree(demo_folder / "bundle", work / mine.partition(".")[0] / "b")
        (bundle / mine).parent.mkdir(exist_ok=True)
        (bundle / mine).write_text('{"tool": "mine"}')
        before = snapshot(work)
        error = run_failing(3, None, "export", copied_run, "--output", bundle)
        assert mine.partition("/")[0] in error["message"]
        assert snapshot(work) == before
    assert worked == []


@pytest.mark.timeout(240)
def test_typed_variants_and_serving_files(copied_run, work):
    report = run_json(
        "export", copied_run, "--calib-size", 16, "--max-r1-drop", 5, "--trt", "--triton", "models"
    )
    assert list(report["variants"]) == ["fp32", "int8", "fp16", "int8-fp16"]
    assert "--variant int8-fp16" in report["engines"]["next"]
    assert (work / "models").is_dir()
    for variant, row in report["variants"].items():
        assert row["shipped"]
        assert Bundle.open(work / "bundle", variant).check_golden_samples()
        assert row["size_bytes"] < report["variants"]["fp32"]["size_bytes"] or variant == "fp32"


@pytest.mark.timeout(240)
def test_a_calibration_that_is_reused_decides_everything(copied_run, people, work):
    """The first bundle is not measured: rendered people set its ranges, and it says so."""
    first = run_json("export", copied_run, "--no-gate", "--calib-size", 12)
    assert first["split"] is None
    used = {"image_source": "synthetic renderer", "text_source": "synthetic renderer"}
    used |= {"images": 12, "texts": 12, "reused_file_sha256": None}
    assert {name: first["calibration"][name] for name in used} == used
    assert first["variants"]["int8"]["rungs"] == {"image": "smoothed", "text": "smoothed"}
    entry = Bundle.open(work / "bundle", "int8").entry
    assert (entry.calibration["gate"], entry.metrics) == ("off", None)

    file = Path(shutil.copy(work / "bundle/calibration.json", work))
    (work / "others").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:4]:
        shutil.copy(image, work / "others")
    others = ["--calib-data", "others", "--calib-size", 4, "--no-gate", "--calibration", file]
    second = run_json("export", copied_run, "--output", "again", *others)
    # The graphs are the same to the last bit, though they saw none of these pictures.
    for name in ("calibration.json", "image.int8.onnx", "text.int8.onnx"):
        assert (work / "again" / name).read_bytes() == (work / "bundle" / name).read_bytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert second["calibration"] == first["calibration"] | {"reused_file_sha256": digest}
    calibration = Bundle.open(work / "again", "int8").entry.calibration
    assert calibration["reused_file_sha256"] == digest
    assert calibration["image_source"] == "synthetic renderer"

    third = ["export", copied_run, "--output", "third", *others]
    error = run_failing(2, "estimator_differs", *third, "--estimator", "entropy")
    assert error["fields"] == {"expected": "percentile-99.999", "found": "entropy"}
    text = file.read_text("utf-8")
    file.write_text(text.replace(calibration_of(work)["towers"]["image"]["graph_sha256"], "0" * 64))
    run_failing(6, "calibration_of_other_model", *third)
    file.write_text(text.replace('"alpha"', '"beta"'), "utf-8")
    assert "calibration.json" in run_failing(3, None, *third)["message"]
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

    def export_base(**data):
        exportable.export_base(
            "upperson-small", None, (None, None), work / "bundle", ExportOptions(),
            exportable.ExportData(calib_size=4, **data), lambda *_: None,
        )  # fmt: skip
        model, identity, _, samples, split, *_ = given.pop()
        assert (model.image_size, identity.adapter_sha256) == ((192, 64), "none")
        return samples, split

    samples, split = export_base(root=people)
    assert (samples.image_source, split.name) == (f"{people.name}, train", f"{people.name}, test")
    _, split = export_base(calib_data=people)
    assert (bool(split.captions), split.has_identities) == (True, False)


@pytest.mark.timeout(240)
def test_rtx_engines_and_deepstream_files_come_with_a_bundle(copied_run, work, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for x86-64 only")
    result = run(
        "export", copied_run, *FEW, "--trt", "--trt-flavor", "rtx", "--rtx-capability", "8.9",
        "--deepstream", "nvinfer",
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
    assert any(path.suffix == ".txt" for path in (work / "nvinfer").rglob("*"))

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
    assert names_in(work) == {"run", "bundle", "bundle.rtx", "nvinfer"}
    write(lambda _: None)
    after = snapshot(work / "bundle.rtx")
    assert sorted(after) == ["engines.json", *names[1::2]]
    assert all(after[name] != before[name] for name in after)
    (work / "bundle.rtx/image.int8-fp16.engine").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"image\.int8-fp16\.engine"):
        write(lambda _: None)


def test_a_tampered_adapter_is_refused(copied_run, work):
    path = copied_run / "adapter.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    export = ("export", copied_run, *FEW)
    for part in ("adapter_mlp.up.weight", "prefix.key_tokens"):
        key = next(key for key in tensors if part in key)
        broken = tensors[key].copy()
        broken.flat[0] = np.nan
        save_file(tensors | {key: broken}, path, metadata)
        assert key.partition(".")[2] in run_failing(3, None, *export)["message"]
    for base in ("[1]", "null", "7", '"small"', "{"):
        save_file(tensors, path, {"base": base})
        assert "adapter.safetensors" in run_failing(3, None, *export)["message"]
    save_file(tensors, path, {"base": "{}"})
    run_failing(6, None, *export)
    path.write_bytes(content[:-100])
    run_failing(3, "adapter_unreadable", *export)
    assert names_in(work) == {"run"}


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
        "--triton bundle/models", "--triton a --deepstream ./a", "--triton a/b --deepstream a",
        "--trt --trt-flavor rtx --triton bundle.rtx",
    ],
    (None, 3): [
        "--calib-data nowhere", "--calib-data empty", "--calibration empty", "--output file/bundle",
        "--output file", "--output .", "--triton mine", "--deepstream mine", "--sign file",
        "--sign none.pem",
    ],
}
# fmt: on


def test_bad_options_are_refused_before_any_work(copied_run, work, worked):
    for folder in ("empty", "mine"):
        (work / folder).mkdir()
    (work / "mine/config.txt").write_text("mine")
    (work / "file").write_text("mine")
    before = snapshot(work)
    for (code, exit_code), lines in BAD_OPTIONS.items():
        for options in map(str.split, lines):
            error = run_failing(exit_code, code, "export", copied_run, *options)
            if code is None:  # The error names the file or folder.
                assert options[-1] == "." or options[-1].partition("/")[0] in error["message"]
            else:
                assert error["fields"].get("option", options[-2]) == options[-2]
            assert (worked, snapshot(work)) == ([], before), options
    assert names_in(work) == {"run", "empty", "mine", "file"}


@pytest.mark.timeout(240)
def test_a_base_is_exported_without_a_run_or_captions_and_finds_people(people, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # It compiles for longer than all else.
    crops = work / "crops"
    crops.mkdir()
    for image in sorted(people.rglob("*.jpg"))[:40]:
        shutil.copy(image, crops)
    config, _ = write_base(work / "base", "clip")
    save_openai_archive(toy_base("clip").state_dict(), work / "base/openai.pt")
    report = run_json(
        "export", "--base", config, "--pretrained", work / "base/openai.pt", "--height", 96,
        "--width", 32, "--calib-data", crops, "--calib-size", 8,
    )  # fmt: skip
    split = {"name": "folder crops", "images": 20, "captions": 500}
    assert report["split"] == split | {"people": None, "short_queries": 0}
    limits = report["max_r1_drop"], report["min_overlap"], report["bootstrap"]
    assert limits == (None, 90.0, None)
    for measured in report["ladder"]:  # The files themselves were run.
        assert measured["metrics"] is None
        assert 50 < measured["top10_overlap"] <= 100
        if set(measured["rung"].split(" + ")) != {"fp32"}:
            assert measured["accepted"] == (measured["top10_overlap"] >= 90)
    assert report["calibration"]["image_source"] == "folder crops"
    bundle = Bundle.open(work / "bundle")
    model, image = bundle.manifest.model, bundle.manifest.image
    assert (model.name, model.adapter_sha256) == ("toy-clip", "none")
    assert (image.height_px, image.width_px) == (96, 32)
    assert (bundle.entry.metrics, bundle.entry.calibration["gate"]) == (None, "rankings")
    assert not unowned_in_bundle(work / "bundle")
    base = load_base(str(config), str(work / "base/openai.pt"))
    images = sorted(crops.iterdir())[:3]
    plain = TrainedEncoder(UPPerson(base.clip, PLAIN_CLIP, (96, 32), base.statistics).eval())
    exact = Bundle.open(work / "bundle", "fp32").encoder()
    assert np.abs(exact.encode_images(images) - plain.encode_images(images, 3)).max() < 1e-5
    assert run_rt_json("index", crops)["indexed"] == 40
    assert len(run_rt_json("query", "woman in red coat", "-k", "3")["hits"]) == 3


OWN = ["--base", "upperson-small"]


def test_a_base_that_cannot_be_exported_is_refused(people, work):
    (work / "few").mkdir()
    for image in sorted(people.rglob("*.jpg"))[:39]:
        shutil.copy(image, work / "few")
    for options, code, exit_code in (
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
    ):
        run_failing(exit_code, code, "export", *options)
    assert names_in(work) == {"few"}


def test_a_data_set_without_pictures_or_with_one_person_measures_nothing(copied_run, work):
    (work / "empty").mkdir()
    run_failing(3, None, "export", copied_run, "--root", "empty")
    spec = SyntheticSpec(look="street", train_ids=1, val_ids=0, test_ids=1, views=2)
    write_dataset(work / "alone", spec)
    run_failing(3, "split_of_one_person", "export", copied_run, "--root", "alone")
    assert names_in(work) == {"run", "empty", "alone"}


def test_engines_are_checked_before_any_work(copied_run, work, worked, monkeypatch):
    rtx = ["export", copied_run, "--trt", "--trt-flavor", "rtx"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        run_failing(5, "extra_missing", *rtx)
    with monkeypatch.context() as patch:
        _, trt = install_fake_tensorrt(patch)
        (work / "file").write_text("mine")
        patch.setenv("UPPERSON_CACHE", str(work / "file"))
        run_failing(3, None, "export", copied_run, "--trt")
        patch.setattr(trt, "__version__", "8.6.1")
        run_failing(5, None, "export", copied_run, "--trt")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for x86-64 only")
    run_failing(2, "capability_unsupported", *rtx, "--rtx-capability", "8.7")
    (work / "bundle.rtx").mkdir()
    (work / "bundle.rtx/image.fp16.engine").write_text("took an hour")
    run_failing(3, None, *rtx)
    assert (work / "bundle.rtx/image.fp16.engine").read_text() == "took an hour"
    assert worked == []
