"""All people without a query: newest first, in pages without gaps, and the start page."""

import html
import re

import pytest

from tests.helpers.console import ODD, START, add_items, id_of, last_line, logged
from tests.helpers.toy_bundle import COLOURS
from upperson_console import browse
from upperson_rt.gallery import Item

LATEST_FIRST = [*COLOURS][::-1]


def cards(client, address):
    """Return the ids of a page's cards, and the address of the next page."""
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    more = re.search(r'id="more" href="([^"]+)"', answer.text)
    shown = re.findall(r'<li id="card-(\d+)"', answer.text)
    return [*map(int, shown)], more and html.unescape(more[1])


def all_cards(client, address, most=100):
    found = []
    while address is not None:
        shown, address = cards(client, address)
        found += shown
        assert len(found) <= most
    return found


def keys(console, ids):
    found = console.service.gallery.get(ids)
    return [found[id_][0].key for id_ in ids]


def add(console, *items):
    add_items(console, *items)
    console.service.current.last.has_changed()


@pytest.mark.parametrize(("page", "window"), [(48, 60.0), (2, 0.5), (3, 1e9)])
def test_pages_have_each_track_once_the_newest_first(console, monkeypatch, page, window):
    monkeypatch.setattr("upperson_console.pages.PAGE_HITS", page)
    monkeypatch.setattr(browse, "_FIRST_WINDOW_S", window)
    monkeypatch.setattr(browse, "_MOST_READ", 3)
    found = keys(console, all_cards(console.client, "/?order=time"))
    late, early = [f"{one}-2" for one in LATEST_FIRST], [f"{one}-1" for one in LATEST_FIRST]
    assert found == late + early  # The middle view of each.
    each = keys(console, all_cards(console.client, "/?by=picture&camera=gate"))
    assert each == [f"{one}-{number}" for one in LATEST_FIRST for number in (1, 0)]


def test_equal_times_and_tracks_over_pages_show_nothing_twice(console, monkeypatch):
    monkeypatch.setattr("upperson_console.pages.PAGE_HITS", 2)
    now = START + 50_000
    long = [Item(key=f"l{n}", camera="yard", time=now - 40 * n, track="long") for n in range(9)]
    same = [Item(key=f"s{n}", camera="yard", time=now - 100) for n in range(5)]
    add(console, *long, *same)
    found = keys(console, all_cards(console.client, "/?camera=yard"))
    assert found[0] == "l4"
    assert sorted(found[1:]) == [one.key for one in same]
    # What comes meanwhile is on no later page, and moves none.
    first, following = cards(console.client, "/?camera=yard")
    add(console, Item(key="new", camera="yard", time=now + 1))
    assert sorted(keys(console, first + all_cards(console.client, following))) == sorted(found)


def test_items_without_a_time_come_last(console, monkeypatch):
    monkeypatch.setattr("upperson_console.pages.PAGE_HITS", 3)
    add(
        console,
        Item(key="timed", camera="yard", time=START, track="a"),
        *(Item(key=f"a{n}", camera="yard", track="a") for n in range(3)),
        *(Item(key=f"b{n}", camera="yard", track="b") for n in range(3)),
        *(Item(key=f"c{n}", camera="yard") for n in range(3)),
    )
    found = keys(console, all_cards(console.client, "/?camera=yard"))
    assert found[0] in ("timed", "a0", "a1", "a2")
    assert found[1:] == ["b1", "c0", "c1", "c2"]
    assert keys(console, all_cards(console.client, "/?camera=yard&until=2030-01-01")) == ["timed"]


def test_browsing_is_logged_and_keeps_to_the_cameras_of_the_account(guarded):
    shown, _ = cards(guarded.viewer, "/?order=time")
    assert {key.split("-")[1] for key in keys(guarded, shown)} == {"1"}
    logged(guarded, action="browse", user="vera", ids=shown)
    page = html.unescape(guarded.viewer.get("/").text)
    assert (page.count('aria-label="Newest people of gate"'), ODD in page) == (1, False)
    line = last_line(guarded)
    assert (line["action"], len(line["ids"])) == ("browse", 6)
    assert cards(guarded.viewer, "/?camera=%3Cb%3Ehall")[0] == []


def test_the_start_page_shows_the_newest_people_by_camera(console):
    add(console, Item(key="old", camera="gate", time=START - 90_000), Item(key="n", camera="yard"))
    page = html.unescape(console.client.get("/").text)
    sections = re.findall(r'aria-label="Newest people of ([^"]+)"(.*?)</section>', page, re.S)
    assert [name for name, _ in sections] == [ODD, "gate", "yard"]
    found = [[*map(int, re.findall(r'href="/people/(\d+)', text))] for _, text in sections]
    assert keys(console, found[1]) == [f"{one}-1" for one in LATEST_FIRST]
    assert keys(console, found[2]) == ["n"]
    assert last_line(console)["ids"] == [one for ids in found for one in ids]


def test_selected_tracks_are_deleted_after_a_look(guarded):
    ids = [id_of(guarded, "red-0"), id_of(guarded, "blue-2")]
    chosen = {"ids": ids, "address": "order=time"}
    assert guarded.operator.get("/delete", params=chosen).status_code == 403
    page = guarded.admin.get("/delete", params=chosen).text
    (listed,) = re.findall(r'name="ids" value="([0-9 ]+)"', page)
    whole = keys(guarded, [*map(int, listed.split())])
    assert (sorted(whole), last_line(guarded)["action"]) == (["blue-2", "red-0", "red-1"], "view")
    page = guarded.admin.get("/delete", params=chosen | {"address": "by=picture"}).text
    assert f'name="ids" value="{ids[0]} {ids[1]}"' in page
    done = guarded.admin.post("/delete", data={"ids": listed, "reason": "asked for"})
    assert "Deleted 3 pictures" in done.text
    assert guarded.admin.get("/delete").headers["location"] == "/"


def test_a_saved_search_is_shared_with_those_who_may_see_its_cameras(guarded):
    def save(name, address, **more):
        form = {"name": name, "address": address, **more}
        return guarded.operator.post("/saved", data=form).status_code

    def shared(client):
        return client.get("/").text.count("shared by olga")

    known = guarded.service.user_state.saved
    save("red", "q=red", shared="true")
    save("hall", f"q=red&camera={ODD}", shared="true")
    save("Own <b>", "q=own")
    assert "Own &lt;b&gt;</a>" in guarded.operator.get("/").text
    assert save(" ", "q=x") == 422
    assert (shared(guarded.admin), "Own" in guarded.admin.get("/").text) == (2, False)
    assert (shared(guarded.viewer), 'href="/?q=red"' in guarded.viewer.get("/").text) == (1, True)
    guarded.viewer.post("/saved/forget", data={"saved": known("vera")[1].id})  # It is not hers.
    assert shared(guarded.viewer) == 1
    save("red", "q=red")
    assert shared(guarded.viewer) == 0
    for saved in known("olga"):
        guarded.operator.post("/saved/forget", data={"saved": saved.id})
    assert known("olga") == []
