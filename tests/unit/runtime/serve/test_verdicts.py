"""Verdicts and likelihoods in the console: results, timeline, person, API and log."""

import html
import re
import shutil

import pytest

from tests.helpers.console import ODD, START, add_items, id_of, last_line
from tests.helpers.toy_bundle import EMBED_DIM, calibrate_toy_bundle
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Item
from upperson_rt.score_calibration import Reference
from upperson_rt.search import shift


@pytest.fixture
def compared(monkeypatch):
    """Sets the number of pictures that are compared with the calibration, in every time zone."""
    monkeypatch.setattr(shift, "_DAYLIGHT", range(24))
    return lambda least: monkeypatch.setattr(shift, "LEAST", least)


def verdict_on(page):
    """The word and the text of a page's first verdict."""
    found = re.search(r'<p class="verdict (\w+)">([^<]*)</p>', page)
    return found[1], html.unescape(found[2])


@pytest.mark.parametrize(
    ("word", "sentence", "floor"),
    [
        ("likely", "a woman in a red coat", {}),
        ("possible", "a woman in a red coat", {"floor": 1}),
        ("nobody", "woman in a coat", {}),
        ("uncalibrated", "zebra", {}),
    ],
)
def test_page_api_and_log_have_the_verdict(calibrated, compared, word, sentence, floor):
    compared(3)
    found = calibrated.client.search(sentence=sentence, filter={"attributes": floor}).json()
    verdict = found["verdict"]
    labels, likelihoods = ([hit[name] for hit in found["hits"]] for name in ("match", "likelihood"))
    where = {"where": [f"{key}={value}" for key, value in floor.items()]}
    page = calibrated.client.get("/", params={"q": sentence, **where}).text
    shown, text = verdict_on(page)
    kept = last_line(calibrated)["details"]
    assert word == verdict["word"] == shown == kept["verdict"]
    assert kept.get("likelihood") == verdict["likelihood"]
    assert text.lower().startswith(verdict["text"].lower())
    if word == "uncalibrated":
        assert (verdict["reason"], verdict["likelihood"]) == ("words_unknown", None)
        assert ({*labels}, {*likelihoods}) == ({""}, {None})
        assert ('class="match unknown"' in page, "%" in text) == (True, False)
    else:
        assert labels[0] == {"nobody": "unlikely"}.get(word, word)
        if verdict["expected_matches"] is not None:
            assert verdict["expected_matches"] == pytest.approx(sum(likelihoods), abs=1.5)
        assert verdict["likelihood"] == pytest.approx(likelihoods[0], abs=0.02)
        assert re.search(rf'class="match {labels[0]}" .*{labels[0]} .*\d+\xa0%<', page)
    if word == "likely":
        assert labels.count("likely") == 3  # The tracks of people in red.


def test_a_user_sees_nothing_of_other_cameras(make_guarded, calibrated_encoder, compared):
    client = make_guarded(encoder=calibrated_encoder).viewer
    verdict = client.search(sentence="a woman in red").json()["verdict"]
    assert (verdict["reason"], verdict["fields"]["pictures"]) == ("few_pictures", 12)
    compared(1)
    metrics = client.get("/api/v1/metrics").text
    assert metrics.count("upperson_score_shift_distance{") == 1  # No other camera is named.
    hidden = client.search(sentence="red coat", filter={"cameras": [ODD]}).json()["verdict"]
    assert hidden["reason"] == "nothing_searched"


def test_pictures_unlike_those_of_the_calibration_are_named_and_measured(
    make_console, served_folder, tmp_path, monkeypatch, compared
):
    bundle = shutil.copytree(served_folder / "bundle", tmp_path / "bundle")
    ones = (1.0,) * EMBED_DIM
    reference = Reference(mean=(0.0,) * EMBED_DIM, axes=(ones,), threshold=1e-9)
    calibrate_toy_bundle(bundle, reference=reference)
    monkeypatch.setattr("upperson_rt.search.verdict.FEWEST", 10)
    compared(10)
    console = make_console(encoder=open_encoder(bundle, threads=1))
    where = {"cameras": ["gate"]}
    verdict = console.client.search(sentence="a red coat", filter=where).json()["verdict"]
    assert (verdict["reason"], verdict["fields"]["cameras"]) == ("pictures_unlike", ["gate"])
    metrics = console.client.get("/api/v1/metrics").text
    (distance,) = re.findall(r"upperson_score_shift_distance{(.*)} (.*)\n", metrics)
    assert (distance[0], float(distance[1]) > 1e-9) == ('camera="gate",period="day"', True)
    assert "upperson_score_shift_limit 1e-09" in metrics
    # The other camera has too few pictures to be compared.
    other = console.client.search(sentence="a red coat", filter={"cameras": [ODD]}).json()
    assert other["verdict"]["word"] == "likely"


def bars(page):
    return sum(int(number) for number in re.findall(r'aria-label="[^"]*: (\d+)"', page))


def test_cameras_that_are_not_compared_are_named_to_those_who_may_see_them(calibrated, compared):
    compared(7)  # Of gate alone.

    def found(*cameras):
        filter_ = {"cameras": cameras} if cameras else {}
        result = calibrated.client.search(sentence="woman in a coat", filter=filter_).json()
        few = [one for one in result["notices"] if one["code"] == "cameras_not_compared"]
        return result["verdict"]["word"], [one["fields"] for one in few]

    few = {"cameras": ["yard"], "pictures": 6, "wanted": 7}
    assert found("gate", "yard") == ("nobody", [few])
    assert found("gate") == ("nobody", [])
    assert found("yard") == ("uncalibrated", [])


def test_the_timeline_counts_likely_hits_only_and_all_without_a_calibration(
    calibrated, reader, compared
):
    compared(3)
    assert bars(calibrated.client.get("/timeline?q=a+woman+in+red").text) == 3
    ids = {id_of(calibrated, f"red-{number}") for number in (1, 2, 9)}
    assert {*last_line(calibrated)["ids"]} == ids
    assert bars(calibrated.client.get("/timeline?q=woman+in+a+coat").text) == 0
    for console, sentence, count in ((calibrated, "zebra", 18), (reader, "a woman in red", 12)):
        page = console.client.get("/timeline", params={"q": sentence}).text
        assert ("uncalibrated" in page, bars(page)) == (True, count)
    verdict = reader.client.search(sentence="a woman in red").json()["verdict"]
    assert (verdict["word"], verdict["reason"]) == ("uncalibrated", "no_calibration")


def test_a_line_joins_likely_tracks_only(calibrated, reader):
    page = calibrated.client.get(f"/people/{id_of(calibrated, 'red-0')}").text
    way = re.search(r'<polyline class="way" points="([^"]*)"', page)[1].split()
    assert len(way) == 3  # This track, and those in red at the two other cameras.
    assert page.count('<rect class="stop') == 13
    assert verdict_on(page)[0] == "likely"
    item = Item(key="new", camera="gate", time=START, track="new")
    (new,) = add_items(calibrated, item, text="zebra")
    assert "<polyline" not in calibrated.client.get(f"/people/{new}").text
    assert "<polyline" not in reader.client.get(f"/people/{id_of(reader, 'red-0')}").text
