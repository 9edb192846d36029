"""Queries of a gallery, and phrases against pictures: what `Retriever` makes of sentences."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS
from upperson_phrases import parse
from upperson_phrases.evidence import (
    MOST_EXCLUDED,
    MOST_PARAPHRASES,
    Evidence,
    describe,
    paraphrases,
)
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.ingest.files import index_images
from upperson_rt.retriever import Retriever
from upperson_rt.search.query import SearchRequest, refine
from upperson_rt.search.service import search_excluding


@pytest.fixture
def retriever(encoder, gallery, pictures):
    index_images(encoder, gallery, pictures)
    return Retriever(encoder, gallery)


def colour_of(hit):
    return Path(hit.item.source).stem


def ids(hits):
    return [hit.id for hit in hits]


def test_sentences_find_pictures(encoder, gallery, pictures):
    report = index_images(encoder, gallery, pictures, camera="gate", batch_size=4)
    assert (report.indexed, report.skipped) == (len(pictures), [])
    retriever = Retriever(encoder, gallery)
    best = retriever.query("a woman in a red coat", k=2)
    assert (best[0].item.source, best[0].item.camera) == (str(pictures[0].absolute()), "gate")
    assert best[0].score > best[1].score
    red, blue = retriever.query(["red", "blue"], k=1)
    assert [red[0].item.source, blue[0].item.source] == [str(pictures[0]), str(pictures[2])]
    assert retriever.query("red", where=Filter(camera="hall")) == []
    hall = Filter(camera="hall")
    requests = [SearchRequest(sentence="red", where=where) for where in (None, hall)]
    everywhere, nowhere = retriever.service.search_all(requests)
    assert (len(everywhere.hits), nowhere.hits) == (len(pictures), [])
    request = SearchRequest(sentence="red, no bag", where=hall, notices=True)
    noted = retriever.service.search(request)
    assert [notice.is_warning for notice in noted.notices] == [True, False, False]
    assert retriever.query([]) == []
    with refused("sentence_empty", InputError):
        retriever.query(" ")


def test_or_between_colours_finds_either(retriever, pictures):
    either = SearchRequest(sentence="a red or blue coat", k=3)
    hits = retriever.search(either).hits
    apart = retriever.query(["a red coat", "a blue coat"], k=len(pictures))
    scores = {}
    for hit in [*apart[0], *apart[1]]:
        scores[hit.id] = max(hit.score, scores.get(hit.id, -1))
    expected = sorted(scores.items(), key=lambda pair: -pair[1])[:3]
    assert [(hit.id, hit.score) for hit in hits] == expected
    (first, *_), vectors_ND = next(retriever.gallery.vectors())
    match = retriever.service.match(either, 1, first, vectors_ND[0])
    assert match.score == pytest.approx(scores[1], abs=1e-6)


def test_sentences_and_pictures_in_one_call(retriever, pictures):
    with Image.open(pictures[2]) as image:
        blue = image.convert("RGB")
    bgr = np.asarray(blue)[..., ::-1]
    mixed = ["green", pictures[0], blue, bgr, "a man in yellow"]
    found = retriever.query(mixed, k=1, channels="bgr")
    best = [colour_of(hits[0]) for hits in found]
    assert best == ["green", "red", "blue", "blue", "yellow"]
    for query, hits in zip(mixed, found, strict=True):
        (single,) = retriever.query(query, k=1, channels="bgr")
        assert (single.id, single.score) == (hits[0].id, pytest.approx(hits[0].score, abs=1e-6))
    # A str is a sentence, whatever file has that name.
    assert retriever.query(str(pictures[0]), k=1)[0].score < 0.9
    assert retriever.query(pictures[0], k=1)[0].score > 0.99
    with refused("image_unreadable", InputError, path="missing.png"):
        retriever.query(Path("missing.png"))
    with refused("out_of_range", UsageError, what="k"):
        retriever.query("red", k=0)
    with refused("no_picture", InputError):
        retriever.query([5])


def test_a_picture_gives_up_what_it_has_no_longer(encoder, gallery, pictures):
    two = [[0, 0, 30, 190], [32, 0, 64, 190]]
    for boxes, keys in (
        (None, [""]),
        (two, ["#person=1", "#person=2"]),
        (two[:1], ["#person=1"]),
        ([], []),
        (two, ["#person=1", "#person=2"]),
        (None, [""]),
    ):
        detector = None if boxes is None else lambda frame, boxes=boxes: boxes
        index_images(encoder, gallery, pictures[:1], detector=detector)
        found = [item.key.removeprefix(str(pictures[0])) for item in gallery.items()]
        assert sorted(found) == keys


def test_threads_may_share_a_retriever(retriever, pictures):
    queries = [*COLOURS, *pictures] * 2
    expected = [retriever.query(query, k=3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: retriever.query(query, k=3), queries)) == expected


def test_a_phrase_speaks_for_the_pictures_it_is_true_of_and_outlives_them(retriever):
    sentence = "a person in a red coat and a blue bag, not in a green coat"
    hits = retriever.query("person", k=len(COLOURS))
    found = retriever.explain(sentence, hits)
    assert [phrase.text for phrase in found.phrases] == ["red coat", "blue bag", "green coat"]
    assert [phrase.negated for phrase in found.phrases] == [False, False, True]
    assert found.evidence_HP.shape == (len(hits), 3)
    assert ((found.evidence_HP >= 0) & (found.evidence_HP <= 1)).all()
    for column, colour in enumerate(("red", "blue", "green")):
        best = hits[int(found.evidence_HP[:, column].argmax())]
        assert colour_of(best) == colour
    assert found.parsed == parse(sentence)
    hits = retriever.query("red coat", k=3)
    before = retriever.explain("red coat", hits).evidence_HP
    retriever.gallery.delete([hits[1].item.key])
    after = retriever.explain("red coat", hits).evidence_HP
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert retriever.explain("a person", hits).evidence_HP.shape == (3, 0)
    assert retriever.explain("red coat", []).evidence_HP.shape == (0, 1)
    with refused("hits_invalid", InputError):
        retriever.explain("red coat", ["red.png"])


def test_what_a_sentence_excludes_goes_down(retriever):
    everything = len(COLOURS)
    coats = retriever.query("red coat", k=everything)
    assert colour_of(coats[0]) == "red"
    excluded = retriever.query("a coat that is not red", k=everything)
    plain = {hit.id: hit.score for hit in retriever.query("a coat", k=everything)}
    for hit in excluded:
        assert plain[hit.id] - MOST_EXCLUDED - 1e-6 <= hit.score <= plain[hit.id] + 1e-6
    lost = {colour_of(hit): plain[hit.id] - hit.score for hit in excluded}
    assert max(lost, key=lost.get) == "red"
    assert [hit.score for hit in excluded] == sorted((hit.score for hit in excluded), reverse=True)
    # However many hits there are, the first ones are the same.
    assert ids(retriever.query("a coat that is not red", k=2)) == ids(excluded[:2])
    # What is wanted is not excluded.
    wanted = retriever.query("a woman with a bag", k=3)
    assert ids(retriever.query("a woman with a bag without a bag", k=3)) == ids(wanted)


def test_hits_are_looked_for_away_from_what_is_excluded(encoder, gallery):
    """Forty pictures are weighed, and fifty with a bag look a little more like *a person*."""

    def embed_texts(texts):
        rows = np.zeros((len(texts), encoder.embed_dim), np.float32)
        rows[:, 0] = 1
        rows[:, 1] = [0.5 * any(bag in text for bag in ("bag", "pack", "case")) for text in texts]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    pictures = np.zeros((90, encoder.embed_dim), np.float32)
    pictures[:50, :2] = 1, 0.4
    pictures[50:, [0, 2]] = 1, 0.5
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    gallery.add([Item(key=str(number)) for number in range(90)], pictures)
    evidence = Evidence(embed_texts)
    wanted_D = embed_texts(["a person"])[0]
    (best,) = gallery.search(wanted_D[None], 40)
    assert all(int(hit.item.key) < 50 for hit in best)
    excluded = parse("a person without a bag").excluded
    assert np.linalg.norm(evidence.away(wanted_D, excluded)) == pytest.approx(1, abs=1e-6)
    found = search_excluding(gallery, evidence, wanted_D, excluded, 10, None, by_track=False)
    assert all(int(hit.item.key) >= 50 for hit in found)
    scores = evidence.scores(["a person without a bag"], pictures)[0]
    for hit in found:  # Galleries keep float16.
        assert hit.score == pytest.approx(scores[int(hit.item.key)], abs=1e-3)


def test_scores_without_a_gallery_are_those_of_queries(retriever, pictures):
    images_ND = retriever.encoder.encode_images(pictures)
    sentences = ["red coat", "a coat that is not red", "a man without a hat or a blue coat"]
    scores_TN = Evidence(retriever.encoder.encode_texts).scores(sentences, images_ND)
    for sentence, row in zip(sentences, scores_TN, strict=True):
        hits = retriever.query(sentence, k=len(pictures))
        found = [hit.score for path in pictures for hit in hits if hit.item.source == str(path)]
        assert found == pytest.approx(row.tolist(), abs=3e-3), sentence  # Galleries keep float16.


def test_paraphrases_are_averaged(retriever):
    sentence = "a woman in a red coat and a blue bag"
    counts = 1, MOST_PARAPHRASES  # Both at once: a wording count is not taken for another.
    requests = [SearchRequest(sentence=sentence, paraphrases=count) for count in counts]
    alone, averaged = (query.vectors_AD[0] for query in retriever.service.queries.embed(requests))
    wordings = paraphrases(parse(sentence), MOST_PARAPHRASES)
    mean_D = retriever.encoder.encode_texts(wordings).mean(axis=0)
    np.testing.assert_allclose(averaged, mean_D / np.linalg.norm(mean_D), atol=1e-6)
    np.testing.assert_allclose(alone, retriever.encoder.encode_texts([sentence])[0], atol=1e-6)
    for wrong in (0, 17):
        with refused("out_of_range", UsageError, what="paraphrases"):
            retriever.query(sentence, paraphrases=wrong)


def test_paraphrases_say_the_same():
    parsed = parse("The woman wears a red coat, blue jeans and carries a brown purse, no hat")
    wordings = paraphrases(parsed, MOST_PARAPHRASES)
    assert wordings[0] == parsed.wanted
    assert 8 <= len(set(wordings)) == len(wordings) <= MOST_PARAPHRASES
    said = {phrase.text for phrase in parsed.phrases if not phrase.negated}
    for wording in wordings[1:]:
        assert {phrase.text for phrase in parse(wording).phrases} == said, wording
    assert "a woman in a red coat and blue jeans with a brown purse" in wordings
    assert paraphrases(parse("zzz"), 16) == ["zzz"]
    assert describe(parse("an orange umbrella").phrases) == "a person with an orange umbrella"


def test_feedback_attracts_and_repels():
    query, right, wrong = np.eye(3, dtype=np.float32)
    assert refine(query, None, np.empty((0, 3), np.float32)) is query
    towards = refine(query, right[None], None)
    assert towards @ right > 0.5 > towards @ wrong == 0
    away = refine(query, None, wrong[None])
    assert away @ wrong < -0.05
    assert refine(query, None, np.stack([wrong] * 5)) @ wrong < away @ wrong
    for moved in (towards, away, refine(query, right[None], wrong[None])):
        assert np.linalg.norm(moved) == pytest.approx(1, abs=1e-6)
