"""Fitting a score calibration: labelled queries, blocks of people, annotations of a site."""

import json

import numpy as np
import pytest

from tests.helpers.invoke import refusal, run_rt, run_rt_json
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import calibrate_toy_bundle, draw_person
from upperson_phrases.evidence import ALTERNATIVES, Evidence
from upperson_rt.bundle import open_encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.search.features import is_stale
from upperson_scores import fitting
from upperson_scores.annotations import read_annotations
from upperson_scores.fitting import (
    Block,
    Judgement,
    blocks_of,
    calibration_error,
    fit_score_calibration,
    search_block,
    shipped_prior,
    tenths,
)
from upperson_scores.labelled_queries import TRAITS, LabelledPictures, queries_about, traits_of
from upperson_scores.metrics import auroc

D, VIEWS = 48, 4
NOUNS, COLOURS = ALTERNATIVES["upper"].nouns[:4], ALTERNATIVES["upper"].colours[:6]
LOWER = ALTERNATIVES["lower"].nouns[:2]


class World:
    """Pictures and sentences as the sums of their words, with noise."""

    def __init__(self, people, seed=0):
        rng = np.random.default_rng(seed)
        self._words = {}
        self._rng = np.random.default_rng(9)
        choices = ["woman", "man"], COLOURS, NOUNS, COLOURS, LOWER
        values = [[rng.choice(some) for some in choices] for _ in range(people)]
        sentences = [f"a {a} in a {b} {c} and {d} {e}" for a, b, c, d, e in values]
        vectors_ND = np.repeat(self.embed(sentences), VIEWS, axis=0)
        vectors_ND = vectors_ND + 0.12 * rng.normal(size=vectors_ND.shape)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        self.pictures = LabelledPictures(
            vectors_ND=vectors_ND.astype(np.float32),
            people_N=np.repeat(np.arange(people), VIEWS),
            cameras_N=np.tile(["gate", "hall"], people * VIEWS // 2),
            captions=[[sentence] for sentence in sentences for _ in range(VIEWS)],
            traits={
                name: np.repeat([one[column] for one in values], VIEWS)
                for column, name in enumerate(TRAITS)
            },
        )

    def embed(self, texts):
        rows = []
        for text in texts:
            words = text.lower().replace(",", " ").replace(".", " ").split()
            row = np.zeros(D)
            for place, word in enumerate(words):
                if word not in ("a", "in", "and", "with", "an", "the"):
                    near = words[place + 1] if place + 1 < len(words) else ""
                    row += self._word(word) + 0.7 * self._word(f"{word} {near}")
            length = np.linalg.norm(row)
            rows.append(row / length if length else self._word("nothing"))
        return np.array(rows, np.float32)

    def _word(self, word):
        if word not in self._words:
            generator = np.random.default_rng(sum(map(ord, word)) * 7919 + len(word))
            self._words[word] = generator.normal(size=D) / D**0.5
        return self._words[word]


def test_queries_with_a_match_and_without_one():
    world = World(60)
    people = world.pictures.people_N
    inside = world.pictures.of(np.flatnonzero(people < 30))
    outside = world.pictures.of(np.flatnonzero(people >= 30))
    found = queries_about(inside, outside, np.random.default_rng(0))
    by_kind = {}
    for one in found:
        by_kind.setdefault((one.kind, bool(one.right(inside).any())), []).append(one)
    assert {kind for kind, _ in by_kind} == {"short", "two", "caption"}
    assert all(len(own) <= 100 for own in by_kind.values())
    for own in by_kind["short", True]:
        row = np.flatnonzero(own.right(inside))[0]
        wanted = {name: inside.traits[name][row] for name in own.wanted}
        assert own.wanted == wanted
        assert all(word in own.sentence for word in own.wanted.values())
    for own in by_kind["caption", True]:
        (person,) = np.unique(inside.people_N[own.right(inside)])
        assert own.sentence in inside.captions[person * VIEWS]
    assert not any(own.right(inside).any() for own in by_kind["caption", False])


def test_traits_come_from_captions_where_nothing_else_says_them():
    captions = [["A woman in a red coat."], ["She wears blue jeans and a red coat."], ["A man."]]
    found = traits_of(captions, np.array([4, 4, 9]))
    assert {name: values.tolist() for name, values in found.items()} == {
        "gender": ["woman", "woman", "man"],
        "upper_colour": ["red", "red", ""],
        "upper": ["coat", "coat", ""],
        "lower_colour": ["blue", "blue", ""],
        "lower": ["jeans", "jeans", ""],
    }


@pytest.mark.timeout(180)  # Of a busy machine.
def test_a_fit_tells_present_from_absent_and_says_how_well():
    world = World(100)
    blocks = blocks_of(world.pictures, np.random.default_rng(0))
    assert len(blocks) == 2
    people = [{*block.galleries[0].people_N.tolist()} for block in blocks]
    assert not people[0] & people[1]
    made = fit_score_calibration(blocks, world.embed, "sha256:1", "toy", shipped_prior())
    assert made.fitted_on["people"] == 100
    assert made.held_out["all"]["auroc"] > 80
    assert made.held_out["all"]["wrong_nobody"] <= 1
    assert 0 < made.nobody_below <= 0.25
    assert not is_stale(made, world.embed)
    assert made.reference.distance(world.pictures.vectors_ND) < made.reference.threshold
    assert made.reference.distance(-world.pictures.vectors_ND) > made.reference.threshold


def test_absent_captions_are_of_people_outside_of_the_block_first():
    world = World(40)
    blocks = blocks_of(world.pictures, np.random.default_rng(0))
    for gallery in blocks[0].galleries[1:]:
        part = Block(galleries=[gallery], queries=blocks[0].queries)
        searches = search_block(part, Evidence(world.embed))
        captions = [one for one in searches if one.kind == "caption"]
        absent = [one for one in captions if not one.is_present]
        assert len(absent) == len(captions) / 2 > 0
        assert {one.person for one in absent} == {None}


def limit_of(answers):
    """The limit of `nobody` for queries that all have a match."""
    judged = [
        Judgement(kind="short", is_present=True, person=None, answer=one, likely_N=answers,
                  right_N=answers > 0, expected=0.0)
        for one in answers
    ]  # fmt: skip
    return fitting._nobody_below(judged)


def test_the_limit_of_nobody_is_too_high_in_one_of_five_samples():
    """It aims lower where queries are many, and is none where they are few."""
    rng = np.random.default_rng(0)
    # One in a hundred is below 0.002.
    too_high = sum(limit_of(0.2 * rng.random(300)) > 0.002 for _ in range(60))
    assert 6 <= too_high <= 18
    few, many = (limit_of(0.2 * (np.arange(count) + 0.5) / count) for count in (90, 9000))
    assert few == 0
    assert 0.0010 < many < 0.0016


def test_figures_and_too_few_people():
    with refused("too_few_people", InputError, found=19):
        blocks_of(World(19).pictures, np.random.default_rng(0))
    likely, right = np.array([0.05, 0.05, 0.95, 0.95]), np.array([False, False, True, False])
    assert auroc(likely[right], likely[~right]) == pytest.approx(100 * (2 + 0.5) / 3)
    assert tenths(likely, right)[0] == [2, 0.1, 0]
    assert tenths(likely, right)[9] == [2, 1.9, 1]
    assert calibration_error(likely, right) == pytest.approx(100 * (0.1 + 0.9) / 4)


# --- A site's own


@pytest.fixture
def site(tmp_path, folder, monkeypatch):
    """A bundle, a gallery, and 20 people with captions of a site."""
    monkeypatch.chdir(tmp_path)
    encoder = open_encoder(folder, threads=1)
    with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
        gallery.add([Item(key="1")], encoder.encode_texts(["a man in a red coat"]))
    file = tmp_path / "site.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for picture in range(40):
            person, name = picture // 2, f"{picture // 2}-{picture % 2}.png"
            colour = ["red", "green", "blue", "yellow"][person % 4]
            draw_person(tmp_path / name, colour, seed=picture)
            caption = f"a {('man', 'woman')[person % 2]} in a {colour} coat"
            lines.write(json.dumps({"image": name, "pid": person, "caption": caption}) + "\n")
    return file


def test_a_site_calibrates_on_its_own_pictures(site, tmp_path, monkeypatch):
    place = ("calibrate", "-b", "bundle", "-g", "gallery")
    refusal(run_rt(*place, "--json"), 3, "no_score_calibration")
    unreliable = run_rt(*place, "--annotations", site, "--json")
    refusal(unreliable, 3, "calibration_unreliable")
    assert not [*(tmp_path / "gallery").glob("scores*")]
    monkeypatch.setattr(fitting, "_LEAST_AUROC", 0.0)
    found = run_rt_json(*place, "--annotations", site)
    assert (found["version"], found["fitted_on"]["people"]) == (1, 20)
    assert (tmp_path / found["file"]).is_file()
    assert run_rt_json(*place, "--annotations", site)["version"] == 2
    assert (tmp_path / "gallery" / "scores-1.json").is_file()
    calibrate_toy_bundle(tmp_path / "bundle")
    assert run_rt_json(*place)["version"] == 2, "the gallery's own counts"
    assert "version 2" in run_rt(*place).stdout


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"image": "no.png", "pid": 1, "caption": "a man"}', "picture_missing"),
        ('{"image": "0-0.png", "pid": 5, "caption": "a man"}', "picture_of_two_people"),
        ('{"image": "0-0.png", "pid": NaN, "caption": "a man"}', "no_json"),
        ('{"image": "0-0.png", "pid": 0, "caption": " "}', "value_unfit"),
    ],
)
def test_annotations_that_are_not_right_are_refused(site, line, code):
    with site.open("a") as file:
        file.write(line + "\n")
    with refused(code, InputError):
        read_annotations(site)
