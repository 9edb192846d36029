"""Background scores: deviations are the same for one picture and for many, whatever the query."""

from types import SimpleNamespace

import numpy as np
import pytest

from upperson_phrases import parse
from upperson_rt.gallery import Item
from upperson_rt.search import background
from upperson_rt.search.background import BACKGROUND_SENTENCES, BackgroundScores

D = 64


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class World:
    """People as a model sees them: what all have in common, what each is, and what a view adds."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.common = {kind: 5 * self.rng.normal(size=D) / D**0.5 for kind in ("text", "picture")}

    def people(self, count):
        return 8 * self.rng.normal(size=(count, D)) / D**0.5

    def _seen(self, kind, people, noise):
        views = noise * self.rng.normal(size=people.shape) / D**0.5
        return unit(self.common[kind] + people + views)

    def pictures(self, people):
        return self._seen("picture", people, 4)

    def texts(self, people):
        return self._seen("text", people, 8)

    def query(self, person, share):
        text, picture = self.texts(person[None])[0], self.pictures(person[None])[0]
        return unit((1 - share) * text + share * picture)

    def scale(self, vectors):
        items = [Item(key=str(n), camera="gate") for n in range(len(vectors))]
        gallery = SimpleNamespace(
            embed_dim=D,
            count=lambda: len(vectors),
            vectors=lambda batch_size: iter([(items[:batch_size], vectors[:batch_size])]),
        )
        background = self.pictures(self.people(8))
        sentences = self.texts(self.people(len(BACKGROUND_SENTENCES)))
        return BackgroundScores(gallery, background, lambda: sentences)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["a sentence", "both", "a picture"])
@pytest.mark.parametrize("count", [1, 100])
def test_deviations_mean_the_same_in_every_gallery(count, share):
    right, other = [], []
    for seed in range(30):
        world = World(seed)
        people = world.people(count)
        pictures = world.pictures(people)
        both = people[0], world.people(1)[0]
        scores = [world.query(person, share) @ pictures[0] for person in both]
        own, another = world.scale(pictures).deviations(share, scores)
        right.append(own)
        other.append(another)
    assert sum(one >= 3 for one in right) >= 22
    assert sum(one < 2.5 for one in right) <= 3
    assert sum(one < 2.5 for one in other) >= 28


def test_a_deviation_counts_spreads_above_the_middle():
    world, share = World(2), 0.5
    scale = world.scale(world.pictures(world.people(100)))
    middle, spread = scale._usual(share)
    scores = [middle - spread, middle, middle + 2.5 * spread]
    assert scale.deviations(share, scores) == pytest.approx([-1, 0, 2.5])
    assert scale.deviations(share, []) is None


@pytest.mark.parametrize(
    ("sentence", "count", "unclear"),
    [
        ("asdf", 100, True),
        ("no bag", 100, True),  # What is excluded describes no one person.
        ("a person in red", 100, True),  # No garment is named: scores decide.
        ("asdf", 40, False),  # Too few to say so.
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
    sizes, counts, reads = iter((60, 61, 67, 100, 61)), [], []

    def count():
        counts.append(next(sizes))
        return counts[-1]

    def vectors(batch_size):
        reads.append(counts[-1])
        yield [Item(key=str(n)) for n in range(counts[-1])], pictures[: counts[-1]]

    scale._gallery.count, scale._gallery.vectors = count, vectors
    for searches in range(1, 6):
        scale.refresh()
        scale.deviations(0.0, [0.5])
        scale.is_indistinct(parse("asdf"), pictures[0])
        assert len(counts) == searches
    assert reads == [60, 67, 100, 61]


def test_a_large_sample_is_read_again_so_that_it_keeps_no_deleted_pictures(monkeypatch):
    world = World(1)
    scale = world.scale(world.pictures(world.people(1000)))
    monkeypatch.setattr(background, "_SAMPLE", 100)
    now, reads, read = [0.0], [], scale._gallery.vectors
    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now[0]))
    scale._gallery.vectors = lambda batch_size: (reads.append(now[0]), read(batch_size))[1]
    for now[0] in (10.0, 20.0, 3700.0, 3800.0):
        scale.refresh()
    assert reads == [10.0, 3700.0]
