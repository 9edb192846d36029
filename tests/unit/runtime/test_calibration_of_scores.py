"""Match labels and likelihoods: the same for one picture and for many, whatever the query."""

import json
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import likelihood
from upperson_rt.gallery import Item
from upperson_rt.phrases import parse
from upperson_rt.search.calibration import BACKGROUND_SENTENCES, LABELS, ScoreCalibration, curves

D = 64
SHARES = [0.0, 0.5, 1.0]
NAMES = ["a sentence", "both", "a picture"]


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """People as a model sees them: what all have in common, what each is, and what a view adds."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.common = {kind: 5 * self.rng.normal(size=D) / D**0.5 for kind in ("text", "picture")}

    def people(self, count):
        return 8 * self.rng.normal(size=(count, D)) / D**0.5

    def pictures(self, people):
        return unit(
            self.common["picture"] + people + 4 * self.rng.normal(size=people.shape) / D**0.5
        )

    def texts(self, people):
        return unit(self.common["text"] + people + 8 * self.rng.normal(size=people.shape) / D**0.5)

    def query(self, person, share):
        text, picture = self.texts(person[None])[0], self.pictures(person[None])[0]
        return unit((1 - share) * text + share * picture)

    def scale(self, vectors, tracks=None):
        items = [
            Item(key=str(n), camera="gate", track=None if tracks is None else tracks[n])
            for n in range(len(vectors))
        ]
        gallery = SimpleNamespace(
            embed_dim=D,
            count=lambda: len(vectors),
            vectors=lambda batch_size: iter([(items[:batch_size], vectors[:batch_size])]),
        )
        background = self.pictures(self.people(8))
        sentences = self.texts(self.people(len(BACKGROUND_SENTENCES)))
        return ScoreCalibration(gallery, background, lambda: sentences)


@pytest.mark.parametrize("share", SHARES, ids=NAMES)
@pytest.mark.parametrize("count", [1, 10, 100, 2500])
def test_a_word_means_the_same_in_every_gallery(count, share):
    right, other = [], []
    for seed in range(30):
        world = World(seed)
        people = world.people(count)
        pictures = world.pictures(people)
        scores = [
            world.query(person, share) @ pictures[0] for person in (people[0], world.people(1)[0])
        ]
        own, another = world.scale(pictures).labels(share, scores)
        right.append(own)
        other.append(another)
    assert right.count("very close") + right.count("close") >= 22
    assert right.count("loose") <= 3
    assert other.count("loose") >= 28


@pytest.mark.parametrize("share", SHARES, ids=NAMES)
def test_a_likelihood_follows_the_words(share):
    world = World(2)
    scale = world.scale(world.pictures(world.people(100)))
    scores = np.linspace(-1, 1, 401).tolist()
    likely = scale.likelihoods(share, scores)
    assert likely == sorted(likely)
    assert 0 <= likely[0] < 0.001
    assert 0.999 < likely[-1] <= 1
    slope, half = (curves()[0] * (1 - share) + curves()[1] * share).tolist()
    middle, spread = scale._usual(share)
    for least, word in LABELS.items():
        begins = 1 / (1 + np.exp(-slope * (least - half)))
        found = scale.likelihoods(share, [middle + least * spread])
        assert found == pytest.approx([begins])
        assert scale.labels(share, [middle + (least + 0.01) * spread]) == [word]
    assert scale.likelihoods(share, []) == []


def test_without_anything_to_compare_with_a_likelihood_is_the_cosine_and_there_is_no_label():
    world = World(1)
    scale = world.scale(world.pictures(world.people(1)))
    scale._background_KD = scale._background_KD[:1]
    assert scale.likelihoods(1.0, [-1.0, 0.0, 0.5, 1.0, 1.01]) == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert scale.labels(1.0, [0.9]) == [""]
    assert scale.labels(0.5, []) == []


@pytest.mark.parametrize("count", [1, 2, 10, 60, 3000])
@pytest.mark.parametrize("tracks", [False, True], ids=["without tracks", "one track"])
def test_a_picture_is_very_close_to_itself_wherever(count, tracks):
    world = World(1)
    # The worst case: all are the same person.
    pictures = world.pictures(np.repeat(world.people(1), count, axis=0))
    scale = world.scale(pictures, ["t"] * count if tracks else None)
    assert scale.labels(1.0, [float(pictures[0] @ pictures[0]), 1.0, 0.9999]) == ["very close"] * 3


@pytest.mark.parametrize(
    ("sentence", "count", "unclear"),
    [
        ("asdf", 100, True),
        ("a person", 100, True),
        ("no bag", 100, True),  # What is excluded describes no one person.
        ("a person in red", 100, True),  # No garment is named: scores decide.
        ("asdf", 40, False),  # Too few to say so.
        ("asdf in a red coat", 100, False),
        ("a person in a red coat", 100, False),
    ],
)
def test_a_sentence_that_tells_no_people_apart_is_unclear(sentence, count, unclear):
    world = World(3)
    pictures = world.pictures(world.people(count))
    scale = world.scale(pictures)
    same = np.linalg.svd(pictures)[2][-1]  # About as near to everybody.
    assert scale.is_indistinct(parse(sentence), same) is unclear
    other = world.texts(world.people(1))[0]
    assert not scale.is_indistinct(parse(sentence), other)


def test_a_gallery_that_grew_is_read_again_and_counted_once_a_search():
    world = World(1)
    pictures = world.pictures(world.people(1000))
    scale = world.scale(pictures)
    sizes, counts, reads = iter((60, 61, 65, 67, 68, 100, 61)), [], []

    def count():
        counts.append(next(sizes))
        return counts[-1]

    def vectors(batch_size):
        reads.append(counts[-1])
        yield [Item(key=str(n)) for n in range(counts[-1])], pictures[: counts[-1]]

    scale._gallery.count, scale._gallery.vectors = count, vectors
    for searches in range(1, 8):
        scale.refresh()
        scale.labels(0.0, [0.5])
        scale.likelihoods(0.0, [0.5])
        scale.is_indistinct(parse("asdf"), pictures[0])
        assert len(counts) == searches
    assert reads == [60, 67, 100, 61]


@pytest.mark.parametrize(("row", "kind", "most"), [(0, "sentence", 3), (1, "picture", 3)])
def test_the_curves_are_those_of_the_counts_that_they_were_fitted_on(row, kind, most):
    found = json.loads(files("upperson_rt.search").joinpath("likelihood.json").read_text("utf-8"))
    assert found["bin_edges"] == likelihood.EDGES.tolist()
    pairs, right = (np.array(found[kind][part]) for part in ("pairs", "right"))
    assert curves()[row].tolist() == pytest.approx(likelihood.fit_curve(pairs, right), rel=1e-6)
    tenths = likelihood.by_tenth(*curves()[row], pairs[None], right[None])
    assert likelihood.calibration_error(tenths) < most
    held_out = np.array(found[kind]["held_out"]["first_40"])
    assert likelihood.calibration_error(held_out) < most
