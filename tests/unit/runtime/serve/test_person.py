"""One person: views, other cameras, the frame, an export, marks and a deletion."""

import hashlib
import html
import io
import json
import re
import zipfile

import numpy as np
import pytest

from tests.helpers.console import ODD, START, problem
from tests.helpers.toy_bundle import COLOURS, draw_person
from upperson_console import side_pages
from upperson_console.search import Search
from upperson_rt.gallery import Gallery, Item
from upperson_rt.log_chain import verify_log
from upperson_rt.printable import local_time
from upperson_rt.query_log import QueryLog
from upperson_rt.search.feedback import refine


def id_of(console, key):
    return console.desk.gallery.ids([key])[key]


def lines(console):
    return [json.loads(line) for line in console.log.read_text().splitlines()]


def test_a_page_has_all_views_of_the_track_and_the_nearest_elsewhere(console):
    id_ = id_of(console, "red-0")
    page = console.client.get(f"/people/{id_}?q=red").text
    assert "This track, 2 views" in page
    assert f'href="/people/{id_of(console, "red-1")}?q=red"' in page
    nearest = re.findall(r'class="open" href="/people/(\d+)\?q=red"', page)
    assert nearest[0] == str(id_of(console, "red-2"))
    assert len(nearest) == len(COLOURS)
    assert '<polyline class="way"' in page
    assert 'href="/?q=red"' in page
    assert lines(console)[-1]["action"] == "view"


def test_the_api_tells_the_same(reader):
    id_ = id_of(reader, "red-0")
    item = reader.client.get(f"/api/v1/items/{id_}").json()
    assert (item["key"], item["camera"], item["track"]) == ("red-0", "gate", "red-False")
    assert reader.client.get(item["picture"]).headers["content-type"] == "image/jpeg"
    track = reader.client.get("/api/v1/tracks", params={"track": "red-False", "camera": "gate"})
    assert [view["key"] for view in track.json()["views"]] == ["red-0", "red-1"]
    assert track.json()["span"]["pictures"] == 2
    problem(reader.client.get("/api/v1/tracks", params={"track": "nobody"}), 404)


@pytest.mark.parametrize("size", ["thumb", "view"])
def test_pictures_are_small_jpegs_by_id(reader, size):
    from PIL import Image

    answer = reader.client.get(f"/people/{id_of(reader, 'red-0')}/picture?size={size}")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == "JPEG"
        assert image.size == (64, 192)
    assert answer.headers["cache-control"] == "private, max-age=3600"


def test_the_box_is_shown_in_the_frame(console, tmp_path):
    frame = draw_person(tmp_path / "frame.png", "red", size=(300, 200))
    item = Item(key="boxed", camera="gate", source=str(frame), box=(10, 20, 110, 180))
    console.desk.gallery.add([item], console.desk.encoder.encode_texts(["red"]))
    id_ = id_of(console, "boxed")
    assert f'href="/people/{id_}/frame"' in console.client.get(f"/people/{id_}").text
    page = console.client.get(f"/people/{id_}/frame").text
    assert 'viewBox="0 0 300 200"' in page
    assert '<rect x="10" y="20" width="100" height="160"/>' in page
    from PIL import Image

    with Image.open(io.BytesIO(console.client.get(f"/people/{id_}/picture").content)) as image:
        assert image.size == (100, 160)
    assert console.client.get(f"/people/{id_of(console, 'red-0')}/frame").status_code == 404


ASKED = {"sentence": "red <b>", "filter": {"since": "2026-09-21T13:00:00Z"}}


def test_an_export_stands_by_itself(console):
    ids = [id_of(console, f"red-{number}") for number in range(3)]
    answer = console.client.post("/api/v1/export", json={"ids": [*map(str, ids)], "search": ASKED})
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    hashes = json.loads(files.pop("manifest.json"))["sha256"]
    assert hashes == {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    facts = json.loads(files["items.json"])
    assert facts["model"]["fingerprint"] == console.desk.encoder.fingerprint
    assert facts["query"]["search"] == ASKED
    assert [one["key"] for one in facts["items"]] == ["red-0", "red-1", "red-2"]
    kept = (console.folder / "crops" / "red0.png").read_bytes()
    assert files[facts["items"][0]["file"]] == kept
    page = files["index.html"].decode()
    assert "<b>hall" not in page
    assert "red \\u003cb\\u003e" in page
    last = lines(console)[-1]
    assert (last["action"], last["ids"]) == ("export", ids)
    assert last["details"]["sha256"] == hashlib.sha256(answer.content).hexdigest()


def test_marks_refine_one_search_and_can_be_taken_back(reader):
    asked = {"sentence": "a coat", "by_track": False, "limit": 18}
    before = reader.client.search(**asked).json()["hits"]
    yes, no = str(id_of(reader, "green-0")), before[0]["id"]
    after = reader.client.search(**asked, yes=[yes], no=[no]).json()["hits"]
    assert after[0]["key"].startswith("green")
    assert [hit["id"] for hit in after].index(no) > 0
    assert reader.client.search(**asked).json()["hits"] == before
    other = {**asked, "sentence": "red"}
    assert reader.client.search(**other).json() == reader.client.search(**other).json()


def test_a_person_is_marked_on_its_own_page(guarded):
    id_, other = id_of(guarded, "red-0"), id_of(guarded, "red-2")
    page = guarded.operator.get(f"/people/{id_}?q=red").text
    yes = f'name="yes" value="{id_}" aria-pressed="false"'
    assert page.count(yes) == 1
    assert f'name="no" value="{other}"' in page  # Who is nearest elsewhere, too.
    form = {"address": "q=red", "yes": id_, "person": id_}
    marked = guarded.operator.post("/marks", data=form)
    assert marked.headers["location"] == f"/people/{id_}?q=red&marks=y{id_}"
    page = guarded.operator.get(marked.headers["location"]).text
    assert yes.replace("false", "true") in page
    assert "Refined by 1 yes, 0 no" in page
    assert guarded.desk.memory.marks("olga", Search(sentence="red").question) == ([id_], [])
    # There is nothing to mark without a question, nor for a viewer.
    assert 'name="yes"' not in guarded.operator.get(f"/people/{id_}").text
    assert 'name="yes"' not in guarded.viewer.get(f"/people/{id_}?q=red").text


def test_a_person_is_told_as_people_look_for_it(console):
    console.desk.gallery.add(
        [Item(key="boxed", camera="gate", time=START, box=(10, 20, 110, 180), source="a/b.jpg",
              track="gate-7", attributes={"floor": 2, "sharpness": 1921.6})],
        console.desk.encoder.encode_texts(["red"]),
    )  # fmt: skip
    page = html.unescape(console.client.get(f"/people/{id_of(console, 'boxed')}?q=red").text)
    facts, _, raw = page.partition('<details class="raw">')
    assert re.search(
        r'<dt>Match</dt><dd>\s*<span class="match [a-z-]+" title="score 1.000">', facts
    )
    assert f"<dt>Seen</dt><dd>{local_time(START)}</dd>" in facts
    assert "<dt>floor</dt><dd>2</dd>" in facts
    assert "a/b.jpg" not in facts
    assert "1921" not in facts
    assert "<dt>Sharpness</dt><dd>1921.6</dd>" in raw
    assert "100 \u00d7 160 pixels, at 10, 20" in raw
    assert "<dt>Track</dt><dd>gate-7</dd>" in raw
    around = re.search(r'href="/\?([^"]*)">Who else was there then', page)[1]
    there = console.client.get(f"/?{around}").text
    (newest, *_) = re.findall(r'class="open" href="/people/(\d+)', there)
    assert int(newest) in {id_of(console, "red-0"), id_of(console, "red-1")}
    views = html.unescape(console.client.get(f"/people/{id_of(console, 'red-0')}?q=red").text)
    assert re.search(r"<dt>Seen</dt><dd>[\d: -]+ \u2013 [\d:]+, 2 views</dd>", views)
    # A picture that is not kept any more is no reason not to show the person.
    gone = console.client.get(f"/people/{id_of(console, 'red-0')}?picture={'0' * 32}")
    assert gone.status_code == 200
    assert "<dt>Match</dt>" not in gone.text


def test_the_word_on_the_page_is_that_on_the_card(console):
    for address in ("q=red", "q=red+without+a+bag", f"like={id_of(console, 'red-2')}"):
        page = console.client.get(f"/?{address}").text
        cards = re.findall(
            r'/people/(\d+)\?.*?(<span class="match [^"]*" title="[^"]*">)', page, re.DOTALL
        )
        assert len(cards) == 12
        for id_, match in cards[:3]:
            assert match in console.client.get(f"/people/{id_}?{address}").text


def test_marks_on_the_page_are_kept_with_the_search(console):
    green, red = id_of(console, "green-0"), id_of(console, "red-0")
    first = console.client.post("/marks", data={"address": "q=coat", "yes": green})
    assert first.headers["location"] == f"/?q=coat&marks=y{green}"
    second = console.client.post("/marks", data={"address": f"q=coat&marks=y{green}", "no": red})
    assert second.headers["location"] == f"/?q=coat&marks=y{green}.n{red}"
    assert lines(console)[-1]["action"] == "mark"
    page = console.client.get("/?q=coat").text
    assert "You marked 1 yes and 1 no for this search before" in page
    assert f"marks=y{green}.n{red}" in page
    assert "You marked" not in console.client.get("/?q=shirt").text
    undone = console.client.post(
        "/marks", data={"address": f"q=coat&marks=y{green}.n{red}", "undo": "last"}
    )
    assert undone.headers["location"] == f"/?q=coat&marks=y{green}"
    again = console.client.post("/marks", data={"address": f"q=coat&marks=y{green}", "yes": green})
    assert again.headers["location"] == "/?q=coat"
    assert "You marked" not in console.client.get("/?q=coat").text


def test_refining_has_bounds_and_gives_the_same_bits():
    rng = np.random.default_rng(0)

    def some(count):
        vectors = rng.normal(size=(count, 32))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    query, nothing = some(1)[0], np.empty((0, 32), np.float32)
    assert refine(query, nothing, nothing) is query
    for yes, no in ((1, 0), (0, 1), (60, 0), (0, 60), (20, 20)):
        ours, theirs = some(yes), some(no)
        moved = refine(query, ours, theirs)
        assert np.linalg.norm(moved) == pytest.approx(1, abs=1e-5)
        assert moved.dtype == np.float32
        assert (moved == refine(query, ours, theirs)).all()
        assert moved @ query > 0.1
    assert (refine(query, nothing, np.repeat(query[None], 9, axis=0)) @ query) == pytest.approx(1)
    assert (refine(query, -query[None], nothing) != 0).any()


def test_saved_searches_have_a_name(console):
    console.client.post("/saved", data={"name": "Red <b>", "address": "q=red&camera=gate"})
    page = console.client.get("/").text
    assert "Red &lt;b&gt;" in page
    assert 'href="/?q=red&amp;camera=gate"' in page
    (saved,) = console.desk.memory.saved("desk")
    console.client.post("/saved/forget", data={"saved": saved.id})
    assert console.desk.memory.saved("desk") == []
    assert console.client.post("/saved", data={"name": " ", "address": "q=x"}).status_code == 422


def test_a_deletion_is_looked_at_first_and_needs_a_reason(console):
    id_ = id_of(console, "red-0")
    look = console.client.get(f"/people/{id_}/delete?what=alike&min_score=0.9").text
    alike = re.search(r'name="ids" value="([\d ]+)"', look)[1]
    assert set(map(int, alike.split())) >= {id_}
    assert "looks are no identity" in look
    refused = console.client.post("/delete", data={"ids": alike, "reason": " ", "what": "alike"})
    assert refused.status_code == 422
    assert "needs a reason" in refused.text
    assert console.desk.gallery.count() == 18
    done = console.client.post("/delete", data={"ids": alike, "reason": "asked", "what": "alike"})
    count = len(alike.split())
    assert f"Deleted {count} picture" in done.text
    assert console.desk.gallery.count() == 18 - count
    last = lines(console)[-1]
    assert (last["action"], last["details"]["reason"]) == ("delete", "asked")
    assert not (console.folder / "crops" / "red0.png").exists()
    assert verify_log(console.log).problems == []


def test_the_api_deletes_tracks_and_whoever_is_alike(console):
    id_ = id_of(console, "blue-0")
    path = f"/api/v1/items/{id_}/alike"
    dry = console.client("DELETE", path, params={"min_score": 0.99}).json()
    assert dry["dry_run"] is True
    assert console.desk.gallery.count() == 18
    assert "needs a reason" in problem(
        console.client("DELETE", path, params={"min_score": 0.99, "dry_run": False}), 422
    )
    params = {"min_score": 0.99, "dry_run": False, "reason": "asked"}
    assert console.client("DELETE", path, params=params).json()["deleted"] == dry["deleted"] >= 1
    track = {"track": "red-True", "camera": ODD, "reason": "asked"}
    assert console.client("DELETE", "/api/v1/tracks", params=track).json()["deleted"] == 1


def test_pruning_counts_first(console):
    asked = {"keep_newest": 5, "reason": "enough"}
    assert console.client.post("/api/v1/prune", json=asked).json() == {
        "deleted": 13,
        "dry_run": True,
    }
    assert console.desk.gallery.count() == 18
    assert (
        console.client.post("/api/v1/prune", json={**asked, "dry_run": False}).json()["deleted"]
        == 13
    )
    assert console.desk.gallery.count() == 5
    page = console.client.post("/records/prune", data={"days": "0", "act": "look"}).text
    assert "would go" in page
    assert console.client.get("/records").status_code == 200


def test_the_timeline_narrows_the_search(reader):
    page = reader.client.get("/timeline?q=red&order=time").text
    bars = re.findall(r'<a href="(/\?[^"]*)" aria-label="([^"]*)">', page)
    assert {text.partition(",")[0] for _, text in bars} == {
        "gate",
        ODD.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;"),
    }
    total = sum(int(text.rpartition(" ")[2]) for _, text in bars)
    assert total == 12
    found = 0
    for address, text in bars:
        page = reader.client.get(html.unescape(address)).text
        there = len(re.findall('class="open"', page))
        assert there == int(text.rpartition(" ")[2])
        found += there
    assert found == total


def test_the_live_page_needs_no_process(reader, make_console, tmp_path):
    page = reader.client.get("/live").text
    assert "No process is named" in page
    assert "gate" in page


def test_a_gallery_on_milvus_is_served_as_well(
    make_console, served_folder, served_encoder, tmp_path
):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: extra 'milvus'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
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
    assert first["hits"][0]["key"].startswith("red")
    assert len(first["hits"][0]["id"]) > 15
    second = console.client.search(sentence="red", limit=3, cursor=first["next"]).json()
    assert not {hit["id"] for hit in first["hits"]} & {hit["id"] for hit in second["hits"]}
    id_ = first["hits"][0]["id"]
    page = console.client.get(f"/people/{id_}?q=red&marks=y{id_}")
    assert page.status_code == 200
    assert "no picture kept" in page.text
    assert "Nearest in other cameras" in page.text
    cameras = {one["name"]: one["pictures"] for one in console.client.get("/api/v1/cameras").json()}
    assert cameras == {"gate": 12, ODD: 6}
    marked = console.client.post("/marks", data={"address": "q=red", "yes": id_})
    assert marked.headers["location"] == f"/?q=red&marks=y{id_}"
    assert console.client.get(marked.headers["location"]).status_code == 200
    assert console.client("DELETE", f"/api/v1/items/{id_}?reason=x").json()["deleted"] == 1
    problem(console.client.get(f"/api/v1/items/{id_}"), 404)


@pytest.mark.parametrize(
    ("path", "action", "more"),
    [
        ("/timeline?q=red", "timeline", {}),
        ("/people/{id}/delete?what=alike&min_score=0.9", "alike", {"like": "{id}"}),
        ("/people/{id}/delete", "view", {"picture": "{id}"}),
        ("/people/{id}", "view", {"elsewhere": "{id}"}),
    ],
)
def test_whatever_finds_people_is_in_the_log(console, path, action, more):
    id_ = id_of(console, "red-0")
    assert console.client.get(path.format(id=id_)).status_code == 200
    last = lines(console)[-1]
    assert (last["user"], last["action"]) == ("desk", action)
    assert last["time"]
    assert last["details"].items() >= {k: v.format(id=id_) for k, v in more.items()}.items()
    if action == "timeline":  # By track: one picture stands for it.
        assert (last["sentence"], last["by_track"], len(last["ids"])) == ("red", True, 12)
    else:
        assert (id_of(console, "red-2") if "elsewhere" in more else id_) in last["ids"]


def test_a_dry_run_of_a_deletion_is_in_the_log(console):
    id_ = id_of(console, "red-0")
    params = {"min_score": 0.9}
    dry = console.client("DELETE", f"/api/v1/items/{id_}/alike", params=params).json()
    (line,) = lines(console)
    assert (line["user"], line["action"], len(line["ids"])) == ("desk", "alike", dry["deleted"])
    assert line["details"] == {"like": str(id_), "min_score": 0.9}


def test_a_long_log_is_read_through_when_somebody_asks(console, monkeypatch):
    console.client.search(sentence="red")
    monkeypatch.setattr(side_pages, "SOON_BYTES", 10)
    read = []
    monkeypatch.setattr(
        side_pages, "verify_log", lambda path: read.append(path) or verify_log(path)
    )
    page = console.client.get("/records").text
    assert "Check every line" in page
    assert ">red</td>" in page  # The newest lines are there nevertheless.
    assert read == []
    assert "1 line, none changed or removed" in console.client.get("/records?check=true").text
    assert read == [console.log]


def test_a_damaged_line_is_shown_among_the_others(console):
    console.client.get("/?q=green")
    with open(console.log, "ab") as file:
        file.write(b"garbage <b>\n[1]\n")
    answer = console.client.get("/records")
    assert answer.status_code == 200
    assert answer.text.count("<td>damaged</td>") == 2
    assert "garbage &lt;b&gt;" in answer.text
    assert "line 2 is not what was written" in answer.text
    assert '<td class="wide">green</td>' in answer.text


@pytest.mark.parametrize("way", ["removed", "cut", "replaced"])
def test_a_log_that_was_manipulated_goes_on_in_a_new_file_and_the_console_says_so(console, way):
    for sentence in ("red", "blue"):
        console.client.search(sentence=sentence)
    content = console.log.read_bytes()
    if way != "cut":
        console.log.unlink()
    if way != "removed":
        console.log.write_bytes(content[: content.index(b"\n") + 1])
    else:
        assert console.client.get("/records").status_code == 503
    assert 'role="alert"' not in console.client.get("/").text
    assert console.client.search(sentence="green").status_code == 200
    first, line = map(json.loads, console.log.read_text().splitlines())
    assert (first["action"], line["sentence"]) == ("break", "green")
    for page in ("/", "/?q=green", "/records"):
        assert "The query log was cut, changed or removed" in console.client.get(page).text
    assert "log acknowledge" in console.client.get("/api/v1/info").json()["log_problem"]
    assert "upperson_serve_log_broken 1.0" in console.client.get("/api/v1/metrics").text
    with QueryLog(console.log, user="eve") as log:  # Another process acknowledges it.
        log.acknowledge()
    console.client.search(sentence="green")
    assert console.client.get("/api/v1/info").json()["log_problem"] == ""
    assert "The query log was cut" not in console.client.get("/records").text
    assert verify_log(console.log).problems == []
