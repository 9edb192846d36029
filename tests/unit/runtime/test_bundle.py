import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import upperson_rt
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import EMBED_DIM, make_toy_bundle, replace_in_bundle
from upperson_machine.nvidia import CudaDriver
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError

ORT = "onnxruntime"


def test_default_and_explicit_variant(toy_bundle):
    assert Bundle.open(toy_bundle).variant == "int8"
    encoder = upperson_rt.open(str(toy_bundle), "fp32", "onnxruntime", threads=1)
    assert (encoder.variant, encoder.tokenizer.context_length) == ("fp32", 12)
    with refused("variant_unknown", UsageError, variant="fp23"):
        Bundle.open(toy_bundle, "fp23")


def test_golden_samples_pass_alone_in_an_odd_batch_and_in_one_of_eight(toy_bundle):
    checks = Bundle.open(toy_bundle, backend=ORT, threads=1).check_golden_samples()
    assert [(c.tower, c.batch_size) for c in checks] == [
        (tower, size) for tower in ("image", "text") for size in (1, 3, 8)
    ]
    assert all(check.min_cosine > 0.99999 for check in checks)


def test_bfloat16_may_be_further_from_the_golden_embeddings(toy_bundle):
    entry = Bundle.open(toy_bundle).entry
    for written, float_type, floor in (
        (0.9998, None, 0.9998),
        (0.9998, "f32", 0.9998),
        (0.9998, "bf16", 0.998),
        (0.99, "bf16", 0.99),
    ):
        own = replace(entry, canary_min_cosine=written)
        assert own.min_golden_cosine(SimpleNamespace(float_type=float_type)) == floor


def test_not_a_bundle_and_a_bundle_nearby(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (folder / "more").mkdir()
    monkeypatch.chdir(folder.parent)
    for wrong, near in (
        (tmp_path / "empty", None),
        (tmp_path / "empty" / "nowhere", None),
        (".", folder.name),
        (folder / "more", str(folder)),
        (folder / "x.json", str(folder)),
    ):
        with refused("no_bundle", InputError, near=near):
            Bundle.open(wrong)


@pytest.mark.parametrize(
    ("name", "most"), [("bundle.json", 1), ("tokenizer.json", 8), ("canaries.npz", 32)]
)
def test_files_that_are_read_whole_have_a_largest_size(folder, name, most):
    content = b" " * ((most << 20) + 1)
    if name == "bundle.json":
        (folder / name).write_bytes(content)
    else:
        replace_in_bundle(folder, name, content)
    with refused("file_too_large", IntegrityError, path=str(folder / name)):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "canaries.npz", "text.int8.onnx"])
def test_changed_files_are_noticed(folder, name):
    path = folder / name
    content = path.read_bytes()

    def refuse(code, **fields):
        with refused(code, IntegrityError, path=str(path), **fields):
            Bundle.open(folder).check_files()

    path.write_bytes(content[:-1])
    refuse("size_differs", found=len(content) - 1)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse("checksum_differs")
    path.rename(folder.parent / name)
    refuse("file_missing")
    path.symlink_to(folder.parent / name)
    refuse("link_outside")


def test_a_tower_is_loaded_and_its_hash_checked_when_it_is_needed(folder):
    path = folder / "text.int8.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for name in ("image", "text"):  # Files of other variants are not needed.
        (folder / f"{name}.fp32.onnx").unlink()
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    assert bundle.backend("image") is bundle.backend("image")
    with refused("checksum_differs", IntegrityError, path=str(path)):
        bundle.encoder().encode_texts(["red"])


def test_threads_that_need_a_tower_at_once_load_it_once(toy_bundle, monkeypatch):
    bundle = Bundle.open(toy_bundle, backend=ORT, threads=1)
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


def test_a_tower_that_failed_to_load_is_tried_again(toy_bundle, monkeypatch):
    bundle = Bundle.open(toy_bundle, backend=ORT, threads=1)
    load = bundle._load
    monkeypatch.setattr(bundle, "_load", lambda *_: open_backend(toy_bundle / "gone.onnx"))
    with refused("graph_not_loaded", BackendError):
        bundle.backend("text")
    monkeypatch.setattr(bundle, "_load", load)
    assert bundle.backend("text").device == "cpu"


def test_another_model_behind_right_hashes_is_caught_by_the_golden_samples(folder, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(folder, "text.int8.onnx", (other / "text.int8.onnx").read_bytes())
    bundle = Bundle.open(folder, backend=ORT, threads=1)
    for use in (lambda: bundle.encoder().encode_texts(["red"]), bundle.check_golden_samples):
        with refused("embeds_differ", IntegrityError, tower="text", batch_size=1):
            use()
    bundle.backend("image")  # That one is fine.
    unchecked = Bundle.open(folder, backend=ORT, threads=1, verify=False).encoder()
    assert unchecked.encode_texts(["red"]).shape == (1, EMBED_DIM)


def wrong_third(embeds, third):
    embeds[np.abs(embeds - third).max(axis=1) < 1e-5] *= -1
    return embeds


@pytest.mark.parametrize(
    ("change", "code", "fields"),
    [
        (lambda rows, _: rows * np.nan, "embeds_not_finite", {"batch_size": 1}),
        (lambda rows, _: np.ones_like(rows), "output_constant", {"batch_size": 1}),
        (lambda rows, _: rows[:, :3], "golden_shape_differs", {"batch_size": 1}),
        (lambda rows, _: np.roll(rows, len(rows) == 8, 0), "embeds_differ", {"batch_size": 8}),
        (wrong_third, "embeds_differ", {"batch_size": 1, "row": 2, "count": 1}),
    ],
)
def test_one_wrong_embedding_or_batch_size_is_enough(toy_bundle, monkeypatch, change, code, fields):
    bundle = Bundle.open(toy_bundle, backend=ORT, threads=1)
    right = bundle.backend("image")
    third = right.run({"image": bundle.golden.images})["image_embeds"][2]
    fake = SimpleNamespace(name="fake", version="1", device="cpu", max_batch=None)
    fake.run = lambda inputs: {"image_embeds": change(right.run(inputs)["image_embeds"], third)}
    opened = Bundle.open(toy_bundle, backend=ORT)
    monkeypatch.setattr(opened, "_load", lambda *_: fake)
    with refused(code, IntegrityError, tower="image", **fields):
        opened.backend("image")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": np.zeros((4, 24, 9, 3), np.uint8)}, "golden_samples_unreadable"),
        ({"input_ids": np.zeros((4, 13), np.int32)}, "golden_samples_unfit"),
        ({"image_embeds.int8": np.zeros((3, EMBED_DIM), np.float32)}, "golden_samples_unfit"),
        ({"text_embeds.int8": np.full((4, EMBED_DIM), np.nan, "f")}, "golden_samples_unfit"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "golden_samples_unreadable"),
    ],
)
def test_golden_samples_that_do_not_fit(folder, changes, code):
    file = folder / "canaries.npz"
    with np.load(file) as archive:
        arrays = dict(archive) | changes
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    replace_in_bundle(folder, file.name, packed.getvalue())
    with refused(code, IntegrityError, path=str(file)):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("backend", "device", "providers", "code"),
    [
        (ORT, "cuda", ["CPUExecutionProvider"], "provider_missing"),
        (ORT, "cuda:2", ["CUDAExecutionProvider"], "device_missing"),
        ("openvino", "gpu.9", [], "device_missing"),
        ("tensorrt", "cuda", [], "no_driver"),
    ],
)
def test_a_device_that_is_not_there_is_refused_when_a_bundle_is_opened(
    toy_bundle, monkeypatch, backend, device, providers, code
):
    if backend != "tensorrt":
        pytest.importorskip(backend, reason=f"{backend} is not installed: extra 'cpu'")

    def no_library():
        raise OSError("libcuda.so.1 is not there")

    monkeypatch.setattr("upperson_machine.nvidia.bound_library", no_library)
    monkeypatch.setattr(f"{ORT}.get_available_providers", lambda: providers)
    driver = CudaDriver("12.8", ("Orin", "Thor"), None)
    monkeypatch.setattr("upperson_onnxruntime.backend.probe_cuda_driver", lambda: driver)
    with refused(code, BackendError):
        upperson_rt.open(toy_bundle, "fp32", backend, device)
