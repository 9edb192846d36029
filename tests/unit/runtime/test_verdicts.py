"""Verdicts: features, score calibrations, what they say of a search, and shifted pictures."""

import json
from dataclasses import asdict, replace
from importlib.resources import files

import numpy as np
import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import file_entry
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Item
from upperson_rt.logistic import Logistic, probability
from upperson_rt.phrases import parse
from upperson_rt.phrases.changes import one_word_changes
from upperson_rt.phrases.evidence import Evidence
from upperson_rt.score_calibration import (
    Background,
    Curve,
    Reference,
    ScoreCalibration,
    read_score_calibration,
    site_calibration_file,
    write_score_calibration,
)
from upperson_rt.search import shift
from upperson_rt.search.features import SentenceFeatures, smoothed
from upperson_rt.search.query import SearchRequest
from upperson_rt.search.service import SearchService
from upperson_rt.search.shift import FEWEST, LEAST, compare
from upperson_scores.logistic_fit import fit_logistic
from upperson_scores.site_calibration import add_site_calibration

D = 16


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def calibration(encoder, **changes):
    """By the smoothed score alone: 0.5 at two spreads above the middle."""
    features, together = 12, 14
    picture = np.zeros(features + 1)
    picture[1], picture[-1] = 4.0, -8.0
    answer = np.zeros(together + 1)
    answer[0] = 1.0
    made = ScoreCalibration(
        fingerprint=encoder.fingerprint,
        created="2026-11-29T00:00:00+00:00",
        generator="test",
        version=1,
        fitted_on={"source": "test", "people": 20, "questions": 1},
        held_out={},
        background=Background(middle=0.0, spread=0.25),
        picture=Logistic(
            middle=(0.0,) * features, scale=(1.0,) * features, weights=tuple(picture.tolist())
        ),
        answer=Logistic(
            middle=(0.0,) * together, scale=(1.0,) * together, weights=tuple(answer.tolist())
        ),
        curves={"sentence": Curve(slope=2, middle=2), "picture": Curve(slope=4, middle=3)},
        nobody_below=0.1,
        reference=Reference(
            mean=(0.0,) * encoder.embed_dim,
            axes=(tuple(np.eye(encoder.embed_dim)[0].tolist()),),
            threshold=100.0,
        ),
    )
    return replace(made, **changes)


@pytest.fixture
def searched(encoder, gallery):
    """A gallery of 60 pictures, of which 4 are near `a man in a red coat`; what searches it."""
    rng = np.random.default_rng(0)
    red_D = encoder.encode_texts(["a man in a red coat"])[0]
    others_ND = rng.normal(size=(56, encoder.embed_dim))
    others_ND -= 1.2 * (others_ND @ red_D)[:, None] * red_D
    near_ND = red_D + 0.02 * rng.normal(size=(4, encoder.embed_dim))
    vectors_ND = unit(np.concatenate([near_ND, others_ND]))
    items = [Item(key=str(n), camera=f"cam{n % 2}") for n in range(60)]
    gallery.add(items, vectors_ND)

    def search(sentence="a man in a red coat", made=None, **options):
        encoder_of = type(encoder)(
            encoder.manifest,
            encoder.variant,
            encoder.tokenizer,
            encoder.backend,
            made or calibration(encoder),
        )
        request = SearchRequest(sentence=sentence, calibrate=True, **options)
        return SearchService(encoder_of, gallery).search(request)

    return search


@pytest.fixture
def compared(monkeypatch):
    """Each camera of `searched` is compared."""
    monkeypatch.setattr(shift, "LEAST", 30)


FAR = Background(middle=0.9, spread=0.25)
"""So far from all scores that no picture matches."""


# --- Logistic regression


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


def test_a_prior_holds_a_fit_of_few():
    rng = np.random.default_rng(0)
    features_NF = rng.normal(size=(30, 3))
    right_N = features_NF[:, 0] > 0
    prior = Logistic(middle=(0.0,) * 3, scale=(1.0,) * 3, weights=(1.0, 2.0, 3.0, 0.5))
    near = fit_logistic(features_NF, right_N, products=False, ridge=1e6, prior=prior)
    assert near.weights == pytest.approx(prior.weights, abs=1e-3)
    free = fit_logistic(features_NF, right_N, products=False, ridge=0.1, prior=prior)
    assert free.weights[0] > 2 * abs(free.weights[2])


def test_probabilities_of_any_log_odds():
    assert probability(np.array([-1e4, -1.0, 0.0, 1e4])) == pytest.approx(
        [0.0, 1 / (1 + np.e), 0.5, 1.0]
    )


# --- Features


@pytest.mark.parametrize(
    ("sentence", "there", "count"),
    [
        ("woman in red coat", ["man in red coat", "woman in blue coat", "woman in red dress"], 20),
        ("a person with a backpack", ["a person with a suitcase"], 3),
        ("a person", [], 0),
        ("asdf", [], 0),
    ],
)
def test_one_word_changes(sentence, there, count):
    changed = one_word_changes(parse(sentence))
    assert {*there} <= {*changed}
    assert len(changed) == len({*changed}) == count
    assert sentence not in changed


def test_neighbours_are_averaged_and_strangers_are_not():
    rng = np.random.default_rng(0)
    pool_MD = unit(rng.normal(size=(3, D)))
    pool_MD[1] = unit(pool_MD[0] + 0.01 * rng.normal(size=D))
    near_MD = smoothed(pool_MD, pool_MD)
    assert np.linalg.norm(near_MD, axis=1) == pytest.approx([1] * 3, abs=1e-5)
    assert near_MD[0] @ near_MD[1] > pool_MD[0] @ pool_MD[1]
    assert near_MD[2] @ pool_MD[2] > 0.999


def test_features_of_a_picture_say_what_speaks_for_it(encoder):
    evidence = Evidence(encoder.encode_texts)
    red_D, blue_D = encoder.encode_texts(["a man in a red coat", "a man in a blue coat"])
    features = SentenceFeatures(parse("a man in a red coat"), red_D, evidence)
    pool_ND = np.stack([red_D, blue_D])
    found_NF = features.of_pictures(pool_ND, pool_ND, Background(middle=0.1, spread=0.5), 1000)
    assert found_NF.shape == (2, 12)
    assert found_NF[0, 0] == pytest.approx((1 - 0.1) / 0.5, abs=1e-4)
    for column in (0, 1, 2, 3, 4, 5):  # Scores, evidence, margins.
        assert found_NF[0, column] > found_NF[1, column]
    assert found_NF[0, 11] == pytest.approx(np.log(1000))
    together = features.of_answer(found_NF, np.array([2.0, -1.0]))
    assert together.shape == (14,)
    assert together[0] == 2.0


# --- Verdicts


def test_the_right_pictures_are_likely_and_counted(searched):
    result = searched(k=6)
    assert result.verdict.word == "likely"
    assert result.verdict.likelihood > 0.9
    assert result.verdict.expected == pytest.approx(4, abs=0.5)
    assert not result.verdict.is_more
    assert result.labels == ["likely"] * 4 + ["unlikely"] * 2
    assert min(result.likelihoods[:4]) > 0.9


def test_hits_beyond_the_candidates_and_single_pictures_are_judged_alike(searched):
    all_ = searched(k=60)
    few = searched(k=3)
    assert all_.likelihoods[:3] == pytest.approx(few.likelihoods)
    assert len(all_.likelihoods) == 60


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
        ("the and", "sentence_vague"),
        ("asdf qwer", "words_unknown"),
        ("a green horse on the moon", "words_unknown"),
        ("a man in a red coat and a zzz", "words_unknown"),
    ],
)
def test_a_sentence_that_cannot_be_judged_is_uncalibrated(searched, sentence, reason):
    result = searched(sentence)
    assert (result.verdict.word, result.verdict.reason) == ("uncalibrated", reason)
    assert {*result.likelihoods} == {None}
    assert {*result.labels} == {""}
    assert result.verdict.likelihood is None
    assert len(result.likelihoods) == len(result.hits)


def test_what_a_sentence_excludes_lowers_likelihoods(searched):
    with_, without = searched(k=4), searched("a man in a red coat, not a red coat", k=4)
    assert with_.verdict.word == "likely"
    assert sum(without.likelihoods) < sum(with_.likelihoods)


def test_the_better_reading_counts(searched):
    either = searched("a man in a red or blue coat", k=4)
    assert either.likelihoods == pytest.approx(searched(k=4).likelihoods, abs=0.02)


def test_few_pictures_and_no_calibration_are_said(encoder, gallery):
    service = SearchService(encoder, gallery)
    request = SearchRequest(sentence="a man in a red coat", calibrate=True)
    assert service.search(request).verdict.reason == "no_calibration"
    encoder_of = type(encoder)(
        encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend, calibration(encoder)
    )
    service = SearchService(encoder_of, gallery)
    assert service.search(request).verdict.reason == "nothing_searched"
    rng = np.random.default_rng(0)
    vectors_ND = unit(rng.normal(size=(FEWEST, encoder.embed_dim)))
    gallery.add([Item(key="0"), Item(key="1"), Item(key="2")], vectors_ND[:3])
    found = service.search(request).verdict
    assert (found.reason, found.fields["pictures"]) == ("few_pictures", 3)
    gallery.add([Item(key=str(n)) for n in range(FEWEST)], vectors_ND)
    assert service.search(request).verdict.reason is None
    gallery.delete([str(n) for n in range(FEWEST)])
    assert service.search(request).verdict.reason == "nothing_searched"


def test_a_mark_of_a_wrong_hit_changes_the_order_and_not_the_likelihoods(searched, gallery):
    plain = searched(k=4)
    wrong_1D = np.stack([*gallery.vectors_of(plain.hits[-1:]).values()])
    marked = searched(k=4, not_relevant_ND=wrong_1D)
    likely = dict(zip([hit.id for hit in plain.hits], plain.likelihoods, strict=True))
    for hit, likelihood in zip(marked.hits, marked.likelihoods, strict=True):
        assert likelihood == pytest.approx(likely[hit.id])
    assert marked.verdict.word == "likely"


def test_expected_matches_do_not_depend_on_the_number_of_hits(searched, gallery):
    red_D = np.stack([*gallery.vectors_of(searched(k=1).hits).values()])[0]
    for query in ({"sentence": "a man in a red coat"}, {"sentence": None, "picture": red_D}):
        found = {searched(k=k, **query).verdict.expected for k in (1, 5, 60)}
        assert len(found) == 1


def test_a_sentence_about_things_that_were_not_fitted_has_no_count(searched):
    result = searched("a man in a red coat with a backpack")
    assert result.verdict.expected is None
    assert result.verdict.as_json()["expected_matches"] is None


def test_a_long_sentence_is_uncalibrated_at_once(searched):
    result = searched("a man in a red coat and " * 500)
    assert result.verdict.reason == "sentence_truncated"


# --- Pictures that are unlike


def shifted_gallery(gallery, offset=3.0):
    """Three cameras of which one, and another by night, are far off."""
    rng = np.random.default_rng(0)
    noon, night = 1_764_417_600, 1_764_374_400  # 12:00 and 00:00 UTC; local hours are patched.
    for name, away, time in (
        ("plain", 0.0, noon), ("far", offset, noon), ("plain", offset, night), ("few", offset, noon)
    ):  # fmt: skip
        count = LEAST if name != "few" else LEAST - 1
        vectors_ND = 0.1 * rng.normal(size=(count, gallery.embed_dim))
        vectors_ND[:, 1] += 1
        vectors_ND[:, 0] += away
        keys = [f"{name} {time} {n}" for n in range(count)]
        gallery.add([Item(key=key, camera=name, time=time) for key in keys], unit(vectors_ND))


@pytest.fixture
def reference(encoder):
    axis = np.eye(encoder.embed_dim)[0] / 0.1
    mean = np.eye(encoder.embed_dim)[1]
    return Reference(mean=tuple(mean.tolist()), axes=(tuple(axis.tolist()),), threshold=4.0)


@pytest.fixture
def utc(monkeypatch):
    import time

    monkeypatch.setattr(shift.time, "localtime", time.gmtime)


def test_each_camera_is_compared_by_day_and_by_night(gallery, reference, utc):
    shifted_gallery(gallery)
    found = {(one.camera, one.is_night): one.distance > 4 for one in compare(gallery, reference)}
    assert found == {("plain", False): False, ("plain", True): True, ("far", False): True}


@pytest.mark.parametrize("future_s", [0, 10 * 365 * 86_400], ids=["", "a clock in the future"])
def test_a_camera_with_few_pictures_a_day_is_compared(gallery, reference, utc, future_s):
    rng = np.random.default_rng(0)
    vectors_ND = 0.1 * rng.normal(size=(300, gallery.embed_dim))
    vectors_ND[:, 0] += 3
    noon = 1_764_417_600
    times = [noon + 86_400 * (n // 30) for n in range(300)]
    times[-1] += future_s
    items = [Item(key=str(n), camera="far", time=time) for n, time in enumerate(times)]
    gallery.add(items, unit(vectors_ND))
    (group,) = compare(gallery, reference)
    assert (group.camera, group.is_night) == ("far", False)
    assert group.pictures >= LEAST
    assert group.distance > reference.threshold


def test_pictures_without_a_camera_are_compared_together(gallery, reference):
    rng = np.random.default_rng(0)
    vectors_ND = unit(rng.normal(size=(LEAST, gallery.embed_dim)))
    gallery.add([Item(key=str(n)) for n in range(LEAST)], vectors_ND)
    (group,) = compare(gallery, reference)
    assert (group.camera, group.pictures) == (None, LEAST)


def test_hits_of_cameras_that_are_unlike_have_no_label(encoder, gallery, reference, utc):
    shifted_gallery(gallery)
    encoder_of = type(encoder)(
        encoder.manifest,
        encoder.variant,
        encoder.tokenizer,
        encoder.backend,
        calibration(encoder, reference=reference),
    )
    service = SearchService(encoder_of, gallery)
    everywhere = service.search(SearchRequest(sentence="a man in a red coat", calibrate=True))
    assert everywhere.verdict.reason == "pictures_unlike"
    assert everywhere.verdict.fields == {"cameras": ["far", "plain"], "at_night": True}
    where = Filter(camera="few")
    own = service.search(SearchRequest(sentence="a man in a red coat", where=where, calibrate=True))
    assert own.verdict.reason == "cameras_not_compared"
    assert own.verdict.fields == {"cameras": ["few"], "pictures": LEAST - 1, "wanted": LEAST}


def add_pictures(encoder, gallery, count, camera):
    rng = np.random.default_rng(count)
    vectors_ND = unit(rng.normal(size=(count, encoder.embed_dim)))
    gallery.add([Item(key=f"{camera} {n}", camera=camera) for n in range(count)], vectors_ND)


def not_compared(result):
    """The fields of the notice, or None."""
    found = [one.fields for one in result.notices if one.code == "cameras_not_compared"]
    assert len(found) <= 1
    assert not found or result.notices[0].is_warning
    return found[0] if found else None


def test_many_cameras_are_all_compared(encoder, gallery, monkeypatch):
    monkeypatch.setattr(shift, "LEAST", 20)
    monkeypatch.setattr(shift, "_MOST_READ", 100)  # Of all cameras together.
    cameras = [f"cam{number}" for number in range(12)]
    for number, camera in enumerate(cameras):
        add_pictures(encoder, gallery, 20 + number, camera)
    add_pictures(encoder, gallery, 19, "few")
    found = compare(gallery, calibration(encoder).reference)
    assert {group.camera for group in found} == {*cameras}


def test_nobody_is_not_said_where_most_pictures_are_of_cameras_not_compared(encoder, searched):
    made = calibration(encoder, background=FAR)
    result = searched(made=made, notices=True)
    assert (result.verdict.word, result.verdict.reason) == ("uncalibrated", "cameras_not_compared")
    assert result.verdict.fields == {"cameras": ["cam0", "cam1"], "pictures": 60, "wanted": LEAST}
    assert {*result.labels} == {""}
    assert {*result.likelihoods} == {None}
    assert not_compared(result) is None, "the verdict says it"
    assert searched().verdict.word == "likely", "what is found is said all the same"


def test_nobody_has_a_notice_where_few_pictures_are_of_cameras_not_compared(
    encoder, gallery, searched, compared
):
    made = calibration(encoder, background=FAR)
    for camera, count in (("new", 20), ("yard", 9), (None, 25)):
        add_pictures(encoder, gallery, count, camera)
    result = searched(made=made, notices=True)
    assert result.verdict.word == "nobody"
    expected = {"cameras": ["new", "yard"], "pictures": 54, "wanted": 30}
    assert not_compared(result) == expected
    assert not_compared(searched(notices=True)) is None, "it is about nobody alone"
    where = Filter(camera=("cam0", "new"))
    result = searched(made=made, notices=True, where=where)
    assert not_compared(result) == {"cameras": ["new"], "pictures": 20, "wanted": 30}
    assert not_compared(searched(made=made, notices=True, where=Filter(camera="cam0"))) is None
    result = searched(made=made, notices=True, where=Filter(camera=("new", "yard")))
    assert (result.verdict.reason, not_compared(result)) == ("cameras_not_compared", None)


@pytest.mark.parametrize(("count", "noticed"), [(50, True), (LEAST, False)])
def test_a_folder_without_cameras_has_verdicts(encoder, gallery, count, noticed):
    add_pictures(encoder, gallery, count, None)
    encoder_of = type(encoder)(
        encoder.manifest,
        encoder.variant,
        encoder.tokenizer,
        encoder.backend,
        calibration(encoder, background=FAR),
    )
    request = SearchRequest(sentence="a man in a red coat", calibrate=True, notices=True)
    result = SearchService(encoder_of, gallery).search(request)
    assert result.verdict.word == "nobody"
    assert {*result.labels} == {"unlikely"}
    expected = {"cameras": [], "pictures": count, "wanted": LEAST} if noticed else None
    assert not_compared(result) == expected


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
    assert site_calibration_file("milvus://host/name") is None


def test_a_calibration_of_other_dimensions_is_refused(encoder, gallery):
    write_score_calibration(
        site_calibration_file(gallery.location),
        calibration(encoder, reference=Reference(mean=(0.0,), axes=((1.0,),), threshold=1.0)),
    )
    with refused("axes_unfit", InputError):
        SearchService(encoder, gallery)


def test_the_gallerys_own_calibration_counts(encoder, gallery, searched, compared):
    site = site_calibration_file(gallery.location)
    write_score_calibration(site, calibration(encoder, background=FAR, version=2))
    assert searched().verdict.word == "nobody"
    site.write_text(site.read_text("utf-8").replace('"version": 2', '"version": "two"'), "utf-8")
    with refused("value_unfit", InputError):
        searched()


def test_a_calibration_that_is_made_meanwhile_counts_at_once(encoder, gallery, searched, compared):
    searched()  # Fills the gallery.
    request = SearchRequest(sentence="a woman in a red coat", calibrate=True)
    service = SearchService(encoder, gallery)
    assert service.search(request).verdict.reason == "no_calibration"
    site = site_calibration_file(gallery.location)
    for background, word in ((FAR, "nobody"), (None, "likely")):
        changes = {} if background is None else {"background": background}
        add_site_calibration(site, calibration(encoder, **changes))
        assert service.search(request).verdict.word == word
    assert service.judge is service.judge, "read once"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"fingerprint": "sha256:" + "0" * 64}, "calibration_of_another_model"),
        ({"schema_version": 99}, "version_unknown"),
        ({"nobody_below": 0.5}, "value_unfit"),
        ({"background": {"middle": 0, "spread": 0}}, "value_unfit"),
        ({"background": {"middle": 0, "spread": "NaN"}}, "value_unfit"),
        ({"picture": {"middle": [0], "scale": [1], "weights": [1, 2, 3, 4]}}, "weights_unfit"),
        ({"picture": {"middle": [0], "scale": [0], "weights": [1, 2]}}, "weights_unfit"),
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


def test_a_bundle_with_a_changed_calibration_is_refused(encoder, folder):
    file = folder / "scores.json"
    write_score_calibration(file, calibration(encoder))
    manifest = json.loads((folder / "bundle.json").read_text("utf-8"))
    manifest["scores"] = asdict(file_entry(file))
    (folder / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    assert Bundle.open(folder).encoder().calibration == calibration(encoder)
    file.write_bytes(file.read_bytes().replace(b'"generator": "test"', b'"generator": "tset"'))
    with refused("checksum_differs", IntegrityError):
        Bundle.open(folder)


def test_the_prior_was_fitted_on_many_and_checked_on_others():
    found = json.loads(files("upperson_scores").joinpath("prior.json").read_text("utf-8"))
    assert found["fitted_on"]["people"] >= 2000
    held_out = found["held_out"]["all"]
    assert held_out["auroc"] > 95
    assert held_out["error"] < 3
    assert held_out["wrong_nobody"] <= 1.0
