import io
import json
import shutil
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import upperson_rt
from tests.helpers.toy_bundle import EMBED_DIM, make_toy_bundle, replace_in_bundle
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.cuda_driver import CudaDriver
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError

ORT = "onnxruntime"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def canaries_with(folder, **changes):
    """Return the bytes of canaries.npz with some arrays replaced (None: left out)."""
    with np.load(folder / "canaries.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays.update({name.replace("__", "."): value for name, value in changes.items()})
    path = folder / "changed.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path.read_bytes()


def test_default_and_explicit_variant(folder):
    assert Bundle.open(folder).variant == "int8"
    bundle = Bundle.open(str(folder), "fp32", "onnxruntime", threads=1)
    assert bundle.entry.precision == "fp32"
    assert bundle.tokenizer.context_length == 12
    with pytest.raises(UsageError, match="no variant 'fp23', did you mean 'fp32'"):
        Bundle.open(folder, "fp23")


def test_canaries_pass_alone_in_an_odd_batch_and_in_one_of_eight(folder):
    checks = Bundle.open(folder, backend=ORT, threads=1).check_canaries()
    assert [(c.tower, c.batch_size) for c in checks] == [
        (tower, size) for tower in ("image", "text") for size in (1, 3, 8)
    ]
    assert all(check.min_cosine > 0.99999 for check in checks)


@pytest.mark.parametrize(
    ("written", "float_type", "floor"),
    [
        (0.9998, None, 0.9998),
        (0.9998, "f32", 0.9998),
        (0.9998, "bf16", 0.998),
        (0.99, "bf16", 0.99),
    ],
)
def test_bfloat16_may_be_further_from_the_golden_embeddings(folder, written, float_type, floor):
    entry = replace(Bundle.open(folder).entry, canary_min_cosine=written)
    assert entry.canary_floor(SimpleNamespace(float_type=float_type)) == floor


def test_towers_are_loaded_once_and_when_needed(folder):
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    (folder / "image.int8.onnx").unlink()  # Nobody asks for it below.
    assert bundle.backend("text") is bundle.backend("text")


def test_not_a_bundle(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"is not a bundle .*upperson export .*upperson demo"):
            Bundle.open(path)


def test_a_bundle_nearby_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "more").mkdir()
    for wrong, near in ((".", folder.name), (folder / "more", folder), (folder / "x.json", folder)):
        with pytest.raises(InputError, match=rf"is not a bundle \(.*\), but {near} is: name that"):
            Bundle.open(wrong)


def test_truncated_manifest(folder):
    path = folder / "bundle.json"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(IntegrityError, match=r"bundle\.json is not valid JSON"):
        Bundle.open(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match=r"bundle\.json is no text in UTF-8"):
        Bundle.open(folder)
    path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(IntegrityError, match=r"bundle\.json has more than 1048576 bytes"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("name", "most"), [("tokenizer.json", 8 << 20), ("canaries.npz", 32 << 20)]
)
def test_files_that_are_read_whole_have_a_largest_size(folder, name, most):
    replace_in_bundle(folder, name, b"\0" * (most + 1))
    with pytest.raises(IntegrityError, match=f"{name} has {most + 1} bytes, expected at most"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "canaries.npz", "image.int8.onnx", "text.int8.onnx"]
)
def test_changed_files_are_noticed(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=f"{name} has {len(content) - 1} bytes, expected"):
        Bundle.open(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=f"{name} has sha256 .*, expected .*copy the bundle"):
        Bundle.open(folder).check_files()
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        Bundle.open(folder)


def test_a_towers_hash_is_checked_when_it_is_loaded(folder):
    path = folder / "text.int8.onnx"
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))
    encoder = Bundle.open(folder, backend=ORT, threads=1).encoder()
    assert encoder.encode_pixels(np.zeros((1, 24, 8, 3), np.uint8)).shape == (1, EMBED_DIM)
    with pytest.raises(IntegrityError, match=r"text\.int8\.onnx has sha256"):
        encoder.encode_texts(["red"])


def test_threads_that_need_a_tower_at_once_load_it_once(folder, monkeypatch):
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    load, loaded = bundle._load, []
    together = threading.Barrier(8)

    def slowly(tower, name):
        loaded.append(tower)
        time.sleep(0.05)
        return load(tower, name)

    def embed(number):
        together.wait()
        if number % 2:
            return bundle.encoder().encode_texts(["red"])
        return bundle.encoder().encode_pixels(np.full((1, 24, 8, 3), 200, np.uint8))

    monkeypatch.setattr(bundle, "_load", slowly)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(embed, range(8)))
    assert sorted(loaded) == ["image", "text"]
    for number, embeds in enumerate(results):
        np.testing.assert_array_equal(embeds, results[number % 2])


def test_a_tower_that_failed_to_load_is_tried_again(folder, monkeypatch):
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    load = bundle._load
    monkeypatch.setattr(bundle, "_load", lambda *_: open_backend(folder / "gone.onnx"))
    with pytest.raises(BackendError, match="cannot load"):
        bundle.backend("text")
    monkeypatch.setattr(bundle, "_load", load)
    assert bundle.backend("text").device == "cpu"


def test_files_of_other_variants_are_not_needed(folder):
    (folder / "image.fp32.onnx").unlink()
    Bundle.open(folder, "int8")


def test_links_out_of_the_bundle_are_refused(folder, tmp_path):
    target = folder / "text.int8.onnx"
    target.rename(tmp_path / "elsewhere.onnx")
    target.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="is a link out of the bundle"):
        Bundle.open(folder)


def test_path_escape_is_refused(folder):
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    content["canaries"]["file"] = "../canaries.npz"
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        Bundle.open(folder)


def test_another_model_behind_right_hashes_is_caught_by_the_canaries(folder, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(folder, "text.int8.onnx", (other / "text.int8.onnx").read_bytes())
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    with pytest.raises(IntegrityError, match=r"text tower at batch 1: canary \d has cosine"):
        bundle.encoder().encode_texts(["red"])
    with pytest.raises(IntegrityError, match=r"onnxruntime .* on cpu, text tower at batch 1"):
        bundle.check_canaries()
    bundle.backend("image")  # That one is fine.
    unchecked = Bundle.open(folder, backend=ORT, threads=1, verify=False).encoder()
    assert unchecked.encode_texts(["red"]).shape == (1, EMBED_DIM)


class FakeBackend:
    name, version, device, max_batch = "fake", "1", "cpu", None

    def __init__(self, answer):
        self.answer = answer

    def run(self, inputs):
        name = "image_embeds" if "image" in inputs else "text_embeds"
        return {name: self.answer(next(iter(inputs.values())))}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: np.full((len(x), EMBED_DIM), np.nan, np.float32), "4 of 4 .* not finite"),
        (lambda x: np.ones((len(x), EMBED_DIM), np.float32), "the same for every input"),
        (lambda x: np.ones((len(x), 3), np.float32), r"shape \(1, 16\), found \(1, 3\)"),
        (lambda x: np.zeros((1, EMBED_DIM), np.float32), "the same for every input"),
    ],
)
def test_broken_backends_are_caught(folder, monkeypatch, answer, message):
    bundle = Bundle.open(folder, backend=ORT)
    monkeypatch.setattr(bundle, "_load", lambda *_: FakeBackend(answer))
    with pytest.raises(IntegrityError, match=message):
        bundle.backend("image")


@pytest.mark.parametrize("size", [3, 8])
def test_a_backend_that_is_wrong_only_in_batches_is_caught(folder, monkeypatch, size):
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    right = bundle.backend("image")

    def answer(images):
        embeds = right.run({"image": images})["image_embeds"]
        return embeds if len(images) != size else np.roll(embeds, 1, axis=0)

    again = Bundle.open(folder, backend=ORT)
    monkeypatch.setattr(again, "_load", lambda *_: FakeBackend(answer))
    with pytest.raises(IntegrityError, match=f"image tower at batch {size}: canary"):
        again.backend("image")


@pytest.mark.parametrize("factor", [0, -1])
def test_one_canary_that_comes_out_wrong_is_enough(folder, monkeypatch, factor):
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    right = bundle.backend("image")
    third = right.run({"image": bundle.canaries.images})["image_embeds"][2]

    def answer(images):
        embeds = right.run({"image": images})["image_embeds"]
        embeds[np.abs(embeds - third).max(axis=1) < 1e-5] *= factor
        return embeds

    again = Bundle.open(folder, backend=ORT)
    monkeypatch.setattr(again, "_load", lambda *_: FakeBackend(answer))
    with pytest.raises(
        IntegrityError, match=r"canary 2 has cosine -?\d\.00000 .*\(1 of 4 differ\)"
    ):
        again.backend("image")


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((4, 24, 9, 3), np.uint8)},
        {"images": np.zeros((0, 24, 8, 3), np.uint8)},
        {"input_ids": np.zeros((4, 5), np.int64)},
        {"input_ids": np.zeros((4, 13), np.int32)},
        {"image_embeds__int8": np.zeros((3, EMBED_DIM), np.float32)},
        {"text_embeds__int8": np.full((4, EMBED_DIM), np.nan, np.float32)},
    ],
)
def test_canaries_that_do_not_fit(folder, changes):
    replace_in_bundle(folder, "canaries.npz", canaries_with(folder, **changes))
    with pytest.raises(IntegrityError, match=r"do(es)? not fit the manifest"):
        Bundle.open(folder)


def test_unusable_canaries(folder):
    pickled = canaries_with(folder, images=np.array([{"a": 1}], dtype=object))
    replace_in_bundle(folder, "canaries.npz", canaries_with(folder, text_embeds__int8=None))
    with pytest.raises(IntegrityError, match=r"lacks text_embeds\.int8"):
        Bundle.open(folder)
    for content in (b"junk", b"", pickled):
        replace_in_bundle(folder, "canaries.npz", content)
        with pytest.raises(IntegrityError, match="cannot read canaries"):
            Bundle.open(folder)


def npy(shape, content=b"", descr="|u1"):
    """Return an .npy file that says it has this shape."""
    file = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue() + content


def zipped(folder, method=zipfile.ZIP_STORED, **replaced):
    """Return canaries.npz with some files in it replaced by bytes."""
    with np.load(folder / "canaries.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, array in arrays.items():
            content = npy(array.shape, array.tobytes(), array.dtype.str)
            archive.writestr(f"{name}.npy", replaced.get(name, content))
    return target.getvalue()


def in_entries(content, offset, value):
    """Change a byte in the headers of all entries of a zip file; offset as in the local ones."""
    changed = bytearray(content)
    for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        place = -1
        while (place := content.find(mark, place + 1)) >= 0:
            changed[place + offset + shift] = value
    return bytes(changed)


def test_hostile_canaries_with_right_hashes(folder):
    packed = zipped(folder, zipfile.ZIP_DEFLATED)
    damaged = bytearray(packed)
    damaged[60:120] = bytes(60)
    bomb = npy((1 << 17, 24, 8, 3), bytes((1 << 17) * 24 * 8 * 3))
    hostile = {
        "invalid|incorrect|Bad|another size": bytes(damaged),
        "encrypted or packed": in_entries(packed, 6, 1),
        "or packed by a method": in_entries(packed, 8, 77),
        "packed by a method that": zipped(folder, zipfile.ZIP_LZMA),
        "has 633318697598976 bytes, expected at most": zipped(
            folder, images=npy((1 << 40, 24, 8, 3))
        ),
        "has 75497472 bytes, expected at most": zipped(folder, zipfile.ZIP_DEFLATED, images=bomb),
        "another size than its header": zipped(folder, images=npy((4, 24, 8, 3), bytes(9))),
        "does not fit .* found object": zipped(folder, images=npy((4, 24, 8, 3), b"", "|O")),
        "export the bundle again": zipped(folder, images=b"\x93NUMPY\1\0\x28\x23" + b"-" * 9000),
        "not in numpy's format": zipped(folder, images=b"\x93NUMPY\3\0"),
    }
    for message, content in hostile.items():
        replace_in_bundle(folder, "canaries.npz", content)
        with pytest.raises(IntegrityError, match=rf"cannot read canaries .*({message})"):
            Bundle.open(folder)
    replace_in_bundle(folder, "canaries.npz", packed)
    assert Bundle.open(folder, backend=ORT, threads=1).check_canaries()


def test_open_gives_an_encoder(folder):
    encoder = upperson_rt.open(folder, variant="fp32", threads=1)
    assert encoder.variant == "fp32"
    assert encoder.fingerprint == Bundle.open(folder).manifest.fingerprint


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        (ORT, "cuda", "device 'cuda' needs ONNX Runtime's CUDAExecutionProvider"),
        (ORT, "tpu", "the backend 'onnxruntime' has no device 'tpu'"),
        ("openvino", "gpu.9", "finds no device 'gpu.9' here, only cpu"),
        ("tensorrt", "cuda", "no NVIDIA driver"),
    ],
)
def test_a_device_that_is_not_there_is_refused_when_a_bundle_is_opened(
    folder, monkeypatch, backend, device, message
):
    if backend != "tensorrt":
        pytest.importorskip(backend, reason=f"{backend} is not installed: extra 'cpu'")

    def no_library():
        raise OSError("libcuda.so.1 is not there")

    monkeypatch.setattr("upperson_rt.cuda_driver.bound_library", no_library)
    monkeypatch.setattr(f"{ORT}.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=message):
        upperson_rt.open(folder, "fp32", backend, device)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", (), "there is no device 'cuda' here, only no NVIDIA driver"),
        ("cuda:2", ("Orin", "Thor"), "there is no device 'cuda:2' here, only Orin, Thor"),
    ],
)
def test_a_gpu_that_only_the_library_is_made_for_is_refused(
    folder, monkeypatch, device, gpus, message
):
    pytest.importorskip(ORT, reason="onnxruntime is not installed: extra 'cpu'")
    monkeypatch.setattr(f"{ORT}.get_available_providers", lambda: ["CUDAExecutionProvider"])
    driver = CudaDriver("12.8", gpus, None if gpus else "no NVIDIA driver")
    monkeypatch.setattr("upperson_rt.backends.onnxruntime.probe_cuda_driver", lambda: driver)
    with pytest.raises(BackendError, match=message):
        upperson_rt.open(folder, "fp32", ORT, device)
