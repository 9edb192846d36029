"""Indexing on a local cluster of Ray: two workers, of which one is killed.

Ray is in no extra of the tests: its cluster takes half a minute of processor time to start. With
``pip install 'ray[data]'`` this runs.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import pytest

from tests.helpers.command_line import environment
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle
from upperson_ray import index as ray_index
from upperson_ray.index import index_on_ray
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.gallery import Gallery
from upperson_shards.merge import merge_shards

SHARDS = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with ./bundle and ./pictures, of which one is none."""
    folder = tmp_path_factory.mktemp("ray")
    make_toy_bundle(folder / "bundle")
    for number in range(4):
        camera = folder / "pictures" / f"camera {number}"
        camera.mkdir(parents=True)
        for colour in COLOURS:
            draw_person(camera / f"{colour}.png", colour, seed=number)
    (folder / "pictures" / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def without_ray(monkeypatch):
    """Ray's place is taken by one worker after the other in this process."""

    def run(numbers, worker, workers, cpus, gpus):
        made = ray_index._Worker(**worker)
        for number in numbers:
            done = made({"shard": [number]})
            yield done["shard"][0], done["problem"][0]

    monkeypatch.setattr(ray_index, "_run", run)
    monkeypatch.setattr(ray_index, "import_module", lambda _: None)


def index(original, output, shards=SHARDS, bundle=None, pictures=None, **options):
    options = {"encoder": {"threads": 1}, **options}
    paths = [pictures or original / "pictures"]
    return index_on_ray(bundle or original / "bundle", paths, output, shards=shards, **options)


def check_merged(original, folders, gallery):
    """Merge shards into a gallery, which gets all pictures but the bad one; return what merged."""
    merged = merge_shards(folders, gallery)
    with Gallery.open(gallery) as opened:
        keys = sorted(item.key.removesuffix("#person=1") for item in opened.items())
    assert keys == sorted(map(str, (original / "pictures").glob("*/*.png")))
    return merged


def test_what_is_finished_is_left_alone(without_ray, original, tmp_path, monkeypatch):
    """A shard that fails stops no other, an interruption does."""
    seen, faults = [], {2: BackendError("the device is away"), 4: KeyboardInterrupt()}
    index_shard = ray_index.index_shard

    def interrupted(encoder, gallery, chosen, *rest, **options):
        seen.append(chosen.shard.number)
        if fault := faults.pop(chosen.shard.number, None):
            raise fault
        return index_shard(encoder, gallery, chosen, *rest, **options)

    monkeypatch.setattr(ray_index, "index_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index(original, tmp_path / "output")
    faults[5] = BackendError("the device is away")
    with refused("shards_failed", BackendError, failed=1, shards=SHARDS) as found:
        index(original, tmp_path / "output")
    assert "5/8: the device is away" in str(found.value)
    assert seen == [1, 2, 3, 4, 2, 4, 5, 6, 7, 8]
    shutil.rmtree(tmp_path / "output" / "shard-3-of-8")
    steps = []
    done = index(original, tmp_path / "output", progress=lambda *step: steps.append(step))
    assert seen[10:] == [3, 5]
    assert done.earlier == 6
    assert steps == [(7, SHARDS), (SHARDS, SHARDS)]
    assert (done.pictures, done.with_items, done.empty, done.skipped) == (25, 24, 0, 1)
    assert check_merged(original, done.folders, tmp_path / "gallery").items == done.items
    assert index(original, tmp_path / "output").earlier == SHARDS


def test_shards_of_other_pictures_or_options_are_refused(without_ray, original, tmp_path):
    options = {"shards": 2, "camera": "gate"}
    index(original, tmp_path / "output", **options)
    make_toy_bundle(tmp_path / "other", seed=1)
    shutil.copytree(original / "pictures", tmp_path / "elsewhere")
    for changes, code in (
        ({"pictures": original / "pictures/camera 1"}, "shard_of_other_pictures"),
        ({"bundle": tmp_path / "other"}, "shard_of_other_pictures"),
        ({"pictures": tmp_path / "elsewhere"}, None),
        ({"camera": "hall"}, None),
    ):
        with pytest.raises(InputError) as found:
            index(original, tmp_path / "output", **options | changes)
        assert code in (None, found.value.code)
    assert index(original, tmp_path / "output", **options).earlier == 2


def test_bad_arguments(original, tmp_path, monkeypatch):
    for what in ("shards", "workers"):
        with refused("out_of_range", UsageError):
            index(original, tmp_path / "output", **{what: 0})
    with refused("gallery_not_shared", InputError, gallery="gallery"):
        index(original, tmp_path / "output", gallery="gallery")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with refused("extra_missing", BackendError, package="ray", extra="ray"):
        index(original, tmp_path / "output")


# A real cluster

CLUSTER = """
import os, sys, time
from pathlib import Path

import ray

from upperson_ray.index import index_on_ray

class Holding:
    # A person is all of a picture; at the second one a worker stands still while there is a file.
    def __init__(self, folder):
        self.folder, self.seen = folder, 0

    def __call__(self, frame):
        self.seen += 1
        while self.seen == 2 and (self.folder / "hold").exists():
            (self.folder / f"held-{os.getpid()}").touch()
            time.sleep(0.05)
        return [[0, 0, frame.shape[1], frame.shape[0]]]

def main(original, output, shards):
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1",
        object_store_memory=80_000_000, configure_logging=False, log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    for _ in range(2):
        done = index_on_ray(
            original / "bundle", [original / "pictures"], output, shards=shards, workers=2,
            encoder={"threads": 1, "backend": "onnxruntime"}, batch_size=1,
            detector=Holding(output.parent),
        )
        print("done", done.earlier, done.pictures, done.with_items, done.skipped, done.items.count)

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("ray") is None, reason="needs  pip install 'ray[data]'")
def test_a_worker_of_a_cluster_is_killed(original, tmp_path):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    (tmp_path / "hold").touch()
    # Paths of sockets may have some hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short_folder:
        run = subprocess.Popen(
            [sys.executable, tmp_path / "cluster.py", original, tmp_path / "output", str(SHARDS)],
            env=environment() | {"RAY_TMPDIR": short_folder, "HOME": short_folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while len(held := list(tmp_path.glob("held-*"))) < 2:
                assert run.poll() is None, run.communicate()
                time.sleep(0.05)
            os.kill(int(held[0].name.partition("-")[2]), signal.SIGKILL)
            (tmp_path / "hold").unlink()
            output, errors = run.communicate()
        finally:
            run.kill()
    assert run.returncode == 0, errors
    counts = [line for line in output.splitlines() if line.startswith("done")]  # Ray prints, too.
    assert counts == ["done 0 25 24 1 24", f"done {SHARDS} 25 24 1 24"]
    folders = sorted((tmp_path / "output").glob("shard-*"))
    merged = check_merged(original, folders, tmp_path / "gallery")
    assert (merged.shards, merged.pictures, merged.items.count) == (SHARDS, 25, 24)
