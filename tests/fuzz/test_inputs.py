"""Pictures, sentences, embeddings and what is made of them: odd values are refused in one line."""

import io
from functools import partial

import numpy as np
import pytest
from hypothesis import example
from hypothesis import strategies as st
from PIL import Image

import upperson_rt
from tests.helpers.fuzzing import (
    damaged_bytes,
    examples,
    fuzz,
    mostly,
    nested,
    refused_well,
    texts,
    values,
)
from tests.helpers.toy_bundle import draw_person
from upperson_rt import Bundle, Filter, Hit, Item, Pipeline, Retriever, Tokenizer
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.files import IndexReport, index_images
from upperson_rt.preprocess import capture_time, iter_image_files, load_image, resize_image
from upperson_scores.metrics import RetrievalMetrics, retrieval_metrics
from upperson_sheet.sheet import save_sheet

PIXELS = np.zeros((20, 10, 3), np.uint8)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("fuzz")
    place = folder / "gallery"
    with Gallery.open(place, encoder.fingerprint, encoder.embed_dim, create=True) as opened:
        index_images(encoder, opened, [draw_person(folder / "red.png", "red")])
        yield opened


def is_unit(embeds):
    return np.allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-3)


@fuzz(
    sentences=mostly(["red"], ["red", "blue"], []), images=mostly([PIXELS], PIXELS[None], []),
    batch_size=mostly(2), channels=mostly("rgb", "bgr"),
)  # fmt: skip
@examples(
    {"sentences": ["red"], "images": [PIXELS], "batch_size": 2, "channels": "rgb"},
    {"sentences": ["\udcff"], "images": ["\0"], "batch_size": 2.5, "channels": ["rgb"]},
    {"sentences": 5, "images": 5, "batch_size": "x"}, {"channels": nested(100_000)},
    {"sentences": ["red" * 100_000], "images": ["x" * 5000], "batch_size": 10**30},
)  # fmt: skip
def test_encoding(encoder, sentences, images, batch_size, channels):
    for found in (
        refused_well(encoder.encode_texts, sentences, batch_size),
        refused_well(encoder.encode_images, images, batch_size, channels=channels),
        refused_well(encoder.encode_pixels, images, batch_size),
    ):
        assert isinstance(found, UppersonError) or is_unit(found)
    refused_well(encoder.tokenizer.encode, sentences)


@fuzz(
    query=mostly("red", PIXELS, ["red", PIXELS]), k=mostly(3), min_score=mostly(0.99),
    where=mostly(None, Filter()),
)  # fmt: skip
@examples(
    {"query": "", "k": 3, "min_score": float("nan"), "where": None},
    {"query": 5, "k": None, "min_score": "x"}, {"query": "red", "where": "gate"},
    {"query": ["\udcff"], "k": 10**400, "min_score": 10**400},
)  # fmt: skip
def test_asking(encoder, gallery, query, k, min_score, where):
    retriever = Retriever(encoder, gallery)
    refused_well(retriever.query, query, k, where)
    refused_well(retriever.delete_like, query, min_score, where, dry_run=True)


@fuzz(encoder=mostly(None, 5), other=mostly(None, 5))
@example(encoder=None, other=None)
@example(encoder=Gallery, other=Gallery)
def test_objects_of_another_kind(bundle, gallery, encoder, other):
    opened = upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)
    for make in (Retriever, Pipeline, partial(index_images, files=[])):
        assert isinstance(refused_well(make, encoder, gallery), UppersonError)
        assert isinstance(refused_well(make, opened, other), UppersonError)
    for make in (
        lambda: Retriever(opened, gallery, other),
        lambda: Pipeline(opened, gallery, other),
        lambda: Pipeline(opened, gallery, on_commit=other),
        lambda: index_images(opened, gallery, [], progress=other),
        lambda: index_images(opened, gallery, [], detector=other),
        lambda: opened.encode_images([], progress=other),
    ):
        allowed = other is None or callable(other)
        assert isinstance(refused_well(make), UppersonError) or allowed


@fuzz(
    files=mostly(["a.png"], []), camera=mostly("gate", None), attributes=mostly(None, {"a": 1}),
    batch_size=mostly(2), workers=mostly(1, None), time_from=mostly("exif", "name"),
    track_from=mostly("none", "folder"),
)  # fmt: skip
@example(["x\0y"], "\udcff", {"a": 10**5000}, 2, 1, "exif", "none")
@example("a.png", None, 5, 2.5, 10**9, "sundial", ["folder"])
def test_indexing(
    encoder, gallery, files, camera, attributes, batch_size, workers, time_from, track_from
):
    if isinstance(workers, int) and workers > 4:
        workers = 10**9
    sources = {"time_from": time_from, "track_from": track_from}
    report = refused_well(
        index_images, encoder, gallery, files, camera, batch_size,
        attributes=attributes, workers=workers, **sources,
    )  # fmt: skip
    assert isinstance(report, IndexReport | UppersonError)
    assert gallery.verify() == []


@fuzz(
    image=mostly(PIXELS, PIXELS[:, :, 0], Image.new("F", (4, 4))), height=mostly(8),
    width=mostly(4), paths=mostly(["nowhere"], ["."], []),
)  # fmt: skip
@example(image=np.zeros((0, 4, 3), np.uint8), height=8, width=4, paths=5)
@example(image=PIXELS, height=10**9, width=10**9, paths=["\0", "x" * 5000])
def test_pictures(tmp_path_factory, monkeypatch, image, height, width, paths):
    monkeypatch.chdir(tmp_path_factory.mktemp("pictures"))
    found = refused_well(load_image, image)
    if isinstance(found, np.ndarray):
        assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)
    resized = refused_well(resize_image, image, height, width)
    if isinstance(resized, np.ndarray):
        assert resized.shape == (height, width, 3)
    refused_well(lambda: list(iter_image_files(paths)))


def _files_of_every_format():
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    contents = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x8769] = {0x9003: "2026:11:24 14:00:00", 0x9011: "+01:00"}
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
        Image.fromarray(noise).save(file, kind, **options)
        contents.append(file.getvalue())
    return contents


@fuzz(content=damaged_bytes(_files_of_every_format()))
def test_files_of_pictures(written, content):
    path = written("a.jpg", content)
    found = refused_well(load_image, path)
    if isinstance(found, np.ndarray):
        assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)
    time = capture_time(path)
    assert time is None or np.isfinite(time)


@fuzz(
    queries=mostly(np.eye(3), [[1.0, 0.0]]), gallery=mostly(np.eye(3), [[1.0, 0.0]]),
    pids=mostly([1, 2, 3], ["a", "b", "c"]), chunk_size=mostly(2),
)  # fmt: skip
@example(queries=[["a"]], gallery=[[1, [2]]], pids=[1], chunk_size=2)
@example(queries=[[10**400]], gallery=np.eye(1) * 1e300, pids=[10**400], chunk_size=2)
@example(queries=np.eye(3), gallery=np.eye(3), pids=[None, [1], "a"], chunk_size="x")
def test_metrics(queries, gallery, pids, chunk_size):
    found = refused_well(retrieval_metrics, queries, gallery, pids, pids, chunk_size)
    if isinstance(found, RetrievalMetrics):
        assert all(0 <= value <= 100 for value in found.as_dict().values())


@fuzz(
    title=mostly("red"), name=texts,
    time=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    box=mostly(None, (0, 0, 5, 5)), columns=mostly(5), path=mostly("sheet.png"), hits=values,
)  # fmt: skip
@example("red", "a", 1e300, (0, 0, 10**400, 1), 0, "a\0b", [5])
@example("\udcff\n\x1b", "\n\x1b[2J", -1e300, None, "x", 5, None)
@example("a", "a" * 10**6, float("nan"), None, 5, "x" * 10**6, (hit for hit in ()))
def test_sheets(tmp_path_factory, monkeypatch, title, name, time, box, columns, path, hits):
    monkeypatch.chdir(tmp_path_factory.mktemp("sheets"))
    if isinstance(path, str) and path.startswith(("/", "..", ".")):
        path = "sheet.png"
    item = refused_well(Item, key=name, camera=name, time=time, box=box)
    if isinstance(item, Item):
        refused_well(save_sheet, path, title, [Hit(id=1, score=0.5, item=item)], columns)
    refused_well(save_sheet, "sheet.png", "red", hits, 5, box)


@fuzz(
    path=mostly("bundle", "."), variant=mostly(None, "fp32"), backend=mostly("onnxruntime", "auto"),
    device=mostly("cpu"), threads=mostly(1, None),
)  # fmt: skip
@examples(
    {"path": "bundle", "variant": None, "backend": "onnxruntime", "device": "cpu", "threads": 1},
    {"path": "\0"}, {"path": 5}, {"path": "x" * 10**6}, {"variant": 5, "backend": 5, "device": 5},
    {"backend": "x" * 10**6}, {"backend": "openvino", "device": "x" * 10**6},
    {"threads": 10**12}, {"device": "cuda:99999"},
)  # fmt: skip
def test_opening(bundle, monkeypatch, path, variant, backend, device, threads):
    monkeypatch.chdir(bundle.parent)
    if isinstance(backend, str) and backend == "auto":
        backend = "openvino"  # Backends are not measured in every example.
    opened = refused_well(Bundle.open, path, variant, backend, device, threads=threads)
    if isinstance(opened, Bundle):
        refused_well(opened.backend, "text")
    refused_well(Tokenizer.from_file, path)
