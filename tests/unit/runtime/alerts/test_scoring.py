"""Scores of visits, and what is said when they change."""

import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from tests.helpers.alert_kills import SENTENCE, START
from tests.unit.runtime.alerts.conftest import World
from upperson_alerts.alerts import add_alert, confirm, list_alerts, resume_alert
from upperson_alerts.background import RunningMeans
from upperson_alerts.promise import most_by_chance
from upperson_alerts.scoring import scorer_of
from upperson_phrases import parse
from upperson_rt.logistic import Logistic
from upperson_rt.score_calibration import (
    Background,
    Reference,
    ScoreCalibration,
    site_calibration_file,
    write_score_calibration,
)
from upperson_rt.search.features import SentenceFeatures
from upperson_rt.search.query import QueryEncoder
from upperson_rt.strict import read_fields

DAY = 86400
PER_DAY = 120


@pytest.fixture
def calibrated(encoder):
    """An encoder whose log-odds are four times the deviation of a cosine, in tenths."""
    shipped = json.loads(files("upperson_scores").joinpath("prior.json").read_text("utf-8"))
    weights = np.zeros(13)
    weights[1] = 4.0
    made = replace(
        read_fields(ScoreCalibration, shipped, "prior.json"),
        fingerprint=encoder.fingerprint,
        background=Background(middle=0.0, spread=0.1),
        reference=Reference(
            mean=(0.0,) * encoder.embed_dim, axes=((1.0,) * encoder.embed_dim,), threshold=99.0
        ),
        picture=Logistic(middle=(0.0,) * 12, scale=(1.0,) * 12, weights=tuple(weights.tolist())),
    )
    parts = encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend
    return type(encoder)(*parts, made)


def scorer(encoder, gallery, *sentences):
    return scorer_of(QueryEncoder(encoder), gallery, sentences)


def test_the_log_odds_count_from_two_deviations_on_and_the_cosine_below(calibrated, gallery):
    cosines = np.linspace(-0.5, 0.9, 57)
    images_ND = World(calibrated, gallery).vectors(cosines)
    sentences = "woman in blue coat", SENTENCE, "man in red or green coat", "man without a hat"
    full_N = np.full(len(cosines), 4)
    scores_NS = scorer(calibrated, gallery, *sentences).scores(images_ND, images_ND, full_N)
    own_N = scores_NS[:, 1]
    assert (np.diff(own_N) > 0).all()
    features = SentenceFeatures(
        parse(SENTENCE), calibrated.encode_texts([SENTENCE])[0], QueryEncoder(calibrated).evidence
    )
    is_high = cosines > 0.21
    table = features.of_pictures(images_ND[is_high], None, calibrated.calibration.background, 1000)
    assert own_N[is_high] == pytest.approx(calibrated.calibration.picture.log_odds(table), abs=1e-3)
    assert (own_N[cosines < 0.19] < -30).all()
    one = images_ND[30:31]  # It scores alone as it does among others.
    alone_S = scorer(calibrated, gallery, *sentences).scores(one, one, full_N[:1])[0]
    assert alone_S == pytest.approx(scores_NS[30], abs=1e-3)


def test_the_calibration_of_a_gallery_counts_as_in_its_searches(
    calibrated, encoder, gallery, caplog
):
    images_ND = World(calibrated, gallery).vectors([0.5])

    def score(one):
        return scorer(one, gallery, SENTENCE).scores(images_ND, images_ND, np.full(1, 4))[0, 0]

    cosine, log_odds = score(encoder), score(calibrated)
    assert log_odds > cosine + 1
    own = site_calibration_file(gallery.location)
    write_score_calibration(own, calibrated.calibration)
    assert score(encoder) == pytest.approx(log_odds, abs=1e-3)
    own.write_text("{", "utf-8")
    assert score(encoder) == pytest.approx(cosine), "rows are committed all the same"
    (logged,) = caplog.records
    assert (logged.levelname, "scores.json" in logged.getMessage()) == ("WARNING", True)


def test_a_visit_scores_by_the_mean_of_its_pictures_however_they_were_committed(
    calibrated, encoder, gallery, place
):
    world = World(calibrated, gallery)
    items = [replace(item, track=f"t{n % 2}") for n, item in enumerate(world.items(6))]
    items.append(replace(items[0], key="alone", track=None))
    images_ND = world.vectors([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.4])
    whole_ND, counts_N = RunningMeans().of(items, images_ND, keep=True)
    assert counts_N.tolist() == [1, 1, 2, 2, 3, 3, 1]
    mean_D = images_ND[0] + images_ND[2] + images_ND[4]
    assert whole_ND[4] == pytest.approx(mean_D / np.linalg.norm(mean_D), abs=1e-6)
    assert (whole_ND[6] == images_ND[6]).all()
    parts = RunningMeans()
    first_ND, _ = parts.of(items[:3], images_ND[:3], keep=True)
    assert (first_ND == whole_ND[:3]).all()
    for _ in range(2):  # Comparing adds nothing.
        assert (parts.of(items[3:], images_ND[3:], keep=False)[0] == whole_ND[3:]).all()
    few, many = (
        scorer(calibrated, gallery, SENTENCE).scores(images_ND, whole_ND, np.full(7, count))
        for count in (1, 9)
    )
    assert few == pytest.approx(many - 3.6, abs=1e-3)
    plain = scorer(encoder, gallery, SENTENCE).scores(images_ND, whole_ND, counts_N)
    assert plain[:, 0] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.4], abs=1e-3)
    found = []
    for name, size in (("one", 1), ("all", 4)):
        world = place(name)
        world.encoder, world.rng = calibrated, np.random.default_rng(1)
        world.add(world.rng.uniform(-0.2, 0.3, 800), days=2.0)
        add_alert(world.gallery, calibrated, SENTENCE, rate=2.0)
        crops = [replace(item, track="x") for item in world.items(4, start=START + 2 * DAY)]
        vectors_ND = world.vectors([0.5, 0.6, 0.7, 0.8])
        world.vectors = lambda rows: rows
        world.commit(crops, vectors_ND, size)
        world.restart()
        world.commit([replace(crops[0], key="later", track="y")], vectors_ND[3:])
        found.append([one.body["data"]["p_value"] for one in world.messages()])
    assert found[0] == found[1] == [2 / 802, 1 / 801]  # The newest first.


@pytest.fixture
def watched(world):
    """Two days of visits, and an alert that is never capped."""
    world.add(world.rng.uniform(0, 0.4, 2 * PER_DAY), days=2.0)
    add_alert(world.gallery, world.encoder, SENTENCE, rate=2.0, cap=1000)
    return world


def days_of(world, first, days, shift):
    """Commit days of visits whose scores are so much higher; return the states of each evening."""
    found = []
    for day in range(first, first + days):
        scores = world.rng.uniform(0, 0.4, PER_DAY) + shift
        world.commit(world.items(PER_DAY, start=START + day * DAY), scores, 40)
        found.append(list_alerts(world.gallery)[0].state)
    return found


def test_an_alert_whose_visits_score_higher_is_uncalibrated_until_they_are_background(watched):
    world = watched
    assert days_of(world, 2, 3, 0.0) == ["active"] * 3
    before = len(world.messages(state="ready"))
    assert days_of(world, 5, 1, 0.2) == ["uncalibrated"]
    assert len(world.messages(state="ready")) <= before + most_by_chance(2.0)
    kept = {one.body["data"]["reason"] for one in world.messages(state="review")}
    assert kept == {"uncalibrated"}
    world.restart()
    states = days_of(world, 6, 9, 0.2)
    assert (states[0], states[-1]) == ("uncalibrated", "active")


def test_an_uncalibrated_alert_is_resumed_and_confirmed_visits_do_not_count(watched):
    world = watched
    for number in range(3 * most_by_chance(2.0)):
        world.visit(0.6, start=START + 2 * DAY + number)
        confirm(world.gallery, world.messages(most=1)[0].key)
    assert list_alerts(world.gallery)[0].state == "active"
    assert days_of(world, 3, 1, 0.2) == ["uncalibrated"]
    assert resume_alert(world.gallery, SENTENCE).state == "active"
    world.visit(0.9, start=START + 4 * DAY)
    assert world.messages(most=1)[0].state == "ready"


def test_counts_that_chance_exceeds_once_in_ten_thousand_times():
    rng = np.random.default_rng(0)
    for mean in (0.3, 2.0, 40.0, 700.0):
        found = rng.poisson(mean, 200_000)
        assert (found > most_by_chance(mean)).mean() < 2.5e-4
        assert (found >= most_by_chance(mean) - np.sqrt(mean) - 1).mean() > 1e-4
