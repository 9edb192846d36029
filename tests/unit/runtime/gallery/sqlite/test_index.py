"""The search index beside the database: exact, kept up, replaceable."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, items_of, open_new, some_vectors, sql
from tests.helpers.gallery_places import put as add
from tests.helpers.refused import refused
from upperson_maintenance.erase_proof import Selection, prove_erasure
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.sqlite import index, index_file, list_files, lists, search, segments
from upperson_rt.gallery.sqlite import rows as stored

QUERIES = some_vectors(4, 5)
WHERE = [None, Filter(camera="c3"), Filter(since=100, until=1900)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "gallery"


@pytest.fixture
def small(monkeypatch):
    """Sizes at which an index file, sealed segments and merging come into play."""
    monkeypatch.setattr(index, "_SEAL_ROWS", 64)
    monkeypatch.setattr(index, "_MOST_SEGMENTS", 3)
    monkeypatch.setattr(stored, "_BLOCK_ROWS", 50)


@pytest.fixture
def approximate(small, monkeypatch):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 500)
    monkeypatch.setattr(list_files, "SEAL_ROWS", 64)
    monkeypatch.setattr(list_files, "PART_ROWS", 256)


@pytest.fixture
def busy(approximate, monkeypatch):
    """Looks at each search whether there is work."""
    monkeypatch.setattr(index, "_EVERY_S", 0)


@pytest.fixture
def no_build(monkeypatch):
    """Forbids to make an index from the whole database, from when it is called."""
    return lambda: monkeypatch.setattr(
        index.SearchIndex, "build", lambda *_: pytest.fail("read it all")
    )


def delete_beside_index(gallery, keys):
    """Delete rows, and put the file of the index back, as a process that made it meanwhile does."""
    content = gallery._index.path.read_bytes()
    gallery.delete(keys)
    gallery._index.path.write_bytes(content)


def keys(numbers):
    return [f"k{n}" for n in numbers]


def put(gallery, start, stop, seed=None):
    """Add rows, and search so that the index has them."""
    columns = {"camera": lambda n: f"c{n % 10}", "time": float, "track": lambda n: f"t{n // 7}"}
    add(gallery, range(start, stop), start if seed is None else seed, **columns)
    gallery.search(QUERIES, 1)


def truth(gallery, queries, k, where=None):
    """Ids and scores by sorting everything that the database holds."""
    parts = list(gallery.vectors(where))
    rows = np.concatenate([np.empty((0, queries.shape[1])), *(rows for _, rows in parts)])
    ids = dict(sql(gallery.path, "SELECT key, id FROM items"))
    ids = [ids[item.key] for found, _ in parts for item in found]
    scores = (rows @ queries.astype(np.float64).T).astype(np.float32).T
    ranked = (sorted(zip(-line, ids, strict=True))[:k] for line in scores)
    return [[(id_, -score) for score, id_ in best] for best in ranked]


def answer(gallery, queries, k, where=None):
    return [[(hit.id, hit.score) for hit in hits] for hits in gallery.search(queries, k, where)]


def assert_right(gallery, k=20, where=None, queries=QUERIES):
    assert answer(gallery, queries, k, where) == truth(gallery, queries, k, where)


def share_found(gallery, queries, k=10, where=None):
    pairs = zip(answer(gallery, queries, k, where), truth(gallery, queries, k, where), strict=True)
    return np.mean([len(set(found) & set(right)) / k for found, right in pairs])


def parts(gallery):
    snapshot = gallery._index.snapshot
    return snapshot.segments if snapshot.lists is None else [*snapshot.lists.parts.values()]


def kinds(gallery):
    return ["lists" if isinstance(part, lists.ListPart) else "exact" for part in parts(gallery)]


def dead(gallery):
    return sum(part.dead_count for part in parts(gallery))


def test_the_index_equals_sorting_everything(folder, small, monkeypatch):
    with open_new(folder) as gallery:
        put(gallery, 0, 2000)
    for where in WHERE:
        with open_new(folder) as gallery:
            for count, k in ((1, 1), (3, 300), (40, 10)):
                queries = some_vectors(count, 5)
                assert_right(gallery, k, where, queries)  # With a filter perhaps from SQL alone.
                gallery.search(QUERIES, 1)  # Now the index is in memory.
                assert_right(gallery, k, where, queries)
            assert kinds(gallery) == ["exact"]
    monkeypatch.setattr(segments, "_GEMM_ROWS", 33)
    with open_new(folder) as gallery:
        gallery.delete(keys(range(0, 400, 3)))
        queries = some_vectors(100, 5)
        one_by_one = [answer(gallery, queries[i : i + 1], 7)[0] for i in range(100)]
        assert answer(gallery, queries, 7) == one_by_one


def test_a_small_gallery_has_no_index_but_its_rows(gallery, no_build):
    put(gallery, 0, 200)
    no_build()
    for number in (3, 5, 150):
        for where in WHERE:
            for k in (1, 10, 200, 500):
                assert_right(gallery, k, where, some_vectors(7, 5))
        gallery.delete([f"k{number}"])
    assert kinds(gallery) == []


@pytest.mark.parametrize("sizes", ["small", "approximate"])
def test_changes_are_followed_row_by_row(folder, sizes, request, no_build):
    request.getfixturevalue(sizes)
    rng = np.random.default_rng(1)
    with open_new(folder) as gallery, open_new(folder) as other:
        put(gallery, 0, 600)
        no_build()
        for step in range(12):
            writer, start = (gallery, other)[step % 2], 600 + 40 * step
            put(writer, start, start + 40)
            add(writer, rng.choice(start, 9, replace=False), 200 + step)
            delete = delete_beside_index if sizes == "small" else Gallery.delete
            delete(writer, keys(rng.choice(start, 9, replace=False)))
            for k in (1, 10, 2000):  # 2000 are all of the items.
                if sizes == "small" or k == 2000:
                    assert_right(gallery, k)
        assert len(kinds(gallery)) <= 5


def test_an_index_file_is_used_followed_and_read_once(folder, small, no_build, monkeypatch):
    with open_new(folder) as gallery:
        put(gallery, 0, 500)
        add(gallery, [3, *range(500, 520)], 8)
        delete_beside_index(gallery, ["k4", "k5"])
    no_build()
    with open_new(folder) as gallery:
        assert_right(gallery)
        assert dead(gallery) == 3
        for name in ("read_stamp", "read_file"):
            monkeypatch.setattr(index, name, lambda *_: pytest.fail("read again"))
        add(gallery, ["more"], 9)
        assert_right(gallery)


DAMAGES = {
    "cut off, or no index of this version": lambda content: content[:-100],
    "checksum does not match": lambda content: (
        content[: len(content) // 2] + b"~~" + content[len(content) // 2 + 2 :]
    ),
    "its stamp is damaged": lambda content: content.replace(b'"last_id": 500', b'"last_id": 700'),
    "too short": lambda content: b"",
}


@pytest.mark.parametrize("sizes", ["small", "approximate"])
def test_a_damaged_index_file_is_made_again(folder, sizes, request, caplog):
    request.getfixturevalue(sizes)
    with open_new(folder) as gallery:
        put(gallery, 0, 500)
        path = gallery._index.path
    for reason, damage in DAMAGES.items():
        if sizes == "approximate" and "checksum" in reason:
            continue  # It consists of its stamp.
        path.write_bytes(damage(path.read_bytes()))
        with open_new(folder) as gallery:
            (problem,) = gallery.verify()
            assert reason in problem
            assert_right(gallery, 500)
            assert any(reason in line and "making it again" in line for line in caplog.messages)
            assert gallery.verify() == []


def worked(gallery):
    """Search until the work beside searches has come to its end, and its files are used."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        gallery.search(QUERIES[:1], 1)
        worker = gallery._index._worker
        if worker is None or not worker.is_alive():
            gallery.search(QUERIES[:1], 1)
            return kinds(gallery)
        worker.join(1)
    raise AssertionError("the index is still being worked on")


def test_new_rows_become_parts_beside_searches_and_small_parts_are_merged(
    folder, busy, monkeypatch
):
    with open_new(folder) as gallery, open_new(folder) as other:
        put(gallery, 0, 400)
        assert kinds(gallery) == ["exact"]
        put(gallery, 400, 800)
        assert set(worked(gallery)) == {"lists"}
        assert_right(gallery, 1000)
        other.search(QUERIES, 1)
        for start in range(800, 1600, 100):
            put(gallery, start, start + 100)
            assert worked(gallery)[0] == "lists"
        add(gallery, range(0, 1600, 16), 9, camera="c3")
        gallery.delete(keys(range(1, 300)))
        gallery.search(QUERIES, 1)
        worked(gallery)
        assert len(parts(gallery)) < 12
        assert gallery._index.snapshot.tail.length < 64
        for where in WHERE:
            assert_right(gallery, 2000, where)
        # Another process follows, and uses the same files.
        assert_right(other, 2000)
        named = {*gallery._index.snapshot.lists.parts}
        assert {*other._index.snapshot.lists.parts} == named
        files = {path.name for path in folder.glob("gallery.index*")} - {"gallery.index-lock"}
        assert files == {"gallery.index", *named}
    # Who may not write uses the parts, too.
    monkeypatch.setattr("upperson_rt.gallery.sqlite.database._is_writable", lambda _: False)
    with open_new(folder) as gallery:
        assert_right(gallery, 2000)
        assert set(kinds(gallery)) == {"lists"}


def test_a_deletion_takes_items_out_of_the_files(folder, approximate, monkeypatch):
    """Without training lists again; retention leaves it to the work beside searches."""
    with open_new(folder) as gallery:
        put(gallery, 0, 1000)
        monkeypatch.setattr(list_files, "make_part", lambda *_: pytest.fail("encoded"))
        gallery.prune(older_than=20.0)
        assert dead(gallery) == 0
        gallery.search(QUERIES, 1)
        assert dead(gallery) == 20
        gallery.delete(keys(range(0, 1000, 3)))
        for where in WHERE:
            assert_right(gallery, 2000, where)
        assert dead(gallery) == 0
        assert sum(part.index.ntotal for part in parts(gallery)) == gallery.count()
        (hits,) = gallery.search(QUERIES[:1], 3, Filter(camera="c3"))
        assert {hit.item.camera for hit in hits} == {"c3"}
    with open_new(folder) as gallery:
        assert_right(gallery, 2000)
        assert gallery.verify() == []


def centroids(folder):
    """Centroids in the files of parts."""
    found = []
    for file in folder.glob("gallery.index-*"):
        if not file.name.endswith("lock"):
            read = segments.load_faiss().read_index(str(file))
            found.append(read.quantizer.reconstruct_n(0, read.nlist))
    return np.concatenate(found)


@pytest.mark.parametrize("pictures", [20, 150, 500])
def test_no_centroid_resembles_a_deleted_person(folder, one_part, pictures):
    """More than it resembles people who were never there."""
    people, dim = some_vectors(5, 8, 256), 256
    rows = np.concatenate([people[:1].repeat(pictures, 0), clustered(200, 3000, dim)])
    rows[:pictures] += 0.05 * some_vectors(pictures, 9, dim)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with open_new(folder, dim) as gallery:
        gallery.add(items_of(range(len(rows))), rows)
        gallery.rebuild()
        assert (centroids(folder) @ people[0]).max() > 0.85
        gallery.delete(keys(range(pictures)))
        left = centroids(folder) @ people.T
        assert left[:, 0].max() < left[:, 1:].max() + 0.1
        found = share_found(gallery, rows[pictures::60] + 0.0)
        assert found >= 0.99


def test_a_deletion_during_a_build_leaves_the_files_after_it(folder, approximate, monkeypatch):
    """What is built sees the rows, and another process has the lock."""
    make, deleted = list_files.make_part, []
    with open_new(folder) as gallery, open_new(folder) as other:
        put(gallery, 0, 600)

        def beside(block, check):
            if not deleted:
                deleted.append(other.delete(["k0", "k1"]))
            return make(block, check)

        monkeypatch.setattr(list_files, "make_part", beside)
        gallery.rebuild()
        assert deleted == [2]
        files = gallery._index._files.read()
        assert min(part.ids.min() for part in files.parts.values()) > 2
        assert dead(gallery) == 0
        assert_right(gallery, 1000)


def test_one_row_alone_is_a_part(gallery, approximate):
    """And two: fewer rows than lists would be trained."""
    put(gallery, 0, 1500)
    gallery.delete(keys([*range(256, 511), *range(512, 766)]))
    gallery.rebuild()
    assert_right(gallery, 2000)
    assert {1, 2} <= {len(part.ids) for part in parts(gallery)}


def test_parts_of_others_and_altered_ones_are_told_and_not_used(folder, approximate):
    """Their checksums are right: they were written so."""
    with open_new(folder / "other") as other:
        put(other, 0, 600, 4)
        (of_other, *_) = other._index._files.read().parts
    with open_new(folder) as gallery:
        put(gallery, 0, 600, 3)
        own, identity = gallery._index._files, gallery._database.meta.identity
        (name, *_) = own.read().parts
        part = own.read_part(name)
    path = folder / name
    saved = path.read_bytes()
    for alter in (
        lambda: shutil.copy(folder / "other" / of_other, path),
        *(
            lambda fields=fields: lists.write_part(path, replace(part, **fields), identity)
            for fields in (
                {"places": np.zeros_like(part.places)},
                {"cameras": part.cameras[1:]},
                {"ids": part.ids[::-1]},
            )
        ),
    ):
        alter()
        with open_new(folder) as gallery:
            assert len(gallery.verify()) == 1
        path.write_bytes(saved)
    with open_new(folder) as gallery:
        assert gallery.verify() == []
        assert_right(gallery, 2000)


def forge(path, arrays=None, stamp=None, rows=None):
    """Alter a file of the index, with right checksums."""
    index = segments.load_faiss().read_index(str(path)) if path.name != "gallery.index" else None
    _, old_arrays, old_stamp = index_file.read_file(path)
    if rows is not None:
        number = next(n for n in range(index.nlist) if index.invlists.list_size(n))
        segments.load_faiss().rev_swig_ptr(index.invlists.get_ids(number), 1)[:] = rows
    arrays = {name: array.copy() for name, array in old_arrays.items()} | (arrays or {})
    index_file.write_file(path, index, arrays, {**old_stamp, **(stamp or {})})


FORGED = {
    "a row that is not there": ("part", {"rows": 10**9}),
    "a row below zero": ("part", {"rows": -5}),
    "times not in order": ("part", {"arrays": {"times": np.arange(256.0)[::-1]}}),
    "cameras of no name": ("part", {"stamp": {"cameras": [[{}, 0, 256]]}}),
    "a recall of no number": ("part", {"stamp": {"recall_at_10": [1]}}),
    "dead rows of another type": ("list", {"arrays": {"*": np.zeros(3)}}),
    "a name of no text": ("list", {"name": 5}),
    "a part's recall of no number": ("list", {"recall_at_10": None}),
    "a huge number": ("list", {"stamp": {"seq": -(2**80)}}),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_are_made_again(folder, approximate, kind):
    file, change = FORGED[kind]
    with open_new(folder) as gallery:
        put(gallery, 0, 600)
        name, *_ = gallery._index._files.read().parts
        gallery.prune(older_than=2.0)
    path = folder / (name if file == "part" else "gallery.index")
    if "arrays" in change and "*" in change["arrays"]:
        change = {"arrays": {name: change["arrays"]["*"]}}
    if fields := {*change} & {"name", "recall_at_10"}:
        parts = [dict(part) for part in index_file.read_stamp(path)["parts"]]
        parts[0].update({field: change[field] for field in fields})
        change = {"stamp": {"parts": parts}}
    forge(path, **change)
    with open_new(folder) as gallery:
        assert len(gallery.verify()) == 1
        assert_right(gallery, 2000)
        assert_right(gallery, 5, Filter(since=100, until=300))
        assert gallery.delete(["k7"]) == 1
        assert gallery.info().index.rows == 597
        assert gallery.verify() == []


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_sparse(path):
    end = path.read_bytes()[-4096:]
    with path.open("wb") as file:
        file.seek(1 << 40)
        file.write(end)


@pytest.mark.parametrize("odd", [make_pipe, make_sparse])
@pytest.mark.parametrize("sizes", ["small", "approximate"])
def test_odd_files_are_not_waited_for(folder, sizes, odd, request):
    request.getfixturevalue(sizes)
    with open_new(folder) as gallery:
        put(gallery, 0, 600)
        parts = {} if sizes == "small" else gallery._index._files.read().parts
        name = next(iter(parts), "gallery.index")
    odd(folder / name)
    with open_new(folder) as gallery:
        assert len(gallery.verify()) == 1
        assert_right(gallery, 2000)
    odd(folder / "gallery.index")
    with open_new(folder) as gallery:
        gallery.delete(["k7"])
        assert_right(gallery, 2000)
        assert gallery.verify() == []


KILLED_WRITER = """
from upperson_rt.gallery.sqlite import index, index_file, list_files
index._SEAL_ROWS = list_files.SEAL_ROWS = 64
if sys.argv[2] == "approximate":
    index.APPROXIMATE_FROM = 500
index_file.put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with open_new(folder) as gallery:
    put(gallery, range(600))
    gallery.rebuild()
"""


@pytest.mark.parametrize("sizes", ["small", "approximate"])
@pytest.mark.parametrize("then", ["write", "delete", "prove"])
def test_what_a_killed_writer_left_goes(folder, sizes, then, request, start):
    assert start(KILLED_WRITER, folder, sizes).wait() == -signal.SIGKILL
    request.getfixturevalue(sizes)
    (left,) = folder.glob(".gallery.index*")
    if then != "write":
        left.rename(folder / f".gallery.index-{'a' * 12}.{'b' * 8}.tmp")  # As earlier releases did.
    copy = shutil.copytree(folder, folder.parent / "copies" / "monday")
    with open_new(folder) as gallery:
        if then == "prove":
            places = prove_erasure(gallery, Selection(), [copy.parent])
            found = {place.name: place.left for place in places if place.left}
            assert found == {"backup 1: search index": 1}
        else:
            gallery.rebuild() if then == "write" else gallery.delete(["k7"])
    assert [*folder.glob(".*")] == []


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_work_for_a_while(gallery, busy, monkeypatch, caplog):
    put(gallery, 0, 600)
    for name in ("write_part", "write_file"):
        monkeypatch.setattr(list_files, name, full)
    for start in range(600, 1000, 100):
        put(gallery, start, start + 100)
        worked(gallery)
    assert_right(gallery, 2000)
    assert len([line for line in caplog.messages if "cannot be saved" in line]) == 1


def test_an_interrupted_build_goes_on_where_it_was(folder, approximate, monkeypatch):
    made, make = [], list_files.make_part

    def dying(block, _):
        made.append(len(block.ids))
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(block)

    with open_new(folder) as gallery:
        add(gallery, range(2000))
        monkeypatch.setattr(list_files, "make_part", dying)
        with pytest.raises(KeyboardInterrupt):
            gallery.search(QUERIES, 1)
    with open_new(folder) as gallery:
        assert_right(gallery, 2000)
    assert made == [256] * 8 + [208]


def test_a_filter_by_camera_and_time_is_a_range_of_rows(gallery, approximate):
    rng = np.random.default_rng(5)

    def some(value):
        return lambda _: None if rng.random() < 0.1 else value()

    columns = {
        "camera": some(lambda: f"c{rng.integers(4)}"), "time": some(lambda: float(rng.integers(50)))
    }  # fmt: skip
    add(gallery, range(850), **columns)
    gallery.search(QUERIES, 1)
    add(gallery, range(850, 900), 1, **columns)
    for _ in range(2):
        for where in (
            Filter(camera="c1"), Filter(camera=["c0", "c3", "nobody"]), Filter(since=10, until=20),
            Filter(until=7, camera="c2"), Filter(since=49), Filter(camera="nobody"),
        ):  # fmt: skip
            for k in (3, 1000):
                assert_right(gallery, k, where)
        gallery.delete(keys(range(0, 900, 7)))


def test_the_end_of_a_gallery_ends_the_work_on_its_index(folder, busy, monkeypatch):
    started, make = threading.Event(), list_files.make_part
    monkeypatch.setattr(
        list_files, "make_part", lambda block, check: started.set() or make(block, check)
    )
    with open_new(folder) as gallery:
        put(gallery, 0, 450)
        put(gallery, 450, 800)
        assert started.wait(30)
    assert not gallery._index._worker.is_alive()
    with open_new(folder) as gallery:
        assert_right(gallery, 1000)


def test_an_index_of_another_state_is_not_used(folder, tmp_path, small, caplog):
    """A copy of the database was put back and the gallery went on from there."""

    def assert_refused(folder, saved, reason, *more):
        caplog.clear()
        (folder / "gallery.index").write_bytes(saved)
        with open_new(folder) as gallery:
            if more:
                put(gallery, *more)
            assert_right(gallery)
        assert reason in caplog.text

    with open_new(folder) as gallery:
        put(gallery, 0, 300)
    shutil.copytree(folder, tmp_path / "copy")
    with open_new(folder) as gallery:
        put(gallery, 300, 400)
        gallery.rebuild()
    saved = (folder / "gallery.index").read_bytes()
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    assert_refused(folder, saved, "newer than the database")
    assert_refused(folder, saved, "another one than it was made from", 300, 450, 4)
    open_new(tmp_path / "other").close()
    assert_refused(tmp_path / "other", saved, "belongs to another gallery", 0, 300, 6)


def test_a_log_that_was_cut_off_makes_the_index_again(folder, small, monkeypatch):
    monkeypatch.setattr(stored, "_LOG_ENTRIES", 40)
    with open_new(folder) as gallery, open_new(folder) as other:
        put(gallery, 0, 400)
        for start in range(0, 200, 10):
            other.delete(keys(range(start, start + 10)))
        assert sql(folder, "SELECT count(*) FROM changes")[0][0] <= 41
        assert_right(gallery, 300)
    with open_new(folder) as gallery:
        assert_right(gallery, 300)


def test_what_is_gone_is_cleared_away(gallery, small):
    put(gallery, 0, 300)
    assert gallery._index.path.exists()
    gallery.delete(keys(range(200)))
    gallery.search(QUERIES, 1)
    assert [len(part.ids) for part in parts(gallery)] == [100]
    gallery.delete(keys(range(300)))
    assert gallery.search(QUERIES[:1], 1) == [[]]
    assert parts(gallery) == ()
    put(gallery, 300, 302)
    gallery.rebuild()
    assert not gallery._index.path.exists()
    with open_new(gallery.path) as again:
        assert len(again.search(QUERIES, 9)[0]) == 2


def clustered(groups, rows, dim=32):
    """Rows around some centres, in turn."""
    found = some_vectors(groups, 2, dim)[np.arange(rows) % groups]
    found = found + 0.8 * some_vectors(rows, 3, dim)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def one_part(monkeypatch):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 3000)
    monkeypatch.setattr(list_files, "SEAL_ROWS", 1000)


@pytest.fixture
def few_lists(one_part, monkeypatch):
    """One list is searched, whatever that finds."""
    monkeypatch.setattr(lists, "_LISTS_PROBED", 10_000)
    monkeypatch.setattr(lists, "_RECALL", 0.0)


def test_the_approximate_index_measures_itself(folder, one_part):
    queries = some_vectors(50, 9, 32)
    with open_new(folder, 32) as gallery:
        gallery.add(items_of(range(4000), camera=lambda n: f"c{n % 10}"), clustered(60, 4000))
        gallery.rebuild()
        info = gallery.info().index
        assert (info.kind, info.rows, info.beside) == ("ivf-rabitq", 4000, 0)
        assert info.parameters == {"parts": 1}
        assert info.recall_at_10 >= 0.99
        # Scores are equal to the last bit where the item is.
        assert share_found(gallery, queries) >= 0.97
        hits, found_KD = gallery.search_with_vectors(queries[0], 200, certain=10)
        assert hits[:10] == gallery.search(queries[:1], 10)[0]
        assert (len({hit.id for hit in hits}), len(found_KD)) == (200, 200)
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        gallery.add(items_of(["new"], camera="c9"), queries[:1])
        assert gallery.search(queries[:1], 1)[0][0].item.key == "new"
        info = gallery.info().index
        assert (info.rows, info.beside) == (4000, 1)
    with Gallery.open(folder) as gallery:
        assert gallery.info().index == info
        assert gallery.search(queries[:1], 1)[0][0].item.key == "new"
        # A filter that few items pass is exact.
        assert_right(gallery, 10, Filter(camera=["c1", "c2"]), queries[:3])


def test_a_filter_that_passes_far_items_only_gets_them_all(gallery, few_lists, monkeypatch):
    """They lie in lists that a search for this query does not look into."""
    for module in (lists, search):
        monkeypatch.setattr(module, "candidates_for", lambda k: k + 10)
    rows = np.tile(np.eye(2, DIM, dtype=np.float32), (1500, 1)) + 0.3 * some_vectors(3000, 3)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    columns = {"camera": lambda n: f"c{n % 2}", "track": lambda n: f"t{n // 100}"}
    gallery.add(items_of(range(3000), **columns), rows)
    gallery.rebuild()
    assert kinds(gallery) == ["lists"]
    query = np.eye(1, DIM, dtype=np.float32)
    for by_track in (False, True):
        (hits,) = gallery.search(query, 25, Filter(camera="c1"), by_track)
        assert [hit.item.camera for hit in hits] == ["c1"] * 25


def test_many_new_pictures_hide_no_older_ones(gallery, few_lists, monkeypatch):
    """Scores of pictures that are in no part yet are exact: they say nothing of those of lists."""
    monkeypatch.setattr(lists, "_LISTS_PROBED", 1)  # All.
    rows = some_vectors(3000, 3)
    gallery.add(items_of(range(3000)), rows)
    gallery.rebuild()
    assert kinds(gallery) == ["lists"]
    found = []
    for number in range(10):
        query = some_vectors(1, 20 + number)
        best = np.sort(query @ rows.T)[0, ::-1]
        wanted = np.random.default_rng(number).uniform(best[30], best[6], 300)
        beside = some_vectors(300, 50 + number)
        beside -= (beside @ query.T) * query
        beside /= np.linalg.norm(beside, axis=1, keepdims=True)
        new = wanted[:, None] * query + np.sqrt(1 - wanted[:, None] ** 2) * beside
        keys = [f"new {one}" for one in range(300)]
        gallery.add(items_of(keys), new.astype(np.float32))
        (hits,) = gallery.search(query, 6)
        found.append([hit.score for hit in hits] == pytest.approx(best[:6], abs=1e-3))
        gallery.delete(keys)
    assert all(found)


def test_more_tracks_than_are_certain_need_no_second_search(gallery, few_lists, monkeypatch):
    """The pictures that are read at first are of fewer."""
    monkeypatch.setattr(lists, "_LISTS_PROBED", 1)  # All.
    monkeypatch.setattr(search, "_DEVIATIONS", 0.0)
    looked, find = [], index.Snapshot.search_lists
    monkeypatch.setattr(index.Snapshot, "search_lists", lambda *a: looked.append(a) or find(*a))
    people = some_vectors(430, 3)
    rows = np.repeat(people, 7, axis=0)[:3000] + 0.01 * some_vectors(3000, 4)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gallery.add(items_of(range(3000), camera="gate", track=lambda n: f"t{n // 7}"), rows)
    gallery.rebuild()
    assert kinds(gallery) == ["lists"]
    found, _ = gallery.search_with_vectors(people[7], 200, by_track=True, certain=2)
    best = np.argsort(-(people @ people[7]))
    assert [hit.item.track for hit in found][:2] == [f"t{n}" for n in best[:2]]
    assert len({hit.item.track for hit in found}) == 200
    assert len(looked) == 1


@pytest.mark.parametrize("most", [10_000, 10])
def test_a_filter_by_attributes_passes_what_lists_find_or_all(
    gallery, few_lists, monkeypatch, most
):
    monkeypatch.setattr(search, "_FROM_SQL", 10)
    monkeypatch.setattr(search, "_MOST_ASKED", most)
    columns = {"camera": lambda n: f"c{n % 2}", "attributes": lambda n: {"n": n % 9}}
    add(gallery, range(3000), **columns)
    gallery.rebuild()
    where = Filter(camera="c1", attributes={"n": 4})
    assert_right(gallery, 1000, where)
    assert_right(gallery, 5, Filter(attributes={"n": 40}))
    (hits,) = gallery.search(QUERIES[:1], 5, where)
    assert [hit.item.attributes["n"] for hit in hits] == [4] * 5


def test_filtered_searches_look_into_more_lists(folder, few_lists, monkeypatch):
    monkeypatch.setattr(search, "candidates_for", lambda k: 30 * k)
    monkeypatch.setattr(lists, "_LISTS_PROBED", 38)  # 4 of 155.
    with open_new(folder, 32) as gallery:
        # The 15 rows of a group follow one another.
        order = np.argsort(np.arange(6000) % 400, kind="stable")
        items = items_of(range(6000), camera=lambda n: f"c{n // 15 % 10}")
        gallery.add(items, clustered(400, 6000)[order])
        gallery.rebuild()
        where = Filter(camera=["c1", "c2", "c3", "c4", "c5"])
        queries = some_vectors(200, 9, 32)
        wide = share_found(gallery, queries, 10, where)
        monkeypatch.setattr(lists, "_SPREAD", 0.0)
        assert share_found(gallery, queries, 10, where) < wide - 0.02
        assert kinds(gallery) == ["lists"]


@pytest.mark.parametrize("probed", [None, 10_000])
def test_recall_is_that_of_the_lists_looked_into(monkeypatch, probed):
    """As far queries of our own find it; more lists are searched until it is 99 %."""
    if probed is not None:
        monkeypatch.setattr(lists, "_LISTS_PROBED", probed)
        monkeypatch.setattr(lists, "_RECALL", 0.0)
    monkeypatch.setattr(lists, "candidates_for", lambda k: 300)
    vectors = clustered(60, 6000).astype(np.float16)
    numbers = np.arange(1, 6001)
    block = stored.Block(numbers, vectors, numbers, np.full(6000, None), np.full(6000, np.nan))
    part = lists.make_part(block)
    near = vectors[::40].astype(np.float32)
    queries = near + np.sqrt(1 / 0.54**2 - 1) * some_vectors(len(near), 77, 32)
    best = numbers[np.argsort(-(queries @ vectors.T.astype(np.float32)), axis=1)[:, :10]]
    _, found = part.search(queries, 300, [(0, 6000)])
    shares = [np.isin(right, ids).mean() for ids, right in zip(found, best, strict=True)]
    assert part.recall_at_10 == pytest.approx(np.mean(shares), abs=0.08)
    assert (part.recall_at_10 >= 0.99) == (probed is None)


def test_a_failed_write_leaves_the_earlier_file(gallery, small, monkeypatch):
    put(gallery, 0, 300)
    path, (part,) = gallery._index.path, parts(gallery)
    path.chmod(0o640)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(InputError):
            index_file.write_file(path, part.index, {"ids": part.ids}, {})
    assert path.read_bytes() == before
    assert [*gallery.path.glob(".*")] == []
    gallery.rebuild()
    assert path.stat().st_mode & 0o777 == 0o640


def test_searches_go_on_during_a_rebuild(folder, approximate, monkeypatch):
    make, found = list_files.make_part, []
    new, near = some_vectors(1, 77), some_vectors(2, 77)
    with open_new(folder) as gallery:
        put(gallery, 0, 600)

        def slow(block, _):
            if not found:
                add(gallery, ["new"], 77)
                gallery.delete(["k0", "k1"])
            thread = threading.Thread(target=lambda: found.append(answer(gallery, new, 1)))
            thread.start()
            thread.join(20)
            return make(block)

        monkeypatch.setattr(list_files, "make_part", slow)
        gallery.rebuild()
        assert found[0] == truth(gallery, new, 1)
        assert_right(gallery, 1000, queries=near)  # What happened meanwhile is followed afterwards.
    with open_new(folder) as gallery:
        assert_right(gallery, 1000, queries=near)


def test_an_index_that_contradicts_the_database_is_an_error(gallery, small):
    put(gallery, 0, 100)
    sql(gallery.path, "DELETE FROM items WHERE id < 50")
    with refused("index_contradicts_database", IntegrityError):
        gallery.search(QUERIES, 60)
    with refused("rows_missing", IntegrityError, expected=100, found=51):
        gallery.rebuild()


def test_threads_search_while_others_add_replace_and_delete(gallery, small):
    """Each search is right for one state: what was committed before it began is found."""
    vectors, committed = some_vectors(700, 7), [100]
    put(gallery, 0, 100, 7)

    def write():
        try:
            for start in range(100, 700, 20):
                part = range(start, start + 20)
                gallery.add(items_of(part), vectors[part])
                gallery.add(items_of([start]), vectors[start : start + 1])
                gallery.delete([f"gone{start}"])
                committed[0] = start + 20
        finally:
            committed.append(700)

    def read(seed):
        rng = np.random.default_rng(seed)
        while committed[-1] < 700:
            wanted = int(rng.integers(committed[0]))
            (hit,) = gallery.search(vectors[wanted : wanted + 1], 1)[0]
            assert hit.item.key == f"k{wanted}"

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, seed) for seed in range(3)]
        for work in (pool.submit(write), *readers):
            work.result()
    assert_right(gallery, 50)
