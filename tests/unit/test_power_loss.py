"""What is left when the power fails at any moment: the old result or the new one, and whole."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.gallery_places import add_filmed, open_new
from tests.helpers.power_loss import Files, Recording, below, build_disk_calls, record, write_files
from tests.helpers.toy_bundle import make_toy_bundle
from upperson.checkpoint import Checkpointer
from upperson_maintenance.backup import back_up, restore
from upperson_maintenance.export import export_gallery
from upperson_rt.bundle import Bundle
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.sqlite import index
from upperson_rt.gallery.sqlite.index import INDEX_FILE
from upperson_tensorrt.cache import EngineCache

EXPORT = """
import sys
from pathlib import Path
from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from tests.helpers.toy_graphs import export_exchanged, load_toy_graphs
from upperson.data.vocabulary import clip_tokenizer_json
from upperson_calibration.samples import CalibrationSet
from upperson_export import candidates
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle

load_toy_graphs(Path(sys.argv[1]))
candidates.export_onnx = export_exchanged  # A trace takes seconds.
samples = CalibrationSet(toy_pixels(4).numpy(), toy_ids([4, 9, 5, 7]).numpy(), "toys", "toys")
identity = ModelIdentity(
    name="toy", base="toy", base_sha256="0" * 64, adapter_sha256="0" * 64, embed_dim=24
)
export_bundle(
    toy_model(), identity, clip_tokenizer_json(), samples, None, Path("bundle"),
    ExportOptions(variants=(), force=True), lambda work, done, total: None,
)
"""
CHECKPOINTS = """
from pathlib import Path
import torch
from upperson.checkpoint import Checkpointer, RunState

layer = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(layer.parameters())
checkpointer = Checkpointer(Path("run/last"), layer, optimizer, None, {"data": "d", "base": "b"})
for step in range(1, 5):
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpointer.save(RunState(step=step), step)
"""
FOLDERS = """
from pathlib import Path
from upperson_rt import files

FAULT
def written(text):
    with files.new_folder(Path("out"), lambda _: []) as folder:
        (folder / "deep").mkdir()
        for name in ("a", "b", "deep/c"):
            (folder / name).write_text(text)
    files.write_atomically(Path("single"), text)

written("new")
"""
OLD, NEW = (
    {"out/": b"", "out/deep/": b"", "out/a": text, "out/b": text, "out/deep/c": text}
    for text in (b"old", b"new")
)
ENGINES = """
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tests.unit.runtime.test_tensorrt_cache import RECORD
from upperson_tensorrt.cache import EngineCache

for plan in (b"first", b"second"):
    record = replace(RECORD, sha256=sha256(plan).hexdigest(), size_bytes=len(plan))
    EngineCache(Path("cache")).save(record, plan)
"""
GALLERY = """
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from upperson_rt.files import write_all_atomically
from upperson_rt.gallery import Gallery, Item

gallery = Gallery.open(Path("deep/gallery"), "f" * 64, 4, create=True)
items = [Item(key=f"{n}", crop=f"cam/{n}.jpg") for n in range(3)]
crops = {gallery.crops_dir / item.crop: item.crop.encode() for item in items}
with ThreadPoolExecutor(2) as pool:
    write_all_atomically(crops, pool)
gallery.add(items, np.eye(4, dtype=np.float32)[:3])
os._exit(0)
"""

REBUILD = """
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.sqlite import index

index._SEAL_ROWS = 4
with Gallery.open("gallery") as gallery:
    gallery.rebuild()
"""
GALLERY_EXPORT = """
import sys
from pathlib import Path
from upperson_rt.gallery import Gallery
from upperson_maintenance.export import export_gallery

with Gallery.open(sys.argv[1]) as gallery:
    export_gallery(gallery, Path("out"))
"""


DELETION = """
import os, sys
from upperson_rt.gallery import Gallery

gallery = Gallery.open("gallery")
keys, what = ["gate/anna/100", "gate/anna/120"], sys.argv[1]
if what == "add":
    gallery.bin.add(keys, "ada", "why")
elif what == "restore":
    gallery.bin.restore([entry.id for entry in gallery.bin.entries()])
elif what == "empty":
    gallery.bin.delete()
else:
    gallery.delete(keys)
os._exit(0)
"""

BACKUP = """
from pathlib import Path
from upperson_maintenance.backup import back_up

back_up(Path("gallery"), Path("copy"))
"""


def outputs(states: list[Files], name: str) -> set[frozenset[tuple[str, bytes]]]:
    """What a folder holds in some states, each once."""
    return {frozenset(below(state, name).items()) for state in states}


def opened(states: list[Files], name: str, folder: Path) -> Iterator[Path]:
    """Write what has a name in each state into a folder, and yield that."""
    for number, state in enumerate(states):
        folder.mkdir(exist_ok=True)
        yield write_files(below(state, name), folder / str(number))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder that a process writes into."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture(scope="module")
def disk_calls(tmp_path_factory) -> Path:
    return build_disk_calls(tmp_path_factory.mktemp("disk_calls"))


@pytest.fixture(scope="module")
def recording(toy_graphs, shared_folder, disk_calls, tmp_path_factory) -> Recording:
    """An export that replaces an earlier bundle, then four checkpoints of which two are kept."""
    folder = tmp_path_factory.mktemp("work")
    make_toy_bundle(folder / "bundle")
    code = EXPORT + CHECKPOINTS  # Torch alone takes seconds to start.
    return record(code, folder, shared_folder / "toy_graphs", library=disk_calls)


def test_an_export_leaves_the_old_bundle_or_the_new_one(recording, tmp_path):
    bundles = outputs(recording.states, "bundle")
    assert len(recording.states) > 20
    assert len(bundles) == 2
    for number, content in enumerate(bundles):
        bundle = Bundle.open(write_files(dict(content), tmp_path / str(number)), "fp32")
        bundle.check_files()
    (final,) = outputs(recording.final, "bundle")
    assert json.loads(dict(final)["bundle.json"])["model"]["embed_dim"] == 24
    assert final in bundles


def test_whenever_the_power_fails_a_run_goes_on_from_its_newest_checkpoint(recording, tmp_path):
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    found = []
    for last in opened([*recording.states, *recording.final], "run/last", tmp_path):
        there = sorted(int(path.stem[5:]) for path in last.glob("step_*"))
        checkpointer = Checkpointer(last, layer, optimizer, None, {"data": "d", "base": "b"})
        resumed, problems = checkpointer.load()
        assert problems == []
        assert (resumed.step if resumed else None) == (there[-1] if there else None)
        found.append(tuple(there))
    assert set(found) == {
        (), (1,), (1, 2), (1, 2, 3), (2, 3), (1, 2, 3, 4), (2, 3, 4), (3, 4)
    }  # fmt: skip
    assert {tuple(sorted(below(state, "run/last"))) for state in recording.final} >= {
        ("step_00000003.safetensors", "step_00000004.safetensors")
    }
    assert all("run/last/step_00000004.safetensors" in state for state in recording.final)


def outcomes(recording: Recording) -> set[str]:
    """Say what is in ``out`` and in ``single`` in each state."""
    found = set()
    for state in recording.states:
        out = {name: content for name, content in state.items() if name.startswith("out/")}
        found.add("old" if out == OLD else "new" if out == NEW else "damaged")
        found.add("damaged" if state["single"] not in (b"old", b"new") else "new")
    return found


def recorded_folders(folder: Path, library: Path, fault: str) -> Recording:
    write_files(OLD | {"single": b"old"}, folder)
    return record(FOLDERS.replace("FAULT", fault), folder, library=library)


@pytest.mark.parametrize("fault", ["", "files._exchange = lambda *_: False"], ids=["", "renames"])
def test_folders_and_files_are_old_or_new(tmp_path, disk_calls, fault):
    recording = recorded_folders(tmp_path / "work", disk_calls, fault)
    kept = Recording(states=[state for state in recording.states if "out/" in state])
    assert outcomes(kept) == {"old", "new"}
    for state in recording.states:
        if "out/" not in state:  # Without an exchange there is a moment with neither.
            assert fault
            (retired,) = (name for name in state if name.endswith(".old/"))
            assert below(state, retired[:-1]) == below(OLD, "out")
    assert all(state.items() >= (NEW | {"single": b"new"}).items() for state in recording.final)


NO_SYNC = "files.os.fsync = lambda handle: None"
NO_NAME = """real = files.sync_folder
files.sync_folder = lambda folder: folder.resolve() == Path.cwd() or real(folder)"""


@pytest.mark.parametrize("fault", [NO_SYNC, NO_NAME], ids=["all", "the folder with the name"])
def test_a_sync_that_is_left_out_is_found(tmp_path, disk_calls, fault):
    assert "damaged" in outcomes(recorded_folders(tmp_path / "work", disk_calls, fault))


def test_an_engine_built_again_takes_the_place_of_a_whole_one(work, tmp_path, disk_calls):
    recording = record(ENGINES, work, library=disk_calls)
    sizes = []
    for folder in opened([*recording.states, *recording.final], "cache", tmp_path):
        cache = EngineCache(folder)
        records, problems = cache.records()
        assert problems == []
        sizes.append([len(cache.load(one)) for one in records])
        assert sizes[-1] == [one.size_bytes for one in records]
    assert [size for n, size in enumerate(sizes) if size not in sizes[:n]] == [[], [5], [6]]
    assert sizes[-1] == [6]


def test_what_a_gallery_acknowledged_is_there(work, tmp_path, disk_calls):
    recording = record(GALLERY, work, library=disk_calls)
    for place in opened(recording.final, "deep/gallery", tmp_path):
        with Gallery.open(place) as gallery:
            crops = [item.crop for item in gallery.items()]
            assert crops == ["cam/0.jpg", "cam/1.jpg", "cam/2.jpg"]
            assert [(gallery.crops_dir / crop).read_text() for crop in crops] == crops


def filled(folder: Path, rows: int, start: int = 0) -> Gallery:
    """Open a gallery with so many rows more, for the caller to close."""
    gallery = Gallery.open(folder, "f" * 64, 12, create=True)
    items = [Item(key=f"{n}", camera="gate") for n in range(start, start + rows)]
    gallery.add(items, np.eye(12, dtype=np.float32)[start : start + rows])
    return gallery


def test_a_rebuilt_index_is_the_old_one_or_the_new_one(work, tmp_path, disk_calls, monkeypatch):
    monkeypatch.setattr(index, "_SEAL_ROWS", 4)
    folder = work / "gallery"
    with filled(folder, 8) as gallery:
        gallery.rebuild()
    filled(folder, 3, start=8).close()
    old = (folder / INDEX_FILE).read_bytes()
    recording = record(REBUILD, work, library=disk_calls)
    name = f"gallery/{INDEX_FILE}"
    (new,) = {state[name] for state in recording.final}
    assert new != old
    assert {state[name] for state in recording.states} == {old, new}
    for place in opened([*recording.states, *recording.final], "gallery", tmp_path):
        with Gallery.open(place) as gallery:
            (hits,) = gallery.search(np.eye(12, dtype=np.float32)[9:10], 20)
            assert len(hits) == 11
            assert (hits[0].item.key, round(hits[0].score, 3)) == ("9", 1.0)
            assert gallery.verify() == []


def test_an_exported_gallery_is_the_old_one_or_the_new_one(work, tmp_path, disk_calls):
    with filled(tmp_path / "gallery", 3) as gallery:
        export_gallery(gallery, work / "out")
    old = {path.name: path.read_bytes() for path in (work / "out").iterdir()}
    filled(tmp_path / "gallery", 5, start=3).close()
    recording = record(GALLERY_EXPORT, work, tmp_path / "gallery", library=disk_calls)
    (new,) = outputs(recording.final, "out")
    assert outputs(recording.states, "out") == {frozenset(old.items()), new}
    out = write_files(dict(new), tmp_path / "new")
    assert json.loads((out / "gallery.json").read_text())["items"] == 8
    assert np.array_equal(np.load(out / "vectors.npy"), np.eye(12, dtype=np.float32)[:8])
    assert len((out / "items.csv").read_text().splitlines()) == 9


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["add", "restore", "empty", "delete"])
def test_no_crop_is_lost_and_what_was_deleted_is_gone(in_memory, disk_calls, what):
    work = in_memory / "work"
    work.mkdir()
    keys = ["gate/anna/100", "gate/anna/120"]
    with open_new(work / "gallery") as gallery:
        add_filmed(gallery, *keys, "hall/eve/100")
        contents = {
            item.crop: (gallery.crops_dir / item.crop).read_bytes() for item in gallery.items()
        }
        if what in ("restore", "empty"):
            gallery.bin.add(keys, "ada", "why")
    recording = record(DELETION, work, what, library=disk_calls)
    found = set()
    for place in opened([*recording.states, *recording.final], "gallery", in_memory):
        with Gallery.open(place) as gallery:
            gallery.finish_erasures()
            assert gallery.verify() == []
            items = {item.crop for item in gallery.items()}
            binned = {entry.item.crop for entry in gallery.bin.entries()}
            for folder, crops in ((gallery.crops_dir, items), (gallery.bin.crops_dir, binned)):
                assert {crop: (folder / crop).read_bytes() for crop in crops} == {
                    crop: contents[crop] for crop in crops
                }
        # Frames and clips go before the rows: a deletion can be repeated.
        folders = {path.relative_to(place).parts[0] for path in place.rglob("*anna*")} - {"clips"}
        assert folders == ({"bin"} if binned else {"crops"} if len(items) == 3 else set())
        found.add((len(items), len(binned)))
    begin, end = {
        "add": ((3, 0), (1, 2)),
        "restore": ((1, 2), (3, 0)),
        "empty": ((1, 2), (1, 0)),
        "delete": ((3, 0), (1, 0)),
    }[what]
    assert found == {begin, end}
    if what in ("empty", "delete"):  # Before any program opens it.
        assert not [name for state in recording.final for name in state if "anna" in name]


@pytest.mark.timeout(180)
def test_a_backup_is_the_earlier_one_or_the_new_one_and_can_be_repeated(in_memory, disk_calls):
    work = in_memory / "work"
    work.mkdir()

    def rows(place: Path, backup: Path) -> set[str]:
        restore(backup, place)
        with Gallery.open(place) as gallery:
            return {item.key for item in gallery.items()}

    with open_new(work / "gallery") as gallery:
        add_filmed(gallery, "gate/anna/100")
    states = record(BACKUP, work, library=disk_calls).states
    begun = [state for state in states if "copy/" in state and "copy/backup.lock" not in state]
    assert begun
    for place in opened(begun, "copy", in_memory / "begun"):
        back_up(work / "gallery", place)
    with Gallery.open(work / "gallery") as gallery:
        gallery.delete(["gate/anna/100"])
        add_filmed(gallery, "hall/eve/100")
    recording = record(BACKUP, work, library=disk_calls)
    found = [
        rows(in_memory / f"restored-{number}", place)
        for number, place in enumerate(opened(recording.states, "copy", in_memory / "later"))
    ]
    assert {*map(frozenset, found)} == {frozenset({"gate/anna/100"}), frozenset({"hall/eve/100"})}
    for state in recording.final:
        assert not [name for name in below(state, "copy") if "anna" in name]
