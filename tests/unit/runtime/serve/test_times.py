"""Times of the pages: shown and typed in the zone of an account, and the same in each address."""

import html
import json
import re
import time
from datetime import datetime, timezone
from urllib.parse import parse_qsl

import pytest

from tests.helpers.console import ODD, START, exported, id_of, last_line
from tests.helpers.refused import refused
from upperson_console import times
from upperson_console.oversight import Oversight
from upperson_console.search import Search
from upperson_console.times import read_time
from upperson_console.translation import zone_of
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Item

ZONES = ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "UTC"]


def utc(text):
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()


def choose(client, zone, language=""):
    answer = client.post("/settings", data={"language": language, "zone": zone})
    assert answer.status_code == 303, answer.text


@pytest.fixture
def server_in(monkeypatch):
    """Puts this machine into a zone, by a rule that needs no file."""

    def put(rule):
        monkeypatch.setenv("TZ", rule)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("zone", ["Europe/Berlin", ""])
def test_a_local_time_that_exists_twice_or_never(zone, server_in, in_locale):
    server_in("CET-1CEST,M3.5.0,M10.5.0/3" if not zone else "EST5")
    where = zone_of(zone)
    twice = "2026-10-25T02:30"
    assert read_time(twice, "from", where) == utc("2026-10-25T00:30")
    assert read_time(twice, "to", where, is_end=True) == utc("2026-10-25T01:30")
    for is_end in (False, True):
        assert read_time("2026-07-01T12:00", "to", where, is_end) == utc("2026-07-01T10:00")
        assert read_time("2026-01-01T12:00", "to", where, is_end) == utc("2026-01-01T11:00")
        assert read_time("2026-03-29T02:30Z", "to", where, is_end) == utc("2026-03-29T02:30")
        for skipped in ("2026-03-29T02:00", "2026-03-29T02:59:59"):
            with refused("time_skipped", UsageError, field="to"):
                read_time(skipped, "to", where, is_end)
        for malformed in ("noon", "9999-12-31T23:59:59.9-23:00x", "", "0000-01-01"):
            with refused("time_malformed", UsageError, field="to"):
                read_time(malformed, "to", where, is_end)
    in_locale(zone=where)
    first, second, third = (utc(f"2026-10-25T0{hour}:30") for hour in range(3))
    assert [*map(times.is_twice, (first, second, third))] == [True, True, False]
    assert times.is_twice(None) is times.is_twice(1e300) is False
    assert times.local_time(second, "%H:%M") == "02:30"
    assert times.local_time(first) == "2026-10-25 02:30:00 +02:00"
    assert times.period(first, second).endswith(" \u2013 02:30:00 +01:00")
    assert times.local_time(utc("2026-07-01T10:00:01.5")) == "2026-07-01 12:00:01"
    assert times.local_time(1e300) == "1e+300 s"
    assert times.zone_name().partition(", UTC")[2] in ("+01:00", "+02:00")


def test_an_address_has_its_times_in_utc_and_is_the_same_search_for_all(in_locale):
    in_locale(zone=zone_of("Europe/Berlin"))
    typed = "q=red&since=2026-10-25T02:30&until=2026-10-25T02:30&zone=Europe/Berlin"
    search = Search.from_address(parse_qsl(typed))
    address = search.address()
    assert parse_qsl(address)[1:] == [
        ("since", "2026-10-25T00:30:00Z"), ("until", "2026-10-25T01:30:00Z"),
    ]  # fmt: skip
    exact = Search(where=Filter(since=START + 0.125, until=START + 1.000001))
    for zone in ZONES:
        in_locale(zone=zone_of(zone))
        assert Search.from_address(parse_qsl(address)) == search
        assert Search.from_address(parse_qsl(exact.address())) == exact


def test_addresses_of_earlier_releases_are_of_the_servers_time(guarded, server_in):
    server_in("EST5")
    old = "camera=gate&since=2026-11-24T14:00&until=2026-11-24T14:00:01"
    guarded.service.user_state.save("vera", "old", old)
    choose(guarded.viewer, "Asia/Kathmandu")
    assert f'href="/?{old}"' in html.unescape(guarded.viewer.get("/").text)
    page = guarded.viewer.get(f"/?q=red&{old}").text
    assert 'name="since" step="1" value="2026-11-25T00:45:00"' in page
    assert last_line(guarded)["filter"]["since"] == utc("2026-11-24T19:00")
    # An unknown zone counts as none: nothing of an old address is lost.
    assert guarded.viewer.get(f"/?{old}&zone=Mars/Base").status_code == 200
    guarded.service.user_state.set_settings("vera", "xx", "Mars/Base")
    assert "server&#39;s time" in guarded.viewer.get("/").text


def test_an_export_that_an_earlier_release_was_asked_for_can_be_downloaded(make_guarded, server_in):
    server_in("EST5")
    console = make_guarded(oversight=Oversight(two_persons=("export",)))
    state, one = console.service.user_state, str(id_of(console, "red-0"))
    console.operator.post("/export", data={"ids": one, "address": "q=red&since=2026-09-21T09:00"})
    (request,) = state.approvals()
    id_ = json.loads(request)["id"]
    assert "2026-09-21T14%3A00%3A00Z" in request
    choose(console.admin, "Asia/Kathmandu")
    assert ">red, since 2026-09-21 19:45:00</a>" in console.admin.get("/approvals").text
    state.set_approval(id_, request.replace("2026-09-21T14%3A00%3A00Z", "2026-09-21T09%3A00"))
    assert console.admin.post(f"/approvals/{id_}/approve").status_code == 303
    answer = console.operator.get(f"/api/v1/approvals/{id_}/export")
    assert answer.headers["content-type"] == "application/zip", answer.text


def test_pages_show_and_read_times_in_the_zone_of_the_account(guarded):
    client = guarded.operator
    choose(client, "Asia/Kathmandu")
    one = id_of(guarded, "red-0")
    page = client.get(f"/people/{one}").text
    assert "2026-09-21 19:58:20" in page
    assert page.count("Asia/Kathmandu") == 1, "the zone is named once"
    (around,) = re.findall(r'href="/\?([^"]*since=[^"]*)"', page)
    narrowed = client.get(f"/?{html.unescape(around)}").text
    assert 'name="since" step="1" value="2026-09-21T19:53:20"' in narrowed
    assert '<input form="search-form" type="hidden" name="zone" value="Asia/Kathmandu">' in narrowed
    # What the form sends finds the same as the address of the link.
    typed = dict(re.findall(r'name="(since|until)" step="1" value="([^"]+)"', narrowed))
    form = {"camera": "gate", "order": "time", "zone": "Asia/Kathmandu", **typed}
    again = client.get("/", params=form).text
    cards = [re.findall(r'id="card-(\d+)"', text) for text in (narrowed, again)]
    assert cards[0] == cards[1] != []
    choose(client, "")
    assert times.local_time(START) in client.get(f"/people/{one}").text
    assert 'name="zone"' not in client.get("/").text


def test_a_time_that_clocks_skip_is_refused_with_what_was_typed(guarded):
    choose(guarded.viewer, "Europe/Berlin", "de")
    typed = "/?q=red&camera=gate&zone=Europe/Berlin&since=2026-03-29T02:30"
    wrong_order = typed.replace("-03-", "-04-") + "&until=2026-04-29T02:00"
    for address in (typed, wrong_order):
        answer = guarded.viewer.get(address)
        assert answer.status_code == 422
        for kept in ('-29T02:30" aria-invalid="true"', '"gate" checked', 'value="red"'):
            assert kept in answer.text
    for address, is_told in (("?zone=Europe/Berlin&since=2026-10-25T02:30", True), ("", False)):
        assert ("Am Ende der Sommerzeit" in guarded.viewer.get(f"/{address}").text) == is_told


def test_records_and_accounts_read_times_in_the_zone(guarded):
    choose(guarded.admin, "Asia/Kathmandu")
    now = datetime.now(zone_of("Asia/Kathmandu"))
    guarded.admin.get("/?q=red")
    later = now.replace(year=now.year + 1, microsecond=0, tzinfo=None).isoformat()
    page = guarded.admin.get("/records", params={"since": later}).text
    assert f'name="since" step="1" value="{later}"' in page
    (link,) = re.findall(r'href="/records/lines\?([^"]*)"', page)
    assert dict(parse_qsl(html.unescape(link)))["since"].endswith("Z")
    assert now.strftime("%Y-%m-%d") in guarded.admin.get("/records").text
    form = {"name": "new", "role": "viewer", "expires": later}
    assert guarded.admin.post("/accounts", data=form).status_code == 200
    assert f'value="{later}"' in guarded.admin.get("/accounts").text


def test_a_report_names_the_zone_of_its_reader(console):
    choose(console.client, "Asia/Kathmandu", "fr")
    address = "q=red&since=2026-09-21T14:00:00Z"
    form = {"ids": str(id_of(console, "red-0")), "address": address}
    files = exported(console.client.post("/export", data=form))
    report, facts = files["index.html"].decode(), json.loads(files["manifest.json"])
    assert "<dt>Fuseau horaire</dt><dd>Asia/Kathmandu</dd>" in report
    assert (facts["zone"], facts["exported"][-6:]) == ("Asia/Kathmandu", "+05:45")
    assert "<dd>2026-09-21T19:45:00.000+05:45</dd>" in report
    item = console.client.get(f"/api/v1/items/{id_of(console, 'red-0')}").json()
    assert datetime.fromisoformat(item["time"]).timestamp() == START
    assert "+05:45" not in item["time"]


def test_all_of_time_is_shown(console):
    gallery = console.service.gallery
    vectors = next(gallery.vectors())[1]
    ends = [-62135596800.0, -6e10, 0.0, 2e11, 253402300799.0]
    gallery.add([Item(key=f"{one:g}", camera=ODD, time=one) for one in ends], vectors[:5])
    console.service.current.last.has_changed()
    for zone in ("Asia/Kathmandu", ""):
        choose(console.client, zone)
        for one in ends:
            assert console.client.get(f"/people/{id_of(console, f'{one:g}')}").status_code == 200
