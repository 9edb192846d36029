"""Verdicts: features, score calibrations, what they say of a search, and shifted pictures."""

import json
import time
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import calibrate_toy_bundle
from upperson_phrases import parse
from upperson_phrases.changes import one_word_changes
from upperson_phrases.evidence import Evidence
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Item
from upperson_rt.logistic import Logistic, probability
from upperson_rt.score_calibration import (
    Background,
    Curve,
    Reference,
    ScoreCalibration,
    read_score_calibration,
    site_calibration_file,
    write_score_calibration,
)
from upperson_rt.search import service, shift, verdict
from upperson_rt.search.features import CANDIDATES, SentenceFeatures
from upperson_rt.search.notices import Notice
from upperson_rt.search.query import SearchRequest
from upperson_rt.search.service import SearchService
from upperson_rt.search.shift import FEWEST, LEAST, compare
from upperson_rt.strict import read_fields
from upperson_scores.logistic_fit import fit_logistic
from upperson_scores.site_calibration import add_site_calibration


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


PRIOR = json.loads(files("upperson_scores").joinpath("prior.json").read_text("utf-8"))


def linear(*weights):
    """Log-odds that are a weighted sum; the last weight stands alone."""
    count = len(weights) - 1
    return Logistic(middle=(0.0,) * count, scale=(1.0,) * count, weights=weights)


def calibration(encoder, **changes):
    """By the smoothed score alone: 0.5 at two spreads above the middle."""
    own = {
        "fingerprint": encoder.fingerprint,
        "generator": "test",
        "version": 1,
        "background": Background(middle=0.0, spread=0.25),
        "picture": linear(0.0, 4.0, *[0.0] * 10, -8.0),
        "answer": linear(1.0, *[0.0] * 14),
        "curves": {"sentence": Curve(slope=2, middle=2), "picture": Curve(slope=4, middle=3)},
        "nobody_below": 0.1,
        "reference": Reference(
            mean=(0.0,) * encoder.embed_dim,
            axes=(tuple(np.eye(encoder.embed_dim)[0].tolist()),),
            threshold=100.0,
        ),
    }
    return replace(read_fields(ScoreCalibration, PRIOR, "prior.json"), **own | changes)


SENTENCE = "a man in a red coat"
REQUEST = SearchRequest(sentence=SENTENCE, calibrate=True)


def calibrated(encoder, made):
    """The same encoder with another calibration."""
    parts = encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend
    return type(encoder)(*parts, made)


def fixed(encoder, log_odds, **changes):
    """A calibration whose answer is the same whatever the pictures are."""
    return calibration(encoder, answer=linear(*[0.0] * 14, log_odds), **changes)


def backwards(encoder):
    """The lower a score, the likelier."""
    return calibration(encoder, picture=linear(0.0, -4.0, *[0.0] * 10, 8.0))


def word_and_reason(result):
    return result.verdict.word, result.verdict.reason


def ids(result):
    return [hit.id for hit in result.hits]


@pytest.fixture
def searched(encoder, gallery):
    """A gallery of 60 pictures, of which 4 are near `a man in a red coat`; what searches it."""
    rng = np.random.default_rng(0)
    red_D = encoder.encode_texts([SENTENCE])[0]
    others_ND = rng.normal(size=(56, encoder.embed_dim))
    others_ND -= 1.2 * (others_ND @ red_D)[:, None] * red_D
    near_ND = red_D + 0.02 * rng.normal(size=(4, encoder.embed_dim))
    vectors_ND = unit(np.concatenate([near_ND, others_ND]))
    items = [Item(key=str(n), camera=f"cam{n % 2}") for n in range(60)]
    gallery.add(items, vectors_ND)

    def search(sentence=SENTENCE, made=None, **options):
        own = calibrated(encoder, made or calibration(encoder))
        request = SearchRequest(sentence=sentence, calibrate=True, **options)
        return SearchService(own, gallery).search(request)

    return search


@pytest.fixture
def compared(monkeypatch):
    """Each camera of `searched` is compared."""
    monkeypatch.setattr(shift, "LEAST", 30)


FAR = Background(middle=0.9, spread=0.25)
"""So far from all scores that no picture matches."""


def test_a_logistic_model_is_found_again():
    rng = np.random.default_rng(0)
    features_NF = 3 + 2 * rng.normal(size=(20_000, 2))
    log_odds_N = 1.5 * features_NF[:, 0] - 0.5 * features_NF[:, 0] * features_NF[:, 1]
    right_N = rng.random(len(log_odds_N)) < probability(log_odds_N)
    found = fit_logistic(features_NF, right_N, products=True, ridge=1.0)
    assert np.abs(found.log_odds(features_NF) - log_odds_N).mean() < 0.2
    plain = fit_logistic(features_NF, right_N, products=False, ridge=1.0)
    assert len(plain.weights) == 3
    assert np.abs(plain.log_odds(features_NF) - log_odds_N).mean() > 0.5


@pytest.mark.parametrize(
    ("sentence", "there", "count"),
    [
        ("woman in red coat", ["man in red coat", "woman in blue coat", "woman in red dress"], 20),
        ("a person with a backpack", ["a person with a suitcase"], 3),
        ("a person in red clothes", ["a person in blue clothes"], 11),
        ("asdf", [], 0),
    ],
)
def test_one_word_changes(sentence, there, count):
    changed = one_word_changes(parse(sentence))
    assert {*there} <= {*changed}
    assert len(changed) == len({*changed}) == count
    assert sentence not in changed


def test_features_of_a_picture_say_what_speaks_for_it(encoder):
    evidence = Evidence(encoder.encode_texts)
    pool_ND = encoder.encode_texts([SENTENCE, "a man in a blue coat"])
    features = SentenceFeatures(parse(SENTENCE), pool_ND[0], evidence)
    found_NF = features.of_pictures(pool_ND, pool_ND, Background(middle=0.1, spread=0.5), 1000)
    assert found_NF.shape == (2, 12)
    assert found_NF[0, 0] == pytest.approx((1 - 0.1) / 0.5, abs=1e-4)
    assert (found_NF[0, :6] > found_NF[1, :6]).all()  # Scores, evidence, margins.
    assert found_NF[0, 11] == pytest.approx(np.log(1000))
    together = features.of_answer(found_NF, np.array([2.0, -1.0]))
    assert together.shape == (14,)
    assert together[0] == 2.0


# --- Verdicts


def test_the_right_pictures_are_likely_and_counted(searched, gallery):
    result = searched(k=6)
    assert result.verdict.word == "likely"
    assert result.verdict.likelihood > 0.9
    assert result.verdict.expected == pytest.approx(4, abs=0.5)
    assert not result.verdict.is_more
    assert result.labels == ["likely"] * 4 + ["unlikely"] * 2
    assert min(result.likelihoods[:4]) > 0.9
    # Expected matches do not depend on the number of hits.
    red_D = gallery.vectors_of(result.hits)[result.hits[0].id]
    for query in ({"sentence": SENTENCE}, {"sentence": None, "picture": red_D}):
        assert len({searched(k=k, **query).verdict.expected for k in (1, 5, 60)}) == 1
    other = searched("a man in a red coat with a backpack")  # Bags were not fitted.
    assert other.verdict.expected is other.verdict.as_json()["expected_matches"] is None
    either = searched("a man in a red or blue coat", k=4)  # The better reading counts.
    assert either.likelihoods == pytest.approx(result.likelihoods[:4], abs=0.02)
    without = searched("a man in a red coat, not a red coat", k=4)
    assert sum(without.likelihoods) < sum(result.likelihoods[:4])


def falls(values):
    return [*values] == sorted(values, reverse=True)


@pytest.mark.parametrize("by_track", [False, True])
def test_hits_of_a_sentence_come_most_likely_first(encoder, searched, monkeypatch, by_track):
    monkeypatch.setattr(service, "CANDIDATES", 20)
    every, few = (searched(made=backwards(encoder), k=k, by_track=by_track) for k in (60, 5))
    scores = [hit.score for hit in every.hits]
    assert falls(every.likelihoods[:20])
    assert not falls(scores[:20])
    assert falls(scores[20:])  # A likelihood of fewer pictures does not depend on their number.
    assert (min(scores[:20]) >= max(scores[20:]), len(scores)) == (True, 60)
    assert ids(few) == ids(every)[:5]
    assert few.likelihoods == pytest.approx(every.likelihoods[:5])
    assert few.labels == every.labels[:5]


def test_the_verdict_is_that_of_the_answer_and_no_hit_is_likelier(encoder, searched, monkeypatch):
    plain = searched(k=60)
    low = searched(made=fixed(encoder, np.log(3 / 7)), k=60)
    assert (low.verdict.word, low.verdict.likelihood) == ("possible", pytest.approx(0.3))
    assert low.likelihoods == pytest.approx(np.minimum(plain.likelihoods, 0.3))
    assert max(plain.likelihoods) > 0.9
    assert (ids(low), low.verdict.expected) == (ids(plain), plain.verdict.expected)
    # Where many match, the likeliest of them counts.
    monkeypatch.setattr(verdict, "_MANY", 3.0)  # Of four.
    found = searched(made=fixed(encoder, np.log(3 / 7)))
    assert found.verdict.word == "likely"
    assert found.verdict.likelihood == max(found.likelihoods) > 0.9


def test_a_likely_answer_without_a_possible_picture_is_possible(encoder, searched):
    found = searched(made=fixed(encoder, 9.0, background=FAR))
    assert (found.verdict.word, found.verdict.likelihood > 0.99) == ("possible", True)


def test_nobody_is_not_said_of_what_a_sentence_excludes(encoder, searched, compared):
    """Answers were fitted on sentences that exclude nothing."""
    low, sentence = fixed(encoder, -9.0), "a man in a red coat without a hat"
    assert searched(made=low).verdict.word == "nobody"
    found = searched(sentence, made=low)
    assert word_and_reason(found) == ("uncalibrated", "exclusion_uncertain")
    assert {*found.labels} == {""}
    assert ids(found) == ids(searched(sentence))


@pytest.mark.parametrize("candidates", [20, verdict.CANDIDATES])
def test_likelihoods_do_not_depend_on_the_number_of_hits(searched, monkeypatch, candidates):
    for module in (service, verdict):
        monkeypatch.setattr(module, "CANDIDATES", candidates)
    few, every = searched(k=3), searched(k=60)
    assert (ids(few), len(every.likelihoods)) == (ids(every)[:3], 60)
    assert few.likelihoods == pytest.approx(every.likelihoods[:3], abs=1e-12)
    assert few.verdict == every.verdict


def test_a_hit_without_a_likelihood_keeps_its_place():
    likely = [0.1, None, 0.3, 0.2, None, 0.3]
    judged = verdict.Judged(
        likelihoods=likely,
        labels=["" if one is None else "likely" for one in likely],
        order=[0.1, None, 0.4, 0.2, None, 0.9],  # Two are above the limit of 0.3.
        verdict=verdict.Verdict(word="possible", likelihood=0.3, expected=None),
    )
    assert service._order(judged, 6, 9) == (6, [5, 1, 2, 3, 4, 0])
    assert service._order(judged, 4, 5) == (4, [2, 1, 3, 0, 4])
    assert service._order(judged, 6, 2) == (2, [5, 1])
    assert service._order(judged, 0, 3) == (0, [0, 1, 2])


def test_what_is_excluded_comes_late(searched, compared, gallery, encoder, monkeypatch):
    sentence = "a man in a red coat without a hat"
    excluded = parse(sentence).excluded
    heard = []
    for weight in (0.0, 300.0):
        monkeypatch.setattr(verdict, "_EXCLUDED_WEIGHT", weight)
        found = searched(sentence, k=60)
        vectors = gallery.vectors_of(found.hits)
        images_ND = np.stack([vectors[hit.id] for hit in found.hits])
        heard.append(Evidence(encoder.encode_texts).against(excluded, images_ND)[:40])
        assert found.ranked == 60
        assert ids(searched(sentence, k=7)) == ids(found)[:7]
    by_likelihood, by_excluded = heard
    assert by_excluded[:10].mean() < by_likelihood[:10].mean()
    assert by_excluded[:10].mean() < by_excluded[-10:].mean()


@pytest.mark.parametrize(
    "options",
    [
        {"not_relevant_ND": unit(np.ones((1, 16)))},
        {"picture": unit(np.ones(16))},
        {"sentence": "a person"},
    ],
    ids=["feedback", "picture", "uncalibrated"],
)
def test_other_hits_come_by_score(encoder, searched, options):
    found = searched(made=backwards(encoder), k=9, **options)
    assert (len(found.hits), len(found.labels), len(found.likelihoods)) == (9, 9, 9)
    assert falls([hit.score for hit in found.hits])


def test_nobody_is_said_below_the_limit_of_the_calibration(encoder, searched, compared):
    weak = searched(made=calibration(encoder, background=FAR), notices=True)
    assert weak.notices == []
    assert weak.verdict.word == "nobody"
    assert 0 < weak.verdict.likelihood < 0.1
    assert {*weak.labels} == {"unlikely"}
    lower = calibration(encoder, background=FAR, nobody_below=weak.verdict.likelihood)
    assert searched(made=lower).verdict.word == "possible"


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("a person", "sentence_vague"),
        ("a man in a red coat and " * 50, "sentence_truncated"),
        ("a man in a red coat and a zzz", "words_unknown"),
        ("a man in a red coat, no grey", "words_unread"),
    ],
)
def test_a_sentence_that_cannot_be_judged_is_uncalibrated(searched, sentence, reason):
    result = searched(sentence)
    assert word_and_reason(result) == ("uncalibrated", reason)
    assert result.likelihoods == [None] * len(result.hits)
    assert {*result.labels} == {""}
    assert result.verdict.likelihood is None


def test_notices_that_a_verdict_repeats_are_left_out():
    about = {"reason": "words_unknown", "fields": {"words": ["flurb", "wman"]}}
    given = verdict.Verdict(word="uncalibrated", likelihood=None, expected=None, **about)
    notices = [
        Notice("words_unknown", {"words": ["flurb"]}),
        Notice("words_unknown", {"words": ["other"]}),
        Notice("did_you_mean", {"words": {"wman": "woman"}, "sentence": "woman with flurb"}),
    ]
    assert given.without_repeated(notices) == notices[1:]


def test_few_pictures_and_no_calibration_are_said(encoder, gallery):
    assert SearchService(encoder, gallery).search(REQUEST).verdict.reason == "no_calibration"
    service = SearchService(calibrated(encoder, calibration(encoder)), gallery)
    assert service.search(REQUEST).verdict.reason == "nothing_searched"
    vectors_ND = unit(np.random.default_rng(0).normal(size=(FEWEST, encoder.embed_dim)))
    items = [Item(key=str(n)) for n in range(FEWEST)]
    gallery.add(items[:3], vectors_ND[:3])
    found = service.search(REQUEST).verdict
    assert (found.reason, found.fields["pictures"]) == ("few_pictures", 3)
    gallery.add(items, vectors_ND)
    assert service.search(REQUEST).verdict.reason is None
    gallery.delete([item.key for item in items])
    assert service.search(REQUEST).verdict.reason == "nothing_searched"


# --- Pictures that are unlike

NOON, NIGHT = 1_764_417_600, 1_764_374_400
"""12:00 and 00:00 UTC."""


def shifted_gallery(gallery):
    """Three cameras of which one, and another by night, are far off."""
    rng = np.random.default_rng(0)
    for name, is_far, at, count in (
        ("plain", False, NOON, LEAST), ("far", True, NOON, LEAST),
        ("plain", True, NIGHT, LEAST), ("few", True, NOON, LEAST - 1),
    ):  # fmt: skip
        vectors_ND = 0.1 * rng.normal(size=(count, gallery.embed_dim))
        vectors_ND[:, :2] += 3 * is_far, 1
        keys = [f"{name} {at} {n}" for n in range(count)]
        gallery.add([Item(key=key, camera=name, time=at) for key in keys], unit(vectors_ND))


@pytest.fixture
def reference(encoder):
    axis = np.eye(encoder.embed_dim)[0] / 0.1
    mean = np.eye(encoder.embed_dim)[1]
    return Reference(mean=tuple(mean.tolist()), axes=(tuple(axis.tolist()),), threshold=4.0)


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setattr(shift.time, "localtime", time.gmtime)


def test_each_camera_is_compared_by_day_and_by_night(gallery, reference, utc):
    shifted_gallery(gallery)
    found = {(one.camera, one.is_night): one.distance > 4 for one in compare(gallery, reference)}
    assert found == {("plain", False): False, ("plain", True): True, ("far", False): True}


def test_a_camera_with_few_pictures_a_day_and_a_clock_in_the_future_is_compared(
    gallery, reference, utc
):
    rng = np.random.default_rng(0)
    vectors_ND = 0.1 * rng.normal(size=(300, gallery.embed_dim))
    vectors_ND[:, 0] += 3
    times = [NOON + 86_400 * (n // 30) for n in range(300)]
    times[-1] += 10 * 365 * 86_400
    items = [Item(key=str(n), camera="far", time=at) for n, at in enumerate(times)]
    gallery.add(items, unit(vectors_ND))
    (group,) = compare(gallery, reference)
    assert (group.camera, group.is_night, group.pictures >= LEAST) == ("far", False, True)
    assert group.distance > reference.threshold


def test_hits_of_cameras_that_are_unlike_have_no_label(encoder, gallery, reference, utc):
    shifted_gallery(gallery)
    made = calibration(encoder, reference=reference)
    service = SearchService(calibrated(encoder, made), gallery)
    for camera, reason, fields in (
        (None, "pictures_unlike", {"cameras": ["far", "plain"], "at_night": True}),
        ("far", "pictures_unlike", {"cameras": ["far"], "at_night": False}),
        ("few", "cameras_not_compared",
         {"cameras": ["few"], "pictures": LEAST - 1, "wanted": LEAST}),
    ):  # fmt: skip
        found = service.search(replace(REQUEST, where=Filter(camera=camera))).verdict
        assert (found.reason, found.fields) == (reason, fields)


def with_odd_camera(encoder, gallery):
    """Add pictures with the lowest scores; return a reference that they alone are unlike."""
    red_D = encoder.encode_texts([SENTENCE])[0]
    gallery.add([Item(key=f"odd {n}", camera="odd") for n in range(30)], np.stack([-red_D] * 30))
    zero = (0.0,) * len(red_D)
    return Reference(mean=zero, axes=(tuple(red_D.tolist()),), threshold=0.25)


def test_what_is_likely_is_said_beside_hits_of_a_camera_that_is_unlike(
    encoder, gallery, searched, compared
):
    made = calibration(encoder, reference=with_odd_camera(encoder, gallery))
    result = searched(made=made, k=90)
    assert result.verdict.word == "likely"
    found = {True: set(), False: set()}
    for hit, label in zip(result.hits, result.labels, strict=True):
        found[hit.item.camera == "odd"].add(label)
    assert found == {True: {""}, False: {"likely", "unlikely"}}


def test_nobody_is_not_said_where_a_camera_is_unlike_though_none_of_its_pictures_is_a_hit(
    encoder, gallery, searched, compared
):
    add_pictures(encoder, gallery, CANDIDATES, "cam1")  # More than are put in order.
    made = calibration(encoder, background=FAR, reference=with_odd_camera(encoder, gallery))
    for cameras, word, reason in (
        (None, "uncalibrated", "pictures_unlike"),
        (("cam1", "odd"), "uncalibrated", "pictures_unlike"),
        (("cam0", "cam1"), "nobody", None),
    ):
        result = searched(made=made, k=10, where=Filter(camera=cameras))
        assert "odd" not in {hit.item.camera for hit in result.hits}
        assert word_and_reason(result) == (word, reason)
        if reason is not None:
            assert result.verdict.fields == {"cameras": ["odd"], "at_night": False}


def add_pictures(encoder, gallery, count, camera, time=None):
    rng = np.random.default_rng(count)
    vectors_ND = unit(rng.normal(size=(count, encoder.embed_dim)))
    keys = [f"{camera} {time} {n}" for n in range(count)]
    gallery.add([Item(key=key, camera=camera, time=time) for key in keys], vectors_ND)


def not_compared(result):
    """The fields of the notice, or None."""
    found = [one.fields for one in result.notices if one.code == "cameras_not_compared"]
    assert len(found) <= 1
    assert not found or result.notices[0].is_warning
    return found[0] if found else None


def test_many_cameras_are_all_compared_by_day_and_by_night(encoder, gallery, utc, monkeypatch):
    monkeypatch.setattr(shift, "LEAST", 20)
    monkeypatch.setattr(shift, "_MOST_READ", 100)  # Of all cameras together.
    cameras = [f"cam{number}" for number in range(12)]
    for number, camera in enumerate(cameras):
        add_pictures(encoder, gallery, 20 + number, camera)
        add_pictures(encoder, gallery, 40, camera, time=NIGHT - 86_400 * number)
    add_pictures(encoder, gallery, 19, "few")
    found = compare(gallery, calibration(encoder).reference)
    expected = {(camera, at_night) for camera in cameras for at_night in (False, True)}
    assert {(group.camera, group.is_night) for group in found} == expected


def test_nobody_is_not_said_where_most_pictures_are_of_cameras_not_compared(encoder, searched):
    made = calibration(encoder, background=FAR)
    result = searched(made=made, notices=True)
    assert word_and_reason(result) == ("uncalibrated", "cameras_not_compared")
    assert result.verdict.fields == {"cameras": ["cam0", "cam1"], "pictures": 60, "wanted": LEAST}
    assert ({*result.labels}, {*result.likelihoods}) == ({""}, {None})
    assert searched().verdict.word == "likely", "what is found is said all the same"


def test_nobody_has_a_notice_where_few_pictures_are_of_cameras_not_compared(
    encoder, gallery, searched, compared
):
    made = calibration(encoder, background=FAR)
    for camera, count in (("new", 20), ("yard", 9), (None, 25)):
        add_pictures(encoder, gallery, count, camera)
    assert not_compared(searched(notices=True)) is None, "it is about nobody alone"
    for cameras, word, fields in (
        (None, "nobody", {"cameras": ["new", "yard"], "pictures": 54, "wanted": 30}),
        (("cam0", "new"), "nobody", {"cameras": ["new"], "pictures": 20, "wanted": 30}),
        ("cam0", "nobody", None),
        (("new", "yard"), "uncalibrated", None),
    ):
        result = searched(made=made, notices=True, where=Filter(camera=cameras))
        assert (result.verdict.word, not_compared(result)) == (word, fields)
    assert result.verdict.reason == "cameras_not_compared"


# --- Files


def test_a_calibration_is_read_back_and_the_one_before_is_kept(encoder, tmp_path):
    made = calibration(encoder)
    file = site_calibration_file(str(tmp_path))
    assert add_site_calibration(file, made) == made
    assert read_score_calibration(file, encoder.fingerprint) == made
    assert add_site_calibration(file, made).version == 2
    assert read_score_calibration(file, encoder.fingerprint).version == 2
    assert read_score_calibration(tmp_path / "scores-1.json", encoder.fingerprint) == made
    file.unlink()  # Numbers are not used again.
    assert add_site_calibration(file, made).version == 2
    assert add_site_calibration(file, made).version == 3
    file.write_bytes(b"{")
    assert add_site_calibration(file, made).version == 3
    assert (tmp_path / "scores-damaged.json").read_bytes() == b"{"


def test_a_calibration_of_other_dimensions_is_refused(encoder, gallery):
    reference = Reference(mean=(0.0,), axes=((1.0,),), threshold=1.0)
    site = site_calibration_file(gallery.location)
    write_score_calibration(site, calibration(encoder, reference=reference))
    with refused("axes_unfit", InputError):
        SearchService(encoder, gallery)


def test_the_gallerys_own_calibration_counts_as_soon_as_it_is_made(
    encoder, gallery, searched, compared
):
    site = site_calibration_file(gallery.location)
    services = [
        SearchService(one, gallery) for one in (encoder, calibrated(encoder, calibration(encoder)))
    ]
    before = [word_and_reason(service.search(REQUEST)) for service in services]
    assert before == [("uncalibrated", "no_calibration"), ("likely", None)]
    for changes, word in (({"background": FAR}, "nobody"), ({}, "likely")):
        add_site_calibration(site, calibration(encoder, **changes))
        assert {service.search(REQUEST).verdict.word for service in services} == {word}
    assert services[0].judge is services[0].judge, "read once"
    site.write_text(site.read_text("utf-8").replace('"version": 2', '"version": "two"'), "utf-8")
    with refused("value_unfit", InputError):
        searched()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"fingerprint": "sha256:" + "0" * 64}, "calibration_of_another_model"),
        ({"schema_version": 99}, "version_unknown"),
        ({"nobody_below": 0.5}, "value_unfit"),
        ({"background": {"middle": 0, "spread": "NaN"}}, "value_unfit"),
        ({"picture": {"middle": [0], "scale": [1], "weights": [1, 2, 3, 4]}}, "weights_unfit"),
        ({"answer": {"middle": [0], "scale": [1], "weights": [1, 2]}}, "features_unfit"),
        ({"curves": {"sentence": {"slope": 1, "middle": 1}}}, "curves_unfit"),
        ({"reference": {"mean": [0], "axes": [[0, 1]], "threshold": 1}}, "axes_unfit"),
        ({"more": 1}, "key_unknown"),
    ],
)
def test_a_calibration_that_is_not_one_is_refused(encoder, tmp_path, change, code):
    file = tmp_path / "scores.json"
    content = json.loads(calibration(encoder).to_json()) | change
    file.write_text(json.dumps(content), "utf-8")
    with refused(code, InputError):
        read_score_calibration(file, encoder.fingerprint)


def test_a_bundle_with_a_changed_calibration_is_refused(folder):
    made, file = calibrate_toy_bundle(folder), folder / "scores.json"
    assert Bundle.open(folder).encoder().calibration.curves == made.curves
    file.write_bytes(file.read_bytes().replace(b'"tests"', b'"tsets"'))
    with refused("checksum_differs", IntegrityError):
        Bundle.open(folder)


def test_the_prior_was_fitted_on_many_and_checked_on_others():
    assert PRIOR["fitted_on"]["people"] >= 2000
    held_out = PRIOR["held_out"]["all"]
    assert (held_out["auroc"] > 95, held_out["error"] < 3) == (True, True)
    assert held_out["wrong_nobody"] <= 1.0
