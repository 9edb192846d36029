"""What is Milvus's own; what all galleries promise is in the contract."""

import subprocess
import sys
import time

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import DIM, items_of, keys_of, put, some_vectors, unit
from tests.helpers.refused import refused
from upperson_milvus import collection, rows
from upperson_milvus.collection import MOST_HITS
from upperson_milvus.connection import TOKEN_VARIABLE
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.gallery import Filter, Gallery, Item


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture(params=["milvus-lite", "milvus-server"])
def place(request):
    return request.getfixturevalue(f"{request.param.removeprefix('milvus-')}_place")


@pytest.fixture
def lite(lite_place):
    with lite_place.open(lite_place.empty()) as opened:
        yield opened


# Limits


def test_two_keys_with_one_id_are_noticed(lite, monkeypatch):
    monkeypatch.setattr(rows, "id_of", lambda key: 7)
    lite.add([Item(key="a")], unit(0))
    with refused("ids_equal", IntegrityError, id=7):
        lite.add([Item(key="b")], unit(1))
    with refused("ids_equal", IntegrityError):
        lite.add([Item(key="a"), Item(key="b")], unit(0, 1))
    assert lite.delete(["b"]) == 0
    assert list(lite.items()) == [Item(key="a")]


def test_what_milvus_cannot_keep_is_refused(gallery):
    for item in (
        Item(key="x" * 65536),
        Item(key="bad", camera="ü" * 32768),
        Item(key="bad", attributes={"a": "x" * 65536}),
        Item(key="bad", attributes={str(n): 1 for n in range(4097)}),
        Item(key="bad", attributes={"a": 2**64}),
    ):
        with pytest.raises(InputError):
            gallery.add([Item(key="good"), item], unit(0, 1))
    assert gallery.count() == 0


def test_the_longest_texts_fit(gallery):
    longest = Item(key="ü" * 32767, camera="c" * 65535, attributes={"a": "x" * 65000})
    gallery.add([longest], unit(0))
    assert list(gallery.items(Filter(camera="c" * 65535))) == [longest]
    assert len(gallery.search(unit(0), k=MOST_HITS - 1)[0]) == 1
    with pytest.raises(UsageError):
        gallery.search(unit(0), k=MOST_HITS)


def test_a_batch_that_is_too_large_is_refused_as_a_whole(server_place):
    with server_place.open(server_place.empty()) as gallery:
        items = [Item(key=str(n), source="s" * 60_000) for n in range(150)]
        with refused("batch_too_large", InputError):
            gallery.add(items, unit(*[0] * 150))
        assert gallery.count() == 0


# Many rows


def test_pages_join_up(gallery, monkeypatch):
    monkeypatch.setattr(collection, "_AT_A_TIME", 7)
    columns = {"camera": lambda n: f"c{n % 2}", "track": lambda n: str(n % 5), "time": float}
    put(gallery, range(30), **columns)
    assert keys_of(gallery.items()) == sorted(f"k{n}" for n in range(30))
    assert gallery.info().items == 30
    assert gallery.verify() == []
    (hits,) = gallery.search(unit(0), k=10, by_track=True)
    assert sum(hit.span.pictures for hit in hits) == 30
    put(gallery, range(30), 1, **columns)
    assert gallery.count() == 30
    assert gallery.prune(keep_newest=22) == 8
    assert gallery.delete_where(Filter(camera="c0")) == 11
    assert gallery.delete([f"k{n}" for n in range(30)]) == 11


# Collections


@pytest.mark.parametrize("index", ["hnsw", "ivf_sq8"])
def test_an_index_is_chosen_in_the_location(lite_place, index):
    location = lite_place.unused()
    with lite_place.open(f"{location}?index={index}", create=True) as gallery:
        put(gallery, range(100))
        gallery.rebuild()
        found = gallery.info().index
        assert (found.kind, found.rows, found.recall_at_10) == (index.replace("_", "-"), 100, None)
        assert gallery.search(some_vectors(100)[5:6], k=1)[0][0].item.key == "k5"
    with lite_place.open(location) as gallery:
        assert gallery.info().index.kind == index.replace("_", "-")
        gallery.rebuild()
        assert (gallery.info().index.kind, gallery.info().index.recall_at_10) == ("exact", 1.0)
        assert gallery.count() == 100


def test_what_cannot_be_a_gallery_is_refused_and_left_alone(place):
    location = f"{place.unused()}?vectors=float16"
    with refused("float16_unsupported", BackendError):
        place.open(location, create=True)
    with refused("gallery_not_found", InputError):
        place.open(location)
    location = place.unused()
    with place.client() as client:
        client.create_collection(location.rsplit("/", 1)[1], dimension=DIM)
        for create in (False, True):
            with refused("not_a_gallery", IntegrityError):
                place.open(location, create=create)
    with place.client() as client:
        assert client.has_collection(location.rsplit("/", 1)[1])


def test_a_collection_made_anew_for_another_model_takes_no_rows_of_this_one(place):
    location = place.unused()
    with place.open(location, create=True) as gallery:
        gallery.add([Item(key="a")], unit(0))
        with gallery._collection.client() as client:
            client.drop_collection(gallery._collection._name)
        with Gallery.open(location, "b" * 16, DIM, create=True) as other:
            with refused("gallery_of_other_model", IntegrityError, found="b" * 16):
                gallery.add([Item(key="b")], unit(1))
            assert other.count() == 0


def test_another_schema_is_refused(lite_place, monkeypatch):
    for version in (2, 0):
        location = lite_place.unused()
        with monkeypatch.context() as other:
            other.setattr("upperson_milvus.collection.SCHEMA_VERSION", version)
            lite_place.open(location, create=True).close()
        with refused("schema_unsupported", InputError, found=version):
            lite_place.open(location)


def test_an_interrupted_creation_is_completed(place, monkeypatch):
    location = place.unused()
    with monkeypatch.context() as cut_off:
        cut_off.setattr("upperson_milvus.collection._make_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            place.open(location, create=True)
    with place.open(location) as gallery:
        gallery.add([Item(key="a")], unit(0))
        assert keys_of(gallery.search(unit(0), k=1)[0]) == ["a"]


def test_verify_finds_what_is_wrong(lite_place):
    location = lite_place.empty()
    with lite_place.open(location) as gallery, lite_place.client() as client:
        put(gallery, "abcde", attributes={"n": 1})
        name = location.rsplit("/", 1)[1]
        rows_of = client.query(name, filter="id >= 0", output_fields=["*"])
        stored = {row["key"]: row for row in rows_of}
        stored["b"]["vector"] = [0.5] * DIM
        stored["c"]["attributes"] = {"n": 2}
        stored["d"]["box"] = {"x0": 1}
        stored["e"]["key"] = "f"
        client.upsert(name, [stored[key] for key in "bcde"])
        texts = {
            "b": "length 2", "c": "filters do not see", "d": "malformed", "f": "not that of its key"
        }  # fmt: skip
        problems = sorted(gallery.verify())
        for problem, (key, text) in zip(problems, texts.items(), strict=True):
            assert problem.startswith(f"item {key}:")
            assert text in problem
        with refused("item_damaged", IntegrityError):
            list(gallery.items())


COUNTS = """
import sys
from upperson_rt.gallery import Gallery
from upperson_rt.errors import InputError
for line in sys.stdin:
    try: print(Gallery.open(line.strip()).count(), flush=True)
    except InputError as error: print(error.code, flush=True)
"""


@pytest.mark.timeout(150)  # A process that imports pymilvus.
def test_a_folder_belongs_to_one_process_until_it_is_closed(lite_place):
    location = lite_place.empty()
    pipe, command = subprocess.PIPE, [sys.executable, "-c", COUNTS]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(), text=True) as other:

        def elsewhere():
            other.stdin.write(f"{location}\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        with lite_place.open(location) as first:
            first.add([Item(key="a")], unit(0))
            with lite_place.open(location) as second:
                assert second.count() == 1
            assert first.count() == 1
            assert elsewhere() == "gallery_in_use"
        assert elsewhere() == "1"


# Trouble on the way


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    for package, place in (("pymilvus", "host/people"), ("milvus_lite", "/tmp/people.db/people")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with refused("extra_missing", BackendError, package=package):
                Gallery.open(f"milvus://{place}")


@pytest.mark.timeout(120)
def test_a_server_that_dies_and_comes_back(server_place, shared_server):
    location, server = server_place.empty(), shared_server.server
    vectors = some_vectors(60)
    gallery = server_place.open(f"{location}?timeout=1")
    with gallery:
        for start in range(0, 50, 5):
            part = range(start, start + 5)
            gallery.add(items_of(part, camera="gate", time=float), vectors[part])
        assert gallery.delete(["k0"]) == 1
        server.kill()  # Nothing is flushed.
        try:
            for use in (
                lambda: gallery.add([Item(key="late")], unit(0)),
                lambda: gallery.search(unit(0), k=1),
                gallery.count,
            ):
                begin = time.monotonic()
                with refused("server_failed", BackendError) as error:
                    use()
                assert time.monotonic() - begin < 10
                assert "\n" not in str(error.value)
        finally:
            server.start()
    with server_place.open(location) as gallery:
        assert gallery.count() == 49
        assert gallery.verify() == []
        gallery.add([Item(key="k1", time=1000)], vectors[1:2])
        assert next(gallery.items(Filter(since=1000))).camera == "gate"
