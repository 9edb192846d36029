"""Ids outside reveal nothing of other rows, and neither do names and paths."""

import inspect
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from tests.helpers.console import START, add_items, exported, id_of, last_line
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import draw_person
from tests.unit.runtime.serve.test_search import all_pages
from tests.unit.runtime.serve.test_user_state import older_store
from upperson_console import opaque_ids
from upperson_console.opaque_ids import IdPermutation, _OpaqueGallery
from upperson_console.search import Search
from upperson_console.user_state import UserState
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Gallery, Item

LAST = 2**63 - 1


def test_ids_are_a_permutation_without_an_order():
    ids, other = IdPermutation(b"a" * 32), IdPermutation(b"b" * 32)
    rows = [*range(2000), *(LAST - n for n in range(2000)), *(1 << n for n in range(63))]
    opaque = [ids.opaque(row) for row in rows]
    assert [ids.row(id_) for id_ in opaque] == rows
    assert [ids.opaque(ids.row(row)) for row in rows] == rows
    assert len({*opaque}) == len({*rows})
    assert 0 <= min(opaque) < max(opaque) <= LAST
    rank = np.argsort(np.argsort(np.array(opaque[:2000], np.float64)))
    assert abs(np.corrcoef(rank, np.arange(2000))[0, 1]) < 0.1
    bits = np.array([[id_ >> bit & 1 for bit in range(63)] for id_ in opaque[:2000]])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.07
    assert not {*opaque} & {other.opaque(row) for row in rows[:2000]}


def test_ids_of_rows_next_to_each_other_stay_the_same_and_have_no_order(make_console, tmp_path):
    def ids_of(console):
        hits = console.client.search(sentence="red", by_track=False).json()["hits"]
        return {hit["key"]: hit["id"] for hit in hits}

    first = make_console()
    ids = ids_of(first)
    rows = first.service.current.last.rows.ids([*ids])
    assert {*map(int, ids.values())}.isdisjoint(rows.values())
    assert max(map(int, ids.values())) > 2**53  # More than JavaScript's numbers hold.
    assert {*map(type, ids.values())} == {str}
    assert last_line(first)["keys"] == [*ids]
    row = rows["red-0"]
    for address in (f"/api/v1/items/{row}", f"/people/{row}", f"/people/{row}/picture"):
        assert first.client.get(address).status_code == 404
    assert ids_of(make_console()) == ids
    (tmp_path / "console.sqlite").unlink()
    other = ids_of(make_console())
    assert ({*ids.values()} & {*other.values()}, [*other]) == (set(), [*ids])


def test_no_method_of_a_gallery_gives_row_ids():
    with_ids = {"search", "search_with_vectors", "vectors_of", "ids", "get"}
    others = {
        "open", "add", "is_read_only", "outbox", "count", "items", "sample", "vectors", "cameras",
        "by_camera", "delete", "delete_where", "prune", "count_prunable", "info", "verify", "check",
        "rebuild", "close", "reusable_bytes",
    }  # fmt: skip
    methods = {name for name, _ in inspect.getmembers(Gallery, callable) if name[0] != "_"}
    assert methods <= with_ids | others, "does it take or return ids?"
    assert with_ids <= {*vars(_OpaqueGallery)}


def upgraded(path):
    with closing(UserState(path)) as store:
        return store.id_permutation(), store.marks("ann", "question"), store.saved("ann")


def content(path):
    with closing(sqlite3.connect(path)) as connection:
        tables = ("user, question, item, yes FROM marks", "name, address FROM saved")
        return [connection.execute(f"SELECT {one}").fetchall() for one in tables]


@pytest.fixture
def old_state(tmp_path):
    """User data of a release whose ids were those of rows."""
    path = older_store(tmp_path / "old.sqlite")
    saved = {"marked": "q=coat+50%25+3&camera=gate+3&marks=y12.n7", "similar": "like=3&last=day"}
    with closing(sqlite3.connect(path)) as connection, connection:
        sql = "INSERT INTO saved (user, name, address, added) VALUES ('ann', ?, ?, 1e9)"
        connection.executemany(sql, saved.items())
    return path


def test_user_data_of_earlier_releases_is_converted_once(old_state):
    ids, marks, saved = upgraded(old_state)
    assert marks == {ids.opaque(row): right for row, right in ((3, True), (1, True), (2, False))}
    by_name = {one.name: one.address for one in saved}
    assert by_name["red coats"] == "?q=a+red+coat"
    assert by_name["similar"] == f"like={ids.opaque(3)}&last=day"
    marked = f"marks=y{ids.opaque(12)}.n{ids.opaque(7)}"
    assert by_name["marked"] == f"q=coat+50%25+3&camera=gate+3&{marked}"
    with ThreadPoolExecutor(4) as pool:
        for again, *same in pool.map(upgraded, [old_state] * 4):
            assert same == [marks, saved]
            assert again.opaque(3) == ids.opaque(3)


def test_a_conversion_that_fails_leaves_all_as_it_was(old_state, monkeypatch):
    UserState(old_state).close()
    before, places = content(old_state), [*range(5)]

    class Failing(IdPermutation):
        def opaque(self, row):
            places.pop()
            return super().opaque(row)

    with monkeypatch.context() as patch:
        patch.setattr("upperson_console.user_state.IdPermutation", Failing)
        with pytest.raises(IndexError):
            upgraded(old_state)
    assert content(old_state) == before
    test_user_data_of_earlier_releases_is_converted_once(old_state)


def test_a_damaged_key_is_refused(tmp_path):
    path = tmp_path / "console.sqlite"
    with closing(UserState(path)) as store:
        store.id_permutation()
        (key,) = store._connection.execute("SELECT key FROM id_key").fetchone()
    assert len(key) == opaque_ids.KEY_BYTES
    damaged = path.read_bytes().replace(key, key[:-1] + bytes([key[-1] ^ 1]))
    path.write_bytes(damaged)
    with refused("user_state_damaged", IntegrityError, path=path):
        UserState(path)


def test_marks_of_a_search_by_an_item_outlive_the_upgrade(make_console, tmp_path):
    first = make_console()
    rows = first.service.current.last.rows.ids(["red-0", "red-1"])
    like, mark = (str(id_of(first, key)) for key in rows)
    with closing(UserState(tmp_path / "older.sqlite")) as store:  # As releases before wrote them.
        key = Search(like=rows["red-0"]).marks_key
        store.change_marks("local", key, {rows["red-1"]: True})
    first.client("PUT", "/api/v1/marks", json={"like": like, "yes": [mark]})
    first.service.close()
    with closing(sqlite3.connect(tmp_path / "console.sqlite")) as connection:
        (found,) = connection.execute("SELECT question FROM marks")
    assert found == (key,)
    again = make_console()
    assert "on another page: 1 yes" in again.client.get(f"/?like={like}").text


@pytest.mark.parametrize("by_track", [False, True])
@pytest.mark.parametrize("limit", [7, 24])
def test_each_of_many_equal_pictures_appears_once(make_console, served_encoder, by_track, limit):
    console = make_console()
    red = draw_person(console.folder / "crops" / "same.png", "red", seed=0)
    items = [
        Item(key=f"same-{n}", camera="twins", time=START + n, track=f"t{n}", crop="same.png")
        for n in range(60)
    ]
    vector = served_encoder.encode_images([red])
    console.service.gallery.add(items, np.repeat(vector, len(items), axis=0))
    query = {"sentence": "red", "limit": limit, "by_track": by_track}
    query |= {"filter": {"cameras": ["twins", "gate"]}}
    found = [hit["key"] for hit in all_pages(console.client, **query)]
    assert {item.key for item in items} < {*found}
    assert len(found) == len({*found}) == 60 + (6 if by_track else 12)


def test_folders_of_the_server_are_for_administrators(guarded, tmp_path):
    (tmp_path / "secret").mkdir()
    source = draw_person(tmp_path / "secret" / "frame.png", "red", seed=1)
    place = {"camera": "gate", "time": START, "box": (1, 1, 9, 9), "source": str(source)}
    (id_,) = add_items(guarded, Item(key=f"gate|{source}#3", track="new", **place))
    query = {"sentence": "red", "filter": {"track": "new"}}
    for client, is_admin in ((guarded.admin, 1), (guarded.operator, 0), (guarded.viewer, 0)):
        answers = [
            client.get(f"/api/v1/items/{id_}").text,
            client.search(**query).text,
            client.get("/api/v1/tracks?track=new&camera=gate").text,
            client.get(f"/people/{id_}").text,
            client.get(f"/people/{id_}/frame").text,
        ]
        if client is not guarded.viewer:
            files = exported(client.post("/api/v1/export", json={"ids": [str(id_)]}))
            answers.append(files["items.json"].decode())
            assert (str(source.parent) in files["index.html"].decode()) <= is_admin
        names = {(str(source.parent) in answer, "frame.png" in answer) for answer in answers}
        assert names == {(bool(is_admin), True)}
    source.write_bytes(b"damaged")
    answer = guarded.viewer.get(f"/api/v1/items/{id_}/picture")
    assert (answer.status_code, str(source.parent) in answer.text) == (422, False)
