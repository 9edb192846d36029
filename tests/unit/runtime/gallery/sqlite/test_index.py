"""The search index beside the database: exact, kept up, replaceable."""

import logging
import shutil
import threading

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors, sql
from tests.helpers.refused import refused
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import index, search, segments
from upperson_rt.gallery.sqlite import rows as stored


def items(start, stop):
    return [
        Item(key=f"k{i}", camera=f"c{i % 10}", time=float(i), track=f"t{i // 7}")
        for i in range(start, stop)
    ]


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


def open_(folder):
    return Gallery.open(folder, FINGERPRINT, DIM, create=True)


def truth(gallery, queries, k, where=None):
    """Ids and scores by sorting everything that the database holds."""
    parts = list(gallery.vectors(where))
    keys = [item.key for found, _ in parts for item in found]
    stored = np.concatenate([rows for _, rows in parts]).astype(np.float64)
    ids = dict(sql(gallery.path, "SELECT key, id FROM items"))
    found = []
    for query in queries.astype(np.float64):
        scores = (stored @ query).astype(np.float32)
        ranked = sorted((-score, ids[key]) for score, key in zip(scores, keys, strict=True))
        found.append([(id_, -score) for score, id_ in ranked[:k]])
    return found


def answer(gallery, queries, k, where=None):
    return [[(hit.id, hit.score) for hit in hits] for hits in gallery.search(queries, k, where)]


def kinds(gallery):
    return ["exact" if part.nprobe is None else "ivf" for part in gallery._index.snapshot.segments]


WHERE = [None, Filter(camera="c3"), Filter(since=100, until=1900)]


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("where", WHERE)
def test_the_index_equals_sorting_everything(folder, small, queries, where):
    with open_(folder) as gallery:
        gallery.add(items(0, 2000), some_vectors(2000))
        for k in (1, 10, 300):
            expected = truth(gallery, some_vectors(queries, 5), k, where)
            assert answer(gallery, some_vectors(queries, 5), k, where) == expected
            gallery.search(some_vectors(1), 1)  # Now the index is in memory.
            assert answer(gallery, some_vectors(queries, 5), k, where) == expected
        assert kinds(gallery) == ["exact"]
    with open_(folder) as gallery:  # From the file; with a filter perhaps from SQL alone.
        assert answer(gallery, some_vectors(queries, 5), 10, where) == truth(
            gallery, some_vectors(queries, 5), 10, where
        )


@pytest.mark.parametrize("where", WHERE)
def test_a_small_gallery_equals_sorting_everything(folder, where, monkeypatch):
    """It has no index but the rows themselves."""
    with open_(folder) as gallery:
        gallery.add(items(0, 200), some_vectors(200))
        queries = some_vectors(7, 5)
        for k in (1, 10, 200, 500):
            assert answer(gallery, queries, k, where) == truth(gallery, queries, k, where)
        gallery.search(queries, 1)
        assert kinds(gallery) == []
        monkeypatch.setattr(index.SearchIndex, "build", lambda *_: pytest.fail("read it all"))
        for number in (3, 5, 150):
            gallery.delete([f"k{number}"])
            assert answer(gallery, queries, 200, where) == truth(gallery, queries, 200, where)


@pytest.mark.parametrize("sizes", ["small", "approximate"])
def test_changes_are_followed_row_by_row(folder, sizes, request, monkeypatch):
    request.getfixturevalue(sizes)
    queries = some_vectors(4, 5)
    rng = np.random.default_rng(1)
    with open_(folder) as gallery, open_(folder) as other:
        gallery.add(items(0, 600), some_vectors(600))
        gallery.search(queries, 5)
        built = index.SearchIndex.build
        monkeypatch.setattr(index.SearchIndex, "build", lambda *_: pytest.fail("read it all"))
        for step in range(12):
            writer = (gallery, other)[step % 2]
            start = 600 + 40 * step
            writer.add(items(start, start + 40), some_vectors(40, 100 + step))
            again = [Item(key=f"k{i}") for i in rng.choice(start, 9, replace=False)]
            writer.add(again, some_vectors(9, 200 + step))
            writer.delete([f"k{i}" for i in rng.choice(start, 9, replace=False)])
            for k in (1, 10, 2000):  # 2000 looks into all lists of the approximate index.
                if sizes == "small" or k == 2000:
                    assert answer(gallery, queries, k) == truth(gallery, queries, k)
        assert len(kinds(gallery)) <= 5
        monkeypatch.setattr(index.SearchIndex, "build", built)


def test_an_index_file_is_used_and_followed(folder, small, monkeypatch):
    with open_(folder) as gallery:
        gallery.add(items(0, 500), some_vectors(500))
        gallery.search(some_vectors(1), 1)
        assert gallery._index.path.exists()
        gallery.add([*items(500, 520), Item(key="k3")], some_vectors(21, 8))
        gallery.delete(["k4", "k5"])
    monkeypatch.setattr(index.SearchIndex, "build", lambda *_: pytest.fail("read it all"))
    with open_(folder) as gallery:
        assert answer(gallery, some_vectors(3, 5), 20) == truth(gallery, some_vectors(3, 5), 20)
        assert gallery._index.snapshot.segments[0].dead_count == 3


def damage_end(content):
    return content[:-100]


def damage_middle(content):
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def damage_stamp(content):
    return content.replace(b'"rows": 500', b'"rows": 700')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_end, "cut off, or no index of this version"),
        (damage_middle, "checksum does not match"),
        (damage_stamp, "its stamp is damaged"),
        (lambda content: b"", "too short"),
        (lambda content: b"\xff" * len(content), "no index of this version"),
    ],
    ids=["cut", "bit", "stamp", "empty", "other"],
)
@pytest.mark.parametrize("sizes", ["small", "approximate"])
def test_a_damaged_index_file_is_made_again(folder, damage, reason, sizes, request, caplog):
    request.getfixturevalue(sizes)
    with open_(folder) as gallery:
        gallery.add(items(0, 500), some_vectors(500))
        gallery.search(some_vectors(1), 1)
        path = gallery._index.path
        assert gallery.verify() == []
    path.write_bytes(damage(path.read_bytes()))
    with open_(folder) as gallery:
        (problem,) = gallery.verify()
        assert reason in problem
        assert "upperson-rt gallery rebuild" in problem
        found = answer(gallery, some_vectors(2, 5), 500)
        assert found == truth(gallery, some_vectors(2, 5), 500)
        assert any(reason in line and "making it again" in line for line in caplog.messages)
        assert gallery.verify() == []


def test_an_outgrown_exact_index_becomes_approximate_at_the_next_start(folder, approximate):
    with open_(folder) as gallery:
        gallery.add(items(0, 400), some_vectors(400))
        gallery.search(some_vectors(1), 1)
        gallery.add(items(400, 600), some_vectors(200, 1))
        gallery.search(some_vectors(1), 1)
        assert set(kinds(gallery)) == {"exact"}
    with open_(folder) as gallery:
        assert gallery.info().index is None
        assert answer(gallery, some_vectors(2, 5), 1000) == truth(gallery, some_vectors(2, 5), 1000)
        assert kinds(gallery) == ["ivf"]


def test_an_index_file_that_holds_little_is_written_again(folder, small):
    with open_(folder) as gallery:
        gallery.add(items(0, 100), some_vectors(100))
        gallery.search(some_vectors(1), 1)
        gallery.add(items(100, 1000), some_vectors(900, 1))
        gallery.search(some_vectors(1), 1)
    size = (folder / "gallery.index").stat().st_size
    with open_(folder) as gallery:
        assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
        assert [len(part.ids) for part in gallery._index.snapshot.segments] == [1000]
    assert (folder / "gallery.index").stat().st_size > 5 * size


def test_large_exact_segments_are_not_copied(folder, small, monkeypatch):
    monkeypatch.setattr(index, "_LARGE_ROWS", 256)
    with open_(folder) as gallery:
        gallery.add(items(0, 1000), some_vectors(1000))
        gallery.search(some_vectors(1), 1)
        first = gallery._index.snapshot.segments[0]
        for start in range(1000, 3000, 100):
            gallery.add(items(start, start + 100), some_vectors(100, start))
            assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
        parts = gallery._index.snapshot.segments
        assert parts[0].index is first.index
        assert sum(len(part.ids) < 256 for part in parts) <= 3
        assert len(parts) < 2000 / 256 + 3 + 1
        gallery.delete([f"k{i}" for i in range(700)])
        assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
        assert sum(part.dead_count for part in gallery._index.snapshot.segments) == 0


def test_an_index_of_another_state_is_not_used(folder, tmp_path, small, caplog):
    """A copy of the database was put back and the gallery went on from there."""
    with open_(folder) as gallery:
        gallery.add(items(0, 300), some_vectors(300))
    shutil.copytree(folder, tmp_path / "copy")
    with open_(folder) as gallery:
        gallery.add(items(300, 400), some_vectors(100, 3))
        gallery.search(some_vectors(1), 1)
    saved = (folder / "gallery.index").read_bytes()
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    (folder / "gallery.index").write_bytes(saved)
    with open_(folder) as gallery:
        assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
    assert "newer than the database" in caplog.text
    caplog.clear()
    (folder / "gallery.index").write_bytes(saved)
    with open_(folder) as gallery:
        gallery.add(items(300, 450), some_vectors(150, 4))
        assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
    assert "another one than it was made from" in caplog.text
    caplog.clear()
    with open_(tmp_path / "other") as gallery:
        gallery.add(items(0, 300), some_vectors(300, 6))
        (tmp_path / "other" / "gallery.index").write_bytes(saved)
        assert answer(gallery, some_vectors(2, 5), 20) == truth(gallery, some_vectors(2, 5), 20)
    assert "belongs to another gallery" in caplog.text


def test_a_log_that_was_cut_off_makes_the_index_again(folder, small, monkeypatch):
    monkeypatch.setattr(stored, "_LOG_ENTRIES", 40)
    with open_(folder) as gallery, open_(folder) as other:
        gallery.add(items(0, 400), some_vectors(400))
        gallery.search(some_vectors(1), 1)
        for start in range(0, 200, 10):
            other.delete([f"k{i}" for i in range(start, start + 10)])
        assert sql(folder, "SELECT count(*) FROM changes")[0][0] <= 41
        assert answer(gallery, some_vectors(2, 5), 300) == truth(gallery, some_vectors(2, 5), 300)
    with open_(folder) as gallery:
        assert answer(gallery, some_vectors(2, 5), 300) == truth(gallery, some_vectors(2, 5), 300)


def test_what_is_gone_is_cleared_away(folder, small):
    with open_(folder) as gallery:
        gallery.add(items(0, 300), some_vectors(300))
        gallery.search(some_vectors(1), 1)
        gallery.delete([f"k{i}" for i in range(200)])
        gallery.search(some_vectors(1), 1)
        assert [len(part.ids) for part in gallery._index.snapshot.segments] == [100]
        gallery.delete([f"k{i}" for i in range(300)])
        assert gallery.search(some_vectors(1), 1) == [[]]
        assert gallery._index.snapshot.segments == ()
        gallery.add(items(300, 302), some_vectors(2))
        assert len(gallery.search(some_vectors(1), 9)[0]) == 2
    with open_(folder) as gallery:
        assert len(gallery.search(some_vectors(1), 9)[0]) == 2


def test_equal_pictures_are_ordered_by_id_in_any_number(folder, small):
    with open_(folder) as gallery:
        same = np.tile(some_vectors(1), (200, 1))
        gallery.add(items(0, 200), same)
        for query in (same[:1], np.tile(same[:1], (30, 1))):
            assert [hit.id for hit in gallery.search(query, 5)[-1]] == [1, 2, 3, 4, 5]


def test_the_approximate_index_measures_itself(folder, monkeypatch):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 3000)
    groups = some_vectors(60, 2, 32)
    rows = groups[np.arange(4000) % 60] + 0.8 * some_vectors(4000, 3, 32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with Gallery.open(folder, FINGERPRINT, 32, create=True) as gallery:
        gallery.add(items(0, 4000), rows)
        gallery.rebuild()
        info = gallery.info().index
        assert (info.kind, info.rows, info.beside) == ("ivf-sq8", 4000, 0)
        assert info.parameters["nlist"] == round(2 * np.sqrt(4000))
        assert info.recall_at_10 >= 0.985
        queries = some_vectors(50, 9, 32)
        expected = truth(gallery, queries, 10)
        found = answer(gallery, queries, 10)
        same = [len(set(a) & set(b)) for a, b in zip(found, expected, strict=True)]
        assert np.mean(same) >= 9.7  # Scores are equal to the last bit where the item is.
        gallery.add([Item(key="new", camera="c9")], queries[:1])
        assert gallery.search(queries[:1], 1)[0][0].item.key == "new"
        info = gallery.info().index
        assert (info.rows, info.beside) == (4000, 1)
    with Gallery.open(folder) as gallery:
        assert gallery.info().index == info
        assert gallery.search(queries[:1], 1)[0][0].item.key == "new"
        # A filter that leaves few is exact; so is one that the lists answer, with all of them.
        where = Filter(camera=["c1", "c2"])
        assert answer(gallery, queries[:3], 10, where) == truth(gallery, queries[:3], 10, where)
        monkeypatch.setattr("upperson_rt.gallery.sqlite.search._FROM_SQL", 10)
        assert answer(gallery, queries[:3], 1000, where) == truth(gallery, queries[:3], 1000, where)


@pytest.mark.parametrize("by_track", [False, True])
def test_a_filter_that_passes_far_items_only_gets_them_all(folder, monkeypatch, by_track):
    """They lie in lists that a search for this query does not look into."""
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 3000)
    monkeypatch.setattr(segments, "_NPROBES", (1,))
    monkeypatch.setattr(search, "_FROM_SQL", 10)
    rows = np.tile(np.eye(2, DIM, dtype=np.float32), (1500, 1)) + 0.3 * some_vectors(3000, 3)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with open_(folder) as gallery:
        gallery.add(
            [Item(key=str(i), camera=f"c{i % 2}", track=f"t{i // 100}") for i in range(3000)], rows
        )
        gallery.rebuild()
        assert kinds(gallery) == ["ivf"]
        query = np.eye(1, DIM, dtype=np.float32)
        (hits,) = gallery.search(query, 25, Filter(camera="c1"), by_track)
        assert len(hits) == 25
        assert {hit.item.camera for hit in hits} == {"c1"}


@pytest.mark.parametrize(
    ("cameras", "least"), [(["c1"], 9.8), (["c1", "c2", "c3", "c4", "c5"], 8.5)]
)
def test_filtered_searches_look_into_more_lists(folder, monkeypatch, cameras, least):
    """The best that pass are spread over more lists than the best of all: in 4, 6.2 of them."""
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 3000)
    monkeypatch.setattr(search, "_FROM_SQL", 10)
    monkeypatch.setattr(segments, "_NPROBES", (4,))
    groups = some_vectors(400, 2, 32)
    rows = groups[np.arange(6000) // 15] + 0.8 * some_vectors(6000, 3, 32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    where, queries = Filter(camera=cameras), some_vectors(50, 9, 32)
    with Gallery.open(folder, FINGERPRINT, 32, create=True) as gallery:
        gallery.add([Item(key=f"k{i}", camera=f"c{i // 15 % 10}") for i in range(6000)], rows)
        gallery.rebuild()
        found, expected = answer(gallery, queries, 10, where), truth(gallery, queries, 10, where)
        assert kinds(gallery) == ["ivf"]
    same = [len(set(a) & set(b)) for a, b in zip(found, expected, strict=True)]
    assert np.mean(same) >= least


def test_recall_is_that_of_the_lists_looked_into(monkeypatch):
    """Measured against numpy on the same queries."""
    monkeypatch.setattr(segments, "_NPROBES", (1,))
    rows = some_vectors(3000, 1, 32)

    def blocks():
        yield np.arange(0, 1000), rows[:1000]
        yield np.arange(1000, 3000), rows[1000:]

    trained = segments.train_lists(3000, 32, lambda most: rows[:most], blocks)
    queries, others = segments._held_out(rows[: trained.nlist * 50 + 200])
    assert len(others) == min(3000, trained.nlist * 50 + 200) - len(queries)
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    best = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    import faiss

    found = trained.index.search(queries, 72, params=faiss.SearchParametersIVF(nprobe=1))[1]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]
    assert trained.recall_at_10 == pytest.approx(np.mean(shares))
    assert 0.05 < trained.recall_at_10 < 0.9


def test_an_index_that_cannot_be_saved_still_answers(folder, approximate, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "write_index", full)
    with open_(folder) as gallery:
        gallery.add(items(0, 600), some_vectors(600))
        assert answer(gallery, some_vectors(2, 5), 1000) == truth(gallery, some_vectors(2, 5), 1000)
        assert not gallery._index.path.exists()
    assert "cannot be saved" in caplog.text


def test_a_failed_write_leaves_the_earlier_file(folder, small, monkeypatch):
    with open_(folder) as gallery:
        gallery.add(items(0, 300), some_vectors(300))
        gallery.search(some_vectors(1), 1)
        before = gallery._index.path.read_bytes()

        def fail(*_):
            raise OSError(28, "No space left on device")

        snapshot = gallery._index.snapshot
        monkeypatch.setattr("os.replace", fail)
        part = snapshot.segments[0]
        with pytest.raises(InputError):
            index.write_index(
                gallery._index.path, (part.index, part.ids, part.checksums), snapshot.stamp
            )
        assert gallery._index.path.read_bytes() == before
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_searches_go_on_during_a_rebuild(folder, approximate, monkeypatch):
    train, found = segments.train_lists, []
    new, near = some_vectors(1, 77), some_vectors(2, 77)
    with open_(folder) as gallery:
        gallery.add(items(0, 600), some_vectors(600))
        gallery.search(some_vectors(1), 1)

        def slow(*arguments):
            gallery.add([Item(key="new")], new)
            gallery.delete(["k0", "k1"])
            thread = threading.Thread(target=lambda: found.append(answer(gallery, new, 1)))
            thread.start()
            thread.join(20)
            return train(*arguments)

        monkeypatch.setattr(index, "train_lists", slow)
        gallery.rebuild()
        assert found == [truth(gallery, new, 1)]
        # What happened meanwhile is followed afterwards.
        assert answer(gallery, near, 1000) == truth(gallery, near, 1000)
    with open_(folder) as gallery:
        assert answer(gallery, near, 1000) == truth(gallery, near, 1000)


def test_growing_beyond_the_limit_advises_once(folder, small, monkeypatch, caplog):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 150)
    with open_(folder) as gallery:
        gallery.add(items(0, 100), some_vectors(100))
        gallery.search(some_vectors(1), 1)
        with caplog.at_level(logging.WARNING):
            for start in (100, 300, 500):
                gallery.add(items(start, start + 200), some_vectors(200, start))
                gallery.search(some_vectors(1), 1)
        advice = [line for line in caplog.messages if "gallery rebuild" in line]
        assert len(advice) == 1
        gallery.rebuild()
        assert kinds(gallery) == ["ivf"]
        assert gallery.info().index.kind == "ivf-sq8"


def test_a_small_gallery_leaves_no_file_behind(folder, small):
    with open_(folder) as gallery:
        gallery.add(items(0, 300), some_vectors(300))
        gallery.rebuild()
        assert gallery._index.path.exists()
        gallery.prune(keep_newest=10)
        gallery.rebuild()
        assert not gallery._index.path.exists()
        assert len(gallery.search(some_vectors(1), 99)[0]) == 10


def test_an_index_that_contradicts_the_database_is_an_error(folder, small):
    with open_(folder) as gallery:
        gallery.add(items(0, 100), some_vectors(100))
        gallery.search(some_vectors(1), 1)
        sql(folder, "DELETE FROM items WHERE id < 50")
        with refused("index_contradicts_database", IntegrityError):
            gallery.search(some_vectors(1), 60)
        with refused("rows_missing", IntegrityError, expected=100, found=51):
            gallery.rebuild()


def test_threads_search_while_others_add_replace_and_delete(folder, small):
    """Each search is right for one state: what was committed before it began is found."""
    errors = []
    committed = [0]
    with open_(folder) as gallery:
        vectors = some_vectors(1500, 7)
        gallery.add(items(0, 100), vectors[:100])
        committed[0] = 100

        def write():
            try:
                for start in range(100, 1500, 20):
                    gallery.add(items(start, start + 20), vectors[start : start + 20])
                    gallery.add([Item(key=f"k{start}")], vectors[start : start + 1])
                    gallery.delete([f"gone{start}"])
                    committed[0] = start + 20
            except Exception as error:
                errors.append(error)

        def read(seed):
            rng = np.random.default_rng(seed)
            try:
                while committed[0] < 1500:
                    wanted = int(rng.integers(committed[0]))
                    (hit,) = gallery.search(vectors[wanted : wanted + 1], 1)[0]
                    assert hit.item.key == f"k{wanted}"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        threads.append(threading.Thread(target=write))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert answer(gallery, some_vectors(2, 5), 50) == truth(gallery, some_vectors(2, 5), 50)


def test_many_queries_equal_one_at_a_time(folder, small, monkeypatch):
    monkeypatch.setattr(segments, "_GEMM_ROWS", 33)
    with open_(folder) as gallery:
        gallery.add(items(0, 500), some_vectors(500))
        gallery.search(some_vectors(1), 1)
        gallery.delete([f"k{i}" for i in range(0, 100, 3)])
        queries = some_vectors(300, 5)
        assert answer(gallery, queries, 7) == [
            answer(gallery, queries[i : i + 1], 7)[0] for i in range(300)
        ]
