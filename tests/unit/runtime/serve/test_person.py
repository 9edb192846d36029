"""One person: views, other cameras, the frame, an export, marks, a deletion, and the records."""

import html
import re
from datetime import datetime
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.helpers.console import (
    ODD,
    START,
    add_items,
    id_of,
    last_line,
    log_lines,
    logged,
    picture_in,
    problem,
)
from tests.helpers.toy_bundle import COLOURS, draw_person
from tests.unit.runtime.serve.conftest import LOCAL
from upperson_console import side_pages
from upperson_console.search import Search
from upperson_log.chain import verify_log
from upperson_log.query_log import QueryLog
from upperson_rt.gallery import Gallery, Item
from upperson_rt.printable import local_time


def size_of(answer):
    assert answer.headers["content-type"] == "image/jpeg"
    return picture_in(answer.content).size


def mark(client, address, **form):
    """Mark on a page; return where it leads."""
    return client.post("/marks", data={"address": address, **form}).headers["location"]


def test_page_and_api_have_all_views_of_the_track(console):
    id_ = id_of(console, "red-0")
    page = console.client.get(f"/people/{id_}?q=red").text
    for part in (f'href="/people/{id_of(console, "red-1")}?q=red"', 'href="/?q=red"',
                 "This track, 2 views", 'aria-label="Where and when"'):  # fmt: skip
        assert part in page
    nearest = re.findall(r'class="open" href="/people/(\d+)\?q=red"', page)
    assert nearest[0] == str(id_of(console, "red-2"))  # At the other camera.
    assert len(nearest) == len(COLOURS)
    item = console.client.get(f"/api/v1/items/{id_}").json()
    assert (item["key"], item["camera"], item["track"]) == ("red-0", "gate", "red-False")
    for size in ("thumb", "view"):
        assert size_of(console.client.get(f"{item['picture']}?size={size}")) == (64, 192)
    params = {"track": "red-False", "camera": "gate"}
    track = console.client.get("/api/v1/tracks", params=params).json()
    assert [view["key"] for view in track["views"]] == ["red-0", "red-1"]
    assert track["span"]["pictures"] == 2
    answer = console.client.get("/api/v1/tracks", params={"track": "nobody"})
    problem(answer, 404, "track_not_found")


def test_a_person_has_its_facts_and_the_frame_with_its_box(console, tmp_path):
    frame = draw_person(tmp_path / "frame.png", "red", size=(300, 200))
    about = {"track": "gate-7", "attributes": {"floor": 2, "sharpness": 1921.6}}
    place = {"camera": "gate", "time": START, "box": (10, 20, 110, 180), "source": str(frame)}
    (id_,), client = add_items(console, Item(key="boxed", **place, **about)), console.client
    page = html.unescape(client.get(f"/people/{id_}?q=red").text)
    facts, _, raw = page.partition('<details class="raw">')
    assert re.search(r'<dt>Match</dt><dd>\s*<span class="match [a-z-]+" title="score 1', facts)
    for fact in (f"<dt>Seen</dt><dd>{local_time(START)}</dd>", ">floor</dt><dd>2</dd>"):
        assert fact in facts
    for fact in (str(frame), "<dt>Sharpness</dt><dd>1921.6</dd>", ">gate-7</dd>"):
        assert (fact in raw, fact in facts) == (True, False)
    around = re.search(r'href="/\?([^"]*)">Who else was there then', page)[1]
    newest = re.findall(r'class="open" href="/people/(\d+)', client.get(f"/?{around}").text)[0]
    assert int(newest) in {id_of(console, "red-0"), id_of(console, "red-1")}
    assert size_of(client.get(f"/people/{id_}/picture")) == (100, 160)
    other = id_of(console, "red-0")
    assert client.get(f"/people/{other}/frame").status_code == 404
    # Without its query picture the person is shown nevertheless.
    gone = client.get(f"/people/{other}?picture={'0' * 32}")
    assert (gone.status_code, "<dt>Match</dt>" in gone.text) == (200, False)


@pytest.mark.parametrize("name", ["reader", "calibrated"])
def test_match_and_likelihood_of_page_and_card_are_the_same(name, request):
    console = request.getfixturevalue(name)
    pattern = r'<span class="match [^"]*" title="[^"]*">(?:<span.*?</span>)*[^<]*</span>'
    for address in ("q=a+red+coat", "q=red+coat,+no+bag", f"like={id_of(console, 'red-2')}"):
        page = console.client.get(f"/?{address}").text
        cards = re.findall(rf"/people/(\d+)\?.*?({pattern})", page, re.DOTALL)
        assert len(cards) == (18 if name == "calibrated" else 12)
        for id_, label in cards[:3]:
            assert label in console.client.get(f"/people/{id_}?{address}").text


def test_marks_refine_one_search_and_can_be_removed(reader):
    query = {"sentence": "a coat", "by_track": False, "limit": 18}
    before = reader.client.search(**query).json()["hits"]
    yes, no = str(id_of(reader, "green-0")), before[0]["id"]
    after = reader.client.search(**query, yes=[yes], no=[no]).json()["hits"]
    assert after[0]["key"].startswith("green")
    assert [hit["id"] for hit in after].index(no) > 0
    assert reader.client.search(**query).json()["hits"] == before


def test_marks_are_kept_with_the_search(guarded):
    client, id_, other = guarded.operator, id_of(guarded, "red-0"), id_of(guarded, "red-2")
    page = client.get(f"/people/{id_}?q=red").text
    yes = f'name="yes" value="{id_}" aria-pressed="false"'
    assert page.count(yes) == 1
    assert f'name="no" value="{other}"' in page  # The nearest elsewhere can be marked, too.
    place = mark(client, "q=red", yes=id_, person=id_)
    assert place == f"/people/{id_}?q=red&marks=y{id_}"
    line = last_line(guarded)
    assert (line["action"], line["ids"], line["details"]["yes"]) == ("mark", [id_], [id_])
    assert yes.replace("false", "true") in client.get(place).text
    both = f"q=red&marks=y{id_}.n{other}"
    assert mark(client, f"q=red&marks=y{id_}", no=other) == f"/?{both}#card-{other}"
    key = Search(sentence="red").marks_key
    assert guarded.service.user_state.marks("olga", key) == {id_: True, other: False}
    page = client.get("/?q=red").text
    assert "Marked before, or on another page: 1 yes, 1 no." in page
    assert f"marks=y{id_}.n{other}" in page
    assert "Marked before" not in client.get(f"/?{both}").text
    assert mark(client, both, undo="last") == f"/?q=red&marks=y{id_}"
    assert mark(client, f"q=red&marks=y{id_}", yes=id_) == f"/?q=red#card-{id_}"
    assert last_line(guarded)["details"]["removed"] == [id_]
    # There is nothing to mark without a query, nor for a viewer.
    assert 'name="yes"' not in client.get(f"/people/{id_}").text
    assert 'name="yes"' not in guarded.viewer.get(f"/people/{id_}?q=red").text


def test_two_pages_do_not_overwrite_each_others_marks(guarded):
    client, key = guarded.operator, Search(sentence="red").marks_key
    one, two, three = (id_of(guarded, f"red-{number}") for number in range(3))

    def kept():
        return guarded.service.user_state.marks("olga", key)

    mark(client, "q=red", yes=one)
    # A page that was opened before knows nothing of that mark.
    assert mark(client, "q=red", no=two) == f"/?q=red&marks=y{one}.n{two}#card-{two}"
    # Another one, of an address with marks of its own, removes a mark.
    place = mark(client, f"q=red&marks=y{one}.y{three}", yes=one)
    assert place == f"/?q=red&marks=y{three}.n{two}#card-{one}"
    assert kept() == {two: False}
    mark(client, f"q=red&marks=y{one}.n{two}", each="yes", ids=[one, two])
    assert kept() == {one: True, two: True}
    # The API changes what it names.
    change = {"sentence": "red", "no": [str(three)], "remove": [str(one)]}
    answer = client("PUT", "/api/v1/marks", json=change)
    assert answer.json() == {"yes": [str(two)], "no": [str(three)]}
    # A page undoes its own marks, and does not show those of others in their place.
    for own, left in ((f"n{three}", {two: True}), (f"y{two}", {})):
        assert mark(client, f"q=red&marks={own}", undo="all") == "/?q=red"
        assert kept() == left


def pictures_of(console):
    return sum(info.pictures for info in console.service.cameras(LOCAL).values())


def test_a_deletion_shows_first_what_goes_and_needs_a_reason(console):
    client, id_ = console.client, id_of(console, "red-0")
    look = client.get(f"/people/{id_}/delete?what=alike&min_score=0.9").text
    ids = re.search(r'name="ids" value="([\d ]+)"', look)[1]
    count = len(ids.split())
    assert str(id_) in ids.split()
    assert pictures_of(console) == 18
    form = {"ids": ids, "what": "alike"}
    assert client.post("/delete", data={**form, "reason": " "}).status_code == 422
    assert console.service.gallery.count() == 18
    done = client.post("/delete", data={**form, "reason": "requested"})
    assert f"Deleted {count} picture" in done.text
    assert console.service.gallery.count() == pictures_of(console) == 18 - count
    last = last_line(console)
    assert (last["action"], last["details"]["reason"]) == ("delete", "requested")
    assert not (console.folder / "crops" / "red0.png").exists()


def test_the_api_deletes_and_prunes_after_a_dry_run(console):
    def delete(**params):
        return console.client("DELETE", path, params={"min_score": 0.99, **params})

    def prune(**body):
        return console.client.post("/api/v1/prune", json={"keep_newest": 5, **body})

    assert prune().json() == {"deleted": 13, "dry_run": True}
    problem(prune(dry_run=False), 422, "reason_missing")
    path = f"/api/v1/items/{id_of(console, 'blue-0')}/alike"
    dry = delete().json()
    line = last_line(console)
    assert (line["action"], len(line["ids"])) == ("alike", dry["deleted"])
    assert (dry["dry_run"], console.service.gallery.count()) == (True, 18)
    for unseen in ({}, {"reason": "\u200b"}):
        problem(delete(dry_run=False, **unseen), 422, "reason_missing")
    problem(delete(dry_run=False, reason="x" * 501), 422, "request_invalid")
    assert delete(dry_run=False, reason="requested").json()["deleted"] == dry["deleted"] >= 1
    track = {"track": "green-True", "camera": ODD, "reason": "requested"}
    assert console.client("DELETE", "/api/v1/tracks", params=track).json()["deleted"] == 1
    left = pictures_of(console)
    assert console.service.gallery.count() == left
    assert prune(dry_run=False, reason="enough").json()["deleted"] == left - 5
    assert console.service.gallery.count() == pictures_of(console) == 5
    assert verify_log(console.log).problems == []
    page = console.client.post("/records/prune", data={"days": "0", "act": "look"}).text
    assert "5 pictures would go" in page


def test_the_timeline_narrows_the_search(reader):
    page = reader.client.get("/timeline?q=red&order=time").text
    bars = re.findall(r'<a href="(/\?[^"]*)" aria-label="([^"]*)">', page)
    assert {html.unescape(text).partition(",")[0] for _, text in bars} == {"gate", ODD}
    counts = [int(text.rpartition(" ")[2]) for _, text in bars]
    assert sum(counts) == 12
    for (address, _), count in zip(bars, counts, strict=True):
        narrowed = parse_qs(urlsplit(html.unescape(address)).query)
        begin, end = (datetime.fromisoformat(narrowed[name][0]) for name in ("since", "until"))
        assert (end - begin).total_seconds() == 300  # The narrowest step of 60 bars at most.
        assert reader.client.get(html.unescape(address)).text.count('class="open"') == count


def test_a_gallery_on_milvus_is_served_as_well(
    make_console, served_folder, served_encoder, tmp_path
):
    for name in ("pymilvus", "milvus_lite"):
        pytest.importorskip(name, reason=f"{name} is not installed: extra 'milvus'")
    place = f"milvus://{tmp_path}/people.db/people"
    space = served_encoder.fingerprint, served_encoder.embed_dim
    with (
        Gallery.open(place, *space, create=True) as there,
        Gallery.open(served_folder / "gallery") as source,
    ):
        for items, vectors in source.vectors():
            there.add(items, vectors)
    console = make_console(folder=place)
    first = console.client.search(sentence="red", limit=3).json()
    second = console.client.search(sentence="red", limit=3, cursor=first["next"]).json()
    assert not {hit["id"] for hit in first["hits"]} & {hit["id"] for hit in second["hits"]}
    id_, key = (first["hits"][0][name] for name in ("id", "key"))
    assert (key[:3], len(id_) > 15) == ("red", True)
    page = console.client.get(f"/people/{id_}?q=red&marks=y{id_}")
    assert "Nearest in other cameras" in page.text
    for address in ("/?order=time", "/?camera=gate&by=picture", "/"):
        assert console.client.get(address).text.count('class="open"') == 12
    cameras = {one["name"]: one["pictures"] for one in console.client.get("/api/v1/cameras").json()}
    assert cameras == {"gate": 12, ODD: 6}
    assert mark(console.client, "q=red", yes=id_) == f"/?q=red&marks=y{id_}#card-{id_}"
    assert console.client("DELETE", f"/api/v1/items/{id_}?reason=x").json()["deleted"] == 1
    problem(console.client.get(f"/api/v1/items/{id_}"), 404, "picture_not_found")


def test_whatever_finds_people_is_in_the_log(console):
    id_, other = id_of(console, "red-0"), id_of(console, "red-2")
    for path, action, details, found in (
        (f"/people/{id_}/delete?what=alike", "alike", {"like": str(id_), "min_score": 0.9}, id_),
        (f"/people/{id_}/delete", "view", {"picture": str(id_)}, id_),
        (f"/people/{id_}", "view", {"elsewhere": str(id_)}, other),
    ):
        assert console.client.get(path).status_code == 200
        last = logged(console, user="local", action=action, details=details)
        assert found in last["ids"]
    console.client.get(f"/people/{id_}?q=a+blue+coat&camera=gate&like={other}")
    line = next(one for one in log_lines(console) if one["sentence"])
    assert (line["action"], line["sentence"]) == ("view", "a blue coat")
    assert line["filter"]["camera"] == ["gate"]
    assert line["details"] == {"picture": str(id_), "like": str(other)}
    assert console.client.get("/timeline?q=red").status_code == 200
    last = logged(
        console, action="timeline", sentence="red", by_track=True
    )  # By track: one picture stands for it.
    assert len(last["ids"]) == 12


def test_the_records_show_the_log_and_check_it(console, monkeypatch):
    """A long log is read through on request only; damaged lines are shown as such."""
    console.client.search(sentence="red")
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(side_pages, "SOON_BYTES", 10)
        patch.setattr(side_pages, "verify_log", lambda path: read.append(path) or verify_log(path))
        assert ">red<br>" in console.client.get("/records").text
        assert read == []
        assert "1 line, none changed" in console.client.get("/records?check=true").text
        assert read == [console.log]
    with open(console.log, "ab") as file:
        file.write(b"garbage <b>\n[1]\n")
    page = console.client.get("/records").text
    assert page.count("<td>damaged</td>") == 2
    for part in ("garbage &lt;b&gt;", "line 2 is not what was written", '<td class="wide">red<br>'):
        assert part in page


def test_a_manipulated_log_goes_on_in_a_new_file_and_the_console_says_so(console):
    client, content = console.client, b""
    for sentence in ("red", "blue"):
        client.search(sentence=sentence)
        content = content or console.log.read_bytes()
    console.log.unlink()
    assert client.get("/records").status_code == 503
    console.log.write_bytes(content)  # As it was after the first search.
    assert client.search(sentence="green").status_code == 200
    first, line = log_lines(console)
    assert (first["action"], line["sentence"]) == ("break", "green")
    for page in ("/", "/?q=green", "/records"):
        assert "The query log was cut, changed or removed" in client.get(page).text
    assert "log acknowledge" in client.get("/api/v1/info").json()["log_problem"]
    assert "upperson_serve_log_broken 1.0" in client.get("/api/v1/metrics").text
    with QueryLog(console.log, user="eve") as log:  # Another process acknowledges it.
        log.acknowledge()
    client.search(sentence="green")
    assert client.get("/api/v1/info").json()["log_problem"] == ""
    assert "The query log was cut" not in client.get("/records").text
    assert verify_log(console.log).problems == []
