import csv
import json

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, FINGERPRINT, open_new, save, some_vectors
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Item

ITEMS = [
    Item(
        key='a "quoted", ünï\nkey', source="rtsp://x#1", camera="gate", time=1764000000.25,
        track="t1", box=(1, 2, 3, 4), crop="a.jpg", attributes={"n": 1, "text": 'x,"y"'},
    ),
    Item(key="bare"),
    Item(key="c", camera="hall", time=-1.0),
]  # fmt: skip


@pytest.fixture
def gallery(tmp_path):
    with open_new(tmp_path / "gallery") as store:
        store.add(ITEMS, some_vectors(3))
        yield store


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_rows_of_all_files_belong_together(gallery, out, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    seen = []
    done = export_gallery(gallery, out, progress=seen.append)
    assert (done.items, seen) == (3, [3])
    names = ["gallery.json", "items.csv", "items.parquet", "vectors.npy"]
    assert [path.name for path in done.files] == names
    vectors = np.load(out / "vectors.npy")
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, some_vectors(3).astype(np.float16).astype(np.float32))
    with open(out / "items.csv", encoding="utf-8", newline="") as file:
        first, bare, other = csv.DictReader(file)
    assert first["key"] == ITEMS[0].key
    assert (first["camera"], float(first["time"])) == ("gate", ITEMS[0].time)
    assert [first[name] for name in ("x0", "y0", "x1", "y1", "crop")] == [*"1234", "a.jpg"]
    assert json.loads(first["attributes"]) == ITEMS[0].attributes
    assert (bare["camera"], bare["time"], bare["x0"]) == ("", "", "")
    assert float(other["time"]) == -1
    assert json.loads((out / "gallery.json").read_text("utf-8")) == {
        "gallery": gallery.location, "fingerprint": FINGERPRINT, "embed_dim": DIM, "items": 3,
    }  # fmt: skip
    rows = parquet.read_table(out / "items.parquet").to_pylist()
    assert [row["key"] for row in rows] == [item.key for item in ITEMS]
    assert (rows[0]["time"], rows[0]["x1"], rows[1]["time"]) == (ITEMS[0].time, 3, None)
    monkeypatch.setattr("upperson_maintenance.export.find_spec", lambda name: None)
    done = export_gallery(gallery, out)  # Replaces the earlier one.
    assert [path.name for path in done.files] == ["gallery.json", "items.csv", "vectors.npy"]


def test_filters_and_empty_exports(gallery, out):
    for camera, count in (("hall", 1), ("nowhere", 0)):
        export_gallery(gallery, out, Filter(camera=camera))
        assert np.load(out / "vectors.npy").shape == (count, DIM)
    assert len((out / "items.csv").read_text("utf-8").splitlines()) == 1


def test_what_is_not_an_export_is_not_replaced_and_a_failed_one_leaves_nothing(
    gallery, out, monkeypatch
):
    save(out, "diary.txt")
    with pytest.raises(InputError):
        export_gallery(gallery, out)
    assert [path.name for path in out.iterdir()] == ["diary.txt"]
    (out / "diary.txt").unlink()
    out.rmdir()

    def broken(self, where=None):
        yield [ITEMS[0]], some_vectors(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(gallery), "vectors", broken)
    with pytest.raises(InputError):
        export_gallery(gallery, out)
    assert [path.name for path in out.parent.iterdir()] == ["gallery"]
